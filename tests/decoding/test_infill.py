"""Masks of a given canvas are filled as a plain Python loop fills them; what is given is never touched."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import DecodingConfig, Engine, generate, infill, to_diffusion
from sdar_jax.errors import DecodingError
from tests.bad_input import refused
from tests.decoding import oracle
from tests.objectives.test_paradigms import VALUES, model_with
from tests.tiny import MASK, VOCAB, padded, tiny_model

BLOCKS = DecodingConfig(confidence_threshold=0.2)
CANVAS = DecodingConfig(strategy="semi_autoregressive", denoising_steps=2)
CONFIGS = [
    BLOCKS,
    DecodingConfig(strategy="sequential", denoising_steps=3),
    DecodingConfig(strategy="low_confidence_static", block_size=8),
    CANVAS,
]


def random_canvases(seed: int, count: int = 4, longest: int = 25) -> list[list[int]]:
    """Some nearly all masks, some without any, some that begin or end with masks or with text.

    Something is given in the first block: masks alone attend to equal values, and only rounding would rank them.
    """
    random, canvases = np.random.default_rng(seed), []
    for share in np.linspace(0, 1, count):
        length = int(random.integers(1, longest))
        masked = random.random(length) < share
        masked[random.integers(min(length, 4))] = False
        canvases.append(np.where(masked, MASK, random.integers(0, MASK, length)).tolist())
    return canvases


def check(model, canvases, config, stops=(), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = infill(model, canvases, config, stop_token_ids=padded(stops), **options)
    for canvas, completion in zip(canvases, got, strict=True):
        tokens, logprobs, steps, reason, forwards = oracle.infill(model, canvas, config, stops)
        assert (completion.tokens, completion.steps, completion.finish_reason) == (
            tokens,
            steps,
            reason,
        )
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)
        assert completion.denoising_forwards == forwards
        assert all(
            after == before for after, before in zip(tokens, canvas, strict=False) if before != MASK
        )
    return got


@pytest.mark.parametrize("config, slots", [*((config, 2) for config in CONFIGS), (BLOCKS, 1)])
def test_canvases_equal_the_python_loop(config, slots, x64):
    for seed in range(4):
        got = check(tiny_model(), random_canvases(seed), config, window_slots=slots)
    assert all(MASK not in completion.tokens for completion in got)


def test_blocks_from_the_first_mask_equal_the_python_loop(x64):
    """LLaDA's canvas: blocks count from where there is something to fill."""
    model = tiny_model(block_origin="response", objective="masked_diffusion")
    for seed in range(4):
        check(model, random_canvases(seed), CANVAS)


@pytest.mark.parametrize("config", [BLOCKS, CANVAS], ids=lambda config: config.strategy)
def test_stops_count_behind_the_last_given_token(config, x64):
    """A stop token that is given, or fills a mask between given ones, ends nothing."""
    canvases = [[3, MASK, MASK, 5, *[MASK] * 17], [3, MASK, 5], [1, 2] + [MASK] * 18, [1]]
    free = check(tiny_model(), canvases, config)
    stops = (free[0].tokens[8], free[0].tokens[1], 3, 5)
    ended = check(tiny_model(), canvases, config, stops)
    assert ended[0].finish_reason == "stop" and ended[0].stop_reason in stops
    assert len(ended[1].tokens) == 3


