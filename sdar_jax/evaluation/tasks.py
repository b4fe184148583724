"""Benchmarks: problems from files in their public form, the prompt of the published settings, and the grader.

Prompts are those behind the scores of SDAR's Table 1 (the OpenCompass configurations that the paper's evaluation
names): no examples, the chat template, a chain of thought; MMLU has five examples of its development set, and IFEval's
prompts stand as they are.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdar_jax.data.config import SourceConfig
from sdar_jax.data.sources import Source
from sdar_jax.errors import ConfigError, DataError, SdarError
from sdar_jax.evaluation.graders import (
    Grade,
    grade_choice,
    grade_humaneval,
    grade_math,
    grade_mbpp,
    last_boxed,
)
from sdar_jax.evaluation.ifeval import grade_ifeval

Record = dict[str, Any]
Message = dict[str, str]

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        id: tells it apart from the task's other problems, also in another order or number of them.
        messages: of the conversation that asks it.
        record: what the grader knows of it.
    """

    id: str
    messages: list[Message]
    record: Record


@dataclass(frozen=True)
class Task:
    """A benchmark. One's own is made in the same way and given to `evaluate` beside those of `TASKS`.

    Attributes:
        name: of files and tables.
        path: where its records are if no other files are named: as the path of a data source.
        problems: makes the problems of its records.
        grade: says of an answer's text whether it solves the problem.
        runs_code: whether grading runs what the model wrote.
    """

    name: str
    path: str
    problems: Callable[[Sequence[Record]], list[Problem]]
    grade: Callable[[Problem, str], Grade]
    runs_code: bool = False

    def load(self, path: str | None = None) -> list[Problem]:
        """Reads the problems: JSONL, JSON or parquet, a file, directory, glob or hub path.

        Raises:
            DataError: files that cannot be read, or records that are not in the task's public form.
            ConfigError: a package is missing that the task's problems are held to.
        """
        path = self.path if path is None else path
        records = read_all(path)
        try:
            found = self.problems(records)
        except SdarError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            why = f"a record is not in the form of {self.name} ({type(error).__name__}: {error})"
            raise DataError(f"{path}: {why}; give its public files") from None
        ids = [problem.id for problem in found]
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise DataError(
                f"{path}: problem {twice!r} of {self.name} is there twice; give each once"
            )
        return found


def read_all(path: str) -> list[Record]:
    """Reads the records of all files of a path, whichever of JSONL, JSON and parquet they are. Raises DataError."""
    # Of the formats the one that takes any of these files.
    source = Source(SourceConfig(path, "chat"))
    if source.failures:
        raise DataError(source.failures[0])
    records = []
    for k in range(len(source)):
        try:
            records.append(source.read(k))
        except DataError as error:
            raise DataError(f"{source.where(k)}: {error}") from None
    if not records:
        raise DataError(f"{path}: no record in it; give files that are not empty")
    return records


def load_tasks(names: Sequence[str]) -> list[tuple[Task, list[Problem]]]:
    """Reads tasks by name, each as NAME or NAME=PATH. Raises ConfigError and DataError."""
    loaded = []
    for given in names:
        name, named, path = given.partition("=")
        if name not in TASKS:
            raise ConfigError(
                f"task {name!r}: choose from {', '.join(TASKS)}, each as NAME or NAME=PATH"
            )
        if named and not path:
            raise ConfigError(f"task {given!r}: give a path behind the sign")
        loaded.append((TASKS[name], TASKS[name].load(path or None)))
    if not loaded:
        raise ConfigError(f"no task is named; choose from {', '.join(TASKS)}")
    if len({task.name for task, _ in loaded}) < len(loaded):
        raise ConfigError(f"tasks {', '.join(names)}: one is named twice; give each once")
    return loaded


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _gsm8k(records: Sequence[Record]) -> list[Problem]:
    """{"question", "answer"}, whose last line is `#### 42`."""
    problems = []
    for i, record in enumerate(records):
        _, marked, reference = record["answer"].rpartition("####")
        if not marked:
            raise ValueError(f"the answer of record {i} has no line '#### ...'")
        solution = {"reference": reference.strip().replace(",", "")}
        problems.append(Problem(str(i), _asked(record["question"] + BOXED), solution))
    return problems


def _math(records: Sequence[Record]) -> list[Problem]:
    """{"problem", "solution"}; the reference is what the solution boxes last, else "answer"."""
    problems = []
    for i, record in enumerate(records):
        # In some copies of MATH-500 the field "answer" is not what the solution says.
        reference = last_boxed(record.get("solution") or "") or record["answer"]
        name = str(record.get("unique_id") or i)
        problems.append(Problem(name, _asked(record["problem"] + BOXED), {"reference": reference}))
    return problems


