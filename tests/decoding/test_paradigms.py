"""Every value of the paradigm that is decoded, against a plain loop over a dense mask, and its cache by prefill."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, Engine, ModelConfig, generate
from sdar_jax.decoding.buffer import Decoder
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model
from sdar_jax.paradigm import Paradigm
from tests.bad_input import refused
from tests.decoding.oracle import _columns, _ended, choose, softmax
from tests.decoding.states import start_state
from tests.objectives import oracle as network
from tests.objectives.test_paradigms import QUICK, VALUES, model_with
from tests.tiny import VOCAB

LENGTH = 48
SLOW = [pytest.mark.slow, pytest.mark.ci]
STOPS = (3, 5)
network_logits = jax.jit(network.logits)


def sees(paradigm: Paradigm, size: int, prompt: int, start: int, i: int, j: int) -> bool:
    """Whether position i sees j while the block at `start` is filled."""
    if paradigm.block_size is None or i >= start:
        return j < start + size or paradigm.block_size is None
    if paradigm.causal_clean:
        return j <= i
    if paradigm.origin == "sequence":
        return j // size <= i // size
    if i < prompt:
        return j < prompt and (paradigm.bidirectional_prompt or j // size <= i // size)
    return j < prompt or (j - prompt) // size <= (i - prompt) // size


def decode(model: Model, prompt: list[int], config: DecodingConfig, new: int):
    """Greedy (tokens, logprobs, steps, reason, denoising forwards) of one prompt; the whole sequence is read anew."""
    paradigm, size, mask_id = (
        model.config.paradigm,
        model.config.block_size,
        model.config.mask_token_id,
    )
    origin = len(prompt) if paradigm.origin == "response" else 0
    limit = len(prompt) + new
    end = origin + math.ceil((limit - origin) / size) * size
    sequence = list(prompt) + [mask_id] * (LENGTH - len(prompt))
    known = [i < len(prompt) for i in range(LENGTH)]
    start, denoising, record = origin + (len(prompt) - origin) // size * size, 0, {}
    while True:
        step = 0
        while not all(known[start : start + size]):
            read = end if paradigm.block_size is None else start + size
            visible = [[i < read and j < read and sees(paradigm, size, len(prompt), start, i, j) for j in range(LENGTH)]
                       for i in range(LENGTH)]  # fmt: skip
            logits = np.array(
                network_logits(model, np.array(sequence), np.arange(LENGTH), np.array(visible))
            )
            logits[:, mask_id] = -np.inf
            first = start - paradigm.shifted
            # Position 0 of an unfinished block is never asked of a shifted model: the prompt holds it.
            probs = softmax(logits[np.maximum(np.arange(first, first + size), 0)])
            masked = [i for i in range(size) if not known[start + i]]
            for i in choose(config, probs, masked, step, size):
                token = int(probs[i].argmax())
                sequence[start + i], known[start + i] = token, True
                record[start + i] = (token, math.log(probs[i].max()), denoising)
            step, denoising = step + 1, denoising + 1
            at, reason = _ended(sequence, known, len(prompt), start, size, limit, STOPS)
            if reason:
                return *_columns([record[i] for i in range(len(prompt), at)]), reason, denoising
        start += size


def prompts(seed: int, lengths=(1, 4, 7, 14)) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB - 1, n).tolist() for n in lengths]


def own(model: ModelConfig) -> DecodingConfig:
    """Its own strategy, with a threshold that is crossed."""
    if model.objective == "masked_diffusion":
        return DecodingConfig(strategy="semi_autoregressive", denoising_steps=2)
    return DecodingConfig(strategy="low_confidence_dynamic", confidence_threshold=0.2)


def assert_equal(completion, wanted) -> None:
    tokens, logprobs, steps, reason, denoising = wanted
    assert (completion.tokens, completion.steps, completion.finish_reason) == (
        tokens,
        steps,
        reason,
    )
    np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-9)
    assert completion.denoising_forwards == denoising


CASES = [
    *((name, 2) for name in QUICK),
    *(pytest.param(name, 2, marks=SLOW) for name in VALUES if name not in QUICK),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in VALUES),
]


@pytest.mark.parametrize(("name", "slots"), CASES)
def test_decoding_equals_the_plain_loop(name, slots, x64):
    model = model_with(**VALUES[name])
    config, given = own(model.config), prompts(len(name))
    got = generate(
        model, given, config, max_new_tokens=11, stop_token_ids=STOPS, window_slots=slots
    )
    for prompt, completion in zip(given, got, strict=True):
        assert_equal(completion, decode(model, prompt, config, 11))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW) for name in VALUES if "no blocks" not in name]
)
def test_an_engine_equals_the_plain_loop(name, x64):
    """Requests that come one after another, prompts that share beginnings, and pages that run out."""
    model = model_with(**VALUES[name])
    config, given = own(model.config), prompts(7, (9, 2, 14, 6))
    given += [given[2][:13], given[2], given[0] + [1, 2]]
    engine = Engine(model, batch_slots=3, pages=8, page_size=8, prefill_tokens=16)
    ids = [
        engine.submit(prompt, config, max_new_tokens=11, stop_token_ids=STOPS) for prompt in given
    ]
    for prompt, request in zip(given, ids, strict=True):
        assert_equal(engine.result(request), decode(model, prompt, config, 11))


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("shifted with a causal clean copy", 2),
        pytest.param("shifted with a causal clean copy", 1, marks=pytest.mark.slow),
        *(pytest.param(name, 2, marks=SLOW) for name in ("shifted", "causal clean copy")),
        *(
            pytest.param(name, 1, marks=pytest.mark.slow)
            for name in ("shifted", "causal clean copy")
        ),
    ],
)
def test_prefill_gives_the_cache_that_decoding_gave(name, slots, x64):
    """Of prompt and answer together: keys that were written while masks were in sight would not be the same."""
    model, prompt = model_with(**VALUES[name]), prompts(3)[2]
    decoded = finished(model, np.array(prompt, np.int32), 17, slots)
    whole = np.asarray(decoded.batch.output.tokens[0, : len(prompt) + 17])
    prefilled = finished(model, whole, 4, slots)
    final = (len(prompt) + 17 - 4) // 4 * 4
    for ours, theirs in zip(
        jax.tree.leaves(decoded.cache), jax.tree.leaves(prefilled.cache), strict=True
    ):
        np.testing.assert_allclose(
            ours[..., 0, :, :final, :], theirs[..., 0, :, :final, :], rtol=1e-9, atol=1e-11
        )


def finished(model: Model, ids: np.ndarray, new: int, slots: int):
    """The state after a request is done, its pages those of one sequence in order."""
    state, buffer = start_state(
        model,
        [ids],
        [own(model.config)],
        max_new_tokens=new,
        stop_ids=(),
        seed=0,
        window_slots=slots,
        page_size=32,
    )
    return Decoder(model, buffer)(state, 10**6)[0]


def test_one_open_block_at_a_time_where_clean_keys_are_causal():
    model = model_with(jnp.float32, causal_clean=True)
    with refused(DecodingError, "add_threshold is 0.5", "leave it 1"):
        generate(model, [[1]], DecodingConfig(add_threshold=0.5), max_new_tokens=4)


@pytest.mark.parametrize("name", ["shifted", "no blocks, shifted"])
def test_a_shifted_model_needs_a_token_to_begin_with(name):
    model = model_with(jnp.float32, **VALUES[name])
    with refused(DecodingError, "prompt 0 is empty", "at least one token"):
        generate(model, [[]], own(model.config), max_new_tokens=4)


def test_the_paradigm_is_saved_and_read_back():
    config = dataclasses.replace(model_with().config, shifted=True, causal_clean=True)
    assert ModelConfig.from_hf(config.to_hf()).paradigm == config.paradigm


def test_a_prompt_that_sees_all_of_itself_is_read_in_one_piece():
    model = model_with(jnp.float32, **VALUES["bidirectional prompt"])
    with refused(DecodingError, "the prompt has 20 tokens", "prefill_tokens of at least that"):
        Engine(model, batch_slots=1, pages=8, page_size=8, prefill_tokens=16).submit(
            [1] * 20, max_new_tokens=4
        )
    Engine(model, batch_slots=1, pages=8, page_size=8, prefill_tokens=20).submit(
        [1] * 20, max_new_tokens=4
    )
