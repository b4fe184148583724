"""The training loop: dispatch a step, read the metrics of the one before it, save now and then.

The devices of `config.mesh` compute. The host's only wait in the step path is for the metrics of step N - 1 while
step N runs, so that packing the next batch, logging and most of saving take none of the device's time.
"""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sdar_jax.data import PackedDataset, load_tokenizer
from sdar_jax.errors import ConfigError, TrainingError
from sdar_jax.model import Model
from sdar_jax.objectives import Batch
from sdar_jax.pretrained import save_pretrained
from sdar_jax.sharding import batch_sharding, use
from sdar_jax.training.checkpoint import Checkpoints, Position
from sdar_jax.training.config import EvalConfig, TrainConfig
from sdar_jax.training.reading import to_values
from sdar_jax.training.resume import check_unchanged, write_config
from sdar_jax.training.setup import Setup, open_dataset, prepare, tokenizer_directory
from sdar_jax.training.signals import Interrupts
from sdar_jax.training.step import StepMetrics, make_step
from sdar_jax.training.trackers import Trackers

log = logging.getLogger(__name__)

Evaluate = Callable[[Model], dict[str, float]]
MakeEvaluate = Callable[[EvalConfig, PackedDataset], Evaluate]

_RECORDS_NAMED = 5


class Outcome(NamedTuple):
    """step: how many are done. finished: all of them. signal: the one that stopped the run, if one did."""

    step: int
    finished: bool
    signal: int | None = None


def train(config: TrainConfig, *, make_evaluate: MakeEvaluate | None = None) -> Outcome:
    """Trains until `config.steps`, from the newest checkpoint of `config.run_dir` if it holds one.

    An interrupted and resumed run equals an uninterrupted one bit for bit, on the same machine and versions (on a GPU,
    where XLA is told to be deterministic: XLA_FLAGS=--xla_gpu_deterministic_ops=true). SIGTERM
    or SIGINT ends the current step, saves and returns. At the end the model (with `ema_decay`, its moving average) is
    written to run_dir/model, with its tokenizer; a run that has one is finished, and nothing is done.

    Args:
        make_evaluate: given `config.eval` and its data, returns what is called on the model: named numbers. Called
            only where `config.eval` is set.

    Raises:
        ConfigError: values that cannot be honoured, or that differ from those the run was started with.
        CheckpointError: weights or checkpoints that cannot be read. DataError: records that cannot be used.
        TrainingError: a loss or gradient that is not finite (nothing of it is saved), or data that ends too soon.
    """
    if config.eval is not None and make_evaluate is None:
        raise ConfigError("eval is set and train() has no make_evaluate; give one, or set eval to None")
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {config.run_dir!r} cannot be made ({error.strerror}); choose another") from None
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        position = checkpoints.position()
        if position is not None:
            check_unchanged(position.config, config)
        if (run_dir / "model").exists():
            log.info("%s is finished and its model in %s; nothing is left to do", run_dir, run_dir / "model")
            return Outcome(checkpoints.latest or config.steps, finished=True)
        return _train(config, run_dir, checkpoints, position, make_evaluate)


def _train(
    config: TrainConfig,
    run_dir: Path,
    checkpoints: Checkpoints,
    position: Position | None,
    make_evaluate: MakeEvaluate | None,
) -> Outcome:
    tokenizer_at = tokenizer_directory(config.model)
    tokenizer = load_tokenizer(tokenizer_at)
    setup = prepare(config, tokenizer, checkpoints, position)
    evaluate = None
    if config.eval is not None and make_evaluate is not None:
        evaluate = make_evaluate(config.eval, open_dataset(config.eval.data, tokenizer, setup.model))
    start = checkpoints.latest or 0
    log.info("%s: %s step %d of %d", run_dir, "going on from" if start else "starting at", start, config.steps)
    write_config(run_dir, config)
    outputs = Trackers(run_dir, step=start, steps=config.steps, tensorboard=config.tensorboard)
    with closing(setup.data), outputs as trackers, Interrupts() as interrupts:
        loop = _Loop(config, setup, start, trackers, checkpoints, evaluate)
        with use(setup.mesh):
            loop.run(interrupts)
    checkpoints.wait()
    if loop.done < config.steps:
        log.info("%s: stopped by a signal, saved at step %d; start it again to go on", run_dir, loop.done)
        return Outcome(loop.done, finished=False, signal=interrupts.received)
    save_pretrained(loop.model(), run_dir / "model", tokenizer_from=tokenizer_at)
    averaged = "" if config.ema_decay is None else " (the moving average of the weights)"
    log.info("%s: finished, model%s in %s", run_dir, averaged, run_dir / "model")
    return Outcome(loop.done, finished=True)


