"""The training loop: dispatch a step, read the metrics of the one before it, save now and then.

The devices of `config.mesh` compute. The host's only wait in the step path is for the metrics of step N - 1 while
step N runs, so that packing the next batch, logging and most of saving take none of the device's time.

The processes of a job all run this loop, each with its rows of the data; the first one writes. A signal to one of them
travels with a step to all, and is read with that step's metrics: they stop after the same one.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerBase

from sdar_jax import adapters
from sdar_jax.data import join_states, load_tokenizer
from sdar_jax.devices import processes
from sdar_jax.devices.chips import check_backend
from sdar_jax.devices.sharding import activate_mesh, batch_sharding, make_mesh
from sdar_jax.errors import ConfigError, DataError, TrainingError, TrainingInterrupted
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.held_out import held_out_likelihood
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch
from sdar_jax.training.best import keep_best
from sdar_jax.training.checkpoint import Checkpoints, HostState
from sdar_jax.training.config import TrainConfig
from sdar_jax.training.config_io import to_values
from sdar_jax.training.extensions import Callback, Evaluator, Extensions, TrainingObjective
from sdar_jax.training.noise_ramp import noise_schedule
from sdar_jax.training.resume import (
    check_extensions,
    check_same_for_all,
    check_unchanged,
    write_config,
)
from sdar_jax.training.run_dir import finished_step, mark_export, model_path, occupied
from sdar_jax.training.setup import (
    Setup,
    configured_step,
    open_dataset,
    prepare,
    tokenizer_directory,
)
from sdar_jax.training.signals import Interrupts
from sdar_jax.training.step import Rebuild, StepMetrics, with_block_size
from sdar_jax.training.trackers import Line, NullTracker, Trackers

log = logging.getLogger(__name__)

_RECORDS_NAMED = 5


class Outcome(NamedTuple):
    """The end of a run.

    Attributes:
        step: how many steps are done.
        finished: whether these are all.
        signal: the one that stopped the run, if one did.
    """

    step: int
    finished: bool
    signal: int | None = None


def train(
    config: TrainConfig,
    *,
    data: Iterable[dict[str, Any]] | None = None,
    evaluators: Sequence[Evaluator] = (),
    callbacks: Sequence[Callback] = (),
    objective: TrainingObjective | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Model:
    """Trains until `config.steps` (or as many as `config.epochs` has), from the newest checkpoint of `config.run_dir`.

    An interrupted and resumed run equals an uninterrupted one bit for bit, on the same machine and versions (on a GPU,
    where XLA is told to be deterministic: XLA_FLAGS=--xla_gpu_deterministic_ops=true). At the end the model (with
    `ema_decay`, its moving average) is written to run_dir/model, with its tokenizer; a run that has written it is
    finished, and nothing is done. Its generation_config.json lists the tokens that end the responses it learned. A
    finished run that is given more steps continues, if its schedule allows it.

    What is given besides the config is to be the same each time the run starts, and in all processes of a job.

    Args:
        data: batches in place of `config.data.sources`, which is then empty: dicts of `tokens` int32 [B, L],
            `segment_ids` int32 [B, L] (> 0 and contiguous a document, 0 for padding), `loss_mask` bool [B, L] (the
            tokens with loss), with noisy_length `noisy_index` int32 [B, N], and `order` int32 [B, L] (when each token
            was committed) where masks follow it; B and L as `config.data` says. An iterator with `get_state` and
            `set_state` is resumed by them; of any other, a run that resumes leaves out what it had used.
        evaluators: (model, step) -> named numbers, which are logged as "eval_" + name. Called each `config.eval.every`
            steps, without `config.eval` each `config.checkpoint.every`, and after the last one. With `config.eval` the
            held-out likelihood is one of them.
        callbacks: called with (step, line, model) for each line of metrics.jsonl, a dict of numbers. `model()` gives
            the model as it would be exported now.
        objective: what is learned, in place of `config.objective` and the model's own.
        trainable: says of a weight's name, such as "layers.body.qkv", whether it is trained. The others are frozen:
            without gradients and moments, and saved once. None: all are trained.

    A model that an evaluator or a callback is given is good until it returns: the next step takes its weights over.

    Returns:
        What is in run_dir/model, in `config.export_dtype`, on the mesh of the run.

    Raises:
        ConfigError: values that cannot be honoured, or that differ from those the run was started with; a run_dir that
            another job uses, or with a model of another's.
        CheckpointError: weights or checkpoints that cannot be read. DataError: records or batches that cannot be used;
            the steps before are saved.
        TrainingError: a loss or gradient that is not finite (not saved), or data that ends too soon (all is saved).
        TrainingInterrupted: SIGTERM or SIGINT came. The step at hand was ended and all is saved.
    """
    outcome = run(config, Extensions(data, evaluators, callbacks, objective, trainable))
    if outcome.signal is not None:
        raise TrainingInterrupted(
            f"{config.run_dir} was stopped by signal {outcome.signal} and saved at step {outcome.step}; start it again "
            "to go on",
            outcome.signal,
        )
    model = model_path(Path(config.run_dir))
    return load_pretrained(model, dtype=config.export_dtype, mesh=make_mesh(config.mesh))


def run(config: TrainConfig, extensions: Extensions = Extensions()) -> Outcome:  # noqa: B008 (a tuple)
    """Trains as `train` does, but does not read the exported model; a signal is part of the outcome."""
    check_backend()
    check_extensions(config, extensions)
    run_dir = Path(config.run_dir)
    with occupied(run_dir), Checkpoints(run_dir, config.checkpoint) as checkpoints:
        check_same_for_all(config)
        host_state = checkpoints.host_state()
        if host_state is not None:
            check_unchanged(host_state.config, config)
        if (end := finished_step(run_dir, config, checkpoints.latest)) is not None:
            log.info(
                "%s is finished and its model in %s; nothing is left to do",
                run_dir,
                model_path(run_dir),
            )
            return Outcome(end, finished=True)
        return _run(config, run_dir, checkpoints, host_state, extensions)


def _run(
    config: TrainConfig,
    run_dir: Path,
    checkpoints: Checkpoints,
    host_state: HostState | None,
    extensions: Extensions,
) -> Outcome:
    tokenizer_at = tokenizer_directory(config.model)
    tokenizer = load_tokenizer(tokenizer_at)
    setup = prepare(config, tokenizer, checkpoints, host_state, extensions)
    config = setup.config
    steps = config.total_steps
    if config.eval is not None:
        extensions = _with_evaluation(config, config.eval, extensions, setup.model, tokenizer)
        if config.eval.best is not None:
            export = lambda model, path: _export(model, config, path, tokenizer_at)
            best = keep_best(config.eval.best, run_dir, export, counts=config.has_final_blocks)
            extensions = extensions._replace(callbacks=[*extensions.callbacks, best])
    start = checkpoints.latest or 0
    log.info(
        "%s: %s step %d of %d", run_dir, "going on from" if start else "starting at", start, steps
    )
    if processes.is_main_process():
        write_config(run_dir, config)
        outputs = Trackers(run_dir, step=start, steps=steps, tensorboard=config.tensorboard)
    else:
        outputs = NullTracker()
    with closing(setup.data), outputs as trackers, Interrupts() as interrupts:
        loop = _Loop(setup, start, trackers, checkpoints, extensions, interrupts)
        with activate_mesh(setup.mesh):
            loop.run()
    checkpoints.wait()
    if loop.done < steps:
        log.info(
            "%s: stopped by a signal, saved at step %d; start it again to go on", run_dir, loop.done
        )
        return Outcome(loop.done, finished=False, signal=loop.signal)
    mark_export(run_dir, config, setup.epochs, complete=False)
    model = loop.model()
    if config.lora is not None:
        adapters.save(
            model,
            run_dir / "adapter",
            base=config.model.init_from,
            modules_to_save=config.lora.modules_to_save,
        )
    _export(model, config, model_path(run_dir), tokenizer_at)
    mark_export(run_dir, config, setup.epochs, complete=True)
    averaged = "" if config.ema_decay is None else " (the moving average of the weights)"
    log.info("%s: finished, model%s in %s", run_dir, averaged, model_path(run_dir))
    return Outcome(loop.done, finished=True)


def _with_evaluation(
    config: TrainConfig,
    evaluation: EvalConfig,
    extensions: Extensions,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Extensions:
    """Puts the evaluators of the config before those that are given."""
    own = []
    if evaluation.data is not None:
        with closing(open_dataset(evaluation.data, tokenizer, model)) as rows:
            own.append(held_out_likelihood(evaluation, rows))
    if evaluation.tasks:
        # It decodes, which other runs need not wait for.
        from sdar_jax.evaluation.in_training import task_scores

        own.append(task_scores(evaluation, tokenizer))
    return extensions._replace(evaluators=[*own, *extensions.evaluators])


def _export(model: Model, config: TrainConfig, path: Path, tokenizer_at: Path) -> None:
    if config.lora is not None:
        model = adapters.merge(model)
    save_pretrained(model, path, tokenizer_from=tokenizer_at, dtype=config.export_dtype)


def _placed(batch: dict[str, np.ndarray], rows: list[int], batch_size: int, mesh: Mesh) -> Batch:
    """Places a global batch on the devices; `batch` holds `rows` of it, which are those of this process' devices."""
    place = batch_sharding(mesh)
    index_of = {row: i for i, row in enumerate(rows)}

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(batch_size)[index[0]]
            return x[[index_of[row] for row in wanted]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), place, part)

    return Batch(**{name: put(batch[name]) for name in Batch._fields if name in batch})


