"""Training in several real processes: killed, stopped, failed, resumed in other numbers."""

import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdar_jax.training import CheckpointConfig
from sdar_jax.training.checkpoint import Checkpoints
from tests.processes.job import Ended, Job, run
from tests.training.conftest import (
    Values,
    assert_same_run,
    data_values,
    merged,
    metrics_of,
    run_values,
    state_of,
)

pytestmark = pytest.mark.slow

STEPS, EVERY = 16, 4


def job_values(inputs: Path, run_dir: Path, **changes) -> Values:
    """A run with every part at work: two streams of data, accumulation, an average, an evaluation."""
    held_out = data_values(inputs / "held-out.jsonl", epochs=1)
    base = {
        "steps": STEPS,
        "model": {"shape": {"num_layers": 2, "num_kv_heads": 2}},
        "data": {"batch_size": 8, "shards": 4},
        "micro_batch_size": 4,
        "ema_decay": 0.9,
        "log_every": 1,
        "checkpoint": {"every": EVERY},
        "eval": {"data": held_out, "every": STEPS // 2, "rows": 4, "samples": 2},
    }
    return merged(merged(run_values(inputs, run_dir), base), changes)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Callable[[int], Path]:
    """undisturbed(count) -> the run directory of so many processes, made once."""
    done: dict[int, Path] = {}

    def make(count: int) -> Path:
        if count not in done:
            home = tmp_path_factory.mktemp(f"undisturbed-{count}")
            run(job_values(inputs, home / "run"), count, home)
            done[count] = home / "run"
        return done[count]

    return make


def kill(values: Values, count: int, victim: int, home: Path) -> list[Ended]:
    """SIGKILL for one process behind the first checkpoint; the others end by themselves."""
    with Job(values, count, home) as job:
        job.wait_for(job.run_dir / "checkpoints" / str(EVERY))
        job.send(victim, signal.SIGKILL)
        killed = time.monotonic()
        ended = job.ended(within=60)
        print(
            f"{count} processes, {victim} killed: the others ended after {time.monotonic() - killed:.1f} s"
        )
    assert ended.pop(victim).status == -signal.SIGKILL
    return ended


def check_killed(inputs, undisturbed: Path, count: int, victim: int, home: Path) -> None:
    values = job_values(inputs, home / "run")
    for other in kill(values, count, victim, home / "killed"):
        told = f"error: process {victim} of {count} was lost; start the job again, it resumes from its last checkpoint"
        if victim > 0:
            assert other.status == 1 and other.errors == [told], other
        else:
            # JAX's own service is gone with process 0, and JAX may be the first to say so.
            assert other.status != 0 and (
                told in other.errors or "Terminating process" in other.err
            ), other
    assert not (home / "run" / "model").exists()
    run(values, count, home / "again")
    assert_same_run(undisturbed, home / "run")


@pytest.mark.ci
def test_one_of_two_is_killed_and_the_job_started_again(undisturbed, inputs, tmp_path):
    check_killed(inputs, undisturbed(2), 2, 1, tmp_path)


@pytest.mark.parametrize("victim", [0, 2])
def test_one_of_four_is_killed_and_the_job_started_again(victim, undisturbed, inputs, tmp_path):
    check_killed(inputs, undisturbed(4), 4, victim, tmp_path)


def assert_close_run(one: Path, other: Path) -> None:
    """The same data at the end, and the same metrics and weights but for rounding."""
    for ours, theirs in zip(metrics_of(one), metrics_of(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    with (
        Checkpoints(one, CheckpointConfig()) as ours,
        Checkpoints(other, CheckpointConfig()) as theirs,
    ):
        assert ours.latest == theirs.latest
        assert ours.host_state().data == theirs.host_state().data
    weights, expected = state_of(one)[1]["weights"], state_of(other)[1]["weights"]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """The run directory of four processes, one of which has received a SIGTERM; and how they ended."""
    home = tmp_path_factory.mktemp("stopped")
    with Job(job_values(inputs, home / "run"), 4, home) as job:
        job.wait_for(home / "run" / "checkpoints" / str(EVERY))
        job.send(2, signal.SIGTERM)
        return home / "run", job.ended(within=60)


def test_a_signal_to_one_stops_all_at_one_step_and_saves(stopped):
    run_dir, ended = stopped
    assert [process.status for process in ended] == [128 + signal.SIGTERM] * 4, ended
    step = state_of(run_dir)[0]
    assert EVERY < step < STEPS and metrics_of(run_dir)[-1]["step"] == step
    assert f"stopped by a signal, saved at step {step}" in ended[0].err
    assert not any("step " in process.out + process.err for process in ended[1:])


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (2, 2, {"tensor": 2, "data": -1, "fsdp": 1}),
        (1, 2, {"context": 2, "fsdp": 1}),
    ],
)
def test_four_processes_go_on_as_fewer_on_other_meshes(
    count, devices, mesh, stopped, undisturbed, inputs, tmp_path
):
    shutil.copytree(stopped[0], tmp_path / "run")
    run(job_values(inputs, tmp_path / "run", mesh=mesh), count, tmp_path / "job", devices=devices)
    assert_close_run(tmp_path / "run", undisturbed(2))


def test_rows_that_two_processes_compute_together_are_read_by_both(undisturbed, inputs, tmp_path):
    """Over `tensor` both need all rows, over `fsdp` each its half."""
    mesh = {"tensor": 2, "fsdp": 1}
    run(job_values(inputs, tmp_path / "run", mesh=mesh), 2, tmp_path / "job")
    assert_close_run(tmp_path / "run", undisturbed(2))


def test_a_damaged_checkpoint_is_set_aside_once(stopped, undisturbed, inputs, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    newest = state_of(tmp_path / "run")[0]
    file = max(
        (tmp_path / "run" / "checkpoints" / str(newest) / "state").rglob("*"),
        key=lambda f: f.stat().st_size,
    )
    file.write_bytes(file.read_bytes()[:-1])
    ended = run(job_values(inputs, tmp_path / "run"), 2, tmp_path / "job")
    assert [f"checkpoint {newest} is damaged" in process.err for process in ended] == [True, False]
    assert (tmp_path / "run" / "damaged" / str(newest)).is_dir()
    assert_close_run(tmp_path / "run", undisturbed(2))


def test_one_that_cannot_write_ends_all_and_the_last_checkpoint_stays(
    stopped, undisturbed, inputs, tmp_path
):
    shutil.copytree(stopped[0], tmp_path / "run")
    last = state_of(stopped[0])[0]
    values = job_values(inputs, tmp_path / "run", checkpoint={"every": 1})
    with Job(values, 2, tmp_path / "job") as job:
        # Less than its part of a state.
        resource.prlimit(job.processes[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        ended = job.ended(within=120)
    assert [process.status for process in ended] == [2, 2], ended
    # The failed one has what the threads of the layers below print as well, dozens of tracebacks at times.
    said = [re.findall(r"error: .*", process.err) for process in ended]
    assert all(len(lines) == 1 and "cannot be written" in lines[0] for lines in said), ended
    assert len(ended[0].errors) == 1
    assert state_of(tmp_path / "run")[0] == last
    run(job_values(inputs, tmp_path / "run"), 2, tmp_path / "again")
    assert_close_run(tmp_path / "run", undisturbed(2))


def test_a_bad_record_that_one_process_reads_ends_all(inputs, tmp_path):
    lines = (inputs / "sums.jsonl").read_text().splitlines()
    lines[151] = '{"question": 5}'
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    data = {**data_values(tmp_path / "sums.jsonl", shuffle=False), "batch_size": 8, "shards": 2}
    with Job(job_values(inputs, tmp_path / "run", data=data, eval=None), 2, tmp_path) as job:
        zero, one = job.ended(within=120)
    assert (zero.status, one.status) == (2, 2), (zero, one)
    assert len(one.errors) == 1 and "sums.jsonl:152: no field 'text'" in one.errors[0]
    assert zero.errors == [one.errors[0].replace("error: ", "error: process 1 of 2: ", 1)]


def test_numbers_that_are_not_finite_end_all_and_name_the_records_of_all(inputs, tmp_path):
    explosive = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant", "warmup": 5.0}
    with Job(
        job_values(inputs, tmp_path / "run", optimizer=explosive, eval=None), 2, tmp_path
    ) as job:
        ended = job.ended(within=120)
    assert [process.status for process in ended] == [2, 2], ended
    assert all(
        len(process.errors) == 1 and "gradient norm" in process.errors[0] for process in ended
    )
    (listed,) = (tmp_path / "run").glob("records-of-step-*.txt")
    # Eight rows of sixteen tokens hold some fifteen sums, half of them on each process.
    assert len(set(listed.read_text().splitlines())) > 12


def test_a_config_error_of_all_is_one_line_of_each(inputs, tmp_path):
    with Job(job_values(inputs, tmp_path / "run", mesh={"fsdp": 3}), 2, tmp_path) as job:
        ended = job.ended(within=60)
    assert [process.status for process in ended] == [2, 2], ended
    assert all(len(process.errors) == 1 and "fsdp 3" in process.errors[0] for process in ended), (
        ended
    )


def test_tiny_of_two_processes(tmp_path):
    recipe = yaml.safe_load(Path("configs/study2/1.7b_cpt.yaml").read_text())
    run({**recipe, "run_dir": str(tmp_path / "run")}, 2, tmp_path, "--tiny", devices=2)
    assert (tmp_path / "run-tiny" / "model" / "model.safetensors").exists()
    assert [line["step"] for line in metrics_of(tmp_path / "run-tiny") if "loss" in line] == [
        1,
        2,
        3,
        4,
    ]
