"""Log-probabilities of a prompt's own tokens, for next-token decoding: one causal pass, apart from the decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdar_jax import visibility
from sdar_jax.devices.sharding import activate_mesh, mesh_of
from sdar_jax.model import Model

# Lengths are rounded up to this, or to a power of two above it; and so many positions have logits at once.
_POSITIONS = 256


def prompt_logprobs(model: Model, prompt: np.ndarray) -> list[float | None]:
    """Of each token given those before it, nats, as `Completion.logprobs` has them; None for the first."""
    padded = np.zeros(max(_POSITIONS, 1 << (len(prompt) - 1).bit_length()), np.int32)
    padded[: len(prompt)] = prompt
    with activate_mesh(mesh_of(model)):
        found = _next_token(model, padded, np.int32(len(prompt)))
    return [None, *np.asarray(found)[: len(prompt) - 1].tolist()]


@jax.jit
def _next_token(
    model: Model, tokens: Int[Array, " T"], length: Int[Array, ""]
) -> Float[Array, " T"]:
    """Of the token behind each position."""
    inside = (jnp.arange(tokens.size) < length).astype(jnp.int32)[None]
    positions = visibility.segments(inside).positions
    hidden = model.hidden(tokens[None], positions, visibility.block_causal(inside, 1))[0]

    def part(given: tuple[Array, Array]) -> Array:
        hidden, token = given
        logits = model.unembed(hidden)
        if model.config.mask_token_id is not None:
            logits = logits.at[:, model.config.mask_token_id].set(-jnp.inf)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    in_parts = lambda x: x.reshape(-1, _POSITIONS, *x.shape[1:])
    return jax.lax.map(part, (in_parts(hidden), in_parts(jnp.roll(tokens, -1)))).reshape(-1)