@jax.jit
def _over_all(
    segment_ids: Int[Array, "B L"], signals: Int[Array, " devices"]
) -> tuple[Array, Array]:
    """Counts the tokens that are no padding, and finds the largest number of a signal."""
    return jnp.count_nonzero(segment_ids), signals.max()


class _Unread(NamedTuple):
    """A dispatched step whose metrics have not been read.

    Attributes:
        step: its number.
        metrics: on the devices.
        tokens: how many the global batch has, without padding.
        signal: what a process had received before this step, or 0.
        record_ids: of the batch.
    """

    step: int
    metrics: StepMetrics
    tokens: Any
    signal: Any
    record_ids: np.ndarray


class _Loop:
    """Runs the steps of a run; `done` counts those dispatched."""

    def __init__(
        self,
        setup: Setup,
        start: int,
        trackers: Trackers,
        checkpoints: Checkpoints,
        extensions: Extensions,
        interrupts: Interrupts,
    ):
        self.done = start
        self._interrupts = interrupts
        # The signal that all processes know of, or 0.
        self._agreed = 0
        self._config = setup.config
        self._setup = setup
        self._state = setup.state
        self._steps = self._config.total_steps
        self._noise_range = noise_schedule(self._config)
        # By block size; compiled where each is called first.
        self._compiled: dict[int | None, jax.stages.Wrapped] = {}
        self._trackers = trackers
        self._checkpoints = checkpoints
        self._extensions = extensions
        self._unread: _Unread | None = None
        self._saved = start
        self._data_state = setup.data.get_state()

    @property
    def signal(self) -> int | None:
        """The one that stops the run, the same on all processes."""
        return self._interrupts.received if jax.process_count() == 1 else self._agreed or None

    def run(self) -> None:
        """Trains until the last step or a signal; then everything is read and saved."""
        config = self._config
        extensions = self._extensions
        every = config.checkpoint.every if config.eval is None else config.eval.every
        while self.done < self._steps and not self.signal:
            self._advance()
            last = self.done == self._steps
            if extensions.callbacks and self._is_logged(self.done):
                # Read now, while the state is still the one that the line is about.
                self._read_metrics()
            if extensions.evaluators and (last or self.done % every == 0):
                self._read_metrics()
                self._evaluate()
            if last or self.done % config.checkpoint.every == 0:
                self._save()
        self._save()

    def _is_logged(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step == self._steps

    def _evaluate(self) -> None:
        line: Line = {}
        for evaluator in self._extensions.evaluators:
            numbers = evaluator(self.model(), self.done)
            new = {name: float(value) for name, value in numbers.items()}
            if twice := sorted(new.keys() & line.keys()):
                raise ConfigError(
                    f"two evaluators give {', '.join(twice)}; let each give a name of its own"
                )
            line |= new
        self._trackers.evaluation(self.done, line)
        self._call_back(self.done, {f"eval_{name}": value for name, value in line.items()})
        self._setup.meter.restart_clock()

    def _call_back(self, step: int, line: Line) -> None:
        for callback in self._extensions.callbacks:
            callback(step, dict(line), self.model)

    def model(self) -> Model:
        """Makes the model as it would be exported now: with the moving average, if one is kept."""
        state = self._state
        weights = state.weights if state.ema is None else state.ema
        rebuild = self._rebuild(self._config.block_size_at(self.done))
        return rebuild({**self._setup.frozen, **weights})

    def _rebuild(self, block_size: int | None) -> Rebuild:
        whole = self._setup.rebuild
        return whole if block_size is None else with_block_size(whole, block_size)

    def _step_of(self, block_size: int | None) -> jax.stages.Wrapped:
        """Makes the step of a block size, where there is none yet; it compiles when it is called."""
        if block_size not in self._compiled:
            model = self._setup.model
            if block_size is not None:
                log.info("step %d: blocks of %d from here on", self.done + 1, block_size)
                model = replace(model, block_size=block_size)
            self._compiled[block_size] = configured_step(
                self._config,
                model,
                self._rebuild(block_size),
                self._extensions.objective,
                self._setup.teacher,
            )
        return self._compiled[block_size]

    def _advance(self) -> None:
        """Dispatches one step, and reads the one before it while this one runs."""
        batch = self._next_batch()
        arrays = _placed(batch, self._setup.rows, self._config.data.batch_size, self._setup.mesh)
        block_size = self._config.block_size_at(self.done + 1)
        compiles = block_size not in self._compiled
        if compiles:
            # What compiles is not timed: the clock starts when this step has run.
            self._read_metrics()
            self._setup.meter.stop_clock()
        self._state, metrics = self._step_of(block_size)(self._state, arrays, self._setup.frozen)
        tokens, signal = self._dispatch_counters(batch, arrays)
        self._read_metrics()
        self.done += 1
        self._unread = _Unread(self.done, metrics, tokens, signal, batch["record_ids"])
        if compiles:
            self._read_metrics()

    def _next_batch(self) -> dict[str, np.ndarray]:
        """Takes the next batch. Where there is none, the steps before it are saved before the error."""
        try:
            batch = next(self._setup.data)
        except StopIteration:
            self._save()
            self._checkpoints.wait()
            more = (
                "raise data.epochs or leave it out"
                if self._extensions.data is None
                else "or give more data"
            )
            raise TrainingError(
                f"the data ended after {self.done} of {self._steps} steps, which are saved; set steps to {self.done}, "
                f"{more}, and start it again"
            ) from None
        except DataError:
            # Another process may not have had this error, and would not save its part.
            if jax.process_count() == 1:
                self._save()
                log.info("saved at step %d; start it again to go on", self._saved)
            raise
        self._data_state = self._setup.data.get_state()
        return batch

    def _dispatch_counters(self, batch: dict[str, np.ndarray], arrays: Batch) -> tuple[Any, Any]:
        """Dispatches the counts of this step's tokens and signals, for `_Unread`."""
        if jax.process_count() == 1:
            return np.count_nonzero(batch["segment_ids"]), 0
        mesh = self._setup.mesh
        received = np.full(1, self._interrupts.received or 0, np.int32)
        one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        signals = jax.make_array_from_callback((mesh.size,), one_each, lambda _: received)
        return _over_all(arrays.segment_ids, signals)

    def _read_metrics(self) -> None:
        """Reads the metrics of the last dispatched step, if they have not been read."""
        if self._unread is None:
            return
        unread = self._unread
        self._unread = None
        metrics, tokens, signal = jax.device_get((unread.metrics, unread.tokens, unread.signal))
        if not metrics.finite:
            raise self._not_finite(unread, metrics)
        self._agreed = int(signal)
        meter = self._setup.meter
        meter.add(metrics, int(tokens))
        self._trackers.advance()
        if self._is_logged(unread.step):
            line = meter.line()
            if self._config.block_sizes:
                line["block_size"] = self._config.block_size_at(unread.step)
            if self._noise_range is not None:
                low, high = self._noise_range(unread.step)
                line |= {"t_min": float(low), "t_max": float(high)}
            self._trackers.train(unread.step, line)
            if self._extensions.callbacks:
                self._call_back(unread.step, line)
                meter.restart_clock()

    def _save(self) -> None:
        self._read_metrics()
        if self._saved == self.done:
            return
        setup = self._setup
        objective = self._extensions.objective
        host_state = HostState(
            # Of the last batch that came: an error behind it can leave the data between two.
            data=join_states(processes.gather(self._data_state)),
            meter=setup.meter.get_state(),
            config=to_values(self._config),
            model=to_values(setup.model),
            files=setup.files,
            epochs=setup.epochs,
            objective=objective and objective.name,
            frozen=list(setup.frozen),
            teacher=None if setup.teacher is None else asdict(setup.teacher),
        )
        self._checkpoints.save(self._state, host_state)
        self._saved = self.done

    def _not_finite(self, unread: _Unread, metrics: StepMetrics) -> TrainingError:
        found = processes.gather(self._setup.data.describe(unread.record_ids))
        records = list(dict.fromkeys(record for records in found for record in records))
        named = ", ".join(records[:_RECORDS_NAMED])
        rest = len(records) - _RECORDS_NAMED
        more = ""
        if rest > 0:
            file = Path(self._config.run_dir) / f"records-of-step-{unread.step}.txt"
            more = f" and {rest} more, listed in {file}"
            try:
                if processes.is_main_process():
                    file.write_text("\n".join(records) + "\n")
            except OSError as error:
                more = f" and {rest} more ({file} cannot be written: {error.strerror})"
        last = self._checkpoints.directory / str(self._saved)
        good = (
            f"the last good checkpoint is {last}" if self._saved else "there is no checkpoint yet"
        )
        loss = metrics.loss / max(metrics.normalizer, 1)
        return TrainingError(
            f"step {unread.step}: loss {loss}, gradient norm {metrics.grad_norm}, in a "
            f"batch of {named}{more}; {good}; mend these records and start it again, or lower optimizer.learning_rate "
            "in a new run_dir"
        )
