"""Kernels made wrong, hanging and crashing on purpose, through the door that users come by."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import verdicts, visibility
from sdar_jax.attention import api, attention
from sdar_jax.devices import chips
from sdar_jax.errors import KernelError
from sdar_jax.verdicts import Kernel, Place, Verdict
from tests.bad_input import refused

Q = jnp.zeros((1, 200, 2, 8))


def chosen() -> str:
    return api.choose(Q, Q, Q).implementation


def settle(monkeypatch, outcome: str, calls: list[Place] | None = None) -> None:
    """Proofs are not run: each ends with this outcome."""

    def prove(place: Place, **_) -> Verdict:
        if calls is not None:
            calls.append(place)
        return Verdict(place, outcome, "" if outcome == "right" else "as it was made", [], 1.0)

    monkeypatch.setattr(verdicts, "prove", prove)


@pytest.mark.usefixtures("unchecked_types")
def test_a_right_kernel_is_used_and_not_proved_again(door, monkeypatch, capsys):
    """At its first use, which is inside a trace; the kept verdict is read in the next process."""
    door.use("right")
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 200, 2, 8))
    ranges = visibility.causal(jnp.ones((1, 200), jnp.int32))
    found = jax.jit(lambda q, k, v: attention(q, k, v, ranges))(q, k, v)
    np.testing.assert_array_equal(found, attention(q, k, v, ranges, implementation="chunked"))
    (kept,) = door.verdicts()
    verdict = json.loads(kept.read_text())
    assert verdict["outcome"] == "right" and verdict["seconds"] > 0
    assert [event["wrong"] for event in verdict["events"] if "wrong" in event] == [None]
    assert "report" not in capsys.readouterr().err
    door.restart()
    monkeypatch.setattr(verdicts, "prove", None)
    assert chosen() == "right" and capsys.readouterr().err == ""


def test_a_wrong_kernel_is_said_once_and_not_used(door, monkeypatch, capsys):
    door.use("one_element")
    assert chosen() == chosen() == "chunked"
    (kept,) = door.verdicts()
    reports = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    (line,) = reports
    for part in (
        "attention one_element gives wrong results on cpu with jax 0.",
        "out is off by",
        "at [0, 130, 1] in 'causal, 2 heads",
        "XLA computes in its place",
        str(kept),
    ):
        assert part in line
    door.restart()
    monkeypatch.setattr(verdicts, "prove", None)
    assert chosen() == "chunked" and capsys.readouterr().err == line + "\n"


def test_a_kernel_that_takes_its_process_along(door, capsys):
    door.use("segfaults")
    assert chosen() == "chunked" and len(door.verdicts()) == 1
    told = capsys.readouterr().err
    assert "crashes on cpu" in told and "SIGSEGV in 'causal" in told


def test_a_kernel_that_hangs(door, monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "LIMIT", 2.0)
    door.use("hangs")
    assert chosen() == "chunked" and len(door.verdicts()) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "sdar-jax: checking the kernel attention hangs on this chip, once"
    assert "hangs on cpu" in told[1] and "no result for 2 s" in told[1]


def test_what_did_not_start_is_no_verdict(door, monkeypatch, capsys):
    """A chip that is another process', say: it may start the next time."""
    monkeypatch.setattr(verdicts, "_JAX_PLATFORMS", {"cpu": "tpu"})
    door.use("right")
    assert chosen() == "chunked" and door.verdicts() == []
    told = capsys.readouterr().err
    assert "could not be checked" in told and "SDAR_JAX_PROVE=0" in told


def test_a_full_device_is_no_verdict():
    full = "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"
    place = Place.here(Kernel("attention", "tests.proof.fakes.right"))
    ready = {"ready": json.loads(json.dumps(place))}
    assert verdicts.judge([ready, {"failed": full, "at": "a"}], None, place)[0] == "unproved"
    error = {"failed": "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "at": "a"}
    assert verdicts.judge([ready, error], None, place)[0] == "crashes"
    elsewhere = {"ready": json.loads(json.dumps(place._replace(device="another")))}
    assert verdicts.judge([elsewhere], None, place)[0] == "unproved"
    assert verdicts.judge([ready], None, place) == ("unproved", "it takes none of the cases")


@pytest.mark.parametrize("change", ["source", "device", "versions"])
def test_a_verdict_holds_for_what_it_was_found_of(change, door, monkeypatch):
    calls: list[Place] = []
    settle(monkeypatch, "right", calls)
    door.use("right")
    assert chosen() == "right"
    here = calls[0]
    other = here._replace(**{change: {"jax": "9"} if change == "versions" else "another"})
    monkeypatch.setattr(Place, "here", lambda kernel: other)
    door.restart()
    settle(monkeypatch, "wrong", calls)
    assert chosen() == "chunked" and len(calls) == 2 and len(door.verdicts()) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"place": 3}', '{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}']
)
def test_a_file_that_is_no_verdict(text, door, monkeypatch):
    settle(monkeypatch, "right")
    door.use("right")
    assert chosen() == "right"
    (kept,) = door.verdicts()
    whole = kept.read_text()
    for bad in (text, whole.replace('"cpu"', '"gpu"')):
        kept.write_text(bad)
        door.restart()
        assert verdicts.read(Place.here(Kernel("attention", "tests.proof.fakes.right"))) is None
        assert chosen() == "right" and kept.read_text() == whole


