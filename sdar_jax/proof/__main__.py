"""The process in which a kernel proves itself: python -m sdar_jax.proof OPERATION MODULE REPORT [--full].

Writes a line for each event to the report: {"ready": place} when the chip computes, {"begun": case} before each case
and what came of it after, {"failed": error} where it ends. Whoever started it reads how far it came.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from sdar_jax.devices.chips import platform
from sdar_jax.proof.cases import cases
from sdar_jax.proof.check import check
from sdar_jax.verdicts import Kernel, Place

# About the key tiles of the kernels.
_TILES = {"tpu": 1024}
_TILE = 128


def main(arguments: Sequence[str]) -> None:
    """Proves a kernel; a failure of its is an event, and no error."""
    parser = argparse.ArgumentParser(prog="python -m sdar_jax.proof", description=__doc__)
    parser.add_argument("operation")
    parser.add_argument("module")
    parser.add_argument("report")
    parser.add_argument("--full", action="store_true", help="more cases")
    options = parser.parse_args(arguments)
    with open(options.report, "a") as report:
        jnp.ones(8).sum().block_until_ready()
        _write(report, {"ready": Place.here(Kernel(options.operation, options.module))})
        _prove(report, options.operation, options.module, options.full)


def _prove(report: TextIO, op: str, name: str, full: bool) -> None:
    at = "loading it"
    try:
        module = importlib.import_module(name)
        for case in cases(op, _TILES.get(platform(), _TILE), full=full):
            if module.unsupported(*case.taken) is not None:
                continue
            at = case.name
            _write(report, {"begun": at})
            _write(report, check(case, module)._asdict())
    # Whatever a compiler or a chip says of a kernel.
    except Exception as error:
        reason = " ".join(str(error).split())[:1000]
        _write(report, {"failed": f"{type(error).__name__}: {reason}", "at": at})


def _write(report: TextIO, event: dict[str, Any]) -> None:
    report.write(json.dumps(event) + "\n")
    report.flush()


if __name__ == "__main__":
    jax.config.update("jax_debug_nans", False)
    main(sys.argv[1:])
