"""Lines of metrics: what is averaged over what, and what is left of them when a run goes on."""

import errno
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from sdar_jax.loss_metrics import LossMetrics, RouterMetrics
from sdar_jax.model.config import ModelConfig
from sdar_jax.training import trackers
from sdar_jax.training.flops import TokenCounts, training_flops
from sdar_jax.training.step import StepMetrics
from sdar_jax.training.trackers import Meter, Trackers

SHAPE = ModelConfig(32, 16, 32, 2, 2, 1, 8)


def metrics(
    loss: float, count: float, nll: float, correct: float, asked: float, norm: float
) -> StepMetrics:
    as_array = lambda *values: tuple(np.float32(value) for value in values)
    done = TokenCounts(*as_array(64, 64, 300, 300, asked))
    scores = LossMetrics(*as_array(nll, correct, asked))
    return StepMetrics(*as_array(loss, count), scores, done, *as_array(norm, 1e-3), np.bool_(True))


@pytest.fixture
def clock(monkeypatch):
    """Each read of the clock is what the test says next."""
    times: list[float] = []
    monkeypatch.setattr(trackers.time, "perf_counter", lambda: times.pop(0))
    return times


def test_a_line_weighs_each_step_by_its_count():
    meter = Meter(SHAPE, None)
    meter.add(metrics(10, 4, 6, 1, 3, 2.0), tokens=60)
    meter.add(metrics(2, 12, 1, 4, 5, 4.0), tokens=50)
    line = meter.line()
    assert line["loss"] == 12 / 16 and line["nll"] == 7 / 8 and line["accuracy"] == 5 / 8
    assert (
        line["grad_norm"] == 3.0
        and line["learning_rate"] == np.float32(1e-3)
        and line["tokens"] == 110
    )
    meter.add(metrics(3, 1, 1, 1, 1, 1.0), tokens=10)
    assert meter.line()["loss"] == 3 and "mfu" not in line


def test_an_moe_s_line_has_its_router_s_losses():
    shape = ModelConfig(
        32,
        16,
        32,
        2,
        2,
        1,
        8,
        architecture="qwen3_moe",
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=8,
    )
    meter = Meter(shape, None)
    for count, values in ((4, (8, 2, 12)), (12, (24, 6, 20))):
        step = metrics(10, count, 6, 1, 3, 2.0)
        router = RouterMetrics(*(np.float32(x) for x in values))
        meter.add(step._replace(scores=step.scores._replace(router=router)), tokens=60)
    line = meter.line()
    assert (line["balance_loss"], line["router_z_loss"], line["max_load"]) == (2.0, 0.5, 2.0)
    assert "max_load" not in Meter(SHAPE, None).line()


def test_a_line_has_the_mean_entropy_of_right_guesses():
    meter = Meter(SHAPE, None)
    for correct, entropy in ((1, 2.0), (4, 0.5)):
        step = metrics(10, 4, 6, correct, 5, 2.0)
        meter.add(
            step._replace(scores=step.scores._replace(entropy=np.float32(entropy))), tokens=60
        )
    assert meter.line()["entropy"] == 2.5 / 5
    meter.add(metrics(10, 4, 6, 1, 3, 2.0), tokens=60)
    assert "entropy" not in meter.line()


def test_a_line_without_a_predicted_token_has_no_averages():
    meter = Meter(SHAPE, None)
    meter.add(metrics(0, 0, 0, 0, 0, 0), tokens=0)
    line = meter.line()
    assert (
        line["loss"] is None
        and line["nll"] is None
        and line["accuracy"] is None
        and line["grad_norm"] == 0
    )


def test_speed_leaves_out_compilation_and_evaluation(clock):
    """Steps end at 100 (compiled), 101 and 102; an evaluation until 150; steps end at 151 and 153."""
    meter = Meter(SHAPE, peak_flops=1e9)
    one = metrics(1, 1, 1, 1, 20, 1)
    clock.extend([100, 101, 102, 150, 151, 153])
    for _ in range(3):
        meter.add(one, tokens=60)
    meter.restart_clock()
    for _ in range(2):
        meter.add(one, tokens=60)
    line = meter.line()
    assert line["tokens_per_second"] == 4 * 60 / 5
    assert line["mfu"] == pytest.approx(4 * training_flops(SHAPE, one.token_counts) / (5 * 1e9))


def test_speed_leaves_out_a_step_that_compiles(clock):
    """Steps end at 100 (compiled), 101, 130 (compiled) and 133."""
    meter = Meter(SHAPE, None)
    clock.extend([100, 101, 130, 133])
    for compiles in (True, False, True, False):
        if compiles:
            meter.stop_clock()
        meter.add(metrics(1, 1, 1, 1, 20, 1), tokens=60)
    assert meter.line()["tokens_per_second"] == 2 * 60 / 4


