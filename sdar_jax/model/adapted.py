"""A weight with low-rank matrices beside it (LoRA, arXiv 2106.09685), which are learned in its place.

    y = W x + s B (A x)        W [out, in], A [r, in], B [out, r]

A weight of ours is several projections of others' files: of `qkv` those of queries, keys and values, of `gate_up` two.
Each may have an A and a B of its own. Weights of experts lie the other way round, [E, in, out], with A [E, r, in] and
B [E, out, r].
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from sdar_jax.experts import LowRank
from sdar_jax.model.quantization import OUTPUT_AXES, QArray, dequantized

# How many axes of each weight of experts (layer.py) are its outputs, those that come last.
EXPERT_OUTPUT_AXES = {"experts_gate_up": 2, "experts_down": 1}
ADAPTED_OUTPUT_AXES = OUTPUT_AXES | EXPERT_OUTPUT_AXES


class Projection(NamedTuple):
    """What of a weight a pair of low-rank matrices is for.

    Attributes:
        name: of the projection, such as "q_proj".
        start, stop: its part of the weight's axis `Adapted.axis`.
        scale: s.
    """

    name: str
    start: int
    stop: int
    scale: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """The weight [*out, *in], or [E, *in, *out] of experts, with low-rank matrices.

    Stacked layers put an axis of theirs before all.

    Attributes:
        base: W, floats or int8.
        lora_a: by projection, A [r, *in], or [E, r, *in].
        lora_b: by projection, B [*out of the projection, r], or [E, *out of the projection, r].
        projections: those that have these, in the order in which they lie.
        axis: of `out`, the one that projections lie along.
        outputs: how many axes `out` has.
        of_experts: whether the weight is [E, *in, *out].
    """

    base: Any
    lora_a: dict[str, Any]
    lora_b: dict[str, Any]
    projections: tuple[Projection, ...] = field(metadata={"static": True})
    axis: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})
    of_experts: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __getitem__(self, index: Any) -> "Adapted":
        """Takes all, or a part of the second axis, as a layer takes the queries of `qkv`; of experts all."""
        if index is Ellipsis:
            return self
        assert not self.of_experts
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        kept, lora_b = [], {}
        for each in self.projections:
            low, high = max(each.start, start), min(each.stop, stop)
            if low >= high:
                continue
            part = slice(low - each.start, high - each.start)
            lora_b[each.name] = jax.lax.slice_in_dim(
                self.lora_b[each.name], part.start, part.stop, axis=self.axis
            )
            kept.append(each._replace(start=low - start, stop=high - start))
        lora_a = {each.name: self.lora_a[each.name] for each in kept}
        return replace(
            self, base=self.base[index], lora_a=lora_a, lora_b=lora_b, projections=tuple(kept)
        )

    def added(self, product: Callable[[Array, Array], Array], like: Array) -> Array:
        """Returns what the low-rank matrices add to the outputs [..., *out], where `product` multiplies by A, then B.

        Args:
            product: (A, B) of a projection -> s-less B (A x) [..., *out of the projection].
            like: the outputs without it, of its shape and dtype.
        """
        axis = like.ndim - self.outputs + self.axis
        size = like.shape[axis]
        parts, at = [], 0
        for each in self.projections:
            parts += _zeros(like, axis, each.start - at)
            b = self.lora_b[each.name]
            parts.append(each.scale * product(self.lora_a[each.name], b))
            at = each.stop
        parts += _zeros(like, axis, size - at)
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)

    def of_expert_outputs(self, start: int, dtype: DTypeLike) -> LowRank | None:
        """Returns the pair, with its scale, of the experts' projection that starts there; None if it has none."""
        for each in self.projections:
            if each.start == start:
                b = each.scale * self.lora_b[each.name]
                b = b.reshape(len(b), -1, b.shape[-1])
                return LowRank(self.lora_a[each.name].astype(dtype), b.astype(dtype))
        return None

    def merged(self) -> Array:
        """Computes W + s B A, in the dtype of W (of an int8 one, in that of its scales)."""
        if next(iter(self.lora_b.values())).ndim > self.of_experts + self.outputs + 1:
            # Layer by layer: the product of all of them, in float32, might not fit.
            return jax.lax.map(Adapted.merged, self)
        base = dequantized(self.base)
        wide = jnp.promote_types(base.dtype, jnp.float32)

        def product(a: Array, b: Array) -> Array:
            one = partial(_product, inputs_first=self.of_experts)
            return (jax.vmap(one) if self.of_experts else one)(a.astype(wide), b.astype(wide))

        # Where the inputs' axes follow the outputs', these are not the last.
        full = self if self.of_experts else replace(self, outputs=base.ndim)
        return (base + full.added(product, base.astype(wide))).astype(base.dtype)


def _product(a: Array, b: Array, *, inputs_first: bool) -> Array:
    """Computes B A of A [r, *in] and B [*out, r]: [*out, *in], or [*in, *out]."""
    pair, axes = ((a, b), (0, -1)) if inputs_first else ((b, a), (-1, 0))
    return jnp.tensordot(*pair, axes, precision="highest")


def is_adapted(leaf: Any) -> bool:
    """Returns whether this is a weight with low-rank matrices."""
    return isinstance(leaf, Adapted)


def is_whole(leaf: Any) -> bool:
    """Returns whether this is one weight, though it has several arrays: int8, or with low-rank matrices."""
    return isinstance(leaf, QArray | Adapted)


def _zeros(like: Array, axis: int, size: int) -> list[Array]:
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return [jnp.zeros(shape, like.dtype)] if size else []