def _placed(batch: dict[str, np.ndarray], rows: int, mesh: Mesh) -> Batch:
    """A global batch of so many rows, of which this process has its share, over the devices."""
    place = batch_sharding(mesh)
    put = lambda x: jax.make_array_from_process_local_data(place, x, (rows, *x.shape[1:]))
    return Batch(**{name: put(batch[name]) for name in Batch._fields if name in batch})


class _Unread(NamedTuple):
    """A dispatched step whose metrics have not been read."""

    step: int
    metrics: StepMetrics
    tokens: int
    record_ids: np.ndarray


class _Loop:
    """The steps of a run; `done` counts those dispatched."""

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        start: int,
        trackers: Trackers,
        checkpoints: Checkpoints,
        evaluate: Evaluate | None,
    ):
        self.done, self._first = start, start + 1
        self._config, self._setup, self._state = config, setup, setup.state
        self._trackers, self._checkpoints, self._evaluate = trackers, checkpoints, evaluate
        self._step = make_step(config, setup.model, setup.rebuild)
        self._unread: _Unread | None = None
        self._saved = start

    def run(self, interrupts: Interrupts) -> None:
        """Until the last step or a signal; then everything is read and saved."""
        config = self._config
        while self.done < config.steps and not interrupts.received:
            self._advance()
            last = self.done == config.steps
            if self._evaluate and config.eval and (last or self.done % config.eval.every == 0):
                self._settle()
                self._trackers.evaluation(self.done, dict(self._evaluate(self.model())))
                self._setup.meter.restart_clock()
            if last or self.done % config.checkpoint.every == 0:
                self._save()
        self._save()

    def model(self) -> Model:
        """As it would be exported now: with the moving average, if one is kept."""
        state = self._state
        return self._setup.rebuild(state.weights if state.ema is None else state.ema)

    def _advance(self) -> None:
        """Dispatches one step, and reads the one before it while this one runs."""
        try:
            batch = next(self._setup.data)
        except StopIteration:
            raise TrainingError(
                f"the data ended after {self.done} of {self._config.steps} steps; set steps to {self.done}, or give "
                "more data or data.epochs"
            ) from None
        arrays = _placed(batch, self._config.data.batch_size, self._setup.mesh)
        self._state, metrics = self._step(self._state, arrays)
        self._settle()
        self.done += 1
        tokens = int(np.count_nonzero(batch["segment_ids"]))
        self._unread = _Unread(self.done, metrics, tokens, batch["record_ids"])
        if self.done == self._first:
            # Read at once, so that the clock starts when the first step has been compiled and run.
            self._settle()

    def _settle(self) -> None:
        """Reads the metrics of the last dispatched step, if they have not been read."""
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        metrics = jax.device_get(unread.metrics)
        if not metrics.finite:
            raise self._not_finite(unread, metrics)
        meter = self._setup.meter
        meter.add(metrics, unread.tokens)
        self._trackers.advance()
        if unread.step % self._config.log_every == 0 or unread.step == self._config.steps:
            self._trackers.train(unread.step, meter.line())

    def _save(self) -> None:
        self._settle()
        if self._saved == self.done:
            return
        data, meter = self._setup.data.get_state(), self._setup.meter.get_state()
        position = Position(data, meter, to_values(self._config), to_values(self._setup.model))
        self._checkpoints.save(self._state, position)
        self._saved = self.done

    def _not_finite(self, unread: _Unread, metrics: StepMetrics) -> TrainingError:
        records = self._setup.data.describe(unread.record_ids)
        named, rest = ", ".join(records[:_RECORDS_NAMED]), len(records) - _RECORDS_NAMED
        more = ""
        if rest > 0:
            file = Path(self._config.run_dir) / f"records-of-step-{unread.step}.txt"
            file.write_text("\n".join(records) + "\n")
            more = f" and {rest} more, listed in {file}"
        last = self._checkpoints.directory / str(self._saved)
        good = f"the last good checkpoint is {last}" if self._saved else "there is no checkpoint yet"
        return TrainingError(
            f"step {unread.step}: loss {metrics.loss / max(metrics.count, 1)}, gradient norm {metrics.grad_norm}, in a "
            f"batch of {named}{more}; {good}; lower optimizer.learning_rate or mend these records"
        )
