"""The while loop equals a plain Python loop, in float64, for every strategy, block size, prompt tail and batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, ModelConfig, generate
from sdar_jax.model import Model
from tests.decoding import oracle

STRATEGIES = [
    DecodingConfig(strategy="sequential", denoising_steps=None),
    DecodingConfig(strategy="sequential", denoising_steps=3),
    DecodingConfig(strategy="low_confidence_static", denoising_steps=3, schedule="paper"),
    DecodingConfig(strategy="low_confidence_static"),
    DecodingConfig(strategy="low_confidence_static", score="margin", denoising_steps=2),
    DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=0.15),
    DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=-2.0, score="neg_entropy"),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=3.0),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=5.0, entropy_rule="jetengine"),
    DecodingConfig(strategy="factor", factor=1.7),
    DecodingConfig(strategy="semi_autoregressive", denoising_steps=2),
    DecodingConfig(strategy="autoregressive"),
]
VOCAB = 23
STOPS = (3, 5)


def tiny_model(**changes) -> Model:
    fields = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
    fields |= {"num_kv_heads": 2, "head_dim": 8, "initializer_range": 0.5, "block_size": 4, "mask_token_id": VOCAB - 1}
    # Wide weights make sharp and varied distributions, so that thresholds are crossed both ways.
    return Model(ModelConfig(**(fields | changes)), jax.random.key(1), jnp.float64)


def fitted(config: DecodingConfig, size: int) -> DecodingConfig:
    import dataclasses

    steps = config.denoising_steps and min(config.denoising_steps, size)
    return dataclasses.replace(config, block_size=size, denoising_steps=steps)


def name(config: DecodingConfig) -> str:
    return f"{config.strategy}-{config.score}-{config.entropy_rule}-{config.denoising_steps}"


@pytest.mark.parametrize("size", [1, 4, 8, 16])
@pytest.mark.parametrize("config", STRATEGIES, ids=name)
def test_batch_equals_python_loop(config, size, x64):
    model = tiny_model()
    config = fitted(config, size)
    random = np.random.default_rng(size)
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (1, 4, 7, 18)]
    got = generate(model, prompts, config, max_new_tokens=13, stop_token_ids=STOPS)
    for prompt, completion in zip(prompts, got, strict=True):
        tokens, logprobs, steps, reason, denoising, commits = oracle.decode(model, prompt, config, 13, STOPS)
        assert completion.tokens == tokens
        assert completion.steps == steps
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)
        assert completion.finish_reason == reason
        assert (completion.denoising_forwards, completion.commit_forwards) == (denoising, commits)
