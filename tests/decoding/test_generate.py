"""What `generate` promises: no batch effects, stops, trimming, one program, no surprise compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding.buffer import advance
from sdar_jax.model import stack_layers
from tests.decoding import oracle
from tests.decoding.states import start_state
from tests.jaxprs import compilations, equations
from tests.tiny import MASK, VOCAB, padded, tiny_model

NEW = 10
# Prompts that end on a block and inside one, and two that are alike; one needs a longer canvas and prefill than others.
POOL = [
    [4],
    [1, 2, 3, 4, 5, 6],
    [7, 8, 9, 10, 11, 12, 13, 14, 15],
    [16, 17, 18, 19],
    [16, 17, 18, 19],
]
GREEDY = DecodingConfig(confidence_threshold=0.2)
SAMPLED = DecodingConfig(
    strategy="low_confidence_static", temperature=1.0, top_k=9, top_p=0.95, denoising_steps=2
)


def run(prompts, config=GREEDY, stops=(), model=None, **options):
    """Most tests decode four prompts, or one, so that they share programs."""
    model = tiny_model() if model is None else model
    stops = None if stops is None else padded(stops)
    return generate(
        model, prompts, config, **{"max_new_tokens": NEW, "stop_token_ids": stops, **options}
    )


def no_logprobs(completion):
    """Log-probabilities may differ in their last bits with the shape of a batch; all else may not differ at all."""
    return completion._replace(logprobs=None)


@pytest.mark.parametrize(
    "config",
    [SAMPLED, pytest.param(GREEDY, marks=[pytest.mark.slow, pytest.mark.ci])],
    ids=lambda c: c.strategy,
)
@given(
    chosen=st.lists(st.integers(0, len(POOL) - 1), min_size=4, max_size=4), seed=st.integers(0, 20)
)
def test_neighbours_and_slots_change_nothing(config, chosen, seed):
    """In float64, a batch of any four, repeats among them, gives each what it gets alone with its own seed + i."""
    with jax.enable_x64(True):
        together = run([POOL[i] for i in chosen], config, stops=(3, 5), seed=seed)
        for slot, i in enumerate(chosen):
            (alone,) = run([POOL[i]], config, stops=(3, 5), seed=seed + slot)
            assert no_logprobs(together[slot]) == no_logprobs(alone)
            np.testing.assert_allclose(together[slot].logprobs, alone.logprobs, rtol=1e-9)


def test_seeds_matter_for_samples_and_not_for_greedy(x64):
    prompts = [POOL[3]] * 4
    sampled, again, other = (run(prompts, SAMPLED, seed=seed) for seed in (1, 1, 50))
    assert [c.tokens for c in sampled] == [c.tokens for c in again]
    assert len({tuple(c.tokens) for c in [*sampled, *other]}) > 1
    assert sampled[1].tokens == run(prompts, SAMPLED, seed=2)[0].tokens
    assert len({tuple(c.tokens) for c in [*run(prompts, seed=1), *run(prompts, seed=9)]}) == 1


@pytest.fixture(scope="module")
def unstopped():
    """What 4 x 6 prompts give without a stop, by a strategy that commits out of order."""
    config = DecodingConfig(strategy="low_confidence_static", block_size=8)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, MASK, n).tolist() for n in random.integers(1, 9, 24)]
    with jax.enable_x64(True):
        batches = [run(prompts[i : i + 4], config) for i in range(0, 24, 4)]
    return config, prompts, [completion for batch in batches for completion in batch]


def test_a_stop_waits_for_the_masks_before_it(unstopped, x64):
    """Greedy decoding is the same until it ends: tokens before the first stop, forwards until all of them are there."""
    config, prompts, whole = unstopped
    waited = 0
    for i, completion in enumerate(whole):
        earliest = min(range(NEW), key=completion.steps.__getitem__)
        stop = completion.tokens[earliest]
        first = completion.tokens.index(stop)
        (stopped,) = run([prompts[i]], config, stops=(stop,))
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == completion.tokens[:first]
        assert stopped.steps == completion.steps[:first]
        assert stopped.denoising_forwards == max(completion.steps[: first + 1]) + 1
        waited += stopped.denoising_forwards > completion.steps[first] + 1
    assert waited >= 5


def test_the_first_of_several_stops_counts(unstopped, x64):
    config, prompts, whole = unstopped
    stops = (whole[0].tokens[4], whole[0].tokens[2])
    first = min(whole[0].tokens.index(stop) for stop in stops)
    assert run([prompts[0]], config, stops=stops)[0].tokens == whole[0].tokens[:first]


def test_stops_in_the_prompt_and_after_the_limit_are_ignored(unstopped, x64):
    config, prompts, whole = unstopped
    # What lies past the limit is decoded with the block that the limit cuts.
    for limit in (1, 3):
        late = [token for token in whole[0].tokens if token not in whole[0].tokens[:limit]]
        (short,) = run([prompts[0]], config, stops=tuple(late[:4]), max_new_tokens=limit)
        assert short.finish_reason == "length" and len(short.tokens) == limit
    inside = next(token for token in range(MASK) if token not in whole[0].tokens)
    (free,), (same,) = (
        run([[inside, *prompts[0]]], config, stops=stops) for stops in ((), (inside,))
    )
    assert inside not in free.tokens and same == free


def test_the_models_own_stops(unstopped, x64):
    config, prompts, whole = unstopped
    stop = whole[0].tokens[3]
    own = tiny_model(stop_token_ids=padded((stop,)))
    first = whole[0].tokens.index(stop)
    assert run([prompts[0]], config, stops=None, model=own)[0].tokens == whole[0].tokens[:first]
    free = run([prompts[0]], config, stops=(), model=own)[0]
    # The last bits of logarithms depend on how many rows a matmul has.
    np.testing.assert_allclose(free.logprobs, whole[0].logprobs, rtol=1e-12)
    assert free._replace(logprobs=None) == whole[0]._replace(logprobs=None)


def test_metrics(x64):
    config = DecodingConfig(strategy="low_confidence_static", denoising_steps=2)
    long, short, *_ = run([list(range(9)), *[[1, 2, 3]] * 3], config)
    (none,) = run([[1]], config, max_new_tokens=0)
    # 9 + 10: three masks in the first block, then four, then three of the last four that are asked for.
    assert (long.denoising_forwards, long.commit_forwards, long.prefill_forwards) == (6, 0, 1)
    assert sorted(long.steps[:3]) == [0, 0, 1]
    assert [set(long.steps[i:j]) for i, j in ((0, 3), (3, 7), (7, 10))] == [{0, 1}, {2, 3}, {4, 5}]
    assert long.tokens_per_forward == 10 / long.denoising_forwards
    # A prompt that fills no block has nothing to prefill, whatever its neighbour has.
    assert short.prefill_forwards == 0
    assert none.tokens_per_forward == 0.0


def test_no_prefill_is_counted_where_there_is_no_cache(x64):
    config = DecodingConfig(strategy="semi_autoregressive")
    assert [completion.prefill_forwards for completion in run(POOL[:4], config)] == [0] * 4


def test_the_mask_is_never_emitted(x64):
    """Its logit is made three times that of the token that came out first: banned, it changes nothing."""
    model = tiny_model()
    (before,) = run([POOL[1]])
    row = 3 * model.head[...][before.tokens[0]]
    louder = jax.tree.map(lambda leaf: leaf, model)
    louder.head = type(model.head)(model.head[...].at[MASK].set(row))
    (after,) = run([POOL[1]], model=louder)
    assert MASK not in after.tokens and after.tokens == before.tokens


def test_weights_that_are_no_numbers_end_a_request_alone(x64):
    """Token 7's embedding is broken: rows that read it fail, at once or when they produce it; others are untouched."""
    model = tiny_model()
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.embedding = type(model.embedding)(model.embedding[...].at[7].set(np.nan))
    prompts = [[1, 7, 2], [16, 17, 18, 19], [3, 1, 3, 1, 3, 1, 3, 1, 3], [4]]
    healthy, got = run(prompts), run(prompts, model=broken)
    assert got[0].finish_reason == "error" and got[0].tokens == []
    assert all(np.isfinite(c.logprobs).all() for c in got)
    for whole, completion in zip(healthy[1:], got[1:], strict=True):
        if 7 in whole.tokens[:-1]:
            assert completion.finish_reason == "error"
            assert completion.tokens == whole.tokens[: len(completion.tokens)]
        else:
            assert no_logprobs(completion) == no_logprobs(whole)


