"""The one door to attention: `attention(q, k, v, ranges)`, and the choice of its implementation.

An implementation is a module with

    unsupported(q, k, v) -> str | None                                  why it cannot take these shapes and types
    forward(q, k, v, ranges, *, scale) -> (out, logsumexp)              logsumexp [B, Q, H], +inf where nothing is seen
    backward(q, k, v, ranges, out, logsumexp, d_out, *, scale) -> (dq, dk, dv)

so that derivative and dispatch are written once. The reference has no backward: it is differentiated as it stands.
Kernels also take `interpret=True`, which runs them on a CPU.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.attention import reference
from sdar_jax.attention.implementations import Choice, Implementations
from sdar_jax.attention.mesh import over_mesh
from sdar_jax.attention.nonfinite import poisoned
from sdar_jax.errors import ConfigError
from sdar_jax.visibility import Ranges

Implementation = Literal["reference", "chunked", "mosaic_gpu", "mosaic_tpu"]

# Where one dense product beats a loop over tiles: few queries, as in decoding, or few scores per head
# (docs/kernels.md).
_DENSE_QUERIES = 16
_DENSE_SCORES = 128 * 256

OP = Implementations("attention", "sdar_jax.attention", get_args(Implementation))

_override: Choice | None = None


@contextlib.contextmanager
def override(implementation: Implementation, *, interpret: bool = False) -> Iterator[None]:
    """Makes every attention traced inside use this implementation: for tests, and to compile for a chip that is absent.

    A function that was traced before keeps its own: jit a new one inside.
    """
    global _override
    before = _override
    _override = Choice(implementation, interpret)
    try:
        yield
    finally:
        _override = before


def overriding() -> Choice | None:
    """Returns what the enclosing `override` asks for, if there is one."""
    return _override


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B Q H D"]:
    """Computes softmax(q k^T scale) v over the keys that `ranges` lets each query see.

    Query head h reads key-value head h // (H / G). Scores and sums are float32 (float64 for float64 inputs). A query
    that sees nothing gives zero; one that sees a key or value that is not finite gives NaN, and no other does.
    Differentiable once, in q, k and v. Under a mesh (`sharding.activate_mesh`) each device computes its own rows, heads
    and positions, and chooses by its own shapes.

    Args:
        q: queries [B, Q, H, D].
        k: keys [B, K, G, D]; G divides H.
        v: values [B, K, G, D].
        ranges: the keys that each query sees, int32 [B, Q, 2] twice.
        scale: factor on the scores; 1 / sqrt(D) if None.
        implementation: "reference" (dense), "chunked" (visited tiles only, O(Q + K) memory, any backend), "mosaic_gpu"
            (Hopper), "mosaic_tpu", or None: the best for this backend and shape.

    Returns:
        [B, Q, H, D], in the queries' dtype.

    Raises:
        ConfigError: head counts that do not divide; an implementation that is unknown, or cannot take these inputs.
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"{q.shape[2]} query heads do not divide over {k.shape[2]} key-value heads; use a multiple"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return over_mesh(partial(_local, scale=factor, implementation=implementation), q, k, v, ranges)


def _local(
    q: Array,
    k: Array,
    v: Array,
    ranges: Ranges,
    *,
    scale: float,
    implementation: Implementation | None,
) -> Array:
    """Computes one device's part, by an implementation chosen for the shapes that it has."""
    choice = choose(q, k, v, implementation)
    k, v = poisoned(k, v)
    if choice.implementation == "reference":
        out, _ = reference.forward(q, k, v, ranges, scale=scale)
        return out
    return _attend(q, k, v, ranges, scale, choice)


def choose(q: Array, k: Array, v: Array, implementation: Implementation | None = None) -> Choice:
    """Chooses the named implementation, the override's, or the best of those that can; a named one that cannot
    raises."""
    requested = OP.requested(implementation, _override, q, k, v)
    if requested is not None:
        return requested
    queries, keys = q.shape[1], k.shape[1]
    if queries <= _DENSE_QUERIES or queries * keys <= _DENSE_SCORES:
        return Choice("reference")
    return OP.kernel(q, k, v) or Choice("chunked")


def no_kernel(q: Array, k: Array, v: Array) -> str | None:
    """Says why no kernel of this platform takes these inputs; None if one does."""
    return OP.no_kernel(q, k, v)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, ranges: Ranges, scale: float, choice: Choice) -> Array:
    out, _ = OP.function(choice, "forward")(q, k, v, ranges, scale=scale)
    return out


def _attend_fwd(q, k, v, ranges, scale, choice):
    out, logsumexp = OP.function(choice, "forward")(q, k, v, ranges, scale=scale)
    return out, (q, k, v, ranges, out, logsumexp)


def _attend_bwd(scale, choice, residuals, d_out):
    q, k, v, ranges, out, logsumexp = residuals
    d_out = jnp.asarray(d_out, q.dtype)
    backward = OP.function(choice, "backward")
    dq, dk, dv = backward(q, k, v, ranges, out, logsumexp, d_out, scale=scale)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
