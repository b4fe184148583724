"""`add` puts low-rank matrices beside a model's weights, `merge` takes them into these."""

import difflib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sdar_jax.adapters.config import SAVED_WHOLE, LoraConfig
from sdar_jax.devices.chips import platform
from sdar_jax.errors import ConfigError
from sdar_jax.hf.tensor_names import INPUT_AXES, layout_of
from sdar_jax.model import Model
from sdar_jax.model.adapted import (
    ADAPTED_OUTPUT_AXES,
    EXPERT_OUTPUT_AXES,
    Adapted,
    Projection,
    is_adapted,
    is_whole,
)
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.quantization import OUTPUT_AXES, QArray, dequantized, quantize_weight

ALL_LINEAR = "all-linear"
# Axes of each weight in one layer: of those that may be int8, and of all that may have low-rank matrices (experts' are
# [E, in, *out]).
_DENSE_RANKS = {
    name: axes + INPUT_AXES[name] for name, axes in OUTPUT_AXES.items() if name != "head"
}
_RANKS = _DENSE_RANKS | {name: 1 + 1 + axes for name, axes in EXPERT_OUTPUT_AXES.items()}


class Place(NamedTuple):
    """Where a projection lies in a weight.

    Attributes:
        field: the weight's name in `Layer`.
        module: the projection's, in the files of the model's family, without its layer: "self_attn.q_proj". Where each
            expert has one, its number goes where the braces are.
        axis: of the weight's outputs, along which it has projections.
        start, stop: the projection's part of that axis; None is its end.
    """

    field: str
    module: str
    axis: int
    start: int
    stop: int | None

    @property
    def name(self) -> str:
        """What the field calls the projection: "q_proj"."""
        return self.module.rpartition(".")[2]

    def is_in(self, config: ModelConfig, layer: int) -> bool:
        """Returns whether this layer has the projection."""
        if self.field in ("gate_up", "down"):
            return not config.has_experts(layer)
        return config.has_experts(layer) or not self.field.startswith(("shared", "experts"))

    def modules(self, config: ModelConfig) -> list[str]:
        """Lists the modules that hold it: one, or one of each expert."""
        count = config.num_experts if self.field in EXPERT_OUTPUT_AXES else 1
        return [self.module.format(expert) for expert in range(count)]


def places(config: ModelConfig) -> list[Place]:
    """Lists the projections of a model's layers that may have low-rank matrices."""
    found = []
    for field, tensors in layout_of(config).parts.items():
        if field in _RANKS:
            found += [
                _place(field, name.removesuffix(".weight"), at) for name, at in tensors.items()
            ]
    return [
        place for place in found if any(map(partial(place.is_in, config), range(config.num_layers)))
    ]


def _place(field: str, module: str, index: Any) -> Place:
    if index is Ellipsis:
        return Place(field, module, ADAPTED_OUTPUT_AXES[field] // 2, 0, None)
    # Experts' inputs come first.
    axis, at = len(index) - 1 - (field in EXPERT_OUTPUT_AXES), index[-1]
    if isinstance(at, slice):
        return Place(field, module, axis, at.start or 0, at.stop)
    # Counted from the end where it is negative, and the last one ends there.
    return Place(field, module, axis, at, at + 1 or None)


def targets(config: ModelConfig, names: Sequence[str]) -> list[Place]:
    """Finds the projections of these names.

    Raises:
        ConfigError: a name that the model does not have, or that is of a router.
    """
    known = places(config)
    if ALL_LINEAR in names:
        return known
    have = {place.name for place in known}
    for name in names:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1)
            hint = f"did you mean {near[0]}?" if near else "use some of"
            raise ConfigError(
                f"target_modules has {name!r}, which is no projection of this model; {hint} "
                f"({', '.join(sorted(have))}, or all-linear)"
            )
    return [place for place in known if place.name in names]


def add(model: Model, config: LoraConfig, key: jax.Array | None = None) -> Model:
    """Puts low-rank matrices, float32, beside a model's weights, which are shared; layers stacked or not.

    A is drawn as PEFT draws it, uniform in +-1/sqrt(inputs), and B is zero: the model computes what it did.

    Args:
        key: for A; None is that of seed 0.

    Raises:
        ConfigError: projections that the model does not have, or low-rank matrices that it has already.
    """
    key = jax.random.key(0) if key is None else key
    number = itertools.count()

    def drawn(layer: Any, place: Place, shapes: Shapes) -> Pair:
        bound = 1 / math.sqrt(math.prod(shapes.inputs))
        draw = partial(jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound)
        a = draw(jax.random.fold_in(key, next(number)), shapes.a(config.r))
        return Pair(a, jnp.zeros(shapes.b(config.r), jnp.float32), config.scale)

    model = with_pairs(model, targets(model.config, config.target_modules), drawn)
    return _in_float32(model, config.modules_to_save)


class Pair(NamedTuple):
    """A [*stack, r, *in] and B [*stack, *out, r] of a projection, and their scale."""

    a: Array
    b: Array
    scale: float


