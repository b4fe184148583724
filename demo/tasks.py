"""The demo's problems: reasoning-gym tasks with compact prompts, scored by reasoning-gym's own verifiers.

A small model has no use for a page of instructions, so a prompt is the task's name and its data, and an answer is the
verifier's form less its separators: `spiral_matrix 3636 1750 6203 6476=` is answered by `3636036746617502`. The
separators are put back before an answer is scored, so what counts as right is reasoning-gym's to say.
"""

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdar_jax.errors import ConfigError, DataError

Item = dict[str, Any]

# reasoning-gym seeds item i with seed + i, so that neighbouring seeds would share items.
_SEED_STRIDE = 1_000_000_007
# How many items are drawn for each distinct prompt wanted before a task counts as exhausted.
_DRAWS_PER_PROMPT = 4


@dataclass(frozen=True)
class Task:
    """One of reasoning-gym's datasets in compact form.

    name: the dataset's name in reasoning-gym, and the first word of every prompt.
    options: what its generator is called with.
    data, answer: an item's prompt (after the name) and its right answer.
    restore: an answer and its item to the text that the verifier reads, "" if the answer has no such form.
    """

    name: str
    options: Mapping[str, int]
    data: Callable[[Item], str]
    answer: Callable[[Item], str]
    restore: Callable[[str, Item], str]

    def prompt(self, item: Item) -> str:
        return f"{self.name} {self.data(item)}="

    def items(self, seed: int) -> Iterator[Item]:
        """Items without end; those of another seed are others."""
        dataset = self._dataset(seed * _SEED_STRIDE)
        return (dataset[index] for index in itertools.count())

    def score(self, answer: str, item: Item) -> float:
        """The verifier's reward. 1.0 is a right answer; some verifiers give a part of it for less."""
        return float(self._dataset(0).score_answer(self.restore(answer, item), item))

    def _dataset(self, seed: int) -> Any:
        return _create_dataset(self.name, tuple(self.options.items()), seed)


