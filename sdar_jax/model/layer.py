"""One decoder layer, and the keys and values that it keeps.

Weights are stored [out, in], as Hugging Face's are: few rows times such a matrix is faster on a CPU
(`benchmarks.matmul_forms`), and outputs of several axes count as one without laying the matrix out anew on a TPU. Heads
and the gate/up pair are axes of their own, so that one matmul makes q, k and v and every axis can be sharded. Shapes: B
rows, T tokens, D hidden, G key-value heads, R query heads for each, K head dimension, F feed-forward, E experts.

    qkv      [G, R + 2, K, D]    R queries, then the key, then the value
    output   [D, G, R, K]
    gate_up  [2, F, D]
    down     [D, F]

An MoE has, in every layer but the first few dense ones of some, instead of the last two:

    router           [D, E]        with the experts the other way round: [in, out]
    expert_bias      [E]           of a router by sigmoids
    experts_gate_up  [E, D, 2, F]
    experts_down     [E, F, D]
    shared_gate_up   [2, F, D]     of shared experts, side by side
    shared_down      [D, F]
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdar_jax.experts import (
    ExpertAdapters,
    LowRank,
    Routing,
    Scoring,
    expert_mlp,
    route,
    route_by_sigmoid,
)
from sdar_jax.model.adapted import Adapted
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.matmul import dot
from sdar_jax.model.rope import rotate

Attend = Callable[[Array, Array, Array], tuple[Array, "LayerPages | None"]]


class LayerPages(NamedTuple):
    """Keys (rotated) and values of one layer, in pages that `page_table`s assign to sequences."""

    k: Float[Array, "P G page K"]
    v: Float[Array, "P G page K"]


class Layer(nnx.Module):
    """One decoder layer. Weights that its config has no use for are None: biases, norms, experts or the dense MLP."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: DTypeLike, *, sparse: bool):
        c = config
        groups = c.num_heads // c.num_kv_heads
        dense = not sparse
        shared = sparse and c.num_shared_experts > 0
        normal = partial(normal_param, scale=c.initializer_range, dtype=dtype)
        keys = jax.random.split(key, 4 + sparse + 2 * shared)

        def ones(size: int) -> nnx.Param:
            return nnx.Param(jnp.ones(size, dtype))

        def zeros(wanted: bool, *shape: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(shape, dtype)) if wanted else None

        def matrix(wanted: bool, key: jax.Array, *shape: int, inputs: int = 0) -> nnx.Param | None:
            return normal(key, *shape, inputs=inputs) if wanted else None

        self.eps = c.rms_norm_eps
        self.top_k = c.num_experts_per_token
        self.renormalise = c.norm_topk_prob
        self.score_function: Scoring = c.score_function
        self.expert_groups = c.num_expert_groups
        self.groups_per_token = c.groups_per_token
        self.routed_scale = c.routed_scaling_factor
        self.attention_norm = ones(c.hidden_size)
        self.qkv = normal(keys[0], c.hidden_size, c.num_kv_heads, groups + 2, c.head_dim, inputs=1)
        self.qkv_bias = zeros(c.qkv_bias, c.num_kv_heads, groups + 2, c.head_dim)
        self.q_norm = ones(c.head_dim) if c.qk_norm else None
        self.k_norm = ones(c.head_dim) if c.qk_norm else None
        self.output = normal(keys[1], c.num_kv_heads, groups, c.head_dim, c.hidden_size, inputs=3)
        self.output_bias = zeros(c.output_bias, c.hidden_size)
        self.mlp_norm = ones(c.hidden_size)
        self.gate_up = matrix(dense, keys[2], c.hidden_size, 2, c.intermediate_size, inputs=1)
        self.gate_up_bias = zeros(c.mlp_bias, 2, c.intermediate_size)
        self.down = matrix(dense, keys[3], c.intermediate_size, c.hidden_size, inputs=1)
        self.down_bias = zeros(c.mlp_bias, c.hidden_size)
        width = c.moe_intermediate_size
        self.router = matrix(sparse, keys[4 if sparse else 0], c.hidden_size, c.num_experts)
        # Who is chosen may turn on small differences: float32, whatever the rest is.
        biased = sparse and c.score_function == "sigmoid"
        wide = jnp.promote_types(dtype, jnp.float32)
        self.expert_bias = nnx.Param(jnp.zeros(c.num_experts, wide)) if biased else None
        self.experts_gate_up = matrix(sparse, keys[2], c.num_experts, c.hidden_size, 2, width)
        self.experts_down = matrix(sparse, keys[3], c.num_experts, width, c.hidden_size)
        width *= c.num_shared_experts
        self.shared_gate_up = matrix(shared, keys[-2], c.hidden_size, 2, width, inputs=1)
        self.shared_down = matrix(shared, keys[-1], width, c.hidden_size, inputs=1)

    def __call__(
        self, x: Array, rope: tuple[Array, Array], attend: Attend, outputs: int | None = None
    ):
        """Maps [B, T, D] to ([B, outputs, D], the layer's pages, the routing of the B * outputs tokens or None).

        Only the first `outputs` positions are computed, or as many as `attend` gives.
        """
        outputs = x.shape[1] if outputs is None else outputs
        with jax.named_scope("attention"):
            q, k, v = self.project(rms_norm(x, self.attention_norm, self.eps), rope, outputs)
            mixed, pages = attend(q, k, v)
            if not mixed.size:
                return x[:, :0], pages, None
            mixed = mixed.reshape(*mixed.shape[:2], *self.output.shape[1:])
            x = x[:, : mixed.shape[1]] + _bias(dot(mixed, self.output, inputs=3), self.output_bias)
        with jax.named_scope("mlp"):
            mixed, routing = self.mlp(rms_norm(x, self.mlp_norm, self.eps))
            return x + mixed, pages, routing

    def project(
        self, x: Array, rope: tuple[Array, Array], outputs: int
    ) -> tuple[Array, Array, Array]:
        """Projects [B, T, D] to rotated queries [B, outputs, G R, K] and keys [B, T, G, K], and values [B, T, G, K]."""
        q_norm, k_norm = None, None
        if self.q_norm is not None and self.k_norm is not None:
            q_norm = self.q_norm[...]
            k_norm = self.k_norm[...]
        if outputs == x.shape[1]:
            qkv = _bias(dot(x, self.qkv), self.qkv_bias)
            # As one, queries and keys are half as many small operations, which is what a CPU's decoding waits for.
            qk = qkv[..., :-1, :]
            norm = None
            if q_norm is not None and k_norm is not None:
                norm = _repeat_then(q_norm, qk.shape[-2] - 1, k_norm)
            qk = self._rotated(qk, norm, rope)
            q = qk[..., :-1, :]
            k = qk[..., -1, :]
            v = qkv[..., -1, :]
        else:
            q_bias, kv_bias = None, None
            if self.qkv_bias is not None:
                q_bias = self.qkv_bias[:, :-2]
                kv_bias = self.qkv_bias[:, -2:]
            q = _bias(dot(x[:, :outputs], self.qkv[:, :-2]), q_bias)
            kv = _bias(dot(x, self.qkv[:, -2:]), kv_bias)
            q = self._rotated(q, q_norm, rope)
            k = self._rotated(kv[..., :1, :], k_norm, rope)[..., 0, :]
            v = kv[..., 1, :]
        return q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v

    def _rotated(self, heads: Array, norm: Array | None, rope: tuple[Array, Array]) -> Array:
        """Rotates [B, T, G, R, K], normed if these layers do that, at the first T of the positions."""
        if norm is not None:
            heads = rms_norm(heads, norm, self.eps)
        length = heads.shape[1]
        cos, sin = (table[:, :length] for table in rope)
        flat = heads.reshape(*heads.shape[:2], -1, heads.shape[-1])
        return rotate(flat, cos, sin).reshape(heads.shape)

    def mlp(self, x: Array) -> tuple[Array, Routing | None]:
        """Computes the feed-forward of [B, T, D], dense or of experts, and the routing of the latter."""
        if self.gate_up is None or self.down is None:
            mixed, routing = self.moe(x)
            if self.shared_gate_up is not None and self.shared_down is not None:
                mixed = mixed + _swiglu(x, self.shared_gate_up, self.shared_down)
            return mixed, routing
        return _swiglu(x, self.gate_up, self.down, self.gate_up_bias, self.down_bias), None

    def moe(self, x: Array) -> tuple[Array, Routing]:
        """Computes what each token's own experts add up to, of [B, T, D], and the routing of its B * T tokens."""
        assert self.router is not None
        router = self.router[...].astype(x.dtype)
        (gate_up, gate_lora, up_lora), (down, down_lora, _) = (
            _of_experts(weight, x.dtype) for weight in (self.experts_gate_up, self.experts_down)
        )
        adapters = ExpertAdapters(gate_lora, up_lora, down_lora)
        rows = x.reshape(-1, x.shape[-1])
        chosen = {"top_k": self.top_k, "renormalise": self.renormalise}
        if self.expert_bias is None:
            routing = route(rows, router, **chosen)
        else:
            routing = route_by_sigmoid(
                rows,
                router,
                self.expert_bias[...],
                **chosen,
                groups=self.expert_groups,
                groups_per_token=self.groups_per_token,
                scale=self.routed_scale,
            )
        return expert_mlp(x, routing.experts, routing.gates, gate_up, down, adapters), routing


