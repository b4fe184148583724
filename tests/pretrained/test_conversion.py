"""From an autoregressive model to one that is ready for diffusion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, logits, stack_layers, unstack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.conversion import to_diffusion

CONFIG = ModelConfig(40, 16, 24, 3, 4, 2, 8, initializer_range=0.3)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 10}
MOE = dataclasses.replace(TIED, architecture="qwen3_moe", **EXPERTS)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 37, jnp.int32)


def make(config: ModelConfig = CONFIG) -> Model:
    return Model(config, jax.random.key(0))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [CONFIG, TIED, MOE], ids=["untied", "tied", "moe"])
@pytest.mark.parametrize("size", [37, 40], ids=["spare", "appended"])
def test_the_function_on_other_tokens_stays_the_same(
    config: ModelConfig, size: int, stacked: bool
) -> None:
    """Untying and making room for the mask leave the logits of all ids that there were."""
    model = make(config)
    converted = to_diffusion(
        stack_layers(make(config)) if stacked else model, block_size=4, tokenizer_size=size
    )
    rows = max(40, size + 1)
    assert converted.config == dataclasses.replace(
        config,
        tie_embeddings=False,
        vocab_size=rows,
        objective="block_diffusion",
        block_size=4,
        mask_token_id=size,
    )
    assert converted.embedding.shape == (rows, 16) and converted.head.shape == (rows, 16)
    expected = logits(model, TOKENS, block_size=1)
    got = logits(unstack_layers(converted), TOKENS, block_size=1)
    np.testing.assert_allclose(got[..., :40], expected, rtol=1e-5, atol=1e-6)


def test_untied_weights_are_apart() -> None:
    """A change of the head no longer changes the embedding, and the given model is as it was."""
    model = make(TIED)
    before = jnp.copy(model.embedding[...])
    converted = to_diffusion(model, block_size=4, mask_token_id=39)
    np.testing.assert_array_equal(converted.head[...], before)
    np.testing.assert_array_equal(converted.embedding[:39], before[:39])
    np.testing.assert_array_equal(model.embedding[...], before)
    assert model.head is None and model.config == TIED
    grads = jax.grad(lambda model: logits(model, TOKENS, block_size=1).sum())(converted)
    assert jnp.abs(grads.head[...] - grads.embedding[...]).max() > 1e-3


def test_where_the_mask_goes() -> None:
    """The id that is given, else the model's own, else the first that the tokenizer leaves free."""
    own = dataclasses.replace(CONFIG, mask_token_id=5)
    for config, options, expected in [
        (CONFIG, {"tokenizer_size": 37}, 37),
        (CONFIG, {"tokenizer_size": 37, "mask_token_id": 38}, 38),
        (own, {"tokenizer_size": 37}, 5),
        (own, {"mask_token_id": 6}, 6),
        (CONFIG, {"mask_token_id": 40}, 40),
    ]:
        assert to_diffusion(make(config), block_size=4, **options).config.mask_token_id == expected


