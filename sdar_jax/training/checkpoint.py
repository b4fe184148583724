"""Checkpoints: the full state of a run in one directory that is complete or absent, written by orbax in the background.

    checkpoints/STEP/state          weights, optimiser, moving average, key and step, as arrays
    checkpoints/STEP/position       the `HostState`: where the data and the meters are, and the configs: JSON
    checkpoints/STEP/sha256.json    a digest of each file of the two, as orbax does not notice flipped bits
    frozen/                         weights that are not trained, if there are any: once, as no step changes them

A checkpoint whose files do not match its digests is set aside in damaged/, and the one before it is used.

Of several processes each writes its part of the state, and the first one the rest when all have; one that cannot write
leaves no checkpoint. Each checks a part of the files when a run resumes.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sdar_jax.devices import processes
from sdar_jax.errors import CheckpointError
from sdar_jax.training.config import CheckpointConfig
from sdar_jax.training.optimizer import Weights
from sdar_jax.training.step import TrainState

log = logging.getLogger(__name__)

_DIGESTS = "sha256.json"
_ITEMS = ("state", "position")


class HostState(NamedTuple):
    """The part of a checkpoint that is no arrays, saved as JSON under the name "position".

    Attributes:
        data: data.get_state().
        meter: Meter.get_state().
        config: of the run, in full.
        model: the model's config, in full.
        files: `data_files.fingerprint` of what the data is read from; None in a checkpoint from before there was one.
        epochs: those whose steps were counted; None where steps were given.
        objective: the name of the user's own.
        frozen: the names of weights that are not trained.
        teacher: the fields of the teacher's paradigm; None without one.
    """

    data: dict[str, Any]
    meter: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, Any] | None = None
    epochs: int | None = None
    objective: str | None = None
    frozen: list[str] | None = None
    teacher: dict[str, Any] | None = None


class Checkpoints:
    """Saves and restores the checkpoints of a run. Close it, or use it in a `with`, so that the last one is finished.

    Raises:
        CheckpointError: there are checkpoints and every one of them is damaged.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig):
        self.directory = run_dir.absolute() / "checkpoints"
        self._damaged = run_dir / "damaged"
        self._saving = 0
        self._set_damaged_aside()
        asynchronous = ocp.options.AsyncOptions(
            post_finalization_callback=self._write_digests,
            barrier_sync_fn=_barrier if jax.process_count() > 1 else None,
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, cleanup_tmp_directories=True, async_options=asynchronous
        )
        self._closing = contextlib.ExitStack()
        plain = self._closing.enter_context(_plain_name(run_dir.absolute()))
        self._frozen = plain / "frozen"
        self._manager = ocp.CheckpointManager(plain / self.directory.name, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._closing, self._failures_reported():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, host_state: HostState) -> None:
        """Copies the state to the host and returns; the rest runs in the background.

        Raises:
            CheckpointError: this one, or the one before it, cannot be written.
        """
        # The callback that a save ends with asks which one it was.
        self.wait()
        self._saving = int(state.step)
        items = {
            "state": ocp.args.StandardSave(state._asdict()),
            "position": ocp.args.JsonSave(host_state._asdict()),
        }
        with self._failures_reported():
            self._manager.save(self._saving, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError if something could not be."""
        with self._failures_reported():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failures_reported(self) -> Iterator[None]:
        try:
            yield
        # What a full disk or a lost file system makes the layers below raise is of many types.
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            raise CheckpointError(
                f"{self.directory}: checkpoint {self._saving} cannot be written ({reason}); make room, then start again"
            ) from error

    def host_state(self) -> HostState | None:
        """Reads that of the newest checkpoint; None if there is none."""
        if self.latest is None:
            return None
        items = ocp.args.Composite(position=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=items)
        return HostState(**restored["position"])

    def state(self, like: TrainState) -> TrainState:
        """Reads that of the newest checkpoint, bit for bit, whatever mesh it was saved from.

        Args:
            like: ShapeDtypeStructs, with the sharding that each array is to have.

        Raises:
            CheckpointError: it holds other arrays, as those of another version of this package do.
        """
        self._check_shapes(like.weights)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()))
        restored = self._manager.restore(self.latest, args=items)
        return TrainState(**restored["state"])

    def _check_shapes(self, weights: Mapping[str, Any]) -> None:
        # By the name that orbax takes as it is.
        path = self._manager.directory / str(self.latest) / _ITEMS[0]
        held = ocp.StandardCheckpointHandler().metadata(path).tree["weights"]
        for name, weight in weights.items():
            if name in held and tuple(held[name].shape) != weight.shape:
                raise CheckpointError(
                    f"{self.directory}: checkpoint {self.latest} has {name} as {list(held[name].shape)}, and this "
                    f"version lays it out as {list(weight.shape)}; go on with the version that wrote it, or use a new "
                    "run_dir"
                )

    def save_frozen(self, weights: Weights) -> None:
        """Writes what no step will change, and returns when it is there. Before the first `save`.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not weights:
            return
        with self._failures_reported(), ocp.StandardCheckpointer() as writer:
            writer.save(self._frozen / _ITEMS[0], weights, force=True)
            writer.wait_until_finished()
            if processes.is_main_process():
                _write_digests(self._frozen)

    def frozen(self, like: dict[str, Any]) -> Weights:
        """Reads what `save_frozen` wrote, bit for bit.

        Args:
            like: ShapeDtypeStructs, with the sharding that each is to have.

        Raises:
            CheckpointError: it is damaged.
        """
        if not like:
            return {}
        if not _is_intact(self._frozen):
            raise CheckpointError(
                f"{self.directory.with_name('frozen')}: the frozen weights are damaged; restore them or use a new "
                "run_dir"
            )
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(self._frozen / _ITEMS[0], like)

    def _set_damaged_aside(self) -> None:
        steps = processes.broadcast(
            lambda: sorted(
                int(path.name) for path in self.directory.glob("*") if path.name.isdigit()
            )
        )
        damaged = []
        for step in reversed(steps):
            if _is_intact(self.directory / str(step)):
                break
            damaged.append(step)
        if damaged and len(damaged) == len(steps):
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged; restore one or use a new run_dir"
            )
        if processes.is_main_process():
            for step in map(str, damaged):
                shutil.rmtree(self._damaged / step, ignore_errors=True)
                self._damaged.mkdir(exist_ok=True)
                (self.directory / step).rename(self._damaged / step)
                log.warning(
                    "checkpoint %s is damaged and now in %s; going on from the one before it",
                    step,
                    self._damaged,
                )
        processes.barrier("damaged checkpoints are set aside")

    def _write_digests(self) -> None:
        """Writes the digests when all else is written and the directory still has its temporary name."""
        name = f"{self._saving}."
        (directory,) = (
            path for path in self.directory.iterdir() if f"{path.name}.".startswith(name)
        )
        _write_digests(directory)


