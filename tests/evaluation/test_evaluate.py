"""Scores do not depend on order, batch or interruptions; intervals, votes and pass@k are those of their definitions."""

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax import DecodingConfig, generate, save_pretrained
from sdar_jax.cli import main
from sdar_jax.cli.evaluate import table
from sdar_jax.errors import ConfigError, DataError
from sdar_jax.evaluation import Problem, Task, evaluate
from sdar_jax.evaluation.graders import Grade
from sdar_jax.evaluation.scores import Answer, interval, pass_at, vote
from tests.bad_input import message_of
from tests.data.conftest import make_byte_tokenizer
from tests.tiny import tiny_model
from tests.virtual_devices import run_module

NEW = 12
SAMPLED = DecodingConfig(temperature=1.0)


# Scores.


@given(st.integers(1, 60), st.data())
def test_wilsons_interval_holds_the_scores_that_a_test_would_not_refuse(count, data):
    """It is the set of p with |mean - p| <= z sqrt(p (1 - p) / n)."""
    right = data.draw(st.integers(0, count))
    mean, low, high = interval([[i < right] for i in range(count)])
    assert mean == right / count
    for p in (low, high):
        assert abs(mean - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), abs=1e-6)


def test_several_answers_to_a_problem_count_as_one_observation():
    alike = interval([[True] * 5, [False] * 5] * 8)
    assert alike[0] == 0.5
    assert alike[2] - alike[0] == pytest.approx(1.959964 * np.std([1, 0] * 8, ddof=1) / 4)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    choices = list(itertools.combinations(correct, k))
    assert pass_at(k, correct) == pytest.approx(
        float(Fraction(sum(map(any, choices)), len(choices)))
    )


def test_votes():
    answers = [
        Answer(False, "1", math.log(0.2)),
        Answer(False, "1", math.log(0.2)),
        Answer(True, "2", math.log(0.9)),
        Answer(False, None, 0.0),
        Answer(False, None, 0.0),
        Answer(False, None, 0.0),
    ]
    assert not vote(answers) and vote(answers, weighted=True)
    assert vote(answers[1:]) is False and vote([*answers[2:], answers[0]]) is True
    assert vote([Answer(False, None, 0.0)]) is False


# Decoding.


@pytest.fixture(scope="module")
def model():
    return tiny_model(jnp.float32, vocab_size=320, mask_token_id=300)


def problems(count=5):
    return [
        Problem(f"p{i}", [{"role": "user", "content": "q" * (3 * i + 1)}], {"modulus": 2 + i % 2})
        for i in range(count)
    ]


def grade(problem, text):
    """Any rule of the text alone that answers pass and fail."""
    total = sum(text.encode())
    return Grade(total % problem.record["modulus"] == 0, str(total % 3), None)


TASK = Task("toy", "nowhere", lambda records: [], grade)


def run(model, config=SAMPLED, own=None, **options):
    options = {"max_new_tokens": NEW, "samples": 2} | options
    (result,) = evaluate(
        model, make_byte_tokenizer(), [(TASK, own or problems())], config, **options
    )
    return result


def lines(folder):
    """The answers, without their confidence, whose last bits depend on the batch."""
    found = [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]
    assert all(each.pop("confidence") <= 0 for each in found)
    return {(each["id"], each["sample"]): each for each in found}


def test_neither_batch_nor_order_nor_number_changes_an_answer(model, tmp_path):
    first = run(model, output=tmp_path / "a")
    second = run(model, batch_size=2, own=problems()[::-1], output=tmp_path / "b")
    assert (first.score, first.tokens, first.pass_at) == (
        second.score,
        second.tokens,
        second.pass_at,
    )
    assert {key: each["text"] for key, each in lines(tmp_path / "a").items()} == {
        key: each["text"] for key, each in lines(tmp_path / "b").items()
    }
    third = run(model, limit=2, samples=1, output=tmp_path / "c")
    assert third.problems == 2 and third.pass_at == {} and third.majority is None
    some = lines(tmp_path / "c")
    assert {key: some[key]["text"] for key in some} == {
        key: lines(tmp_path / "a")[key]["text"] for key in some
    }


