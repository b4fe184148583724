"""Graders: whether the text of an answer solves a problem.

Mathematics is compared by math-verify (`pip install 'sdar-jax[evaluate]'`). Code is run by `evaluation.sandbox`.
"""

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.sandbox import run_python


class Grade(NamedTuple):
    """What a grader says of an answer.

    Attributes:
        correct: whether it solves the problem.
        answer: what was taken for the answer, which votes count; None if there is none.
        reason: why it is wrong, where that is known.
        other_scores: by name, what else of it was found right or wrong; a score is the mean over all answers' entries.
    """

    correct: bool
    answer: str | None
    reason: str | None = None
    other_scores: Mapping[str, Sequence[bool]] = MappingProxyType({})


_SECONDS = 5
_SAID = re.compile(r"answer\s*(?:is|:)", re.IGNORECASE)
_SAID_PART = re.compile(r"[\s*]*(.+?)(?:\.(?!\d)|\*\*|\n|$)")
_FENCED = re.compile(r"```[ \t]*(?:[pP]y(?:thon)?3?)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
_LETTER = re.compile(r"(?<![A-Za-z])([ABCD])(?![A-Za-z])")
_SAID_LETTER = re.compile(r"answer\s*(?:is|:)?\s*\**\s*\(?([ABCD])(?![A-Za-z])", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds, braces matched; None if there is none that is closed.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    for found in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for at in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[found.end() : at].strip()
    return None


def final_answer(text: str) -> str | None:
    """The answer that a text ends with: what it boxes last, else what stands behind its last "answer is"."""
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    said = list(_SAID.finditer(text))
    part = _SAID_PART.match(text, said[-1].end()) if said else None
    return part and part[1].strip() or None


def grade_math(reference: str, text: str) -> Grade:
    """Compares the final answer with the reference as mathematics: 0.5 equals \\frac{1}{2}, 1,000 equals 1000.

    Raises ConfigError where math-verify is not installed.
    """
    parse, verify = _math_verify()
    answer = final_answer(text)
    if answer is None:
        return Grade(False, None, "no answer: nothing is boxed")
    if answer == reference.strip():
        return Grade(True, answer)
    # Its limits are signals, which only the main thread has.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"\\boxed{{{part}}}", parsing_timeout=seconds) for part in (reference, answer)]
    if verify(*parsed, timeout_seconds=seconds):
        return Grade(True, answer)
    return Grade(False, answer, f"{answer} is not {reference}")


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError(
            "gsm8k and math500 are graded by math-verify, which is not installed: pip install 'sdar-jax[evaluate]'"
        ) from None
    # What it cannot parse is a wrong answer, and not for the log.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify


def grade_choice(reference: str, text: str) -> Grade:
    """Compares the first letter A to D that a text says is its answer, else the first that stands alone."""
    boxed = last_boxed(text)
    found = _SAID_LETTER.search(text) or _LETTER.search(boxed or "") or _LETTER.search(text)
    if found is None:
        return Grade(False, None, "no answer: none of A, B, C, D")
    answer = found[1].upper()
    return Grade(
        answer == reference, answer, None if answer == reference else f"{answer} is not {reference}"
    )


def code_of(text: str) -> str:
    """The code of an answer: its first fenced block, which may have no end, else all of it."""
    found = _FENCED.search(text)
    return found[1] if found else text


def grade_humaneval(problem: Mapping[str, Any], text: str) -> Grade:
    """Runs a HumanEval problem's tests on an answer, which may be the whole function or its body alone."""
    code, entry = code_of(text), problem["entry_point"]
    if not re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        code = problem["prompt"] + _indented(code)
    else:
        # What the prompt imports and defines besides, the answer may leave out.
        code = f"{problem['prompt']}    pass\n\n{code}"
    return _run(f"{code}\n\n{problem['test']}\n\ncheck({entry})\n", code)


def grade_mbpp(problem: Mapping[str, Any], text: str) -> Grade:
    """Runs an MBPP problem's tests on an answer."""
    code, tests = code_of(text), "\n".join(_lines(problem["tests"]))
    return _run(f"{problem['setup']}\n{code}\n\n{tests}\n", code)


def _lines(tests: Sequence[str]) -> list[str]:
    return [test.strip() for test in tests]


def _indented(body: str) -> str:
    first = next((line for line in body.splitlines() if line.strip()), "")
    if first.startswith((" ", "\t")):
        return body
    return "\n".join("    " + line if line.strip() else line for line in body.splitlines())


def _run(program: str, code: str) -> Grade:
    failure = run_python(program)
    return Grade(failure is None, code.strip(), failure)
