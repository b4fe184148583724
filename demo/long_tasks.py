"""Problems with answers of 64 characters, for decoding many blocks at once. Three have one right answer, one many.

copy      the letters as they are
shift     each letter moved on by the key, in an alphabet of ten
total     the running sum of the digits, modulo 10: each character needs the one before it
walk      any path of digits from the given one, each one up or down from the one before, modulo 10: half of all
          continuations are right at each step, and two neighbours that are guessed apart fit together half the time
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_jax.errors import ConfigError

LENGTH = 64
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


def _letters(draw: random.Random) -> str:
    return "".join(draw.choices(_LETTERS, k=LENGTH))


def _shifted(data: str) -> str:
    key, letters = data.split()
    return "".join(_LETTERS[(_LETTERS.index(letter) + int(key)) % 10] for letter in letters)


def _totals(data: str) -> str:
    totals, total = "", 0
    for digit in data:
        total = (total + int(digit)) % 10
        totals += str(total)
    return totals


def _path(data: str, draw: random.Random) -> str:
    path = data
    while len(path) <= LENGTH:
        path += str((int(path[-1]) + draw.choice((1, -1))) % 10)
    return path[1:]


def _is_path(data: str, answer: str) -> bool:
    path = data + answer
    if len(answer) != LENGTH or not set(answer) <= set(_DIGITS):
        return False
    steps = ((int(b) - int(a)) % 10 for a, b in itertools.pairwise(path))
    return all(step in (1, 9) for step in steps)


def _one_answer(data: Callable[[random.Random], str], solve: Callable[[str], str]) -> LongTask:
    return LongTask(
        data, lambda data, draw: solve(data), lambda data, answer: answer == solve(data)
    )


TASKS = {
    "copy": _one_answer(_letters, lambda data: data),
    "shift": _one_answer(lambda draw: f"{draw.randrange(1, 10)} {_letters(draw)}", _shifted),
    "total": _one_answer(lambda draw: "".join(draw.choices(_DIGITS, k=LENGTH)), _totals),
    "walk": LongTask(lambda draw: draw.choice(_DIGITS), _path, _is_path),
}


def build(tasks: Sequence[str], count: int, seed: int, path: Path) -> list[dict[str, Any]]:
    """Draws problems, shared evenly among the tasks, and writes them as JSONL of "prompt", "response" and "task".

    The prompts of two seeds differ, but for those of walk, which has ten.

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