def test_a_meter_goes_on_where_it_was_saved():
    """Also between two lines, and through JSON."""
    steps = [metrics(*(np.random.default_rng(i).random(6) + 0.1)) for i in range(5)]
    whole, first, second = (Meter(SHAPE, None) for _ in range(3))
    for step in steps:
        whole.add(step, tokens=7)
    for step in steps[:2]:
        first.add(step, tokens=7)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for step in steps[2:]:
        second.add(step, tokens=7)
    timeless = lambda meter: {k: v for k, v in meter.line().items() if k != "tokens_per_second"}
    assert timeless(whole) == timeless(second)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Trackers(tmp_path, step=0, steps=6, tensorboard=False) as outputs:
        for step in range(1, 6):
            outputs.train(step, {"loss": float(step)})
    file.write_text(file.read_text() + '{"step": 6, "lo')
    with Trackers(tmp_path, step=3, steps=6, tensorboard=False) as outputs:
        outputs.train(4, {"loss": 40.0})
        outputs.evaluation(4, {"nelbo": 2.5})
    assert read_lines(file) == [
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 4, "loss": 40.0},
        {"step": 4, "eval_nelbo": 2.5},
    ]


def test_damaged_lines_are_set_aside(tmp_path, caplog):
    """A power cut leaves NULs, a person a note; some lines are JSON and none of a run's."""
    file = tmp_path / "metrics.jsonl"
    damage = [
        b"\0" * 64,
        b"# a note",
        b"\xff\xfe",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b"[" * 99999,
    ]
    lines = [
        b'{"step": 1, "loss": 1.0}',
        *damage,
        b'{"step": 2, "loss": 2.0}',
        b'{"step": 9, "loss": 9.0}',
    ]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    with (
        caplog.at_level("WARNING"),
        Trackers(tmp_path, step=2, steps=6, tensorboard=False) as outputs,
    ):
        outputs.train(3, {"loss": 3.0})
    assert read_lines(file) == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"".join(
        line + b"\n" for line in damage
    )
    assert "7 damaged lines are now in" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_at_the_log_stops_no_run(tmp_path, caplog, capsys, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "metrics.jsonl"
    with (
        caplog.at_level("WARNING"),
        Trackers(tmp_path, step=0, steps=99, tensorboard=True) as outputs,
    ):
        outputs.train(1, {"loss": 1.0})
        file.rename(tmp_path / "kept")
        file.symlink_to("/dev/full")
        with monkeypatch.context() as full:
            full.setattr(EventsWriter, "write_event", no_room)
            for step in range(2, 40):
                outputs.train(step, {"loss": 1.0})
        file.unlink()
        (tmp_path / "kept").rename(file)
        outputs.train(40, {"loss": 4.0})
    assert read_lines(file) == [{"step": 1, "loss": 1.0}, {"step": 40, "loss": 4.0}]
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all(
        "cannot be written (No space left on device); the run goes on" in line for line in told
    )
    assert "step 39/99 loss 1.0000" in capsys.readouterr().out


def test_a_log_that_cannot_be_opened_stops_no_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with (
        caplog.at_level("WARNING"),
        Trackers(tmp_path, step=0, steps=9, tensorboard=True) as outputs,
    ):
        outputs.train(1, {"loss": 1.0})
    assert [Path(record.message.split()[0]).name for record in caplog.records] == [
        "metrics.jsonl",
        "tensorboard",
    ]


def test_without_a_terminal_each_line_is_printed(tmp_path, capsys):
    with Trackers(tmp_path, step=0, steps=9, tensorboard=False) as outputs:
        outputs.train(
            3, {"loss": 1.25, "accuracy": None, "tokens_per_second": 1234.5, "mfu": 0.415}
        )
        outputs.evaluation(3, {"nelbo": 2.0, "nelbo_se": 0.01, "nelbo/web": 1.0})
    said = capsys.readouterr().out
    assert (
        said
        == "step 3/9 loss 1.2500 1234 tok/s MFU 41.5%\nstep 3: held-out nelbo 2.0000, nelbo_se 0.0100\n"
    )


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with Trackers(tmp_path, step=0, steps=9, tensorboard=True) as outputs:
        outputs.train(3, {"loss": 1.25, "accuracy": None})
        outputs.evaluation(3, {"nelbo": 2.0, "nelbo/web": 1.0, "nelbo_position/4-7": 3.0})
    found = {}
    for file in (tmp_path / "tensorboard").iterdir():
        for event in read_events(file.read_bytes()):
            found.update(
                {value.tag: (event.step, value.simple_value) for value in event.summary.value}
            )
    assert found == {
        "train/loss": (3, 1.25),
        "eval/nelbo": (3, 2.0),
        "eval_nelbo/web": (3, 1.0),
        "eval_nelbo_position/4-7": (3, 3.0),
    }


def read_events(content: bytes) -> list[Event]:
    """Records of TensorFlow's format: length, its checksum, an event, its checksum."""
    events = []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return events


def test_numbers_are_kept_exactly(tmp_path):
    value = float(jnp.float32(1) / 3)
    with Trackers(tmp_path, step=0, steps=1, tensorboard=False) as outputs:
        outputs.train(1, {"loss": value})
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == value