def test_stacked_layers_decode_alike(x64):
    stacked = stack_layers(jax.tree.map(jnp.copy, tiny_model()))
    assert run([POOL[1]], model=stacked) == run([POOL[1]])


class Letters:
    """A tokenizer of one letter a token."""

    def encode(self, text: str, **options: bool) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def test_texts_and_ids(x64):
    by_text, by_ids, *_ = run(["bcd", *[[1, 2, 3]] * 3], tokenizer=Letters())
    assert by_text.tokens == by_ids.tokens
    assert by_text.text == by_ids.text == Letters().decode(by_ids.tokens)
    assert run([[1, 2, 3]])[0].text is None
    assert run([]) == []


@pytest.mark.parametrize(
    "strategy",
    [
        "low_confidence_dynamic",
        "semi_autoregressive",
        pytest.param("autoregressive", marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
)
def test_stop_strings(strategy, x64):
    """Each row ends before its first one, soon after it is there; the others go on."""
    config, letters, prompts = DecodingConfig(strategy=strategy), Letters(), [*POOL[:3], POOL[0]]
    whole = run(prompts, config, tokenizer=letters, max_new_tokens=40)
    stops = [whole[0].text[2:5], whole[1].text[5:9], "#"]
    cut = run(prompts, config, tokenizer=letters, max_new_tokens=40, stop_strings=stops)
    for before, after in zip(whole, cut, strict=True):
        found = [
            (before.text.index(stop) + len(stop), stop) for stop in stops if stop in before.text
        ]
        count, stop = min(found, default=(40, None))
        assert after.tokens == before.tokens[:count] and after.steps == before.steps[:count]
        assert (len(after.logprobs), after.stop_reason) == (count, stop)
        assert after.finish_reason == ("length" if stop is None else "stop")
        assert after.text == before.text[: count - len(stop or "")]
        assert (
            stop is None
            or after.denoising_forwards <= max(after.steps) + 8 < before.denoising_forwards
        )
    assert cut[0].stop_reason


def test_which_stop_token_it_was(unstopped, x64):
    config, prompts, whole = unstopped
    stops = (whole[0].tokens[4], whole[0].tokens[2])
    first = next(token for token in whole[0].tokens if token in stops)
    assert run([prompts[0]], config, stops=stops)[0].stop_reason == first
    assert whole[0].stop_reason is None
    assert run([[1, 2]], config, max_new_tokens=0)[0].stop_reason is None


class Holed(Letters):
    """A tokenizer that lacks ids in the middle and at the end of the vocabulary."""

    missing = frozenset({*range(3, 15), VOCAB - 2})

    def __len__(self):
        return VOCAB - len(self.missing)

    def get_vocab(self):
        return {str(i): i for i in range(VOCAB) if i not in self.missing}


RULES = ["sequential", "low_confidence_static", "entropy_bounded", "factor"]
WHAT_IS_READ = ["low_confidence_dynamic", "autoregressive", "semi_autoregressive"]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize(
    "strategy", [*WHAT_IS_READ, *(pytest.param(name, marks=pytest.mark.slow) for name in RULES)]
)
def test_ids_that_the_tokenizer_lacks_are_never_proposed(strategy, temperature, x64):
    """Not though they are the likeliest; what the others' probabilities are is not changed by that."""
    config = DecodingConfig(strategy=strategy, temperature=temperature)
    free, got = run(POOL[:4], config), run(POOL[:4], config, tokenizer=Holed())
    assert any(token in Holed.missing for c in free for token in c.tokens)
    assert not any(token in Holed.missing for c in got for token in c.tokens)
    if temperature == 0 and strategy != "autoregressive":
        first = got[0].steps.index(0)
        start = len(POOL[0]) // 4 * 4
        blank = POOL[0] + [MASK] * (start + 4 - len(POOL[0]))
        if strategy == "semi_autoregressive":
            blank, size = POOL[0] + [MASK] * (start + 12 - len(POOL[0])), None
        else:
            size = 4
        logits = oracle.forward(tiny_model(), blank, size)[len(POOL[0]) + first]
        likeliest = max({*range(MASK)} - Holed.missing, key=lambda token: logits[token])
        assert got[0].tokens[first] == likeliest
        np.testing.assert_allclose(
            np.exp(got[0].logprobs[first]), oracle.softmax(logits)[likeliest], rtol=1e-9
        )


def test_a_tokenizer_that_has_all_ids_bans_none(x64):
    assert [c.tokens for c in run(POOL[:4], tokenizer=Letters())] == [
        c.tokens for c in run(POOL[:4])
    ]


def traced(config=GREEDY):
    options = dict(max_new_tokens=NEW, stop_ids=(3,), seed=0, window_slots=2)
    state, buffer = start_state(tiny_model(jnp.float32), [np.arange(9)], [config], **options)
    call = lambda model, state: advance(model, state, 99, buffer)
    return state.batch.output.tokens.aval, equations(call, tiny_model(jnp.float32), state)


OTHERS = [DecodingConfig(strategy=name) for name in ("autoregressive", "semi_autoregressive")]


@pytest.mark.parametrize("config", [GREEDY, *OTHERS], ids=lambda config: config.strategy)
def test_decoding_is_one_loop_on_the_device(config):
    """One while loop carries the tokens, and nothing in it calls back to the host."""
    tokens, found = traced(config)
    found = list(found)
    loops = [equation for equation in found if equation.primitive.name == "while"]
    assert sum(tokens in [out.aval for out in equation.outvars] for equation in loops) == 1
    names = [equation.primitive.name for equation in found]
    assert not [
        name for name in names if "callback" in name or "infeed" in name or "outfeed" in name
    ]


def test_numbers_compile_nothing_anew():
    model = tiny_model(jnp.float32)
    first = DecodingConfig(confidence_threshold=0.5, temperature=0.7, top_k=5, top_p=0.9)
    generate(model, [POOL[1]], first, max_new_tokens=9, stop_token_ids=(3, 4), seed=1)
    other = dict(
        confidence_threshold=0.9, temperature=1.3, top_k=2, top_p=0.5, entropy_bound=0.7, factor=2.0
    )
    changed = DecodingConfig(
        **other, denoising_steps=2, schedule="paper", repetition_penalty=1.2, score="margin"
    )
    # A length in the same bucket is the same program too. Where nobody samples it is another, and a smaller one.
    hardly = DecodingConfig(temperature=0.01)
    with compilations() as compiled:
        for prompt, new, config in ((POOL[1], 9, changed), (POOL[1][:5], 7, hardly)):
            generate(model, [prompt], config, max_new_tokens=new, stop_token_ids=(7, 8), seed=5)
    assert not compiled


@pytest.mark.parametrize("calls", [12, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.ci])])
def test_calls_of_all_kinds_compile_few_programs(calls):
    model, random = tiny_model(jnp.float32, max_position_embeddings=2048), np.random.default_rng(7)
    with compilations() as compiled:
        for _ in range(calls):
            lengths = random.integers(1, 1000, random.integers(1, 17))
            prompts = [random.integers(0, MASK, length).tolist() for length in lengths]
            generate(model, prompts, max_new_tokens=int(random.integers(1, 9)), stop_token_ids=())
    assert len(compiled) <= 3


