"""A process in which kernels may crash or hang: python -m sdar_jax.proof TASK REPORT [OPERATION MODULE].

    check     a kernel on the cases of its first use
    check-all on many more
    speed     a kernel beside XLA
    tiles     block shapes of the attention kernels
    forward   a decoding forward
    here      what is here, and which kernels there are for it

Writes a line for each event to the report: {"ready": place} when the chip computes, {"begun": case} before each case
and what came of it after, {"failed": error} where it ends. Whoever started it reads how far it came.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from sdar_jax.devices.chips import platform
from sdar_jax.proof.cases import cases
from sdar_jax.proof.check import check
from sdar_jax.verdicts import Event, Kernel, Place

# About the key tiles of the kernels.
_TILES = {"tpu": 1024}
_TILE = 128


def main(arguments: Sequence[str]) -> None:
    """Does a task; a failure of it is an event, and no error."""
    parser = argparse.ArgumentParser(prog="python -m sdar_jax.proof", description=__doc__)
    parser.add_argument("task", choices=_TASKS)
    parser.add_argument("report")
    parser.add_argument("operation", nargs="?", default="")
    parser.add_argument("module", nargs="?", default="jax")
    options = parser.parse_args(arguments)
    kernel = Kernel(options.operation, options.module)
    with open(options.report, "a") as report:

        def write(event: Event) -> None:
            report.write(json.dumps(event) + "\n")
            report.flush()

        jnp.ones(8).sum().block_until_ready()
        write({"ready": Place.here(kernel)})
        at = "its start"
        try:
            for event in _TASKS[options.task](kernel):
                at = event.get("begun", at)
                write(event)
        # Whatever a compiler or a chip says of a kernel.
        except Exception as error:
            reason = " ".join(str(error).split())[:1000]
            write({"failed": f"{type(error).__name__}: {reason}", "at": at})


def _check(kernel: Kernel, full: bool = False) -> Iterator[Event]:
    module = importlib.import_module(kernel.module)
    for case in cases(kernel.op, _TILES.get(platform(), _TILE), full=full):
        if module.unsupported(*case.taken) is None:
            yield {"begun": case.name}
            yield check(case, module)._asdict()


def _check_all(kernel: Kernel) -> Iterator[Event]:
    return _check(kernel, full=True)


def _speed(kernel: Kernel) -> Iterator[Event]:
    from sdar_jax.proof.speed import kernel_speeds

    return kernel_speeds(kernel.op, importlib.import_module(kernel.module))


def _tiles(kernel: Kernel) -> Iterator[Event]:
    from sdar_jax.attention.tile_sizes import Row, chip_here
    from sdar_jax.proof.tiles import KERNELS, measure

    implementation = kernel.module.rpartition(".")[2]
    for name in KERNELS:
        row = Row(implementation, name, 128, chip_here())
        for tile_sizes, took in measure(row, 4096):
            yield {"row": row._asdict(), "tile_sizes": tile_sizes._asdict(), "took": took}


def _forward(kernel: Kernel) -> Iterator[Event]:
    from sdar_jax.proof.speed import decoding_forwards

    return decoding_forwards()


def _here(kernel: Kernel) -> Iterator[Event]:
    from sdar_jax.attention import api
    from sdar_jax.attention.paged import api as paged
    from sdar_jax.experts import grouped

    found = (op.kernel_here() for op in (api.OP, paged.OP, grouped.OP))
    yield {"platform": platform(), "kernels": [each for each in found if each is not None]}


# What a task imports is imported by it: a first use waits for what checks alone.
_TASKS: dict[str, Callable[[Kernel], Iterator[Event]]] = {
    "check": _check,
    "check-all": _check_all,
    "speed": _speed,
    "tiles": _tiles,
    "forward": _forward,
    "here": _here,
}


if __name__ == "__main__":
    jax.config.update("jax_debug_nans", False)
    main(sys.argv[1:])