def rms_norm(x: Array, weight: nnx.Param | Array, eps: float) -> Array:
    """Computes x / rms(x) * weight over the last axis, in float32 until the scale is applied."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight[...].astype(x.dtype)


def normal_param(
    key: jax.Array, *shape: int, scale: float, dtype: DTypeLike, inputs: int = 0
) -> nnx.Param:
    """Draws [*in, *out] and turns the first `inputs` axes to the end: how a weight lies changes no seed's model."""
    drawn = scale * jax.random.normal(key, shape, dtype)
    return nnx.Param(drawn.transpose(*range(inputs, drawn.ndim), *range(inputs)))


def _repeat_then(repeated: Array, times: int, last: Array) -> Array:
    """Stacks the first vector so many times, then the other: [times + 1, K]."""
    return jnp.concatenate([jnp.broadcast_to(repeated, (times, *repeated.shape)), last[None]])


def _swiglu(
    x: Array, gate_up: Any, down: Any, gate_up_bias: Any = None, down_bias: Any = None
) -> Array:
    """Computes the feed-forward of [B, T, D] with gate_up [2, F, D] and down [D, F]."""
    both = _bias(dot(x, gate_up), gate_up_bias)
    hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
    return _bias(dot(hidden, down), down_bias)


def _of_experts(weight: Any, dtype: DTypeLike) -> tuple[Array, LowRank | None, LowRank | None]:
    """Returns a weight of experts, and the low-rank matrices of its first and second projection, in this dtype."""
    weight = weight[...]
    if not isinstance(weight, Adapted):
        return weight.astype(dtype), None, None
    first, second = (weight.of_expert_outputs(start, dtype) for start in (0, 1))
    return weight.base.astype(dtype), first, second


def _bias(x: Array, bias: nnx.Param | Array | None) -> Array:
    return x if bias is None else x + bias[...].astype(x.dtype)
