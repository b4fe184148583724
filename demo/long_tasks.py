"""Problems with answers of 64 characters, for decoding many blocks at once: 13 words of four, apart from each other.

copy      the words as they are
shift     each letter moved on by the key, in an alphabet of ten
sums      each word's running sum, modulo 10: within a word each digit needs the one before it
walks     in each word any path of digits from the given one, each digit one up or down from the one before, modulo 10:
          half of all continuations are right at each step, and two neighbours that are guessed apart fit together
          half the time

The first three have one right answer, the last has many.
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_jax.errors import ConfigError

_WORDS, _SIZE = 13, 4
LENGTH = _WORDS * (_SIZE + 1) - 1
_LETTERS = "abcdefghij"
_DIGITS = "0123456789"


@dataclass(frozen=True)
class LongTask:
    """A kind of problem.

    data: draws what stands in a prompt behind the task's name.
    answer: a right answer to such data, drawn where there are many.
    right: whether an answer is right.
    """

    data: Callable[[random.Random], str]
    answer: Callable[[str, random.Random], str]
    right: Callable[[str, str], bool]


def _words(alphabet: str, draw: random.Random) -> str:
    return " ".join("".join(draw.choices(alphabet, k=_SIZE)) for _ in range(_WORDS))


def _letters(draw: random.Random) -> str:
    return _words(_LETTERS, draw)


def _shifted(data: str) -> str:
    key, letters = data.split(" ", 1)
    moved = _LETTERS[int(key) :] + _LETTERS[: int(key)]
    return letters.translate(str.maketrans(_LETTERS, moved))


def _sums(data: str) -> str:
    totals = (itertools.accumulate(map(int, word)) for word in data.split())
    return " ".join("".join(str(total % 10) for total in word) for word in totals)


def _paths(data: str, draw: random.Random) -> str:
    words = []
    for _ in range(_WORDS):
        path = data
        while len(path) <= _SIZE:
            path += str((int(path[-1]) + draw.choice((1, -1))) % 10)
        words.append(path[1:])
    return " ".join(words)


def _are_paths(data: str, answer: str) -> bool:
    words = answer.split(" ")
    if [len(word) for word in words] != [_SIZE] * _WORDS or set(answer) - set(_DIGITS + " "):
        return False
    steps = (pair for word in words for pair in itertools.pairwise(data + word))
    return all((int(b) - int(a)) % 10 in (1, 9) for a, b in steps)


def _one_answer(data: Callable[[random.Random], str], solve: Callable[[str], str]) -> LongTask:
    return LongTask(
        data, lambda data, draw: solve(data), lambda data, answer: answer == solve(data)
    )


TASKS = {
    "copy": _one_answer(_letters, lambda data: data),
    "shift": _one_answer(lambda draw: f"{draw.randrange(1, 10)} {_letters(draw)}", _shifted),
    "sums": _one_answer(lambda draw: _words(_DIGITS, draw), _sums),
    "walks": LongTask(lambda draw: draw.choice(_DIGITS), _paths, _are_paths),
}


def build(tasks: Sequence[str], count: int, seed: int, path: Path) -> list[dict[str, Any]]:
    """Draws problems, shared evenly among the tasks, and writes them as JSONL of "prompt", "response" and "task".

    The prompts of two seeds differ, but for those of walks, which has ten.

    Raises:
        ConfigError: an unknown task.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ConfigError(f"task {min(unknown)!r} is unknown; choose from {', '.join(TASKS)}")
    draw = random.Random(seed)
    records = []
    for i in range(count):
        name = tasks[i % len(tasks)]
        data = TASKS[name].data(draw)
        response = TASKS[name].answer(data, draw)
        records.append({"prompt": f"{name} {data}=", "response": response, "task": name})
    draw.shuffle(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)
    return records


def is_right(problem: dict[str, Any], answer: str) -> bool:
    """Tells whether an answer to a problem of `build` is right."""
    data = problem["prompt"].split(" ", 1)[1].removesuffix("=")
    return TASKS[problem["task"]].right(data, answer)
