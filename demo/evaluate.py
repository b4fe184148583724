"""Every way of decoding on the same held-out problems, scored by the tasks' own verifiers."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from demo.tasks import score
from sdar_jax import Completion, DecodingConfig, generate, nelbo
from sdar_jax.evaluation import autoregressive_nll
from sdar_jax.model import Model

BASELINE = "ar_sft"
CONVERTED = ("block4_sft", "block8_sft")
THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
BATCH = 250
# Problems that are decoded one by one, for the speed that a single user sees.
ALONE = 50
MAX_NEW_TOKENS = 24

Problem = dict[str, Any]


class Result(NamedTuple):
    """One way of decoding. accuracy and its standard error; means a problem of generated tokens and forwards; tokens
    a second in batches, without the first, which compiles (0 if it was the only one), and of one problem at a time."""

    model: str
    block_size: int | None
    strategy: str
    threshold: float | None
    accuracy: float
    standard_error: float
    tokens_per_forward: float
    denoising_forwards: float
    commit_forwards: float
    tokens_per_second: float
    tokens_per_second_alone: float


def read_problems(path: Path) -> list[Problem]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ways(model: Model) -> list[tuple[str, DecodingConfig]]:
    """How a model is decoded, each way with its name: greedy if autoregressive, else static and dynamic at each
    threshold."""
    if not model.config.paradigm.masks:
        return [("AR greedy", DecodingConfig(strategy="autoregressive"))]
    dynamic = [("dynamic", DecodingConfig(confidence_threshold=tau)) for tau in THRESHOLDS]
    return [("static", DecodingConfig(strategy="low_confidence_static")), *dynamic]


def evaluate(
    models: dict[str, Model], tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[Result]:
    """Each model in each of its ways, on all problems."""
    runs = [(name, *way) for name, model in models.items() for way in ways(model)]
    calls = -(-len(problems) // BATCH) + 1
    with tqdm(total=len(runs) * calls, desc="decoding", unit="batch", disable=None) as bar:
        return [
            _run(name, models[name], way, config, tokenizer, problems, bar)
            for name, way, config in runs
        ]


def _run(name, model, way: str, config: DecodingConfig, tokenizer, problems, bar: tqdm) -> Result:
    done: list[Completion] = []
    timed_tokens, seconds = 0, 0.0
    for first in range(0, len(problems), BATCH):
        prompts = [problem["prompt"] for problem in problems[first : first + BATCH]]
        started = time.perf_counter()
        completions = generate(
            model, prompts, config, max_new_tokens=MAX_NEW_TOKENS, tokenizer=tokenizer
        )
        if first and len(prompts) == BATCH:
            seconds += time.perf_counter() - started
            timed_tokens += sum(len(c.tokens) for c in completions)
        done += completions
        bar.update()
    rate = timed_tokens / seconds if seconds else 0.0
    alone = _rate_alone(model, config, tokenizer, problems[:ALONE])
    bar.update()
    return _result(name, model, way, config, problems, done, (rate, alone))


def _rate_alone(model: Model, config: DecodingConfig, tokenizer, problems) -> float:
    """Tokens a second where one problem is decoded at a time; the first is decoded once more, as it compiles."""
    tokens, started = 0, time.perf_counter()
    for i, problem in enumerate([problems[0], *problems]):
        if i == 1:
            tokens, started = 0, time.perf_counter()
        (completion,) = generate(
            model, [problem["prompt"]], config, max_new_tokens=MAX_NEW_TOKENS, tokenizer=tokenizer
        )
        tokens += len(completion.tokens)
    return tokens / (time.perf_counter() - started)


def _result(
    name,
    model,
    way: str,
    config: DecodingConfig,
    problems,
    done: list[Completion],
    rates: tuple[float, float],
) -> Result:
    right = np.array(score(problems, [c.text or "" for c in done])) == 1.0
    denoising = sum(c.denoising_forwards for c in done)
    return Result(
        model=name,
        block_size=model.config.block_size if model.config.paradigm.masks else None,
        strategy=way,
        threshold=config.confidence_threshold if way == "dynamic" else None,
        accuracy=float(right.mean()),
        standard_error=float(right.std(ddof=1) / np.sqrt(len(right))),
        tokens_per_forward=sum(len(c.tokens) for c in done) / denoising,
        denoising_forwards=denoising / len(done),
        commit_forwards=sum(c.commit_forwards for c in done) / len(done),
        tokens_per_second=rates[0],
        tokens_per_second_alone=rates[1],
    )


def likelihoods(
    models: dict[str, Model], tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[str]:
    """Nats per answer token (its end included): exact for AR, the bound with its standard error for the others."""
    tokens, segment_ids, answers = _rows(tokenizer, problems)
    lines = []
    for name, model in models.items():
        if not model.config.paradigm.masks:
            exact = autoregressive_nll(model, tokens, segment_ids=segment_ids, loss_mask=answers)
            lines.append(f"{name} exact NLL {exact:.4f}")
        else:
            size = model.config.paradigm.block_size
            mean, error = nelbo(
                model, tokens, block_size=size, segment_ids=segment_ids, loss_mask=answers
            )
            lines.append(f"{name} NELBO {mean:.4f} ± {error:.4f}")
    return lines


def _rows(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One problem a row: ids, segments and which tokens belong to the answer."""
    prompts = [tokenizer.encode(problem["prompt"]) for problem in problems]
    responses = [
        [*tokenizer.encode(problem["response"]), tokenizer.eos_token_id] for problem in problems
    ]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = np.zeros((len(problems), length), np.int32)
    segment_ids, answers = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[i, :end], segment_ids[i, :end] = prompt + response, 1
        answers[i, len(prompt) : end] = True
    return tokens, segment_ids, answers