@given(
    st.integers(0, 9),
    st.integers(0, 6),
    st.sampled_from([CANVAS, DecodingConfig(temperature=1.0, top_k=9)]),
)
def test_a_prompt_with_masks_behind_it_is_generated(seed, new, config):
    prompt = np.random.default_rng(seed).integers(0, MASK, seed + 1).tolist()
    model = tiny_model(jnp.float32)
    (wanted,) = generate(
        model, [prompt], config, max_new_tokens=new, stop_token_ids=(3, 5), seed=seed
    )
    (got,) = infill(model, [[*prompt, *[MASK] * new]], config, stop_token_ids=(3, 5), seed=seed)
    assert got.tokens == prompt + wanted.tokens and got.steps == [-1] * len(prompt) + wanted.steps
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    assert got.denoising_forwards == wanted.denoising_forwards


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", VALUES)
def test_every_paradigm_fills_as_it_generates(name, x64):
    """Behind a prompt; and with more behind that, what is given stays and all else is filled."""
    model = model_with(**VALUES[name])
    config = (
        DecodingConfig(strategy="semi_autoregressive") if "no blocks" in name else DecodingConfig()
    )
    prompt = [1, 2, 3, 4, 5, 6, 7]
    (wanted,) = generate(model, [prompt], config, max_new_tokens=9, stop_token_ids=())
    (got,) = infill(model, [prompt + [model.config.mask_token_id] * 9], config)
    assert (got.tokens, got.denoising_forwards) == (
        prompt + wanted.tokens,
        wanted.denoising_forwards,
    )
    mask = model.config.mask_token_id
    canvas = [1, mask, 3, mask, mask, mask, mask, 8, 9, mask, mask, 2, 3, 4, 5, 6, 7, 8, mask, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (got,) = infill(model, [canvas], config)
    assert got.finish_reason == "length" and mask not in got.tokens
    assert all(
        after == before for after, before in zip(got.tokens, canvas, strict=True) if before != mask
    )


def test_a_shifted_model_needs_the_first_token():
    model = model_with(jnp.float32, **VALUES["shifted"])
    mask = model.config.mask_token_id
    with refused(DecodingError, "prompt 0 begins with a mask", "give its first token"):
        infill(model, [[mask, 2]])
    assert mask not in infill(model, [[1, mask]])[0].tokens


def test_a_model_that_sees_what_follows_uses_it(x64):
    """And one that cannot is told of, once a call, where there is something to see in later blocks."""
    one, other = [1, 2, MASK, 4, 5, 6, 7, 8], [1, 2, MASK, 4, 5, 6, 7, 9]
    sees = [c.logprobs[2] for c in infill(tiny_model(), [one, other], CANVAS)]
    assert sees[0] != sees[1]
    with pytest.warns(UserWarning, match="later blocks") as caught:
        blind = [
            c.logprobs[2]
            for c in infill(tiny_model(), [one, other] * 2, BLOCKS, stop_token_ids=padded())
        ][:2]
    assert len(caught) == 1 and blind[0] == blind[1] and "\n" not in str(caught[0].message)
    # Nothing follows, or only in the same block; warnings are errors here.
    infill(
        tiny_model(),
        [[1, 2, 3, 4, 5, MASK, MASK, 8], [1, 2, 3, 4, 5, 6]] * 2,
        BLOCKS,
        stop_token_ids=padded(),
    )


def test_the_config_follows_the_model(x64):
    canvas = [[1, MASK, 3, MASK, 5, 6]]
    masked = tiny_model(objective="masked_diffusion", block_origin="response")
    default = DecodingConfig(strategy="semi_autoregressive")
    assert infill(masked, canvas) == infill(masked, canvas, default)
    short, stops = [canvas[0][:4]], padded()
    assert infill(tiny_model(), short, stop_token_ids=stops) == infill(
        tiny_model(), short, DecodingConfig(), stop_token_ids=stops
    )


def test_text_and_seeds(x64):
    class Letters:
        def encode(self, text, **options):
            return [MASK if letter == "_" else ord(letter) - 97 for letter in text]

        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    sampled = DecodingConfig(strategy="semi_autoregressive", temperature=1.0)
    by_text, by_ids = infill(
        tiny_model(), ["ab_d_", [0, 1, MASK, 3, MASK]], sampled, tokenizer=Letters(), seed=3
    )
    assert by_text.text == Letters().decode(by_text.tokens) and by_text.text[:2] == "ab"
    assert by_ids.tokens == infill(tiny_model(), [[0, 1, MASK, 3, MASK]], sampled, seed=4)[0].tokens
    assert infill(tiny_model(), []) == []


def test_masks_in_prompts_are_refused_and_can_be_filled(x64):
    """By everything that reads prompts, with the way that does fill them."""
    blank = [1, 2, MASK, 4]
    names = ("holds the mask token 22 at position 2", "sdar_jax.infill")
    for new in (0, 8):
        with refused(DecodingError, "prompt 1", *names):
            generate(tiny_model(), [[1], blank], max_new_tokens=new)
        with refused(DecodingError, *names):
            Engine(tiny_model(), batch_slots=1, pages=8, page_size=8).submit(
                blank, max_new_tokens=new
            )
    assert MASK not in infill(tiny_model(), [blank], stop_token_ids=padded())[0].tokens


def test_what_cannot_be_filled_is_refused():
    model = tiny_model(jnp.float32, max_position_embeddings=64)
    for names, canvases, options in [
        (("'a text'", "list of canvases"), "a text", {}),
        (("token id 23", "0 to 22"), [[23]], {}),
        (("65 tokens", "max_position_embeddings 64"), [[MASK] * 65], {}),
        (("prompt 0 is a text", "tokenizer="), ["a"], {}),
        (("seed is 0.5",), [[MASK]], {"seed": 0.5}),
        (("window_slots is 0",), [[MASK]], {"window_slots": 0}),
        (("stop_token_ids is 5",), [[MASK]], {"stop_token_ids": 5}),
        (("2 configs are given for 1 prompts",), [[MASK]], {"config": [BLOCKS, BLOCKS]}),
    ]:
        with refused(DecodingError, *names):
            infill(model, canvases, **options)


def test_autoregressive_models_and_decoding_fill_nothing():
    """What the messages say instead does."""
    names = dict(objective="autoregressive", block_size=None, mask_token_id=None)
    model = tiny_model(jnp.float32, **names)
    with refused(DecodingError, "this one is autoregressive", "sdar_jax.to_diffusion"):
        infill(model, [[1, 2]])
    converted = to_diffusion(model, block_size=4, mask_token_id=VOCAB)
    assert VOCAB not in infill(converted, [[1, VOCAB, 2]])[0].tokens
    with refused(
        DecodingError, "'autoregressive' fills no masks", "strategy='low_confidence_dynamic'"
    ):
        infill(converted, [[1, VOCAB]], DecodingConfig(strategy="autoregressive"))
    assert (
        VOCAB
        not in infill(converted, [[1, VOCAB]], DecodingConfig(strategy="low_confidence_dynamic"))[
            0
        ].tokens
    )


def test_weights_that_are_no_numbers(x64):
    """What is filled without a gap up to there."""
    broken = jax.tree.map(lambda leaf: leaf, tiny_model())
    broken.embedding = type(broken.embedding)(broken.embedding[...].at[9].set(np.nan))
    with pytest.warns(UserWarning, match="later blocks"):
        canvases = [[1, MASK, 3, 4, 9, MASK, 7, 8], [1, MASK, 3, 4]]
        failed, fine, *_ = infill(broken, canvases * 2, BLOCKS, stop_token_ids=padded())
    assert failed.finish_reason == "error" and failed.tokens == [*fine.tokens, 9]
    assert fine.finish_reason == "length"