@pytest.mark.parametrize("size", [37, 40], ids=["spare", "appended"])
def test_initialisations(size: int) -> None:
    model = make()

    def converted(mask_init: str, **options: object) -> Model:
        return to_diffusion(
            model, block_size=4, tokenizer_size=size, mask_init=mask_init, **options
        )

    mean, zeros = converted("mean"), converted("zeros")
    normal = converted("normal", key=jax.random.key(2))
    np.testing.assert_allclose(
        mean.embedding[size], model.embedding[:size].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    assert (zeros.embedding[size] == 0).all()
    assert 0.1 < float(jnp.std(normal.embedding[size])) < 0.6
    for other in (mean, zeros, normal):
        np.testing.assert_array_equal(other.embedding[:size], model.embedding[:size])
        expected = model.head[size] if size < 40 else model.head[...].mean(axis=0)
        np.testing.assert_allclose(other.head[size], expected, rtol=1e-5, atol=1e-6)
    if size < 40:
        np.testing.assert_array_equal(converted("keep").embedding[...], model.embedding[...])


def test_the_mean_is_taken_in_float32() -> None:
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make())
    converted = to_diffusion(model, block_size=4, tokenizer_size=37)
    assert converted.embedding.dtype == jnp.bfloat16 and converted.head.dtype == jnp.bfloat16
    expected = model.embedding[:37].astype(jnp.float32).mean(axis=0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(converted.embedding[37], expected)


def test_a_diffusion_model_changes_its_block_size_alone() -> None:
    model = to_diffusion(
        make(), block_size=4, tokenizer_size=37, mask_init="zeros", block_origin="response"
    )
    larger = to_diffusion(model, block_size=16)
    assert larger.config == dataclasses.replace(model.config, block_size=16)
    for a, b in zip(jax.tree.leaves(larger), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_diffusion_and_on_to_blocks() -> None:
    model = to_diffusion(make(), objective="masked_diffusion", tokenizer_size=37)
    assert model.config.objective == "masked_diffusion" and model.config.block_size is None
    blocks = to_diffusion(model, block_size=8, block_origin="response")
    expected = {"objective": "block_diffusion", "block_size": 8, "block_origin": "response"}
    assert blocks.config == dataclasses.replace(model.config, **expected)


def test_a_mask_that_the_config_lacks_keeps_its_trained_row() -> None:
    hosted = dataclasses.replace(CONFIG, objective="block_diffusion", block_size=4)
    model = make(hosted)
    converted = to_diffusion(model, block_size=8, mask_token_id=37)
    assert converted.config == dataclasses.replace(hosted, block_size=8, mask_token_id=37)
    np.testing.assert_array_equal(converted.embedding[...], model.embedding[...])


DIFFUSION = dataclasses.replace(CONFIG, objective="block_diffusion", block_size=4)
S4 = {"block_size": 4}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("config", "options", "advice", "advised"),
    [
        (CONFIG, {"mask_token_id": 39}, "needs one, such as 4", S4),
        (CONFIG, S4, "neither mask_token_id nor tokenizer_size", {"tokenizer_size": 37}),
        (
            CONFIG,
            S4 | {"tokenizer_size": 41},
            "largest id plus one, at most 40",
            {"tokenizer_size": 40},
        ),
        (CONFIG, S4 | {"mask_token_id": 41}, "give a spare id below 40", {"mask_token_id": 39}),
        (CONFIG, S4 | {"mask_token_id": 41}, "or 40 to append a row", {"mask_token_id": 40}),
        (
            CONFIG,
            S4 | {"mask_token_id": 39, "objective": "diffusion"},
            "use .* 'masked",
            {"objective": "masked_diffusion"},
        ),
        (
            CONFIG,
            S4 | {"mask_token_id": 39, "mask_init": "median"},
            "use one of .*'zeros'",
            {"mask_init": "zeros"},
        ),
        (
            CONFIG,
            S4 | {"mask_token_id": 39, "mask_init": "normal"},
            "give key=",
            {"key": jax.random.key(0)},
        ),
        (
            CONFIG,
            S4 | {"mask_token_id": 40, "mask_init": "keep"},
            "use 'mean'",
            {"mask_init": "mean"},
        ),
        (DIFFUSION, {"block_size": 8}, "give the one it was trained with", {"mask_token_id": 37}),
        (
            dataclasses.replace(DIFFUSION, mask_token_id=39),
            {"mask_token_id": 38},
            "leave it out",
            {"mask_token_id": None},
        ),
    ],
)
def test_what_a_refusal_advises_is_taken(config, options, advice, advised) -> None:
    with pytest.raises(ConfigError, match=advice):
        to_diffusion(make(config), **options)
    to_diffusion(make(config), **(options | advised))


def test_the_other_values_of_the_paradigm() -> None:
    """Given, they are the new model's; not given, they stay."""
    values = {"shifted": True, "causal_clean": True}
    converted = to_diffusion(make(CONFIG), block_size=4, mask_token_id=39, **values)
    assert (converted.config.paradigm.shifted, converted.config.paradigm.causal_clean) == (
        True,
        True,
    )
    assert ModelConfig.from_hf(converted.config.to_hf()).paradigm == converted.config.paradigm
    other = to_diffusion(converted, block_size=8, causal_clean=False)
    assert other.config == dataclasses.replace(converted.config, block_size=8, causal_clean=False)
    with pytest.raises(
        ConfigError,
        match="bidirectional_prompt is True and blocks do not start at the response; set",
    ):
        to_diffusion(converted, block_size=4, bidirectional_prompt=True)