def _humaneval(records: Sequence[Record]) -> list[Problem]:
    """{"task_id", "prompt", "test", "entry_point"}."""
    fields = ("prompt", "test", "entry_point")
    return [
        Problem(
            record["task_id"],
            _asked(f"Complete the following python code:\n{record['prompt']}"),
            {name: record[name] for name in fields},
        )
        for record in records
    ]


def _mbpp(records: Sequence[Record]) -> list[Problem]:
    """{"task_id", "prompt" or "text", "test_list"}, and "test_imports" or "test_setup_code"."""
    problems = []
    for record in records:
        text = record["prompt"] if "prompt" in record else record["text"]
        tests = "\n".join(record["test_list"])
        asked = (
            f"You are an expert Python programmer, and here is your task:\n{text}\n"
            f"Your code should pass these tests:\n\n{tests}\n"
            " You should submit your final solution in the following format: ```python\n\n```"
        )
        setup = [*(record.get("test_imports") or []), record.get("test_setup_code") or ""]
        graded = {"tests": list(record["test_list"]), "setup": "\n".join(setup)}
        problems.append(Problem(str(record["task_id"]), _asked(asked), graded))
    return problems


def _ifeval(records: Sequence[Record]) -> list[Problem]:
    """{"key", "prompt", "instruction_id_list", "kwargs"}, an object of arguments for each instruction."""
    fields = ("key", "prompt", "instruction_id_list", "kwargs")
    problems = [
        Problem(
            str(record["key"]), _asked(record["prompt"]), {name: record[name] for name in fields}
        )
        for record in records
    ]
    for problem in problems:
        # What the checkers do not know or cannot read is found now, and not behind hours of decoding.
        grade_ifeval(problem.record, "")
    return problems


def _mmlu(records: Sequence[Record]) -> list[Problem]:
    """{"question", "choices", "answer" (a number or a letter), "subject"}; with "split": "dev", an example.

    Each question follows its subject's first five examples, as turns of the conversation, where the files have them.
    """
    examples: dict[str, list[Message]] = {}
    for record in (record for record in records if record.get("split") == "dev"):
        turns = examples.setdefault(record["subject"], [])
        if len(turns) < 10:
            turns += [*_asked(_choices(record)), {"role": "assistant", "content": _letter(record)}]
    return [
        Problem(
            str(i),
            [*examples.get(record["subject"], []), *_asked(_choices(record))],
            {"reference": _letter(record)},
        )
        for i, record in enumerate(record for record in records if record.get("split") != "dev")
    ]


def _choices(record: Record) -> str:
    subject = record["subject"].replace("_", " ")
    lines = [
        f"{letter}. {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True)
    ]
    return (
        f"There is a single choice question about {subject}. Answer the question by replying A, B, C or D.\n"
        f"Question: {record['question']}\n" + "\n".join(lines) + "\nAnswer: "
    )


def _letter(record: Record) -> str:
    answer = record["answer"]
    letter = answer if isinstance(answer, str) else "ABCD"[answer]
    if letter not in tuple("ABCD"):
        raise ValueError(f"answer {json.dumps(answer)} is none of A, B, C, D")
    return letter


def _by_reference(grade: Callable[[str, str], Grade]) -> Callable[[Problem, str], Grade]:
    return lambda problem, text: grade(problem.record["reference"], text)


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "hf://openai/gsm8k/main/test-*.parquet", _gsm8k, _by_reference(grade_math)),
        Task("math500", "hf://HuggingFaceH4/MATH-500/test.jsonl", _math, _by_reference(grade_math)),
        Task(
            "humaneval",
            "hf://openai/openai_humaneval/openai_humaneval/test-*.parquet",
            _humaneval,
            lambda problem, text: grade_humaneval(problem.record, text),
            runs_code=True,
        ),
        Task(
            "mbpp",
            "hf://google-research-datasets/mbpp/sanitized/test-*.parquet",
            _mbpp,
            lambda problem, text: grade_mbpp(problem.record, text),
            runs_code=True,
        ),
        Task(
            "ifeval",
            "hf://google/IFEval/ifeval_input_data.jsonl",
            _ifeval,
            lambda problem, text: grade_ifeval(problem.record, text),
        ),
        Task("mmlu", "hf://cais/mmlu/all/test-*.parquet", _mmlu, _by_reference(grade_choice)),
    )
}
