"""Metrics of a run: averages over steps, to the console, to metrics.jsonl and to TensorBoard."""

import abc
import contextlib
import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from sdar_jax.errors import is_int
from sdar_jax.model.config import ModelConfig
from sdar_jax.training.flops import training_flops
from sdar_jax.training.step import StepMetrics

log = logging.getLogger(__name__)

Line = dict[str, float | int | None]

# fsync, which flushing an event file calls, can take long.
_FLUSH_SECONDS = 30.0

_SHOWN = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "tokens_per_second": "{:.0f} tok/s",
    "mfu": "MFU {:.1%}",
}


class _Sums(NamedTuple):
    """Sums over the steps since the last line."""

    steps: float = 0.0
    loss: float = 0.0
    normalizer: float = 0.0
    nll: float = 0.0
    correct: float = 0.0
    num_loss_tokens: float = 0.0
    grad_norm: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    max_load: float = 0.0
    entropy: float = 0.0


class Meter:
    """Adds up steps and gives a line of averages for them.

    All but speed is a function of the steps alone: saved and restored with a checkpoint, an interrupted run writes the
    lines of one that was not.

    Args:
        model: whose FLOPs are counted.
        peak_flops: FLOP/s of the device; None: no MFU.
        frozen: whether the weights are, as with LoRA.
    """

    def __init__(self, model: ModelConfig, peak_flops: float | None, *, frozen: bool = False):
        self._model = model
        self._frozen = frozen
        self._has_entropy = False
        self._peak = peak_flops
        self._sums = _Sums()
        self._tokens = 0
        self._learning_rate = 0.0
        self._last: float | None = None
        self._restart_timing()

    def _restart_timing(self) -> None:
        self._seconds = 0.0
        self._timed_tokens = 0
        self._timed_flops = 0.0

    def add(self, metrics: StepMetrics, tokens: int) -> None:
        """Adds one step's metrics, on the host, as soon as it has ended.

        Args:
            tokens: clean ones of the batch, without padding.
        """
        scores = metrics.scores
        balance, z, max_load = (0.0, 0.0, 0.0) if scores.router is None else scores.router
        self._has_entropy = scores.entropy is not None
        new = _Sums(
            steps=1,
            loss=float(metrics.loss),
            normalizer=float(metrics.normalizer),
            nll=float(scores.nll),
            correct=float(scores.correct),
            num_loss_tokens=float(scores.num_loss_tokens),
            grad_norm=float(metrics.grad_norm),
            balance=float(balance),
            z=float(z),
            max_load=float(max_load),
            entropy=0.0 if scores.entropy is None else float(scores.entropy),
        )
        self._sums = _Sums(*(total + value for total, value in zip(self._sums, new, strict=True)))
        self._tokens += tokens
        self._learning_rate = float(metrics.learning_rate)
        flops = training_flops(self._model, metrics.token_counts, frozen=self._frozen)
        self._clock(tokens, flops)

    def _clock(self, tokens: int, flops: float) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._timed_tokens += tokens
            self._timed_flops += flops
        self._last = now

    def stop_clock(self) -> None:
        """Leaves the next step out of the training time, as it compiles."""
        self._last = None

    def restart_clock(self) -> None:
        """Leaves out of the training time what happened since the last step ended (an evaluation)."""
        self._last = time.perf_counter()

    def line(self) -> Line:
        """Averages since the last line, and starts anew.

        loss: the objective, sum of weighted cross-entropy over its normalizer, and what an MoE's router and CAP add.
        nll: nats per predicted token, unweighted; accuracy: of first guesses for them; entropy: with `confidence_beta`,
        in nats, mean where these are right. grad_norm: mean, before clipping. tokens: seen since the start. Of an MoE,
        averages over micro-batches: balance_loss, router_z_loss, and max_load, the pairs of the busiest expert of any
        layer as a multiple of an even share.
        """
        sums = self._sums

        def share(part: float | int, total: float | int) -> float | None:
            return part / total if total else None

        line: Line = {
            "loss": share(sums.loss, sums.normalizer),
            "nll": share(sums.nll, sums.num_loss_tokens),
            "accuracy": share(sums.correct, sums.num_loss_tokens),
            "grad_norm": share(sums.grad_norm, sums.steps),
            "learning_rate": self._learning_rate,
            "tokens": self._tokens,
            "tokens_per_second": share(self._timed_tokens, self._seconds),
        }
        if self._has_entropy:
            line["entropy"] = share(sums.entropy, sums.correct)
        if self._model.num_experts:
            line["balance_loss"] = share(sums.balance, sums.normalizer)
            line["router_z_loss"] = share(sums.z, sums.normalizer)
            line["max_load"] = share(sums.max_load, sums.normalizer)
        if self._peak:
            line["mfu"] = share(self._timed_flops, self._seconds * self._peak)
        self._sums = _Sums()
        self._restart_timing()
        return line

    def get_state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, for JSON."""
        return {"sums": list(self._sums), "tokens": self._tokens}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sums = _Sums(*state["sums"])
        self._tokens = state["tokens"]


class Trackers:
    """Writes the three outputs of a run that resumes after `step`; later lines of an earlier attempt are dropped.

    None of them is essential: a warning says what cannot be written, and the run continues without it.
    """

    def __init__(self, run_dir: Path, *, step: int, steps: int, tensorboard: bool):
        self._lines = _Lines(run_dir / "metrics.jsonl", step)
        self._board = _Board(run_dir / "tensorboard", step) if tensorboard else None
        # On a terminal a bar, elsewhere (disable=None) a line of text for each line of metrics.
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def advance(self) -> None:
        """Moves the bar by one step."""
        self._bar.update()

    def train(self, step: int, line: Line) -> None:
        self._write(step, line, "train")
        shown = [
            form.format(line[name]) for name, form in _SHOWN.items() if line.get(name) is not None
        ]
        if self._bar.disable:
            print(f"step {step}/{self._bar.total}", *shown, flush=True)
        else:
            self._bar.set_postfix_str(" ".join(shown), refresh=False)

    def evaluation(self, step: int, line: Line) -> None:
        self._write(step, {f"eval_{name}": value for name, value in line.items()}, "eval")
        # Parts of a number, as "nelbo/web", are for the files.
        whole = {name: value for name, value in line.items() if "/" not in name}
        tqdm.write(
            f"step {step}: held-out "
            + ", ".join(f"{name} {value:.4f}" for name, value in whole.items())
        )
        sys.stdout.flush()

    def _write(self, step: int, line: Line, folder: str) -> None:
        self._lines.write(step, line)
        if self._board:
            self._board.write(step, {_tag(name, folder): value for name, value in line.items()})


def _tag(name: str, folder: str) -> str:
    """Names a number for TensorBoard, which has a section for what is before the slash: parts of one have their own."""
    return name if "/" in name else f"{folder}/{name.removeprefix('eval_')}"


class NullTracker(Trackers):
    """Writes nothing: for processes that leave it to the main one."""

    def __init__(self):
        pass

    def __exit__(self, *_) -> None:
        pass

    def advance(self) -> None:
        pass

    def train(self, step: int, line: Line) -> None:
        pass

    def evaluation(self, step: int, line: Line) -> None:
        pass


class _Output(abc.ABC):
    """A file of metrics after `step`; where it cannot be written, one warning says so, until it can again."""

    _tries_again = True

    def __init__(self, path: Path, step: int):
        self._path = path
        self._step = step
        self._ready = False
        self._warned = False
        self._attempt()

    def write(self, step: int, line: Line) -> None:
        self._attempt(step, line)

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        pass

    def _attempt(self, *line: Any) -> None:
        if self._warned and not self._tries_again:
            return
        try:
            if not self._ready:
                self._open()
                self._ready = True
            if line:
                self._append(*line)
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning(
                    "%s cannot be written (%s); the run goes on without it",
                    self._path,
                    error.strerror,
                )
            self._warned = True

    @abc.abstractmethod
    def _open(self) -> None:
        """Makes the file ready, without what an earlier attempt wrote after the step."""

    @abc.abstractmethod
    def _append(self, step: int, line: Line) -> None:
        """Writes one line, whole or not at all; raises OSError."""


class _Lines(_Output):
    """Writes metrics.jsonl, a JSON object per line. Lines of an earlier attempt after `step` are dropped."""

    def _open(self) -> None:
        _keep_lines(self._path, self._step)
        self._path.touch()

    def _append(self, step: int, line: Line) -> None:
        text = json.dumps({"step": step, **line}).encode() + b"\n"
        # Without a buffer, which would keep what a full disk did not take, and write it later.
        with self._path.open("ab", buffering=0) as file:
            start = file.tell()
            if file.write(text) != len(text):
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Board(_Output):
    """Writes event files for TensorBoard, which drops the events of an earlier attempt after `step`.

    Written by this thread: the one that tensorboardX's SummaryWriter has dies of a full disk, and the run would then
    wait for it without end.
    """

    # An event that is cut short hides all that follow it in its file.
    _tries_again = False

    def _open(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(self._path / "events"))
        self._file.write_event(
            Event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._flushed = time.monotonic()

    def _append(self, step: int, line: Line) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if value is not None
        ]
        self._file.write_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        )
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if self._ready:
            with contextlib.suppress(OSError):
                self._file.close()


def _keep_lines(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a last line that a kill cut short is dropped too.

    Other lines that are none of a run's are moved to metrics.damaged.jsonl.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [_step_of(line) for line in lines]
    damaged = [
        line
        for line, found in zip(lines, steps, strict=True)
        if found is None and line.endswith(b"\n")
    ]
    if damaged:
        aside = path.with_suffix(".damaged.jsonl")
        with aside.open("ab") as file:
            file.writelines(damaged)
        log.warning(
            "%s: %d damaged lines are now in %s; the run goes on", path, len(damaged), aside
        )
    kept = [
        line
        for line, found in zip(lines, steps, strict=True)
        if found is not None and found <= step
    ]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def _step_of(line: bytes) -> int | None:
    """Reads the step of a complete line of metrics; None of any other."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if is_int(step) else None
