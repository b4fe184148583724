"""Benchmarks, decoded and graded: every answer is kept, an interrupted run goes on, scores come with their interval."""

import json
import os
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.tokenizer import Encoder
from sdar_jax.decoding import Completion, DecodingConfig, Engine, generate
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.evaluation.scores import Answer, interval, pass_at, vote
from sdar_jax.evaluation.tasks import Problem, Task, load_tasks
from sdar_jax.model import Model

# Of each answer's line what scores need; the rest is for people.
_FIELDS = (
    *("id", "sample", "prompt", "correct", "answer", "confidence"),
    *("tokens", "denoising_forwards", "finish_reason"),
)
AHEAD = 4  # Batches under way: what an interruption can lose.
Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A task's scores.

    Attributes:
        task: its name.
        problems: how many were asked.
        samples: answers to each.
        score: mean over problems of how many of their answers are right.
        low, high: of its 95% interval.
        pass_at: by k, the chance that one of k answers is right; with several samples.
        majority, confidence_vote: whether the most frequent answer is right, answers counted alike or weighted by
            their probability; with several samples.
        tokens: of all answers.
        denoising_forwards: of all answers.
        tokens_per_forward: of all answers together.
        cut: answers that ended at their greatest length.
        unanswered: answers in which nothing was found to grade.
        other_scores: of a task that has more than one, by name.
        seconds: of the answers that were decoded now, grading left out.
        tokens_per_second: of those; 0 if there is none.
    """

    task: str
    problems: int
    samples: int
    score: float
    low: float
    high: float
    pass_at: dict[int, float]
    majority: float | None
    confidence_vote: float | None
    tokens: int
    denoising_forwards: int
    tokens_per_forward: float
    cut: int
    unanswered: int
    other_scores: dict[str, float]
    seconds: float
    tokens_per_second: float


class _Request(NamedTuple):
    problem: Problem
    sample: int
    ids: list[int]
    max_new_tokens: int
    seed: int

    @property
    def digest(self) -> int:
        """Tells its prompt from others."""
        return zlib.crc32(json.dumps(self.ids).encode())


def evaluate(
    model: Model,
    tokenizer: Any,
    tasks: Sequence[str | tuple[Task, list[Problem]]],
    config: DecodingConfig = DecodingConfig(),  # noqa: B008 (frozen)
    *,
    max_new_tokens: int = 4096,
    samples: int = 1,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    window_slots: int = 2,
    plain: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    allow_code: bool = False,
    output: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Decodes the problems of tasks and grades the answers; the scores do not depend on order, batch or interruptions.

    Args:
        tasks: names of `TASKS`, as NAME or NAME=PATH; or a Task of one's own with its problems.
        max_new_tokens: of an answer at most; fewer where the model's context ends.
        samples: answers to each problem; above 1 `config.temperature` has to be above 0.
        limit: only so many problems of each task, the first ones.
        batch_size: requests decoded at once.
        window_slots: K, blocks of a request that one forward may read, as of `Engine`.
        plain: problems as text, for a model without a chat template.
        chat_template_kwargs: variables of the chat template.
        allow_code: run what the model writes, where a task asks for that (`evaluation.sandbox`).
        output: a folder; answers are added to TASK.jsonl there as they come, and those that are there are not decoded
            again. Who calls sees to it that they are of the same model and settings.
        progress: is told how far it is.

    Raises:
        ConfigError: numbers or tasks that do not fit. DataError: problems or answers that cannot be read.
        DecodingError: a config that this model cannot decode with.
    """
    _check(config, samples, limit, batch_size, max_new_tokens)
    loaded = [task if isinstance(task, tuple) else load_tasks([task])[0] for task in tasks]
    names = [task.name for task, _ in loaded]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"tasks {', '.join(names) or 'are missing'}: give each once, and at least one"
        )
    for task, problems in loaded:
        if task.runs_code and not allow_code:
            raise ConfigError(
                f"{task.name} runs programs that the model writes; allow it (--allow-code), in a container if in doubt"
            )
        if not problems:
            raise ConfigError(f"{task.name} has no problems; give some")
    encode = encoder(tokenizer, plain, chat_template_kwargs or {})
    context = model.config.max_position_embeddings
    work = []
    for task, problems in loaded:
        chosen = problems[:limit]
        requests = [
            _request(task, problem, sample, encode(problem), max_new_tokens, context, seed)
            for problem in chosen
            for sample in range(samples)
        ]
        work.append((task, chosen, requests, _Answers(output, task.name)))
    missing = [r for *_, requests, answers in work for r in requests if not answers.has(r)]
    decode = _decoder(model, tokenizer, config, missing, batch_size, window_slots)
    return [
        _run(task, problems, requests, answers, decode, progress, samples, tokenizer)
        for task, problems, requests, answers in work
    ]