class Shapes(NamedTuple):
    """Of a projection's weight [*stack, *out, *in]; `out` has the axis of projections, of whatever size.

    Stacked layers are in `stack`, and experts are, whose weights lie the other way round.
    """

    stack: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    def a(self, rank: int) -> tuple[int, ...]:
        return (*self.stack, rank, *self.inputs)

    def b(self, rank: int) -> tuple[int, ...]:
        return (*self.stack, *self.outputs, rank)


def with_pairs(
    model: Model,
    chosen: Sequence[Place],
    pair: Callable[[Any, Place, Shapes], Pair | None],
) -> Model:
    """Puts a pair beside each of the chosen projections of each layer.

    Args:
        pair: (layer, place, shapes) -> the pair, or None for none. `layer` is its index, or the name of a stack.

    Raises:
        ConfigError: the model has low-rank matrices already.
    """
    leaves, structure = jax.tree.flatten_with_path(model, is_leaf=is_whole)
    new = []
    for path, leaf in leaves:
        names = path_names(path)
        here = [place for place in chosen if place.field in names] if names[0] == "layers" else []
        if here and is_adapted(leaf):
            raise ConfigError(
                "the model has low-rank matrices already; give merge(model), or the model without them"
            )
        new.append(_beside(leaf, here, partial(pair, names[1])) if here else leaf)
    return jax.tree.unflatten(structure, new)


def _beside(base: Any, here: list[Place], pair: Callable[[Place, Shapes], Pair | None]) -> Any:
    field, axis = here[0].field, here[0].axis
    outputs, of_experts = ADAPTED_OUTPUT_AXES[field], field in EXPERT_OUTPUT_AXES
    before = base.ndim - _RANKS[field] + of_experts
    stack, rest = base.shape[:before], base.shape[before:]
    out, inputs = rest[:outputs], rest[outputs:]
    if of_experts:
        inputs, out = rest[:-outputs], rest[-outputs:]
    found: dict[Projection, Pair] = {}
    for place in here:
        start, stop, _ = slice(place.start, place.stop).indices(out[axis])
        part = (*out[:axis], stop - start, *out[axis + 1 :])
        made = pair(place, Shapes(stack, part, inputs))
        if made is not None:
            found[Projection(place.name, start, stop, made.scale)] = made
    if not found:
        return base
    return Adapted(
        base,
        {projection.name: made.a for projection, made in found.items()},
        {projection.name: made.b for projection, made in found.items()},
        tuple(sorted(found, key=lambda projection: projection.start)),
        axis,
        outputs,
        of_experts,
    )


def path_names(path: tuple) -> list[Any]:
    """Returns the names and indices on the way to a leaf of a model."""
    return [getattr(key, "name", getattr(key, "idx", getattr(key, "key", None))) for key in path]


def _in_float32(model: Model, modules: Sequence[str]) -> Model:
    if "lm_head" in modules and model.head is None:
        raise ConfigError(
            "modules_to_save has lm_head, and the model ties it to the embedding; name embed_tokens"
        )
    whole = {SAVED_WHOLE[name] for name in modules}

    def wide(path: tuple, leaf: Any) -> Any:
        return leaf.astype(jnp.float32) if path_names(path)[0] in whole else leaf

    return jax.tree.map_with_path(wide, model, is_leaf=is_whole)


def is_trained(name: str, config: LoraConfig) -> bool:
    """Returns whether the weight of this name (`model_weights`) is trained with this config."""
    whole = {SAVED_WHOLE[module] for module in config.modules_to_save}
    return name in whole or is_low_rank(name)


def is_low_rank(name: str) -> bool:
    """Returns whether the weight of this name (`model_weights`) is a low-rank matrix."""
    return bool({"lora_a", "lora_b"} & set(name.split(".")))


def base_dtype(config: LoraConfig) -> jnp.dtype:
    """Returns the dtype of the frozen weights that are floats."""
    if config.base_dtype in ("auto", "int8"):
        return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.base_dtype)


def frozen_base(model: Model, config: LoraConfig) -> Model:
    """Returns the model with the matmul weights of its layers in int8, if the config wants that; stacked or not."""
    if config.base_dtype != "int8":
        return model

    def narrow(path: tuple, leaf: Any) -> Any:
        names = path_names(path)
        field = next((name for name in names if name in _DENSE_RANKS), None)
        if names[0] != "layers" or field is None:
            return leaf
        return quantize_weight(leaf, field, stacked=leaf.ndim - _DENSE_RANKS[field])

    return jax.tree.map_with_path(narrow, model)


def merge(model: Model) -> Model:
    """Takes the low-rank matrices into the weights, W + s B A, in the dtype of these; an int8 W becomes floats.

    What a model has of neither it shares with the given one.
    """
    merged = jax.jit(Adapted.merged)
    floats = lambda leaf: dequantized(leaf) if isinstance(leaf, QArray) else leaf
    return jax.tree.map(
        lambda leaf: merged(leaf) if is_adapted(leaf) else floats(leaf), model, is_leaf=is_whole
    )