@functools.lru_cache(maxsize=32)
def _create_dataset(name: str, options: tuple[tuple[str, int], ...], seed: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError(
            "the demo's tasks need reasoning-gym: run pip install 'sdar-jax[demo]'"
        ) from error
    return reasoning_gym.create_dataset(name, seed=seed, **dict(options))


def _digits(item: Item) -> str:
    return "".join(item["answer"].split())


def _rows(matrix: Sequence[Sequence[int]]) -> str:
    return " ".join("".join(map(str, row)) for row in matrix)


def _only(alphabet: str, answer: str) -> str:
    """The answer, or "" if it strays from the task's alphabet: verifiers call `eval` on what they cannot parse."""
    return answer if set(answer) <= set(alphabet) else ""


def _spaced(answer: str, item: Item) -> str:
    return " ".join(_only("0123456789", answer))


def _gridded(answer: str, item: Item) -> str:
    digits, width = _only("0123456789", answer), len(item["metadata"]["solution"][0])
    return "\n".join(
        " ".join(digits[start : start + width]) for start in range(0, len(digits), width)
    )


def _matrix(item: Item) -> str:
    return _rows(item["metadata"]["matrix"])


def _degrees_and_matrix(item: Item) -> str:
    return f"{90 * item['metadata']['num_rotations']} {_matrix(item)}"


def _puzzle(item: Item) -> str:
    return _rows(item["metadata"]["puzzle"]).replace("0", "_")


def _letters(item: Item) -> str:
    return item["metadata"]["string"]


def _whole(numbers: Sequence[str]) -> str:
    return " ".join(number.removesuffix(".0") for number in numbers)


def _direction_and_numbers(item: Item) -> str:
    sign = "<" if item["metadata"]["direction"] == "ascending" else ">"
    return f"{sign} {_whole(item['metadata']['original_numbers'])}"


_REGISTERED = (
    Task("spiral_matrix", {"min_n": 4, "max_n": 4}, _matrix, _digits, _spaced),
    Task(
        "rotate_matrix",
        {"min_n": 4, "max_n": 4, "min_rotations": 1, "max_rotations": 1},
        _degrees_and_matrix,
        _digits,
        _gridded,
    ),
    Task(
        "string_insertion",
        {"min_string_length": 16, "max_string_length": 24},
        data=_letters,
        answer=lambda item: item["answer"],
        restore=lambda answer, item: _only("ABCDE", answer),
    ),
    Task(
        "number_sorting",
        {"min_numbers": 6, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 99},
        data=_direction_and_numbers,
        answer=lambda item: _whole(item["metadata"]["sorted_numbers"]),
        restore=lambda answer, item: json.dumps(_only("0123456789 ", answer).split()),
    ),
    Task("binary_matrix", {"min_n": 5, "max_n": 5}, _matrix, _digits, _gridded),
    Task("mini_sudoku", {"min_empty": 4, "max_empty": 8}, _puzzle, _digits, _gridded),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _REGISTERED}


def build(
    tasks: Sequence[str], n_train: int, n_test: int, seed: int, out_dir: Path | str
) -> tuple[Path, Path]:
    """Writes `n_train` training and `n_test` held-out problems, shared evenly among the tasks, in a shuffled order.

    Returns the paths of train.jsonl, with records of "prompt", "response" and "task", and of test.jsonl, where "entry"
    is what the verifier needs besides. All prompts are distinct, so no held-out one is trained on. The held-out
    problems depend on the tasks, `n_test` and `seed` alone. Raises ConfigError for an unknown task, DataError where
    reasoning-gym is missing or a task has too few distinct prompts; then nothing is written.
    """
    chosen = [_find(name) for name in tasks]
    train, test = [], []
    with tqdm(total=n_train + n_test, desc="problems", unit_scale=True, disable=None) as progress:
        for k, task in enumerate(chosen):
            held_out, trained = (_share(n, k, len(chosen)) for n in (n_test, n_train))
            items = _distinct_items(task, seed, held_out + trained, progress)
            test += [
                _record(task, item) | {"entry": item} for item in itertools.islice(items, held_out)
            ]
            train += [_record(task, item) for item in items]
    paths = Path(out_dir) / "train.jsonl", Path(out_dir) / "test.jsonl"
    for path, records in zip(paths, (train, test), strict=True):
        random.Random(seed).shuffle(records)
        _write_jsonl(path, records)
    return paths


def score(records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float]:
    """The verifiers' rewards for `answers` to test.jsonl's `records`. An answer is right where its reward is 1.0.

    Raises DataError unless there is one answer a record, ConfigError for a record of an unknown task.
    """
    if len(records) != len(answers):
        raise DataError(
            f"{len(answers)} answers to {len(records)} records: give one answer a record"
        )
    return [
        _find(record["task"]).score(answer, record["entry"])
        for record, answer in zip(records, answers, strict=True)
    ]


def _find(name: str) -> Task:
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[name]


def _share(total: int, k: int, parts: int) -> int:
    return total // parts + (k < total % parts)


def _distinct_items(task: Task, seed: int, wanted: int, progress: tqdm) -> Iterator[Item]:
    seen: set[str] = set()
    for item in itertools.islice(task.items(seed), _DRAWS_PER_PROMPT * wanted):
        if len(seen) == wanted:
            return
        prompt = task.prompt(item)
        if prompt not in seen:
            seen.add(prompt)
            progress.update()
            yield item
    if len(seen) < wanted:
        raise DataError(
            f"{task.name} gave only {len(seen)} distinct prompts of {wanted} wanted; ask for fewer problems"
        )


def _record(task: Task, item: Item) -> dict[str, Any]:
    return {"prompt": task.prompt(item), "response": task.answer(item), "task": task.name}


def _write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.replace(path)
