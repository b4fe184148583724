"""Whether a kernel is right on the chip that is here: found out at its first use, and kept.

Nobody has run every kernel on every chip with every version of JAX. So where one is first chosen, a process of its own
runs it on small cases (`sdar_jax.proof`), with a time limit, and the verdict is written into the user's cache folder.
Of a kernel that was wrong, crashed or hung one line is printed, and XLA computes its operation.

A verdict is of a kernel, by its source, on a kind of chip, under versions of JAX and its plugin: where one of them is
another, the kernel proves itself again. In a job of several processes, what process 0 found holds for all. A TPU is
held by one process, this one: there the cases run in a thread; one that is left unfinished counts as a crash.

Kernels that are asked for by name, and those that are compiled for chips that are not here, prove nothing.
SDAR_JAX_PROVE=0 takes all of them as they are.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdar_jax.compatibility import get_shared, share
from sdar_jax.devices import chips
from sdar_jax.devices.user_cache import user_cache_dir
from sdar_jax.errors import KernelError

SWITCH = "SDAR_JAX_PROVE"
# Seconds without a line of a proof, from which on it hangs; the same for its first line, before which JAX starts.
LIMIT = 120.0
_STARTING = 120.0
# Seconds after which is said that it runs; between two looks at it; and that a killed process may take to end.
_QUIET = 2.0
_LOOKING = 0.05
_DYING = 5.0

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
# Beside the room of a kernel, what makes its numbers.
_SOURCES = ("gpu_kernels.py", "visibility.py", "proof/cases.py", "proof/check.py")
# The GPU may be full of what this process holds, which says nothing of a kernel.
_NO_MEMORY = ("Out of memory while trying to allocate", "CUDA_ERROR_OUT_OF_MEMORY")

Event = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel: the operation that it computes, and the name of its module."""

    op: str
    module: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.module.rpartition('.')[2]}"


class Place(NamedTuple):
    """What a verdict holds for.

    Attributes:
        kernel: the kernel.
        source: a hash of the files that make its numbers.
        device: `device_kind`.
        versions: of JAX, its plugin, and what that was built from.
    """

    kernel: Kernel
    source: str
    device: str
    versions: dict[str, str]

    @classmethod
    def here(cls, kernel: Kernel) -> "Place":
        device = chips.device()
        versions = {name: version for name in _PACKAGES if (version := _version(name))}
        versions["platform"] = " ".join(device.client.platform_version.split())
        return cls(kernel, _source(kernel.module), device.device_kind, versions)

    @classmethod
    def of(cls, told: Any) -> "Place":
        """Reads what JSON made of one. Raises whatever it likes where it was none."""
        kernel, source, device, versions = told
        return cls(Kernel(*kernel), str(source), str(device), dict(versions))

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w.-]+", "-", f"{self.kernel.name} {self.device}")
        return user_cache_dir() / "kernels" / f"{name}-{digest[:16]}.json"

    def __str__(self) -> str:
        versions = (f"{name} {text}" for name, text in self.versions.items() if name in _PACKAGES)
        return f"{self.device} with {', '.join(versions)}"


class Verdict(NamedTuple):
    """What was found of a kernel.

    Attributes:
        place: what it holds for.
        outcome: "right"; "wrong", "crashes" or "hangs"; "unproved" where the proof itself could not run, which is not
            kept.
        reason: why it is not right.
        events: what the proof wrote.
        seconds: that it took.
    """

    place: Place
    outcome: str
    reason: str
    events: list[Event]
    seconds: float

    @property
    def right(self) -> bool:
        return self.outcome == "right"

    def __str__(self) -> str:
        """One line, of a kernel that is not right."""
        kernel = self.place.kernel.name
        if self.outcome == "unproved":
            return (
                f"sdar-jax: the kernel {kernel} could not be checked on {self.place} ({self.reason}); XLA computes in "
                f"its place; run `sdar-jax doctor --prove` while nothing else uses the chip, or set {SWITCH}=0 to "
                "trust it"
            )
        verb = "gives wrong results" if self.outcome == "wrong" else self.outcome
        file = self.place.file
        kept = f"with {file}" if file.exists() else f"with this line ({file} cannot be written)"
        return (
            f"sdar-jax: the kernel {kernel} {verb} on {self.place}: {self.reason}; XLA computes in its place; "
            f"please report it {kept}, or what `sdar-jax doctor --prove` writes"
        )