def _check(
    config: DecodingConfig, samples: int, limit: int | None, batch_size: int, max_new_tokens: int
) -> None:
    numbers = {
        "samples": samples,
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; give a positive integer")
    if samples > 1 and not config.temperature:
        raise ConfigError(
            f"samples is {samples} and temperature is 0, which gives the same answer each time; give a temperature"
        )


def encoder(
    tokenizer: Any, plain: bool, variables: dict[str, Any]
) -> Callable[[Problem], list[int]]:
    """What makes token ids of a problem. Raises ConfigError where there is no chat template and `plain` is not set."""
    encode = Encoder(tokenizer)
    if plain:
        text = lambda problem: "\n".join(message["content"] for message in problem.messages)
        return lambda problem: [*encode.leading, *encode(text(problem))]
    renderer = ChatRenderer(tokenizer)
    renderer.check_variables(variables)
    return lambda problem: encode(renderer.prompt({"messages": problem.messages}, variables))


def _request(
    task: Task, problem: Problem, sample: int, ids: list[int], new: int, context: int, seed: int
) -> _Request:
    room = context - len(ids)
    if room < 1:
        raise ConfigError(
            f"problem {problem.id} of {task.name} has {len(ids)} tokens and the model a context of {context}; leave the"
            " task out"
        )
    # Of its own name, so that neither order nor number of the others changes it.
    own = zlib.crc32(json.dumps([task.name, problem.id, sample, seed]).encode()) >> 1
    return _Request(problem, sample, ids, min(new, room), own)


def _decoder(
    model: Model,
    tokenizer: Any,
    config: DecodingConfig,
    requests: Sequence[_Request],
    batch_size: int,
    window_slots: int,
) -> Callable[[Sequence[_Request]], Iterator[Completion]]:
    """What decodes requests, in order; an engine that has room for all of them, or batches where nothing is cached."""
    if not requests:
        return lambda requests: iter(())
    if not config.paradigm(model.config).cached:
        return lambda requests: _in_batches(model, tokenizer, config, requests, batch_size)
    engine = Engine(
        model,
        tokenizer=tokenizer,
        batch_slots=min(batch_size, len(requests)),
        window_slots=window_slots,
        max_length=max(len(request.ids) + request.max_new_tokens for request in requests),
        max_queue=AHEAD * batch_size,
        block_size=config.block_size,
        strategies=() if config.strategy is None else (config.strategy,),
    )
    # Compiled now, and not in the time of the first answers.
    engine.warm_up(config)

    def decode(requests: Sequence[_Request]) -> Iterator[Completion]:
        waiting: deque[int] = deque()
        for request in requests:
            if len(waiting) == AHEAD * batch_size:
                yield engine.result(waiting.popleft())
            waiting.append(
                engine.submit(
                    request.ids, config, max_new_tokens=request.max_new_tokens, seed=request.seed
                )
            )
        while waiting:
            yield engine.result(waiting.popleft())

    return decode


def _in_batches(
    model: Model, tokenizer: Any, config: DecodingConfig, requests: Sequence[_Request], size: int
) -> Iterator[Completion]:
    # A batch has one seed for all its rows, which draws alike only where it draws nothing.
    step = 1 if config.temperature else size
    for start in range(0, len(requests), step):
        batch = requests[start : start + step]
        yield from generate(
            model,
            [request.ids for request in batch],
            config,
            max_new_tokens=min(request.max_new_tokens for request in batch),
            tokenizer=tokenizer,
            seed=batch[0].seed,
        )


class _Answers:
    """Graded answers by problem and sample; those of a file that a run before left, to which new ones are added."""

    def __init__(self, output: Path | None, task: str):
        self._file = None if output is None else output / f"{task}.jsonl"
        self._found: dict[tuple[str, int], Record] = {}
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._found = _read_answers(self._file)
        except OSError as error:
            raise DataError(f"{self._file}: {error.strerror}; choose another output") from None

    def has(self, request: _Request) -> bool:
        """Whether its answer is there. Raises DataError for an answer to another question of that name."""
        found = self._found.get((request.problem.id, request.sample))
        if found is not None and found["prompt"] != request.digest:
            raise DataError(
                f"{self._file}: the answer to problem {request.problem.id} was to another prompt; give the files that"
                " it was made with, or choose another output"
            )
        return found is not None

    def of(self, problem: Problem, samples: int) -> list[Record]:
        return [self._found[problem.id, sample] for sample in range(samples)]

    def add(self, record: Record) -> None:
        self._found[record["id"], record["sample"]] = record
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read_answers(path: Path) -> dict[tuple[str, int], Record]:
    """Reads the answers of a file; a last line that an interruption cut short is removed."""
    if not path.exists():
        return {}
    *lines, cut = path.read_bytes().split(b"\n")
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kept = {name: record[name] for name in _FIELDS}
            # Only tasks with more than one score have it.
            kept |= {name: record[name] for name in ("other_scores",) if name in record}
            found[record["id"], record["sample"]] = kept
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}:{number}: no answer of an evaluation; remove the file, or choose another output"
            ) from None
    if cut:
        os.truncate(path, path.stat().st_size - len(cut))
    return found


