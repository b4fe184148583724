"""The experts' feed-forward on one device, dropless: every pair of a token and one of its experts is computed.

Pairs are sorted by expert, so that each matmul runs over the rows of each expert with that expert's weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.experts.grouped import grouped_dot
from sdar_jax.experts.low_rank import ExpertAdapters, plus_low_rank

NO_ADAPTERS = ExpertAdapters()


def mlp(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    adapters: ExpertAdapters = NO_ADAPTERS,
    *,
    partly: bool = False,
) -> Float[Array, "N D"]:
    """Computes sum_j g_j down_j(silu(gate_j(x)) * up_j(x)) over the experts of each token.

    Args:
        x: [N, D].
        experts: int32 [N, k].
        gates: [N, k].
        gate_up: [E, D, 2, F].
        down: [E, F, D].
        adapters: low-rank matrices beside these: of gate and up A [E, r, D] and B [E, F, r], of down A [E, r, F] and
            B [E, D, r].
        partly: `experts` outside 0 to E - 1 belong to other devices, and add nothing.
    """
    count = len(gate_up)
    flat = experts.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    rows = _dispatch(x, order, inverse)
    sizes = jnp.bincount(flat, length=count)
    out = rows_mlp(rows, sizes, gate_up, down, adapters, partly=partly)
    by_pair = permute(out, inverse, order).reshape(*gates.shape, -1)
    return jnp.einsum("nkd,nk->nd", by_pair, gates)


def rows_mlp(
    rows: Float[Array, "M D"],
    sizes: Int[Array, " E"],
    gate_up: Array,
    down: Array,
    adapters: ExpertAdapters = NO_ADAPTERS,
    *,
    partly: bool,
) -> Float[Array, "M D"]:
    """Computes each row through its expert, rows sorted by expert; with `partly` those after the last expert's give
    zero."""
    count, width = len(gate_up), gate_up.shape[-1]
    hidden = grouped_dot(rows, gate_up.reshape(count, -1, 2 * width), sizes, partly)
    plus = partial(plus_low_rank, sizes=sizes, partly=partly)
    gate = plus(hidden[:, :width], rows, adapters.gate)
    up = plus(hidden[:, width:], rows, adapters.up)
    activated = jax.nn.silu(gate) * up
    return plus(grouped_dot(activated, down, sizes, partly), activated, adapters.down)


@jax.custom_vjp
def permute(
    x: Float[Array, "M D"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """Returns x[order]. Its derivative gathers as well, where that of indexing would scatter."""
    return x[order]


def _permute_fwd(x, order, inverse):
    return x[order], inverse


def _permute_bwd(inverse, d_out):
    return d_out[inverse], None, None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _dispatch(
    x: Float[Array, "N D"], order: Int[Array, " R"], inverse: Int[Array, " R"]
) -> Float[Array, "R D"]:
    """Makes a row for each pair, in `order`. Its derivative gathers, too."""
    pairs_per_token = len(order) // len(x)
    return x[order // pairs_per_token]


def _dispatch_fwd(x, order, inverse):
    return _dispatch(x, order, inverse), (inverse, x.shape)


def _dispatch_bwd(residuals, d_rows):
    inverse, (tokens, width) = residuals
    return d_rows[inverse].reshape(tokens, -1, width).sum(axis=1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