def test_an_interrupted_evaluation_goes_on(model, tmp_path, monkeypatch):
    whole = run(model, output=tmp_path / "whole")
    path = tmp_path / "cut" / "toy.jsonl"
    path.parent.mkdir()
    content = (tmp_path / "whole" / "toy.jsonl").read_bytes()
    at = content.index(b"\n", len(content) // 2)
    path.write_bytes(content[: at + 20])
    said = []
    again = run(model, output=tmp_path / "cut", progress=said.append)
    assert len(said) == 10 - content[: at + 1].count(b"\n") and said[-1] == "toy: 10 of 10"
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    same = (
        "score",
        "low",
        "high",
        "tokens",
        "denoising_forwards",
        "majority",
        "confidence_vote",
        "cut",
    )
    assert all(getattr(again, name) == getattr(whole, name) for name in same)
    kept = run(model, output=tmp_path / "cut")
    assert kept.tokens_per_second == 0 and kept.score == whole.score


def test_other_scores_are_means_over_the_entries_of_all_answers(model, tmp_path):
    """Of an answer to problem i there are i + 1 entries, the first of which is right."""

    def entries(problem, text):
        first = [True] + [False] * int(problem.id[1:])
        return grade(problem, text)._replace(other_scores={"each": first, "all": [all(first)]})

    task = Task("toy", "nowhere", lambda records: [], entries)
    asked = lambda limit: evaluate(
        model,
        make_byte_tokenizer(),
        [(task, problems())],
        max_new_tokens=NEW,
        limit=limit,
        output=tmp_path,
    )
    (some,), (more,) = asked(2), asked(4)
    assert some.other_scores == {"each": 2 / 3, "all": 1 / 2}
    assert more.other_scores == {"each": 4 / 10, "all": 1 / 4}
    assert table([more]).splitlines()[-1] == "toy: each 40.0, all 25.0"
    assert run(model).other_scores == {} and len(table([run(model, samples=1)]).splitlines()) == 2


def test_no_module_hides_the_function():
    """Whatever is imported first: the name of a submodule would take the place of the package's attribute."""
    code = "import sdar_jax.evaluation as e; e.Result; e.TASKS; assert callable(e.evaluate), e.evaluate"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_answer_to_another_question_is_not_taken(model, tmp_path):
    run(model, output=tmp_path)
    changed = [
        p if i else Problem("p0", [{"role": "user", "content": "else"}], p.record)
        for i, p in enumerate(problems())
    ]
    told = message_of(DataError, run, model, own=changed, output=tmp_path)
    assert "the answer to problem p0 was to another prompt" in told


def test_answers_are_those_of_generate(model, tmp_path):
    result = run(model, DecodingConfig(), samples=1, output=tmp_path)
    tokenizer = make_byte_tokenizer()
    for problem in problems():
        text = (
            f"<|im_start|>user\n{problem.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        (expected,) = generate(
            model, [tokenizer(text)["input_ids"]], max_new_tokens=NEW, tokenizer=tokenizer
        )
        found = lines(tmp_path)[problem.id, 0]
        assert (found["text"], found["tokens"]) == (expected.text, len(expected.tokens))
        assert found["correct"] is grade(problem, expected.text or "").correct
        assert found["denoising_forwards"] == expected.denoising_forwards
    assert result.tokens == sum(each["tokens"] for each in lines(tmp_path).values())


def test_a_model_without_a_cache_is_evaluated_too(tmp_path):
    canvas = tiny_model(
        jnp.float32,
        vocab_size=320,
        mask_token_id=300,
        objective="masked_diffusion",
        block_size=None,
    )
    config = DecodingConfig(block_size=4)
    first = run(canvas, config, samples=1, output=tmp_path / "a")
    second = run(canvas, config, samples=1, batch_size=2, output=tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and first.score == second.score


def test_an_answer_ends_where_the_context_does(model):
    short = tiny_model(jnp.float32, vocab_size=320, mask_token_id=300, max_position_embeddings=64)
    result = run(short, DecodingConfig(), samples=1, max_new_tokens=1000, own=problems(2))
    assert 0 < result.tokens <= 2 * 64
    long = [Problem("p", [{"role": "user", "content": "q" * 99}], {"modulus": 2})]
    told = message_of(ConfigError, run, short, DecodingConfig(), samples=1, own=long)
    assert "problem p of toy has" in told and "a context of 64" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 0}, "samples is 0; give a positive integer"),
        ({"limit": 0}, "limit is 0; give a positive integer"),
        ({"batch_size": -1}, "batch_size is -1; give a positive integer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a positive integer"),
        ({"config": DecodingConfig()}, "samples is 2 and temperature is 0"),
        ({"chat_template_kwargs": {"x": 1}}, "the chat template does not read 'x'"),
    ],
)
def test_numbers_that_do_not_fit(model, options, told):
    assert told in message_of(ConfigError, run, model, **options)