def test_a_cache_that_cannot_be_written(door, monkeypatch, capsys):
    """A file is where the folder should be: root may write anywhere else."""
    settle(monkeypatch, "wrong")
    door.cache.write_text("")
    door.use("right")
    assert chosen() == "chunked"
    assert "cannot be written" in capsys.readouterr().err


def test_two_at_once_keep_one_whole_verdict(door, monkeypatch):
    """Another process keeps its own while this one proves."""

    def prove(place: Place, **_) -> Verdict:
        verdicts.keep(Verdict(place, "right", "", [], 2.0))
        return Verdict(place, "right", "", [], 1.0)

    monkeypatch.setattr(verdicts, "prove", prove)
    door.use("right")
    assert chosen() == "right"
    (kept,) = door.verdicts()
    assert json.loads(kept.read_text())["seconds"] == 1.0
    assert list(kept.parent.iterdir()) == [kept]
    assert stat.S_IMODE(kept.stat().st_mode) & stat.S_IRUSR


@pytest.mark.usefixtures("unchecked_types")
def test_what_proves_nothing(door, monkeypatch):
    monkeypatch.setattr(verdicts, "prove", None)
    door.use("one_element")
    asked: Any = "one_element"
    assert api.choose(Q, Q, Q, asked).implementation == "one_element"
    with api.override(asked):
        assert chosen() == "one_element"
    with chips.compiling_for(SimpleNamespace(platform="cpu", device_kind="absent")):
        assert chosen() == "one_element"
    with verdicts.looking():
        assert chosen() == "one_element"
    monkeypatch.setenv("SDAR_JAX_PROVE", "0")
    assert chosen() == "one_element"
    assert door.verdicts() == []


def test_looking_heeds_what_is_kept(door, monkeypatch):
    settle(monkeypatch, "wrong")
    door.use("one_element")
    assert chosen() == "chunked"
    door.restart()
    with verdicts.looking():
        assert chosen() == "chunked"


@pytest.fixture
def held(door, monkeypatch):
    """The chip is this process' own, as a TPU is."""
    monkeypatch.setattr(verdicts, "_holds_chip", lambda: True)
    return door


def test_in_a_thread_while_something_is_traced(held):
    held.use("right")
    assert jax.jit(lambda x: x + (chosen() == "right"))(0) == 1
    (kept,) = held.verdicts()
    assert list(kept.parent.iterdir()) == [kept]


def test_in_a_thread_what_does_not_compile(held, capsys):
    held.use("does_not_compile")
    assert chosen() == "chunked"
    assert "crashes on cpu" in (told := capsys.readouterr().err)
    assert "NotImplementedError: no layout for this in 'causal" in told


def test_in_a_thread_what_hangs_ends_the_process_and_is_kept(held, monkeypatch):
    monkeypatch.setattr(verdicts, "LIMIT", 0.5)
    held.use("hangs")
    with refused(KernelError, "hangs on cpu", "start again"):
        chosen()
    held.restart()
    monkeypatch.setattr(verdicts, "prove", None)
    assert chosen() == "chunked"


def test_in_a_thread_what_a_lost_process_left(held):
    """A mark is of a crash where its process is gone, or has been silent for too long on another host."""
    held.use("right")
    mark = Place.here(Kernel("attention", "tests.proof.fakes.right")).file.with_suffix(".begun")
    mark.parent.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, now = socket.gethostname(), time.time()
    for text, left in (
        ([here, ended.pid, now], True),
        ([here, os.getpid(), now], False),
        (["another host", 1, now], False),
        (["another host", 1, now - 1000], True),
        ("no mark", False),
    ):
        mark.write_text(json.dumps(text))
        assert verdicts._left_behind(mark) == left
    mark.write_text(json.dumps([here, ended.pid, now]))
    assert chosen() == "chunked" and not mark.exists()
    assert "its process ended before it did" in held.verdicts()[0].read_text()


def test_processes_of_a_job_take_what_the_first_found(door, monkeypatch, capsys):
    shared: dict[str, str] = {}
    monkeypatch.setattr(verdicts, "share", shared.__setitem__)
    monkeypatch.setattr(verdicts, "get_shared", lambda key, timeout: shared.get(key))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    settle(monkeypatch, "wrong")
    door.use("right")
    assert chosen() == "chunked" and "report" in capsys.readouterr().err
    door.restart()
    for file in door.verdicts():
        file.unlink()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    settle(monkeypatch, "right")
    assert chosen() == "chunked" and capsys.readouterr().err == ""
    door.restart()
    shared.clear()
    assert chosen() == "right"


def test_sources_are_those_of_the_kernel(tmp_path: Path, monkeypatch):
    before = verdicts._source("sdar_jax.attention.mosaic_gpu")
    assert before != verdicts._source("sdar_jax.experts.mosaic_gpu")
    (tmp_path / "of_mine.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    first = verdicts._source("of_mine")
    (tmp_path / "of_mine.py").write_text("a = 2")
    verdicts._source.cache_clear()
    assert verdicts._source("of_mine") != first
    assert verdicts._source("sdar_jax.attention.mosaic_gpu") == before