def trusted(op: str, module: str) -> bool:
    """Returns whether a kernel may be used here; finds out where that is not known yet, which takes seconds.

    May be called while a function is traced. Says in one line on stderr, once, why not.

    Raises:
        KernelError: it hangs on a chip that this process alone can use.
    """
    if os.environ.get(SWITCH) == "0" or chips.is_compiling_for():
        return True
    kernel = Kernel(op, module)
    with _lock:
        known = _settled.get((kernel, chips.device().device_kind))
        if known is None and _looking:
            kept = read(Place.here(kernel))
            return kept is None or kept.right
        if known is None:
            verdict = _agreed(kernel)
            known = _settled[kernel, verdict.place.device] = verdict.right
    return known


def read(place: Place) -> Verdict | None:
    """Reads the verdict that is kept; None if there is none that can be read."""
    try:
        verdict = _of_json(place.file.read_text())
    except (OSError, ValueError):
        return None
    return verdict if verdict is not None and verdict.place == place else None


def keep(verdict: Verdict) -> None:
    """Writes the verdict, at once or not at all; a folder that cannot be written to is no error."""
    if verdict.outcome != "unproved":
        _write(verdict.place.file, json.dumps(verdict._asdict(), indent=1))


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Proves nothing inside: kernels without a verdict are taken as they are. For reports."""
    global _looking
    before, _looking = _looking, True
    try:
        yield
    finally:
        _looking = before


def prove(place: Place, *, in_thread: bool = False) -> Verdict:
    """Proves a kernel.

    Args:
        place: here.
        in_thread: in this process, whose chip no other can use.

    Raises:
        KernelError: it hangs, and its thread cannot be ended.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "events"
        arguments = ["check", str(report), *place.kernel]
        if in_thread:
            end = _in_thread(place, arguments, report)
        else:
            platform = _JAX_PLATFORMS[chips.platform()]
            end = run_child(arguments, report, _doing(place.kernel), JAX_PLATFORMS=platform)
        events = read_events(report)
    outcome, reason = judge(events, end, place)
    return Verdict(place, outcome, reason, events, round(time.monotonic() - begun, 1))


def judge(events: list[Event], end: str | None, place: Place | None = None) -> tuple[str, str]:
    """Judges what a proof wrote: the outcome, and the reason if that is not "right".

    Args:
        end: "hangs", or how the process ended if not well.
        place: where it should have run.
    """
    ready = next((event["ready"] for event in events if "ready" in event), None)
    if ready is None:
        reason = "it did not start in time" if end == "hangs" else end or "it wrote nothing"
        return "unproved", reason
    if place is not None and Place.of(ready) != place:
        return "unproved", f"its process computed on {Place.of(ready)}"
    for event in events:
        if event.get("wrong"):
            return "wrong", f"{event['wrong']} in {event['case']!r}"
        if "failed" in event:
            unproved = any(words in event["failed"] for words in _NO_MEMORY)
            return "unproved" if unproved else "crashes", f"{event['failed']} in {event['at']!r}"
    at = next((event["begun"] for event in reversed(events) if "begun" in event), "its start")
    if end == "hangs":
        return "hangs", f"no result for {LIMIT:.0f} s in {at!r}"
    if end is not None:
        return "crashes", f"{end} in {at!r}"
    if not any("wrong" in event for event in events):
        return "unproved", "it takes none of the cases"
    return "right", ""


