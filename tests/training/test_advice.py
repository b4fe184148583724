"""What the messages of a run advise works: each error here is met, its advice followed, and the run ends well."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from sdar_jax.errors import ConfigError, DataError, TrainingError
from sdar_jax.training import OptimizerConfig, Outcome, TrainConfig, read_config, run
from sdar_jax.training.config_io import from_values, to_values
from sdar_jax.training.resume import check_schedule
from sdar_jax.training.run_dir import finished_step
from tests.training.conftest import Values, data_values, merged, run_values, state_of

CONSTANT = {"schedule": "constant", "warmup": 0.0}


@pytest.fixture
def config_in(inputs, tmp_path):
    """config_in(name, section={field: value}) -> a config of a run in tmp_path/name."""

    def make(name: str = "run", **changes) -> TrainConfig:
        plain = merged(
            run_values(inputs, tmp_path / name), {"optimizer": CONSTANT, "log_every": 100}
        )
        return from_values(TrainConfig, merged(plain, changes))

    return make


def assert_same_weights(one: Path | str, other: Path | str) -> None:
    (step, state), (other_step, other_state) = state_of(Path(one)), state_of(Path(other))
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, state["weights"], other_state["weights"])


def test_data_that_ends_loses_nothing_and_both_ways_on_work(inputs, tmp_path, config_in, caplog):
    """Also with a schedule that was to go on for longer, which is said."""
    data = data_values(inputs / "held-out.jsonl", epochs=1)
    config = config_in(data=data, optimizer={"schedule": "cosine"}, checkpoint={"every": 100})
    with pytest.raises(
        TrainingError,
        match=r"ended after 3 of 6 steps, which are saved; set steps to 3, raise data\.epo",
    ):
        run(config)
    assert state_of(tmp_path / "run")[0] == 3 and not (tmp_path / "run" / "model").exists()
    for change in ({"data": {"epochs": 9}}, {"data": {"epochs": None}}):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        longer = from_values(
            TrainConfig, merged(to_values(config), {"run_dir": str(tmp_path / "copy"), **change})
        )
        assert run(longer) == Outcome(6, finished=True)
        shutil.rmtree(tmp_path / "copy")
    caplog.clear()
    assert run(replace(config, steps=3)) == Outcome(3, finished=True)
    assert "ends at step 3, before its schedule does: steps (was 6, is 3)" in caplog.text
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_finished_run_that_is_given_more_steps_equals_a_longer_one(config_in):
    assert run(config_in("short", steps=4)) == Outcome(4, finished=True)
    assert run(config_in("short", steps=6)) == Outcome(6, finished=True)
    assert run(config_in("long", steps=6)) == Outcome(6, finished=True)
    assert_same_weights(config_in("short").run_dir, config_in("long").run_dir)
    models = [
        Path(config_in(name).run_dir, "model", "model.safetensors").read_bytes()
        for name in ("short", "long")
    ]
    assert models[0] == models[1]


def optimizer(**changes) -> OptimizerConfig:
    return OptimizerConfig(**changes)


# (optimizer, steps) before and now, and steps done: whether nothing that was done would have been different.
SCHEDULES = [
    (dict(warmup=0), 10, dict(warmup=0), 99, 10, True),
    (dict(warmup=5), 10, dict(warmup=5), 99, 10, True),
    (dict(warmup=0.5), 10, dict(warmup=0.5), 20, 10, False),
    (dict(warmup=0.5), 10, dict(warmup=5), 20, 10, True),
    (dict(warmup=0.03), 20, dict(warmup=0.03), 30, 20, True),
    (dict(warmup=0, schedule="cosine"), 10, dict(warmup=0, schedule="cosine"), 20, 5, False),
    (dict(warmup=5, schedule="cosine"), 10, dict(warmup=5, schedule="cosine"), 20, 5, True),
    (
        dict(warmup=0, schedule="wsd", decay=4),
        10,
        dict(warmup=0, schedule="wsd", decay=4),
        20,
        6,
        True,
    ),
    (
        dict(warmup=0, schedule="wsd", decay=4),
        10,
        dict(warmup=0, schedule="wsd", decay=4),
        20,
        8,
        False,
    ),
    (dict(warmup=0), 10, dict(warmup=0, schedule="wsd", decay=10), 20, 10, True),
    (dict(warmup=0), 20, dict(warmup=0), 10, 10, True),
]


@pytest.mark.parametrize(("before", "steps", "now", "new_steps", "done", "same"), SCHEDULES)
def test_steps_may_change_where_no_step_done_would(
    before, steps, now, new_steps, done, same, config_in
):
    saved = to_values(replace(config_in(), steps=steps, optimizer=optimizer(**before)))
    config = replace(config_in(), steps=new_steps, optimizer=optimizer(**now))
    if same:
        check_schedule(saved, config, done)
        return
    with pytest.raises(
        ConfigError, match=rf"started otherwise: .*steps \(was {steps}, is {new_steps}\)"
    ) as raised:
        check_schedule(saved, config, done)
    message = str(raised.value)
    assert "\n" not in message
    if "set optimizer.warmup to" in message:
        warmup = int(message.split("set optimizer.warmup to ")[1].split(",")[0])
        check_schedule(
            saved, replace(config, optimizer=replace(config.optimizer, warmup=warmup)), done
        )
    else:
        named = f"or use a new run_dir, with model.init_from {config.run_dir}/model, once steps {done} has exported it"
        assert message.endswith(named)
        check_schedule(
            saved, replace(config, steps=done, optimizer=replace(config.optimizer, warmup=0)), done
        )


def test_steps_below_those_done_are_refused(config_in):
    with pytest.raises(
        ConfigError, match=r"steps is 4 and .*run at step 5; give 5 to end it there, or more"
    ):
        check_schedule(to_values(config_in()), replace(config_in(), steps=4), 5)
    check_schedule(to_values(config_in()), replace(config_in(), steps=5), 5)


def test_a_schedule_that_cannot_go_on_begins_anew_from_the_model(config_in):
    cosine = {"optimizer": {"schedule": "cosine"}}
    run(config_in(steps=2, **cosine))
    with pytest.raises(ConfigError, match="or use a new run_dir, with model.init_from") as raised:
        run(config_in(steps=4, **cosine))
    model = str(raised.value).split("model.init_from ")[1]
    assert run(
        config_in("second", steps=2, model={"init_from": model, "shape": None}, **cosine)
    ).finished


def test_a_malformed_record_stops_a_run_that_goes_on_without_it(inputs, tmp_path, config_in):
    """As if it had been left out from the beginning; and no step before it is lost."""
    lines = (inputs / "sums.jsonl").read_text().splitlines(keepends=True)
    lines[60] = '{"question": "1+\n'
    (tmp_path / "data.jsonl").write_text("".join(lines))
    data = data_values(tmp_path / "data.jsonl", shuffle=False, num_threads=0)
    config = config_in(data=data, checkpoint={"every": 100}, steps=12)
    with pytest.raises(
        DataError, match=r"data\.jsonl:61: not valid JSON .*on_error: skip"
    ) as raised:
        run(config)
    stopped = state_of(tmp_path / "run")[0]
    assert stopped is not None and stopped > 1 and "\n" not in str(raised.value)
    skipping = {"data": {**data, "on_error": "skip"}, "steps": 12}
    shutil.copytree(tmp_path / "run", tmp_path / "mended")
    assert run(config_in(**skipping)).finished and run(config_in("whole", **skipping)).finished
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    lines[60] = '{"question": "1+1=", "text": "2"}\n'
    (tmp_path / "data.jsonl").write_text("".join(lines))
    assert run(replace(config, run_dir=str(tmp_path / "mended"))).finished


def test_other_data_of_the_same_number_of_records_is_told(inputs, tmp_path, config_in, caplog):
    shutil.copy(inputs / "sums.jsonl", tmp_path / "data.jsonl")
    config = config_in(data=data_values(tmp_path / "data.jsonl"), steps=2)
    run(config)
    assert "is not what it was" not in caplog.text
    content = (tmp_path / "data.jsonl").read_bytes()
    (tmp_path / "data.jsonl").write_bytes(content.replace(b'"text": "1', b'"text": "2'))
    run(replace(config, steps=3))
    assert (
        f"data.sources.0.path {tmp_path}/data.jsonl is not what it was when the checkpoint was saved"
        in caplog.text
    )
    (tmp_path / "data.jsonl").write_bytes(content.split(b"\n", 1)[1])
    with pytest.raises(
        DataError, match=r"hold \[199\] records and held \[200\] .* or use a new run_dir"
    ):
        run(replace(config, steps=4))
    assert run(replace(config, steps=1, run_dir=str(tmp_path / "new"))).finished


def test_epochs_are_steps_that_are_counted(inputs, tmp_path, config_in, caplog):
    data = data_values(inputs / "held-out.jsonl")
    by_epochs = {"steps": None, "data": data, "optimizer": {"schedule": "cosine"}}
    with caplog.at_level(logging.INFO, "sdar_jax"):
        assert run(config_in(epochs=2, **by_epochs)) == Outcome(6, finished=True)
    written = read_config(tmp_path / "run" / "config.yaml")
    assert (written.steps, written.epochs, written.data.epochs) == (6, None, 2)
    by_steps = {**by_epochs, "steps": 6, "data": {**data, "epochs": 2}}
    run(config_in("by_steps", **by_steps))
    assert_same_weights(tmp_path / "run", tmp_path / "by_steps")
    assert caplog.text.count("counting the steps of 2 epochs") == 1
    with caplog.at_level(logging.INFO, "sdar_jax"):
        assert run(config_in(epochs=2, **by_epochs)) == Outcome(6, finished=True)
    assert "nothing is left to do" in caplog.text and caplog.text.count("counting") == 1


def test_epochs_resume_without_another_count_and_can_be_more(inputs, tmp_path, config_in, caplog):
    by_epochs = {"steps": None, "data": data_values(inputs / "held-out.jsonl")}
    assert run(config_in(epochs=1, **by_epochs)) == Outcome(3, finished=True)
    shutil.rmtree(tmp_path / "run" / "model")
    caplog.clear()
    with caplog.at_level(logging.INFO, "sdar_jax"):
        assert run(config_in(epochs=1, **by_epochs)) == Outcome(3, finished=True)
    assert "counting" not in caplog.text
    assert run(config_in(epochs=2, **by_epochs)).step > 3
    data = {**by_epochs["data"], "epochs": 1}
    assert run(config_in("by_steps", steps=2, data=data)) == Outcome(2, finished=True)
    assert run(config_in("by_steps", epochs=1, **by_epochs)) == Outcome(3, finished=True), (
        "two steps are no epoch"
    )


def test_a_model_that_this_run_did_not_write_is_neither_its_result_nor_replaced(
    tmp_path, config_in
):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match="model is there and this run has not written it; move it away, or use",
        ):
            run(config_in(steps=1))
    (tmp_path / "run" / "model").rename(tmp_path / "base")
    assert (
        run(config_in(steps=1)).finished and (tmp_path / "base" / "config.json").read_text() == "{}"
    )


def test_what_is_exported_is_written_again_where_it_has_to_be(tmp_path, config_in):
    run(config_in(steps=2))
    model, mark = tmp_path / "run" / "model", tmp_path / "run" / "export.json"
    whole = model.joinpath("model.safetensors").stat().st_size
    assert run(config_in(steps=2, export_dtype="bfloat16")) == Outcome(2, finished=True)
    assert model.joinpath("model.safetensors").stat().st_size < 0.75 * whole
    assert json.loads(model.joinpath("config.json").read_text())["torch_dtype"] == "bfloat16"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "complete": False}))
    assert finished_step(tmp_path / "run", config_in(steps=2, export_dtype="bfloat16"), 2) is None
    assert run(config_in(steps=2)) == Outcome(2, finished=True)
    assert model.joinpath("model.safetensors").stat().st_size == whole
    mark.write_text("")
    assert finished_step(tmp_path / "run", config_in(steps=2), 2) is None
    assert run(config_in(steps=2)) == Outcome(2, finished=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run(config_in(steps=2)) == Outcome(2, finished=True)
    with pytest.raises(
        ConfigError,
        match=r"is of step 2 in float32, and no checkpoint is left .* use a new run_dir",
    ):
        run(config_in(steps=3))


def test_rows_longer_than_the_context_are_refused_or_told(config_in, caplog):
    short: Values = {"shape": {"max_position_embeddings": 12}}
    with pytest.raises(
        ConfigError,
        match=r"data\.sequence_length is 16 and .* 12: lower it to 12, or raise max_posit",
    ):
        run(config_in("a", steps=1, model=short, data={"segments": "row"}))
    assert run(
        config_in("b", steps=1, model=short, data={"segments": "row", "sequence_length": 12})
    ).finished
    assert "max_position_embeddings" not in caplog.text
    assert run(config_in("c", steps=1, model=short)).finished
    assert (
        "data.sequence_length is 16 and the model's max_position_embeddings 12: longer documents"
        in caplog.text
    )


def test_numbers_that_are_not_finite_are_left_by_a_lower_rate_in_a_new_run(config_in):
    explosive = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant", "warmup": 5.0}
    with pytest.raises(
        TrainingError,
        match=r"mend these records and start it again, or lower optimizer\.learning_rate",
    ):
        run(config_in(optimizer=explosive))
    assert run(config_in("new", optimizer={**explosive, "learning_rate": 1e-3})).finished
