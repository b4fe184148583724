"""Runs from start to finish: interrupted and resumed as if never stopped, stopped where they must not go on."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from sdar_jax.data import load_tokenizer
from sdar_jax.errors import ConfigError, DataError, TrainingError
from sdar_jax.hf.pretrained import load_pretrained
from sdar_jax.model import stack_layers
from sdar_jax.training import Outcome, TrainConfig, read_config, run
from sdar_jax.training.config_io import from_values, to_values
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.resume import check_same_for_all, check_unchanged
from sdar_jax.training.run_dir import occupied
from sdar_jax.training.step import model_weights
from tests.training.conftest import (
    assert_same_run,
    data_values,
    merged,
    metrics_of,
    run_values,
    state_of,
)

# Every part of a state is at work, and steps 1, 3 and 5 lie between two lines and two checkpoints.
CHANGES = {
    "ema_decay": 0.5,
    "micro_batch_size": 2,
    "objective": {
        "corruption": {"level": "block", "draw": "stratified"},
        "confidence_beta": 0.5,
    },
}


def config_in(inputs: Path, run_dir: Path, **changes) -> TrainConfig:
    held_out = data_values(inputs / "held-out.jsonl", epochs=1)
    evaluation = {"data": held_out, "every": 3, "by": ["source", "position"]}
    values = merged(merged(run_values(inputs, run_dir), CHANGES), {"eval": evaluation})
    return from_values(TrainConfig, merged(values, changes))


def total_weight(model, step):
    """An evaluator: any number that depends on all of the weights."""
    return {"weight": float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(model)))}


TOTAL_WEIGHT = Extensions(evaluators=(total_weight,))


def at_evaluation(number: int, act) -> Extensions:
    """`total_weight`, which does something else as well at its nth call."""
    calls = []

    def evaluate(model, step):
        calls.append(step)
        if len(calls) == number:
            act()
        return total_weight(model, step)

    return Extensions(evaluators=(evaluate,))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(config_in(inputs, run_dir), TOTAL_WEIGHT) == Outcome(6, finished=True)
    return run_dir


def test_a_run_that_sigterm_interrupts_goes_on_as_if_it_had_not(undisturbed, inputs, tmp_path):
    config = config_in(inputs, tmp_path / "run")
    stopped = run(config, at_evaluation(1, terminate))
    assert stopped == Outcome(3, finished=False, signal=signal.SIGTERM)
    assert state_of(tmp_path / "run")[0] == 3 and not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(config, TOTAL_WEIGHT) == Outcome(6, finished=True)
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_run_that_crashes_goes_on_from_its_last_checkpoint(undisturbed, inputs, tmp_path):
    config = config_in(inputs, tmp_path / "run")
    with pytest.raises(Crash):
        run(config, at_evaluation(1, crash))
    assert state_of(tmp_path / "run")[0] == 2
    assert run(config, TOTAL_WEIGHT).finished
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_run_killed_before_its_export_exports(undisturbed, inputs, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    assert run(config_in(inputs, tmp_path / "run"), TOTAL_WEIGHT).finished
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_finished_run_does_nothing(undisturbed, inputs, caplog):
    def look():
        return {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}

    before = look()
    with caplog.at_level(logging.INFO, "sdar_jax"):
        outcome = run(config_in(inputs, undisturbed), TOTAL_WEIGHT)
    assert outcome == Outcome(6, finished=True) and "nothing is left to do" in caplog.text
    assert look() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 8}, r"steps \(was 6, is 8\)"),
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"data": {"batch_size": 8}}, r"data\.batch_size \(was 4, is 8\)"),
        ({"data": {"shards": 2}}, r"data\.shards \(was 1, is 2\)"),
        (
            {"optimizer": {"learning_rate": 0.02}},
            r"optimizer\.learning_rate \(was 0\.01, is 0\.02\)",
        ),
        ({"model": {"shape": {"num_layers": 3}}}, r"model\.shape\.num_layers \(was 1, is 3\)"),
        ({"ema_decay": None}, r"ema_decay \(was 0\.5, is null\)"),
        ({"compute_dtype": "bfloat16"}, r"compute_dtype \(was \"auto\", is \"bfloat16\"\)"),
        (
            {"objective": {"normalizer": "masked"}},
            r"objective\.normalizer \(was \"response\", is \"masked\"\)",
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_config(change, named, undisturbed, inputs):
    with pytest.raises(ConfigError, match=named) as raised:
        run(config_in(inputs, undisturbed, **change), TOTAL_WEIGHT)
    assert "restore these, or use a new run_dir" in str(raised.value) and "\n" not in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("rounding", "changes"),
    [
        (
            False,
            {
                "log_every": 1,
                "checkpoint": {"every": 5, "keep": 1},
                "eval": None,
                "tensorboard": True,
            },
        ),
        (
            False,
            {"peak_flops": 1e12, "data": {"num_threads": 0}, "eval": {"every": 1, "samples": 9}},
        ),
        pytest.param(True, {"micro_batch_size": None}, marks=pytest.mark.slow),
        pytest.param(True, {"remat": "full"}, marks=pytest.mark.slow),
    ],
)
def test_what_does_not_change_the_result_may_change(
    rounding, changes, undisturbed, inputs, tmp_path
):
    """Half of the run with one config and half with the other, in another place."""
    run(config_in(inputs, tmp_path / "run"), at_evaluation(1, terminate))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(config_in(inputs, tmp_path / "moved", **changes), TOTAL_WEIGHT).finished
    ours, theirs = state_of(tmp_path / "moved")[1], state_of(undisturbed)[1]
    tolerance = {"rtol": 2e-3, "atol": 2e-5} if rounding else {"rtol": 0, "atol": 0}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def test_lines_have_the_step_the_averages_and_the_evaluation(undisturbed):
    lines = metrics_of(undisturbed)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert set(lines[0]) == {
        "step",
        "loss",
        "nll",
        "accuracy",
        "entropy",
        "grad_norm",
        "learning_rate",
        "tokens",
    }
    assert set(lines[1]) == {
        "step",
        "eval_nelbo",
        "eval_nelbo_se",
        "eval_nelbo/held-out",
        *(f"eval_nelbo_position/{i}" for i in range(4)),
        "eval_weight",
    }
    assert [line["tokens"] for line in lines if "tokens" in line] == [2 * 64, 4 * 64, 6 * 64]
    assert lines[3]["learning_rate"] == 0
    first = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens_per_second"] > 0 and "mfu" not in first


def test_the_moving_average_is_what_is_evaluated_and_exported(undisturbed, inputs):
    state = state_of(undisturbed)[1]
    model = load_pretrained(undisturbed / "model")
    assert (model.config.objective, model.config.block_size, model.config.mask_token_id) == (
        "block_diffusion",
        4,
        15,
    )
    tokenizer = load_tokenizer(undisturbed / "model")
    assert (
        model.config.eos_token_id == tokenizer.eos_token_id
        and tokenizer.decode(tokenizer.encode("1+2=")) == "1+2="
    )
    weights, _ = model_weights(stack_layers(model))
    jax.tree.map(np.testing.assert_array_equal, weights, state["ema"])
    assert any((state["ema"][name] != state["weights"][name]).any() for name in weights)
    assert metrics_of(undisturbed)[-1]["eval_weight"] == total_weight(model, 6)["weight"]


def test_the_resolved_config_is_left_in_the_run(undisturbed, inputs):
    assert read_config(undisturbed / "config.yaml") == config_in(inputs, undisturbed)


def test_a_run_goes_on_without_the_weights_it_started_from(undisturbed, inputs, tmp_path):
    shutil.copytree(undisturbed / "model", tmp_path / "start")
    changes = {"init_from": str(tmp_path / "start"), "shape": None}
    config = config_in(inputs, tmp_path / "run", model=changes)
    run(config, at_evaluation(1, terminate))
    (tmp_path / "start" / "model.safetensors").unlink()
    assert run(config, TOTAL_WEIGHT).finished


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_batch(inputs, tmp_path):
    run_dir = tmp_path / "run"
    explosive = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant", "warmup": 5.0}
    plain = {"ema_decay": None, "micro_batch_size": None, "eval": None}
    config = config_in(inputs, run_dir, optimizer=explosive, checkpoint={"every": 1}, **plain)
    with pytest.raises(TrainingError) as raised:
        run(config)
    message = str(raised.value)
    assert message.startswith("step 2: loss ") and "\n" not in message
    assert (
        "sums.jsonl:" in message
        and f"the last good checkpoint is {run_dir / 'checkpoints' / '1'}" in message
    )
    listed = (run_dir / "records-of-step-2.txt").read_text().splitlines()
    assert (
        len(listed) > 5
        and all("sums.jsonl:" in line for line in listed)
        and "records-of-step-2.txt" in message
    )
    step, state = state_of(run_dir)
    assert step == 1 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [line["step"] for line in metrics_of(run_dir)] == []


def test_data_that_changed_under_a_run_is_noticed(inputs, tmp_path):
    copy = tmp_path / "sums.jsonl"
    shutil.copy(inputs / "sums.jsonl", copy)
    config = config_in(inputs, tmp_path / "run", data=data_values(copy))
    run(config, at_evaluation(1, terminate))
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="records"):
        run(config, TOTAL_WEIGHT)


def test_a_run_from_before_a_field_goes_on_with_its_default(inputs, tmp_path):
    config = config_in(inputs, tmp_path / "run")
    saved = to_values(config)
    del saved["data"]["shards"], saved["remat"], saved["seed"]
    check_unchanged(saved, config)
    with pytest.raises(ConfigError, match=r"seed \(was 0, is 3\)"):
        check_unchanged(saved, config_in(inputs, tmp_path / "run", seed=3))


def test_a_process_with_another_config_is_noticed(inputs, tmp_path, monkeypatch):
    config = config_in(inputs, tmp_path / "run")
    check_same_for_all(config)
    first = to_values(config_in(inputs, tmp_path / "run", seed=3))
    monkeypatch.setattr("sdar_jax.devices.processes.broadcast", lambda make: first)
    with pytest.raises(
        ConfigError, match=r"not process 0's: seed \(3 in process 0, 0 here\); give all"
    ):
        check_same_for_all(config)


def test_two_jobs_do_not_share_a_run_dir(inputs, tmp_path):
    config = config_in(inputs, tmp_path / "run")
    with (
        occupied(tmp_path / "run"),
        pytest.raises(ConfigError, match="run_dir '.*' is in use by another job"),
    ):
        run(config, TOTAL_WEIGHT)
    with occupied(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_shards_of_data_go_on_exactly(inputs, tmp_path):
    changes = {"data": {"shards": 2}}
    run(config_in(inputs, tmp_path / "whole", **changes), TOTAL_WEIGHT)
    config = config_in(inputs, tmp_path / "run", **changes)
    run(config, at_evaluation(1, terminate))
    assert run(config, TOTAL_WEIGHT).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_dir_that_cannot_be_is_named(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir .* cannot be made"):
        run(config_in(inputs, tmp_path / "file" / "run", eval=None))