def run_child(arguments: list[str], report: Path, doing: str, **environment: str) -> str | None:
    """Runs `python -m sdar_jax.proof`, and kills it where it hangs.

    Args:
        report: the file that it writes to.
        doing: what is said of it where it takes longer than two seconds.
        environment: variables of it alone.

    Returns:
        None if it ended well, "hangs" if it was killed, or how it ended.
    """
    command = [sys.executable, "-m", "sdar_jax.proof", *arguments]
    settings = {
        **os.environ,
        # Modules that are found here are found there.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        # This process may hold most of the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        SWITCH: "0",
        **environment,
    }
    with tempfile.TemporaryFile() as stderr:
        try:
            child = subprocess.Popen(
                command,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            if not _ends(lambda: child.poll() is None, report, doing):
                return "hangs"
        finally:
            _end(child)
        stderr.seek(0)
        told = stderr.read().decode(errors="replace").strip().splitlines()
    status = child.returncode
    if status == 0:
        return None
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"{how}, {told[-1][:300]}" if told else how


def read_events(report: Path) -> list[Event]:
    """Reads what a proof wrote before it ended, however it did."""
    events = []
    for line in report.read_text().splitlines() if report.exists() else ():
        # The last line may be half of one.
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


_lock = threading.RLock()
# Of this process: whether each kernel is right on each kind of chip.
_settled: dict[tuple[Kernel, str], bool] = {}
_looking = False


def _agreed(kernel: Kernel) -> Verdict:
    """The verdict of the job: that of process 0, where it asks as well."""
    if jax.process_count() == 1:
        return _own(kernel)
    key = f"sdar_jax/verdict/{kernel.op}/{kernel.module}"
    if jax.process_index() == 0:
        verdict = _own(kernel)
        share(key, json.dumps(verdict._asdict()))
        return verdict
    told = get_shared(key, 2 * LIMIT)
    # A program that process 0 does not run may choose by itself.
    return (told and _of_json(told)) or _own(kernel)


def _own(kernel: Kernel) -> Verdict:
    """The verdict that is kept, or is found now."""
    place = Place.here(kernel)
    verdict = read(place)
    if verdict is None:
        verdict = prove(place, in_thread=_holds_chip())
        keep(verdict)
    if not verdict.right:
        _say(str(verdict))
    return verdict


def _holds_chip() -> bool:
    """Returns whether no other process can compute where this one does."""
    return chips.platform() == "tpu"


def _in_thread(place: Place, arguments: list[str], report: Path) -> str | None:
    """Runs the proof in a thread, where nothing is being traced; as `run_child`.

    A process that it takes down, or that had to be killed, leaves a mark behind.
    """
    mark = place.file.with_suffix(".begun")
    if _left_behind(mark):
        _write(report, json.dumps({"ready": place}))
        mark.unlink(missing_ok=True)
        return "its process ended before it did"
    # By name: the proof stands above this room, and is a program of its own elsewhere.
    main = importlib.import_module("sdar_jax.proof.__main__").main
    thread = threading.Thread(target=main, args=(arguments,), daemon=True)
    _write(mark, json.dumps([socket.gethostname(), os.getpid(), time.time()]))
    try:
        thread.start()
        if _ends(thread.is_alive, report, _doing(place.kernel)):
            return None
    finally:
        mark.unlink(missing_ok=True)
    outcome, reason = judge(read_events(report), "hangs")
    verdict = Verdict(place, outcome, reason, [], LIMIT)
    keep(verdict)
    raise KernelError(f"{verdict}; the chip is held by it: end this process and start again")


def _left_behind(mark: Path) -> bool:
    """Returns whether the proof that left this mark cannot be running any more."""
    try:
        host, process, begun = json.loads(mark.read_text())
        if host == socket.gethostname():
            os.kill(process, 0)
        return time.time() - begun > LIMIT
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError):
        return False


def _ends(runs: Callable[[], bool], report: Path, doing: str) -> bool:
    """Waits until what `runs` does no longer, and returns True; or False when its report has not grown for too long."""
    begun = heard = time.monotonic()
    size, told = 0, False
    while runs():
        time.sleep(_LOOKING)
        now = time.monotonic()
        written = report.stat().st_size if report.exists() else 0
        if written != size:
            size, heard = written, now
        if now - heard > (LIMIT if size else _STARTING):
            return False
        if not told and now - begun > _QUIET:
            _say(f"sdar-jax: {doing}")
            told = True
    return True


def _end(child: subprocess.Popen) -> None:
    """Kills a process that runs, and the compilers that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        # One that the driver holds may never end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_DYING)


def _doing(kernel: Kernel) -> str:
    return f"checking the kernel {kernel.name} on this chip, once"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _of_json(text: str) -> Verdict | None:
    """Reads a verdict; None where it is none."""
    try:
        place, outcome, reason, events, seconds = json.loads(text).values()
        return Verdict(Place.of(place), str(outcome), str(reason), list(events), float(seconds))
    except (ValueError, TypeError, AttributeError):
        return None


def _write(file: Path, text: str) -> None:
    """Writes a file at once, or not at all."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, file)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _source(module: str) -> str:
    """Hashes the sources of a kernel: its own, its room's, and what all share."""
    package = Path(__file__).parent
    spec = importlib.util.find_spec(module)
    found = {package / name for name in _SOURCES}
    if spec is not None and spec.origin is not None:
        own = Path(spec.origin)
        found.add(own)
        if own.is_relative_to(package):
            room = package / own.relative_to(package).parts[0]
            found |= {file for file in room.rglob("*") if file.suffix in (".py", ".toml")}
    digest = hashlib.sha256()
    for file in sorted(found):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