def _write_digests(directory: Path) -> None:
    digests = {str(path.relative_to(directory)): _digest(path) for path in _files(directory)}
    (directory / _DIGESTS).write_text(json.dumps(digests))


@contextlib.contextmanager
def _plain_name(directory: Path) -> Iterator[Path]:
    """Gives a directory a name that orbax and tensorstore take as it is: to them [ ] is a pattern, and a backslash a /.

    All processes use the same name, a link that each of their machines has.
    """
    if not set("[]\\") & set(str(directory)):
        yield directory
        return
    link = Path(tempfile.gettempdir(), processes.broadcast(lambda: f"run-{uuid.uuid4().hex}"))
    with contextlib.suppress(FileExistsError):
        link.symlink_to(directory)
    try:
        yield link
    finally:
        link.unlink(missing_ok=True)


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Lets orbax's background threads wait for each other, but not one that has failed.

    The others do, until the failed process ends the job.
    """
    if (failure := sys.exception()) is not None:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _is_intact(directory: Path) -> bool:
    """Returns whether a directory matches its digests. Each process checks some of the files; all get the same
    answer."""
    part_is_intact = _is_part_intact(directory, jax.process_index(), jax.process_count())
    return all(processes.gather(part_is_intact))


def _is_part_intact(directory: Path, part: int, parts: int) -> bool:
    try:
        digests = json.loads((directory / _DIGESTS).read_text())
        some = itertools.islice(digests.items(), part, None, parts)
        return bool(digests) and all(_digest(directory / name) == digest for name, digest in some)
    except (OSError, ValueError, AttributeError):
        return False


def _files(directory: Path) -> Iterator[Path]:
    return (
        path for item in _ITEMS for path in sorted((directory / item).rglob("*")) if path.is_file()
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