def test_another_tokenizer_compiles_nothing_anew(x64):
    class Other(Holed):
        missing = frozenset({5})

    run(POOL[:4], tokenizer=Holed())
    with compilations() as compiled:
        run(POOL[:4], tokenizer=Other())
    assert not compiled


MIXED = [
    GREEDY,
    DecodingConfig(temperature=1.0, top_k=9, denoising_steps=2),
    DecodingConfig(strategy="entropy_bounded", entropy_bound=2.0, repetition_penalty=1.5),
    DecodingConfig(strategy="factor", score="margin", add_threshold=0.3, activate_threshold=0.9),
    DecodingConfig(
        strategy="sequential",
        temperature=0.7,
        top_p=0.9,
        confidence="post_filter",
        denoising_steps=3,
    ),
]


@pytest.mark.slow
@pytest.mark.ci
def test_mixed_configs_in_one_batch_equal_each_alone(x64):
    for chosen in ([0, 1, 2, 3], [4, 3, 2, 0]):
        together = run(
            [POOL[i] for i in chosen], [MIXED[i] for i in chosen], stops=(3,), window_slots=3
        )
        for seed, i in enumerate(chosen):
            (alone,) = run([POOL[i]], MIXED[i], stops=(3,), seed=seed, window_slots=3)
            assert no_logprobs(together[seed]) == no_logprobs(alone)
            np.testing.assert_allclose(together[seed].logprobs, alone.logprobs, rtol=1e-9)


