"""`sdar-jax doctor --prove`: every kernel for the chip that is here, checked on many cases and timed; one file to send.

Each part runs in a process of its own, so that a kernel that crashes or hangs costs its own part alone; this process
leaves the chip to them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdar_jax import verdicts
from sdar_jax.verdicts import Event, Kernel, Place, Verdict

Report = dict[str, Any]


class Part(NamedTuple):
    """What a task wrote: its events, and how it ended if not well."""

    events: list[Event]
    end: str | None

    @property
    def failure(self) -> str | None:
        """What kept it from its end."""
        failed = (event["failed"] for event in self.events if "failed" in event)
        return next(failed, self.end)

    def values(self, key: str) -> list[Any]:
        return [event[key] for event in self.events if key in event]


def prove(machine: Report) -> int:
    """Proves and times all kernels, prints what is found, and writes it into the working directory.

    Args:
        machine: what else the file is to say.

    Returns:
        The exit status: 0, or 1 where a kernel is not right or was not checked.
    """
    here = run("here")
    if here.failure or not here.values("kernels"):
        print(f"no kernel was checked: JAX does not start ({here.failure})")
        return 1
    kernels = [Kernel(*kernel) for kernel in here.values("kernels")[0]]
    if not kernels:
        print(f"there is no kernel for {here.values('platform')[0]}: XLA computes every operation")
        return 0
    device = here.values("ready")[0][2]
    print(f"checking {len(kernels)} kernels on {device}, which takes some minutes")
    found: Report = {"device": device, "machine": machine, "kernels": [], "forwards": None}
    for kernel in kernels:
        checked = _checked(kernel)
        found["kernels"].append(checked)
        print(f"\n{kernel.name}: {checked['outcome']}" + _because(checked["reason"]), flush=True)
        if checked["outcome"] == "right":
            _timed(kernel, checked)
    # Through the kernels that are right: their verdicts have just been kept.
    forward = run("forward", **{verdicts.SWITCH: "1"})
    found["forwards"] = forward._asdict()
    print("\ndecoding forwards" + _because(forward.failure))
    print("\n".join(map(_line, _measured(forward))), flush=True)
    file = _written(found)
    print(f"\nwritten to {file}: send it with a report of what was wrong, or of how fast it was")
    return int(any(checked["outcome"] != "right" for checked in found["kernels"]))


def run(task: str, *kernel: str, **environment: str) -> Part:
    """Runs a task of `sdar_jax.proof` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "events"
        what = " ".join((task, *kernel[:1]))
        end = verdicts.run_child([task, str(report), *kernel], report, what, **environment)
        return Part(verdicts.read_events(report), end)


def _checked(kernel: Kernel) -> Report:
    """Checks a kernel on all cases, and keeps the verdict."""
    begun = time.monotonic()
    part = run("check-all", *kernel)
    outcome, reason = verdicts.judge(part.events, part.end)
    seconds = round(time.monotonic() - begun, 1)
    if ready := part.values("ready"):
        verdict = Verdict(Place.of(ready[0]), outcome, reason, part.events, seconds)
        verdicts.keep(verdict)
    return {
        "kernel": kernel,
        "outcome": outcome,
        "reason": reason,
        "cases": part.events,
        "seconds": seconds,
    }


def _timed(kernel: Kernel, checked: Report) -> None:
    """Adds a right kernel's speed and the block shapes that were tried, and prints them."""
    speed = run("speed", *kernel)
    checked["speed"] = speed._asdict()
    print(f"  {len(_cases(checked))} cases" + _because(speed.failure))
    print("\n".join(map(_line, _measured(speed))), flush=True)
    if kernel.op == "attention":
        tiles = run("tiles", *kernel)
        checked["tiles"] = tiles._asdict()
        print("\n".join(_best(tiles)) + _because(tiles.failure), flush=True)


def _cases(checked: Report) -> list[Event]:
    return [event for event in checked["cases"] if "case" in event]


def _measured(part: Part) -> list[Event]:
    return [event for event in part.events if "measured" in event]


def _line(event: Event) -> str:
    """A measurement in words."""
    words = [f"{1e3 * event['seconds']:.3f} ms"]
    if "flops" in event:
        words.append(f"{event['flops'] / 1e12:.1f} TFLOP/s")
    if "bytes" in event:
        words.append(f"{event['bytes'] / 1e9:.0f} GB/s")
    if event.get("of_peak"):
        words.append(f"{event['of_peak']:.0%} of the peak")
    if "xla_seconds" in event:
        words.append(f"XLA takes {event['xla_seconds'] / event['seconds']:.2f} times as long")
    if event.get("floor_seconds"):
        times = event["seconds"] / event["floor_seconds"]
        words.append(f"{times:.2f} times the floor of {1e3 * event['floor_seconds']:.3f} ms")
    return f"  {event['measured']}: {', '.join(words)}"


def _best(tiles: Part) -> Iterator[str]:
    """Of each kernel the fastest block shape beside the one that is used, which is tried first."""
    tried: dict[str, list[tuple[str, float | str]]] = {}
    for event in tiles.events:
        if "row" in event:
            shape = " x ".join(map(str, event["tile_sizes"].values()))
            tried.setdefault(event["row"]["kernel"], []).append((shape, event["took"]))
    for kernel, shapes in tried.items():
        times = {shape: took for shape, took in shapes if not isinstance(took, str)}
        if times:
            best = min(times, key=times.__getitem__)
            used = next(iter(shapes))
            ours = f"{1e3 * used[1]:.3f} ms" if isinstance(used[1], float) else used[1]
            yield f"  {kernel}: best of {len(times)} tiles {best}, {1e3 * times[best]:.3f} ms; {used[0]}: {ours}"


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _written(found: Report) -> Path:
    name = "-".join(str(found["device"]).split())
    file = Path(f"sdar-jax-proof-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json").absolute()
    file.write_text(json.dumps(found, indent=1))
    return file
