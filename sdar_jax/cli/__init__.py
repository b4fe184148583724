"""The command that the package installs, `sdar-jax COMMAND`; each command is a `main(arguments, program)`."""

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence

import sdar_jax

# Tracing makes objects by the million, and few cycles: to look for those less often saves a tenth of a start.
gc.set_threshold(100_000, 20, 20)

_COMMANDS = {
    "train": ("sdar_jax.cli.train", "train a model as a recipe or a YAML file says"),
    "sample": (
        "sdar_jax.cli.sample",
        "decode with a model: one prompt, a chat, or a file of prompts",
    ),
    "evaluate": (
        "sdar_jax.cli.evaluate",
        "scores on benchmarks with their intervals, and what the answers cost",
    ),
    "profile": (
        "sdar_jax.cli.profile",
        "how fast a model decodes here, against batch and block size",
    ),
    "report": (
        "sdar_jax.cli.report",
        "one HTML file of runs and evaluations: curves, tables, pictures, answers",
    ),
    "data": (
        "sdar_jax.cli.data",
        "what a run would read: documents, tokens, what is learned, what is left out and why",
    ),
    "plan": (
        "sdar_jax.cli.plan",
        "what a run needs of devices that are not here: memory, time, cost",
    ),
    "doctor": (
        "sdar_jax.cli.doctor",
        "what is here: versions, devices, what computes each operation, what is missing",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _COMMANDS:
        # Imported when it is asked for: most take JAX and transformers along.
        module = importlib.import_module(_COMMANDS[given[0]][0])
        return module.main(given[1:], program=f"sdar-jax {given[0]}")
    # What is left is help, the version, or a mistake.
    _parser().parse_args(given)
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS))
    told = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sdar-jax",
        description=f"{sdar_jax.__doc__}\n\ncommands, each with --help of its own:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sdar-jax {sdar_jax.__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    return parser
