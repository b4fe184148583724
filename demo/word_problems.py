"""Word problems in two steps, in GSM8K's form: what a language model of 135M weights can learn on a laptop.

    python -m demo.word_problems FOLDER [--train 4000] [--test 200] [--seed 0]

FOLDER/train.jsonl has conversations, asked as `sdar-jax evaluate` asks GSM8K; FOLDER/test.jsonl has GSM8K's own form,
`{"question", "answer": "... #### 37"}`. No question is in both.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdar_jax.evaluation.tasks import BOXED

_NAMES = ("Ana", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "roses", "shells", "stamps")
# The second step changes what the first one left by a number, or by as many times.
_FIRST = {
    "+": ("buys {b} more", "finds {b} more", "is given {b} more"),
    "-": ("gives {b} away", "loses {b}", "sells {b}"),
}
_SECOND = {
    **_FIRST,
    "*": ("then sees that a friend has {b} times as many",),
}


class Problem(NamedTuple):
    """A question, its solution in words, and the number that it asks for."""

    question: str
    solution: str
    answer: int


def problem(random: random.Random) -> Problem:
    """Draws one; no number in it is below 2, and none above 480."""
    name, things = random.choice(_NAMES), random.choice(_THINGS)
    start = random.randint(10, 80)
    first, left, b = _step(random, random.choice("+-"), start)
    second, end, c = _step(random, random.choice("+-*"), left)
    event = random.choice(_FIRST[first]).format(b=b)
    then = random.choice(_SECOND[second]).format(b=c)
    who = "the friend" if second == "*" else name
    joined = f"{name} {event} and {then}." if second == "*" else f"{name} {event}, and {then}."
    question = f"{name} has {start} {things}. {joined} How many {things} does {who} have?"
    return Problem(question, f"{start} {first} {b} = {left}. {left} {second} {c} = {end}.", end)


def _step(random: random.Random, sign: str, value: int) -> tuple[str, int, int]:
    """Changes a value: the sign of what was done, the new value, and the number that it was done with."""
    if sign == "*":
        times = random.randint(2, 4)
        return sign, value * times, times
    if sign == "-" and value >= 8:
        taken = random.randint(2, value - 4)
        return sign, value - taken, taken
    more = random.randint(2, 40)
    return "+", value + more, more


def problems(seed: int) -> Iterator[Problem]:
    """Yields problems without end, each question once."""
    generator, seen = random.Random(seed), set()
    while True:
        drawn = problem(generator)
        if drawn.question not in seen:
            seen.add(drawn.question)
            yield drawn


def for_training(each: Problem) -> dict[str, Any]:
    """Makes a conversation of it."""
    return {
        "messages": [
            {"role": "user", "content": each.question + BOXED},
            {
                "role": "assistant",
                "content": f"{each.solution} The answer is \\boxed{{{each.answer}}}.",
            },
        ]
    }


def for_test(each: Problem) -> dict[str, Any]:
    """Puts it into GSM8K's form."""
    return {"question": each.question, "answer": f"{each.solution}\n#### {each.answer}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="conversations to learn from")
    parser.add_argument("--test", type=int, default=200, help="problems to be scored on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.train, options.test, options.seed)


def write(folder: Path, train: int = 4000, test: int = 200, seed: int = 0) -> None:
    """Writes train.jsonl and test.jsonl with so many problems."""
    drawn = problems(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, form in (("test", test, for_test), ("train", train, for_training)):
        lines = [json.dumps(form(next(drawn))) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
