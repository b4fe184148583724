"""The experts' feed-forward on one device, dropless: every pair of a token and one of its experts is computed.

Pairs are sorted by expert, so that each matmul runs over the rows of each expert with that expert's weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.experts.grouped import grouped_dot


def mlp(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    *,
    partly: bool = False,
) -> Float[Array, "N D"]:
    """sum_j g_j down_j(silu(gate_j(x)) * up_j(x)) over the experts of each token.

    Args:
        partly: `experts` outside 0 to E - 1 are others', and add nothing.
    """
    count = len(gate_up)
    flat = experts.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    rows = _dispatch(x, order, inverse)
    out = rows_mlp(rows, jnp.bincount(flat, length=count), gate_up, down, partly=partly)
    return jnp.einsum("nkd,nk->nd", permute(out, inverse, order).reshape(*gates.shape, -1), gates)


def rows_mlp(
    rows: Float[Array, "M D"], sizes: Int[Array, " E"], gate_up: Array, down: Array, *, partly: bool
) -> Float[Array, "M D"]:
    """Rows sorted by expert, through theirs; zero for those after the last expert's, if `partly` allows of any."""
    count, width = len(gate_up), gate_up.shape[-1]
    hidden = grouped_dot(rows, gate_up.reshape(count, -1, 2 * width), sizes, partly)
    return grouped_dot(jax.nn.silu(hidden[:, :width]) * hidden[:, width:], down, sizes, partly)


@jax.custom_vjp
def permute(x: Float[Array, "M D"], order: Int[Array, " M"], inverse: Int[Array, " M"]) -> Float[Array, "M D"]:
    """x[order]. Its derivative gathers as well, where that of indexing would scatter."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, d_out: (d_out[inverse], None, None))


@jax.custom_vjp
def _dispatch(x: Float[Array, "N D"], order: Int[Array, " R"], inverse: Int[Array, " R"]) -> Float[Array, "R D"]:
    """A row for each pair, in `order`, with such a derivative as well."""
    return x[order // (len(order) // len(x))]


def _dispatch_fwd(x, order, inverse):
    return _dispatch(x, order, inverse), (inverse, x.shape)


def _dispatch_bwd(residuals, d_rows):
    inverse, (tokens, width) = residuals
    return d_rows[inverse].reshape(tokens, -1, width).sum(axis=1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
