"""A live engine that is given other weights serves them, and nothing of the old ones."""

import jax
import jax.numpy as jnp

from sdar_jax import DecodingConfig, Engine
from sdar_jax.decoding import Completion
from sdar_jax.errors import DecodingError
from sdar_jax.model import stack_layers
from tests.bad_input import refused
from tests.jaxprs import compilations
from tests.tiny import tiny_model

CONFIG = DecodingConfig(strategy="low_confidence_static", denoising_steps=2)
PROMPT = [7 * i % 20 + 1 for i in range(26)]
SIZES = dict(batch_slots=2, pages=14, page_size=8, prefill_tokens=8)


PROMPTS = [PROMPT, [*PROMPT[:12], 3]]


def decode(engine: Engine) -> list[Completion]:
    return engine.generate(PROMPTS, CONFIG, max_new_tokens=8, stop_token_ids=())


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def test_results_are_those_of_an_engine_of_the_new_model(x64):
    """Its weights stacked, or on a device by name, as a training step leaves them: nothing is compiled for that."""
    old, new = tiny_model(seed=0), tiny_model(seed=1)
    engine = Engine(old, **SIZES)
    before = decode(engine)
    assert decode(engine)[0].prefill_forwards == 0
    prefix = engine.stats().prefix_tokens
    other = Engine(new, **SIZES)
    fresh = decode(other)
    placed = jax.device_put(jax.tree.map(jnp.copy, new), jax.devices()[0])
    with compilations() as compiled:
        engine.update_weights(placed)
        after = decode(engine)
        assert not compiled
    # To the last bit, and nothing that the old weights had cached was read.
    assert after == fresh and tokens(after) != tokens(before)
    assert (
        after[0].prefill_forwards == 3
        and engine.stats().prefix_tokens - prefix == other.stats().prefix_tokens
    )
    engine.update_weights(stack_layers(jax.tree.map(jnp.copy, old)))
    assert decode(engine) == before
    assert engine.stats().restarts == 0


def test_what_has_not_ended_keeps_its_model():
    engine = Engine(tiny_model(jnp.float32), **SIZES)
    request = engine.submit(PROMPT, CONFIG, max_new_tokens=4, stop_token_ids=())
    with refused(DecodingError, "1 requests have not ended", "cancel them"):
        engine.update_weights(tiny_model(jnp.float32, seed=1))
    engine.cancel(request)
    engine.update_weights(tiny_model(jnp.float32, seed=1))


def test_a_model_of_other_shapes_is_refused_by_name():
    engine = Engine(tiny_model(jnp.float32), **SIZES)
    wrong = tiny_model(jnp.float32, intermediate_size=32)
    with refused(
        DecodingError,
        "weight layers.0.down is float32 [16, 32]",
        "the engine's is float32 [16, 24]",
    ):
        engine.update_weights(wrong)
    with refused(DecodingError, "weight embedding is bfloat16", "float32"):
        engine.update_weights(tiny_model(jnp.bfloat16))
    with refused(DecodingError, "weight layers.2.", "missing"):
        engine.update_weights(tiny_model(jnp.float32, num_layers=3))
    with refused(DecodingError, "the model's mask_token_id is 21", "the engine's 22"):
        engine.update_weights(tiny_model(jnp.float32, mask_token_id=21))
    assert engine.stats().restarts == 0
