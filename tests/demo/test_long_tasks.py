"""Problems with long answers: what is right is right, and little else."""

import random

import pytest

from demo.long_tasks import LENGTH, TASKS, build, is_right
from sdar_jax.errors import ConfigError
from tests.bad_input import refused


@pytest.fixture
def problems(tmp_path):
    return build(tuple(TASKS), 80, 5, tmp_path / "data" / "test.jsonl")


def test_their_own_answers_are_right(problems):
    assert {problem["task"] for problem in problems} == set(TASKS)
    for problem in problems:
        assert len(problem["response"]) == LENGTH == 64
        assert is_right(problem, problem["response"])


def test_an_answer_with_another_character_is_wrong(problems):
    draw = random.Random(0)
    for problem in problems:
        answer = list(problem["response"])
        at = draw.choice([i for i, character in enumerate(answer) if character != " "])
        # Of a path each digit is a step from the one before; five up or down never is.
        answer[at] = str((int(answer[at]) + 5) % 10) if answer[at].isdigit() else "z"
        assert not is_right(problem, "".join(answer))
        assert not is_right(problem, problem["response"][:-1])
        assert not is_right(problem, "")


def test_known_answers():
    one = lambda task, data: {"task": task, "prompt": f"{task} {data}="}
    words = " ".join(["abij"] * 13)
    assert is_right(one("copy", words), words)
    assert is_right(one("shift", f"2 {words}"), " ".join(["cdab"] * 13))
    assert is_right(one("sums", " ".join(["5571"] * 13)), " ".join(["5078"] * 13))
    assert is_right(one("walks", "9"), " ".join(["0987"] * 12 + ["8909"]))
    assert not is_right(one("walks", "9"), " ".join(["0987"] * 12 + ["1210"]))


def test_seeds_share_no_prompt(tmp_path):
    """But for walks, which has ten."""
    names = tuple(set(TASKS) - {"walks"})
    prompts = [
        {problem["prompt"] for problem in build(names, 400, seed, tmp_path / f"{seed}.jsonl")}
        for seed in (0, 1)
    ]
    assert not prompts[0] & prompts[1]


def test_an_unknown_task_is_refused(tmp_path):
    with refused(ConfigError, "'sorting'", "copy"):
        build(("copy", "sorting"), 4, 0, tmp_path / "x.jsonl")
