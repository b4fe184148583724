"""Routing as transformers' Qwen3-MoE has it, or as DeepSeek-V3 and LLaDA2 do, and the losses that keep it even.

Shapes: N tokens, E experts, k of them for each token, D hidden.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scoring = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        logits: float32 [N, E] (or wider).
        experts: int32 [N, k], those that are wanted most, the first most.
        gates: [N, k], their weights, in the tokens' dtype.
    """

    logits: Float[Array, "N E"]
    experts: Int[Array, "N k"]
    gates: Float[Array, "N k"]


class RouterSums(NamedTuple):
    """Sums over the tokens of a layer, float32; layers on a leading axis where there are several.

    Attributes:
        slots: [E], how many token-expert pairs each expert got.
        probability: [E], the sum of each expert's probability.
        squares: the sum of the squared log-sum-exp of the logits.
        tokens: how many there are.
    """

    slots: Float[Array, "*layers E"]
    probability: Float[Array, "*layers E"]
    squares: Float[Array, "*layers"]
    tokens: Float[Array, "*layers"]


def route(
    x: Float[Array, "N D"], router: Float[Array, "D E"], *, top_k: int, renormalise: bool
) -> Routing:
    """Takes the `top_k` highest of a float32 softmax over all experts, scaled to a sum of one if `renormalise`."""
    logits = _logits(x, router)
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    if renormalise:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return Routing(logits, experts, gates.astype(x.dtype))


def route_by_sigmoid(
    x: Float[Array, "N D"],
    router: Float[Array, "D E"],
    bias: Float[Array, " E"],
    *,
    top_k: int,
    renormalise: bool,
    groups: int = 1,
    groups_per_token: int = 1,
    scale: float = 1.0,
) -> Routing:
    """Takes the `top_k` highest of sigmoid scores plus a bias, out of the best groups of experts.

    Section 2.1.2 of DeepSeek-V3 (arXiv 2412.19437), and LLaDA2's public code. A group's worth is the sum of its two
    highest biased scores. The bias decides who is chosen and nothing else: it has no gradient.

    Args:
        x: [N, D].
        router: [D, E].
        bias: [E].
        top_k: k, of one token.
        renormalise: whether scores of the chosen are divided by their sum; the score of a single one never is.
        groups: how many the experts are split into, one after another; each has at least two.
        groups_per_token: of how many of these a token's experts are.
        scale: on the gates, after that.
    """
    logits = _logits(x, router)
    scores = jax.nn.sigmoid(logits)
    wanted = jax.lax.stop_gradient(scores + bias.astype(scores.dtype))
    if groups_per_token < groups:
        wanted = _of_best_groups(wanted, groups, groups_per_token)
    _, experts = jax.lax.top_k(wanted, top_k)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalise and top_k > 1:
        # Scores may all underflow to zero, where a softmax's largest cannot.
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(logits, experts, (scale * gates).astype(x.dtype))


def _logits(x: Array, router: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("nd,de->ne", x, router.astype(x.dtype), preferred_element_type=wide)


def _of_best_groups(wanted: Float[Array, "N E"], groups: int, best: int) -> Float[Array, "N E"]:
    """Puts -inf where an expert is not of one of the `best` groups."""
    members = wanted.reshape(len(wanted), groups, -1)
    worth = jax.lax.top_k(members, 2)[0].sum(axis=-1)
    _, chosen = jax.lax.top_k(worth, best)
    is_best = (chosen[:, :, None] == jnp.arange(groups)).any(axis=1)
    return jnp.where(is_best[:, :, None], members, -jnp.inf).reshape(wanted.shape)


def router_sums(
    routing: Routing, counted: Bool[Array, " N"], scoring: Scoring = "softmax"
) -> RouterSums:
    """Sums up the routing of the tokens that are `counted`, whatever the others' logits are.

    Args:
        scoring: what makes probabilities of logits: a softmax, or sigmoids divided by their sum (DeepSeek-V3's
            equation 19).
    """
    # Selected, not multiplied: 0 * NaN is NaN.
    logits = jnp.where(counted[:, None], routing.logits, 0)
    counted = counted.astype(logits.dtype)
    chosen = jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=counted.dtype).sum(axis=1)
    if scoring == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probability = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    else:
        probability = jax.nn.softmax(logits)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return RouterSums(
        slots=counted @ chosen,
        probability=counted @ probability,
        squares=counted @ squares,
        tokens=counted.sum(),
    )


def balance_loss(sums: RouterSums) -> Float[Array, ""]:
    """Computes E sum_e f_e P_e over the tokens of all layers: f_e the pairs of an expert per token, P_e its mean
    probability.

    Equations (4) to (6) of Switch Transformer (arXiv 2101.03961) as transformers' `load_balancing_loss_func` has them:
    k where the load is even. Gradients flow through P alone.
    """
    tokens = jnp.maximum(sums.tokens.sum(), 1)

    def per_token(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1]).sum(axis=0) / tokens

    slots = per_token(sums.slots)
    return slots.size * slots @ per_token(sums.probability)


def z_loss(sums: RouterSums) -> Float[Array, ""]:
    """Computes the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5), over all
    layers."""
    return sums.squares.sum() / jnp.maximum(sums.tokens.sum(), 1)


def max_load(sums: RouterSums) -> Float[Array, ""]:
    """Computes the pairs of the busiest expert of any layer, as a multiple of an even share."""
    even = sums.slots.mean(axis=-1)
    return jnp.max(sums.slots.max(axis=-1) / jnp.maximum(even, 1))