def test_repetition_penalty_counts_prompt_and_output(x64):
    """Left to right, by the definition: logits of what is there so far are divided where positive, else multiplied."""
    config = DecodingConfig(strategy="sequential", repetition_penalty=2.0)
    plain, penalised, *_ = run([POOL[2]] * 4, [DecodingConfig(strategy="sequential"), config] * 2)
    sequence = list(POOL[2])
    for token, logprob in zip(penalised.tokens, penalised.logprobs, strict=True):
        masks = [MASK] * (-len(sequence) % 4 or 4)
        logits = oracle.forward(tiny_model(), sequence + masks, 4)[len(sequence)]
        seen = np.isin(np.arange(VOCAB), sequence)
        assert (
            token == np.where(seen, np.where(logits < 0, logits * 2, logits / 2), logits).argmax()
        )
        np.testing.assert_allclose(np.exp(logprob), oracle.softmax(logits)[token], rtol=1e-9)
        sequence.append(token)
    assert penalised.tokens != plain.tokens


@pytest.mark.parametrize(
    "steps, size",
    [(1, 4), (2, 4), (4, 4), pytest.param(3, 8, marks=[pytest.mark.slow, pytest.mark.ci])],
)
def test_forwards_a_block(steps, size, x64):
    """gamma where the next block's first forward commits, gamma + 1 where none does; nobody commits the last block."""
    config = DecodingConfig(
        strategy="low_confidence_static", block_size=size, denoising_steps=steps
    )
    for slots, commits in ((1, 4), (2, 0)):
        (out,) = run([POOL[3] * 2], config, max_new_tokens=5 * size, window_slots=slots)
        assert (out.denoising_forwards, out.commit_forwards, out.prefill_forwards) == (
            5 * steps,
            commits,
            1,
        )


def test_a_strategy_that_gets_nowhere_fails(x64):
    """A cap on forwards ends rows whose rule commits nothing, and those alone."""
    stuck = lambda proposal, masked, step, parameters: jnp.zeros_like(masked)
    configs = [DecodingConfig(), DecodingConfig(strategy=stuck)]
    healthy, failed = generate(
        tiny_model(), [POOL[3]] * 2, configs, max_new_tokens=NEW, window_slots=1
    )
    assert healthy.finish_reason == "length" and len(healthy.tokens) == NEW
    assert failed.finish_reason == "error" and failed.tokens == []
    assert failed.denoising_forwards <= 2 * (NEW + 4) + 1