def _run(
    task: Task,
    problems: list[Problem],
    requests: list[_Request],
    answers: _Answers,
    decode: Callable[[Sequence[_Request]], Iterator[Completion]],
    progress: Callable[[str], None],
    samples: int,
    tokenizer: Any,
) -> Result:
    missing = [request for request in requests if not answers.has(request)]
    done, seconds, tokens = len(requests) - len(missing), 0.0, 0
    completions = decode(missing)
    for request in missing:
        started = time.perf_counter()
        completion = next(completions)
        seconds += time.perf_counter() - started
        tokens += len(completion.tokens)
        answers.add(_graded(task, request, completion, tokenizer))
        done += 1
        progress(f"{task.name}: {done} of {len(requests)}")
    records = [answers.of(problem, samples) for problem in problems]
    return _result(task, records, samples, seconds, tokens)


def _graded(task: Task, request: _Request, completion: Completion, tokenizer: Any) -> Record:
    text = completion.text or ""
    grade = task.grade(request.problem, text)
    logprobs = completion.logprobs
    return {
        "id": request.problem.id,
        "sample": request.sample,
        "prompt": request.digest,
        "correct": grade.correct,
        "answer": grade.answer,
        "reason": grade.reason,
        **({"other_scores": dict(grade.other_scores)} if grade.other_scores else {}),
        "text": text,
        "tokens": len(completion.tokens),
        "denoising_forwards": completion.denoising_forwards,
        "finish_reason": completion.finish_reason,
        "confidence": sum(logprobs) / len(logprobs) if logprobs else 0.0,
        "parts": _parts(completion, tokenizer),
    }


def _parts(completion: Completion, tokenizer: Any) -> list[tuple[str, int]]:
    """The text in pieces of whole characters, and the forward that committed the last token of each."""
    parts, open_tokens = [], []
    for token, step in zip(completion.tokens, completion.steps, strict=True):
        open_tokens.append(token)
        if not (text := tokenizer.decode(open_tokens)).endswith("\ufffd"):
            parts.append((text, step))
            open_tokens = []
    return [*parts, (tokenizer.decode(open_tokens), completion.steps[-1])] if open_tokens else parts


def _result(
    task: Task, records: list[list[Record]], samples: int, seconds: float, new_tokens: int
) -> Result:
    graded = [
        [Answer(each["correct"], each["answer"], each["confidence"]) for each in own]
        for own in records
    ]
    correct = [[answer.correct for answer in own] for own in graded]
    score, low, high = interval(correct)
    flat = [each for own in records for each in own]
    total = lambda name: sum(each[name] for each in flat)
    mean = lambda values: sum(values) / len(records)
    # Powers of two, and all of them.
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    several = samples > 1
    return Result(
        task=task.name,
        problems=len(records),
        samples=samples,
        score=score,
        low=low,
        high=high,
        pass_at={k: mean(pass_at(k, own) for own in correct) for k in ks} if several else {},
        majority=mean(vote(own) for own in graded) if several else None,
        confidence_vote=mean(vote(own, weighted=True) for own in graded) if several else None,
        tokens=total("tokens"),
        denoising_forwards=total("denoising_forwards"),
        tokens_per_forward=total("tokens") / max(total("denoising_forwards"), 1),
        cut=Counter(each["finish_reason"] for each in flat)["length"],
        unanswered=sum(each["answer"] is None for each in flat),
        other_scores=_other_scores([each.get("other_scores", {}) for each in flat]),
        seconds=seconds,
        tokens_per_second=new_tokens / seconds if seconds else 0.0,
    )


def _other_scores(found: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """The mean of each over the entries of all answers: of instructions, not of prompts."""
    entries = defaultdict(list)
    for name, rights in (pair for each in found for pair in each.items()):
        entries[name] += rights
    return {name: sum(rights) / len(rights) for name, rights in entries.items() if rights}
