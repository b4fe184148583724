"""What a request may ask for besides how to commit: against a plain Python loop in float64, and against each other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, Engine, generate, infill
from sdar_jax.decoding.buffer import advance
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.decoding import oracle
from tests.decoding.states import start_state
from tests.decoding.test_oracle import STRATEGIES, check, fitted, name, random_prompts
from tests.jaxprs import equations
from tests.tiny import MASK, VOCAB, padded, tiny_model

NEW = 13
# Tokens that these models like, so that there is something to keep them from.
STOPS = (3, 5, 14, 18)
OPTIONS = [
    {"suppress_token_ids": (14, 18, 3)},
    {"min_new_tokens": 6},
    {"eos_last": True},
    {"eos_last": True, "min_new_tokens": 3, "suppress_token_ids": (0, 1, 10)},
]


def sizes(**options):
    return {
        "batch_slots": 2,
        "pages": 14,
        "page_size": 8,
        "prefill_tokens": 8,
        "steps_per_call": 3,
    } | options


def cases():
    """Some of each; all strategies with all options at once in CI, and with each option where there is time."""
    for config in STRATEGIES:
        for options in OPTIONS:
            quick = (
                name(config) == "low_confidence_dynamic-probability-eb_sampler-None"
                and options is OPTIONS[3]
            )
            quick |= (
                config.strategy in ("autoregressive", "semi_autoregressive")
                and options is OPTIONS[1]
            )
            quick |= config.strategy == "entropy_bounded" and options is OPTIONS[2]
            marks = (
                []
                if quick
                else [pytest.mark.slow, pytest.mark.ci]
                if options is OPTIONS[3]
                else [pytest.mark.slow]
            )
            yield pytest.param(
                config, options, marks=marks, id=f"{name(config)}-{'-'.join(options)}"
            )


@pytest.mark.parametrize("config, options", list(cases()))
def test_options_equal_the_python_loop(config, options, x64):
    check(
        tiny_model(),
        random_prompts(4),
        dataclasses.replace(fitted(config, 4), **options),
        stops=STOPS,
    )


def test_what_the_options_change(x64):
    """By themselves, so that the loops are held to something."""
    prompts = random_prompts(4)
    run = lambda **options: generate(
        tiny_model(), prompts, DecodingConfig(**options), max_new_tokens=NEW, stop_token_ids=STOPS
    )
    free = run()
    assert any(len(c.tokens) < 6 for c in free)
    for completion in run(min_new_tokens=6):
        assert len(completion.tokens) >= 6 and not {*completion.tokens[:6]} & {*STOPS}
    used = [token for completion in free for token in completion.tokens]
    # Eight are one program with those of other tests.
    suppressed = sorted({*used}, key=used.count)[-8:]
    for completion in run(suppress_token_ids=tuple(suppressed)):
        assert not {*completion.tokens} & {*suppressed}
    late = run(eos_last=True)
    assert [c.tokens for c in late] != [c.tokens for c in free]


def test_stop_tokens_are_committed_last(x64):
    """The first step commits two tokens: stops only where fewer than two of the proposals are anything else."""
    canvases = [[*range(i, i + 8), *[MASK] * 8, 1] for i in range(12)]
    config = DecodingConfig(strategy="semi_autoregressive", block_size=8, denoising_steps=4)
    # A given token follows, so that stops end nothing; they are what is committed first without the option.
    free = infill(tiny_model(), canvases, config)
    stops = tuple({completion.tokens[completion.steps.index(0)] for completion in free})[:5]
    asked = dataclasses.replace(config, eos_last=True)
    kept_back = 0
    for canvas, before, after in zip(
        canvases, free, infill(tiny_model(), canvases, asked, stop_token_ids=stops), strict=True
    ):
        proposed = oracle.forward(tiny_model(), canvas, None)[8:16].argmax(axis=-1)
        others = int((~np.isin(proposed, stops)).sum())
        first = lambda c: [
            token
            for token, step in zip(c.tokens, c.steps, strict=True)
            if step == 0 and token in stops
        ]
        assert len(first(after)) == max(0, 2 - others)
        kept_back += len(first(before)) - len(first(after))
    assert kept_back > 0


TOP = [
    config
    for config in STRATEGIES
    if config.strategy in ("low_confidence_dynamic", "semi_autoregressive")
][::2]


@pytest.mark.parametrize("config", [*TOP, STRATEGIES[-1]], ids=lambda config: config.strategy)
def test_the_likeliest_tokens(config, x64):
    """As found by going back to the state before each token was committed; rows may ask for different numbers."""
    # Whole blocks, that no stop ends: a completion then says all that was committed.
    model, prompts, new = tiny_model(), random_prompts(3, lengths=(1, 5, 9, 17)), 15
    configs = [dataclasses.replace(fitted(config, 4), top_logprobs=k) for k in (0, 1, 3, VOCAB)]
    got = generate(model, prompts, configs, max_new_tokens=new, stop_token_ids=padded())
    plain = generate(model, prompts, fitted(config, 4), max_new_tokens=new, stop_token_ids=padded())
    assert got[0].top_logprobs is None
    for prompt, asked, completion, same in zip(prompts, configs, got, plain, strict=True):
        assert (completion.tokens, completion.steps) == (same.tokens, same.steps)
        np.testing.assert_allclose(completion.logprobs, same.logprobs, rtol=1e-9)
        if not asked.top_logprobs:
            continue
        wanted = oracle.alternatives(model, prompt, completion, asked)
        assert len(completion.top_logprobs) == len(completion.tokens)
        for found, right, token, logprob in zip(
            completion.top_logprobs, wanted, completion.tokens, completion.logprobs, strict=True
        ):
            assert [id_ for id_, _ in found] == [id_ for id_, _ in right]
            np.testing.assert_allclose([p for _, p in found], [p for _, p in right], rtol=1e-9)
            # Greedy: the likeliest is the one, with the same number.
            assert found[0] == (token, logprob)


@pytest.mark.slow
@pytest.mark.ci
def test_the_likeliest_of_sampled_and_suppressed_tokens_are_raw(x64):
    """Under the distribution of `logprobs`: what is suppressed may be the likeliest, what is sampled may be none."""
    config = DecodingConfig(
        temperature=1.5, suppress_token_ids=(14, 18, 10), repetition_penalty=1.5, top_logprobs=4
    )
    (got,) = generate(tiny_model(), [[1, 2, 3]], config, max_new_tokens=30, stop_token_ids=())
    seen, outside = set(), 0
    for token, logprob, likeliest in zip(got.tokens, got.logprobs, got.top_logprobs, strict=True):
        numbers = [p for _, p in likeliest]
        assert (
            len(likeliest) == 4
            and numbers == sorted(numbers, reverse=True)
            and MASK not in dict(likeliest)
        )
        assert dict(likeliest).get(token, logprob) == logprob
        outside += token not in dict(likeliest)
        seen |= {id_ for id_, _ in likeliest}
    assert outside and seen & {14, 18, 10} and not {*got.tokens} & {14, 18, 10}


@pytest.mark.parametrize("changes", [False, True])
def test_an_engine_gives_what_generate_gives(changes, x64):
    """All options at once, each request with its own; with preemptions, and in events."""
    prompts = random_prompts(5, lengths=(17, 26, 9))
    configs = [
        DecodingConfig(min_new_tokens=5, top_logprobs=2, confidence_threshold=0.2),
        DecodingConfig(eos_last=True, suppress_token_ids=(1, 14), top_logprobs=5),
        DecodingConfig(temperature=1.0, min_new_tokens=13),
    ]
    options = dict(max_new_tokens=20, stop_token_ids=STOPS)
    wanted = generate(tiny_model(), prompts, configs, seed=0, **options)
    served = Engine(tiny_model(), **sizes(pages=7, top_logprobs=5))
    ids = [
        served.submit(p, c, seed=i, **options)
        for i, (p, c) in enumerate(zip(prompts, configs, strict=True))
    ]
    for request, right, config in zip(ids, wanted, configs, strict=True):
        events = list(served.stream(request, changes=changes))
        got = served.result(request)
        assert (got.tokens, got.steps, got.stop_reason) == (
            right.tokens,
            right.steps,
            right.stop_reason,
        )
        if not config.top_logprobs:
            assert got.top_logprobs is None and all(event.top_logprobs is None for event in events)
            continue
        for found, likeliest in zip(got.top_logprobs, right.top_logprobs, strict=True):
            assert [id_ for id_, _ in found] == [id_ for id_, _ in likeliest]
            np.testing.assert_allclose([p for _, p in found], [p for _, p in likeliest], rtol=1e-9)
        for event in events:
            shown = got.top_logprobs[event.start :]
            for told, token, all_ in zip(event.top_logprobs, event.tokens, shown, strict=False):
                assert told == (None if token is None else all_)


def test_log_probabilities_of_a_prompt(x64):
    """By the definition; and those of what was generated are the same when it is given as a prompt."""
    model = tiny_model(objective="autoregressive", block_size=None, mask_token_id=None)
    config = DecodingConfig(strategy="autoregressive", prompt_logprobs=True)
    plain = DecodingConfig(strategy="autoregressive")
    prompts = random_prompts(2, lengths=(1, 4, 18))
    got = generate(model, prompts, config, max_new_tokens=NEW, stop_token_ids=())
    served = Engine(model, **sizes())
    for prompt, completion in zip(prompts, got, strict=True):
        logits = oracle.forward(model, prompt, 1)
        wanted = [np.log(oracle.softmax(logits[i])[token]) for i, token in enumerate(prompt[1:])]
        first, *rest = completion.prompt_logprobs
        assert first is None and len(rest) == len(prompt) - 1
        np.testing.assert_allclose(rest, wanted, rtol=1e-9)
        (again,) = served.generate([prompt], config, max_new_tokens=1, stop_token_ids=())
        assert again.prompt_logprobs == completion.prompt_logprobs
    longer = [*prompts[1], *got[1].tokens]
    scored = generate(model, [longer, *prompts[1:]], config, max_new_tokens=0, stop_token_ids=())[0]
    np.testing.assert_allclose(scored.prompt_logprobs[-NEW:], got[1].logprobs, rtol=1e-9)
    assert generate(model, prompts, plain, max_new_tokens=1)[0].prompt_logprobs is None


@pytest.mark.slow
@pytest.mark.ci
def test_a_long_prompt_is_scored_in_parts():
    model = tiny_model(jnp.float32, objective="autoregressive", block_size=None, mask_token_id=None)
    config = DecodingConfig(strategy="autoregressive", prompt_logprobs=True)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    long, short = generate(model, [prompt, prompt[:100]], config, max_new_tokens=0)
    assert len(long.prompt_logprobs) == 300
    np.testing.assert_allclose(long.prompt_logprobs[1:100], short.prompt_logprobs[1:], rtol=1e-4)


CONFIGS = [
    ({"min_new_tokens": -1}, "min_new_tokens is -1", "0 (off)"),
    ({"min_new_tokens": 1.5}, "min_new_tokens is 1.5", "positive integer"),
    ({"top_logprobs": True}, "top_logprobs is True", "positive integer"),
    ({"eos_last": 1}, "eos_last is 1", "True or False"),
    ({"prompt_logprobs": None}, "prompt_logprobs is None", "True or False"),
    ({"suppress_token_ids": 5}, "suppress_token_ids is 5", "list of token ids"),
    ({"suppress_token_ids": (1, -2)}, "(1, -2)", "list of token ids"),
    ({"suppress_token_ids": "ab"}, "'ab'", "list of token ids"),
]


@pytest.mark.parametrize("fields, value, fix", CONFIGS, ids=str)
def test_bad_configs(fields, value, fix):
    with refused(ConfigError, value, fix):
        DecodingConfig(**fields)


def test_a_list_of_tokens_to_suppress_is_kept_as_a_tuple(unchecked_types):
    assert DecodingConfig(suppress_token_ids=[1, 2]) == DecodingConfig(suppress_token_ids=(1, 2))
    assert hash(DecodingConfig(suppress_token_ids=[1, 2]))


def test_requests_that_cannot_be_served_and_what_to_do():
    model = tiny_model(jnp.float32)
    everything = tuple(range(VOCAB))
    run = lambda new=4, stops=(), **fields: generate(
        model, [[1]], DecodingConfig(**fields), max_new_tokens=new, stop_token_ids=stops
    )
    with refused(DecodingError, "prompt_logprobs", "'low_confidence_dynamic'", "sdar_jax.nelbo"):
        run(prompt_logprobs=True)
    with refused(DecodingError, "min_new_tokens is 5 and max_new_tokens 4", "at most that"):
        run(min_new_tokens=5)
    assert len(run(min_new_tokens=4)[0].tokens) == 4
    with refused(DecodingError, "suppress_token_ids holds 23", "0 to 22"):
        run(suppress_token_ids=(22, 23))
    with refused(DecodingError, "leave no token to propose", "suppress fewer"):
        run(suppress_token_ids=everything)
    with refused(DecodingError, "leave no token to propose", "suppress fewer"):
        run(suppress_token_ids=everything[1:], min_new_tokens=1, stops=(0,))
    with refused(DecodingError, "top_logprobs is 24 and the vocabulary 23", "at most that"):
        run(top_logprobs=24)
    (only,) = run(suppress_token_ids=everything[1:], top_logprobs=23)
    assert {*only.tokens} == {0} and len(only.top_logprobs[0]) == VOCAB - 1


def test_an_engine_has_room_for_what_it_was_made_for():
    served = Engine(tiny_model(jnp.float32, vocab_size=60), **sizes())
    submit = lambda to, **fields: to.submit([1], DecodingConfig(**fields), max_new_tokens=4)
    with refused(DecodingError, "top_logprobs is 3 and the engine's 0", "Engine(top_logprobs=3)"):
        submit(served, top_logprobs=3)
    submit(Engine(tiny_model(jnp.float32), **sizes(top_logprobs=3)), top_logprobs=3)
    many = tuple(range(33))
    with refused(DecodingError, "33 suppress_token_ids", "at most 32", "sdar_jax.generate"):
        submit(served, suppress_token_ids=many)
    submit(served, suppress_token_ids=many[:32])
    config = DecodingConfig(suppress_token_ids=many)
    (got,) = generate(tiny_model(jnp.float32, vocab_size=60), [[1]], config, max_new_tokens=4)
    assert not {*got.tokens} & {*many}
    with refused(DecodingError, "top_logprobs is -1", "0 to 23"):
        Engine(tiny_model(jnp.float32), **sizes(top_logprobs=-1))


def test_what_is_not_asked_for_is_not_computed():
    """Without it the program holds no search for the likeliest tokens."""
    options = dict(max_new_tokens=4, stop_ids=(3,), seed=0, window_slots=2)
    for count, wanted in ((0, set()), (5, {5})):
        state, buffer = start_state(
            tiny_model(jnp.float32), [np.arange(9)], [DecodingConfig(top_logprobs=count)], **options
        )
        call = lambda model, state, buffer=buffer: advance(model, state, 9, buffer)
        found = equations(call, tiny_model(jnp.float32), state)
        assert {
            equation.params["k"] for equation in found if equation.primitive.name == "top_k"
        } == wanted