def test_tasks_that_do_not_fit(model):
    tokenizer = make_byte_tokenizer()
    code = Task("code", "nowhere", lambda records: [], grade, runs_code=True)
    for tasks, told in (
        ([], "are missing: give each once"),
        ([(TASK, problems()), (TASK, problems())], "give each once"),
        ([(TASK, [])], "toy has no problems"),
        ([(code, problems())], "code runs programs that the model writes; allow it (--allow-code)"),
    ):
        assert told in message_of(ConfigError, evaluate, model, tokenizer, tasks, max_new_tokens=4)
    bare = make_byte_tokenizer(None)
    told = message_of(ConfigError, evaluate, model, bare, [(TASK, problems())], max_new_tokens=4)
    assert "no chat template" in told
    (result,) = evaluate(model, bare, [(TASK, problems(1))], max_new_tokens=4, plain=True)
    assert result.problems == 1


def test_a_file_that_holds_something_else(model, tmp_path):
    (tmp_path / "toy.jsonl").write_text('{"id": 1}\n')
    assert "toy.jsonl:1: no answer of an evaluation" in message_of(
        DataError, run, model, output=tmp_path
    )
    (tmp_path / "file").write_text("")
    assert "choose another output" in message_of(DataError, run, model, output=tmp_path / "file")


# The command.


@pytest.fixture
def directory(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(model, tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    records = [{"question": f"what is {i}", "answer": f"it is\n#### {i}"} for i in range(4)]
    (tmp_path / "gsm8k.json").write_text(json.dumps(records))
    return [
        "evaluate",
        "--model",
        "model",
        "--tasks",
        "gsm8k=gsm8k.json",
        "--output",
        "out",
        "--max-new-tokens",
        "8",
    ]


def test_the_command(directory, tmp_path, capsys):
    assert main(directory) == 0
    printed = capsys.readouterr()
    assert "gsm8k: 4 of 4" in printed.err
    head, row = printed.out.splitlines()
    assert head.split("  ")[0] == "task" and row.startswith("gsm8k  4 ")
    (scores,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (scores["task"], scores["problems"], scores["samples"]) == ("gsm8k", 4, 1)
    assert main([*directory, "--limit", "2"]) == 0
    assert "kept" in capsys.readouterr().out
    assert main([*directory, "--temperature", "1"]) == 2
    assert "holds answers made otherwise: temperature was" in capsys.readouterr().err


def test_a_sweep_has_a_folder_for_each_setting(directory, tmp_path, capsys):
    assert main([*directory, "--thresholds", "0.5,0.9", "--block-sizes", "4,2"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [
        "block4-threshold0.5",
        "block4-threshold0.9",
        "block2-threshold0.5",
        "block2-threshold0.9",
    ]
    assert [row["setting"] for row in rows] == names
    assert all((tmp_path / "out" / name / "gsm8k.jsonl").exists() for name in names)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "gsm9k"], "task 'gsm9k': choose from gsm8k"),
        (["--tasks", "gsm8k=gone.json"], "gone.json: no such file"),
        (["--tasks", ""], "no task is named"),
        (["--model", "gone"], "gone: no such directory"),
        (["--thresholds", "a"], "--thresholds is 'a', no list of numbers"),
        (["--thresholds", ""], "--thresholds is ''; give different numbers"),
        (["--block-sizes", "4,4"], "--block-sizes is '4,4'; give different numbers"),
        (["--samples", "3"], "--samples is 3 and temperature is 0"),
        (["--limit", "0"], "--limit is 0; give a positive integer"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs '[]' is not a JSON object"),
        (["--output", "gsm8k.json"], "gsm8k.json"),
        (["--block-size", "0"], "block-size"),
    ],
)
def test_bad_input(directory, arguments, told, capsys):
    assert main([*directory, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and told in error[-1]


def test_code_is_not_run_without_leave(directory, tmp_path, capsys):
    record = {
        "task_id": "1",
        "prompt": "def f():\n",
        "test": "def check(f): pass",
        "entry_point": "f",
    }
    (tmp_path / "he.json").write_text(json.dumps([record]))
    options = [*directory, "--tasks", "humaneval=he.json"]
    assert main(options) == 2
    assert "humaneval runs programs that the model writes" in capsys.readouterr().err
    assert main([*options, "--allow-code"]) == 0


@pytest.mark.slow
@pytest.mark.ci
def test_scores_do_not_depend_on_the_number_of_devices(tmp_path):
    printed = run_module("tests.evaluation.on_devices", tmp_path, devices=4)
    assert "the same on 1, 2 and 4 devices" in printed
