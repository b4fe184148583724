"""Plans a run on devices that are not here: memory, FLOPs, traffic, and the least time and cost of its tokens.

    sdar-jax plan CONFIG.yaml [--topology v5p:4x4x4] [--tokens 50e9] [--json] [--field.path value ...]

The real step is compiled by the chip's own compiler: TPU slices as libtpu names them (v5e:4x4, v5p:2x2x4), GPUs as
h200:8 (a host) or h200:4x8 (4 hosts of 8). Without --topology, that of the file's line "# plan: TOPOLOGY". Fields of
the config are overridden as for train.py. Where the step does not fit, the nearest change that would is looked for
(--attempts 0 looks for none). Needs no file of the recipe. The compilers are those installed, or what `make compilers`
puts into --compilers; `sdar-jax doctor` prints the command that does it elsewhere.

Exit status: 0 it fits, 1 it does not, 2 an error in what was given (one line on stderr).
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from sdar_jax.devices.chips import COMPILERS
from sdar_jax.errors import ConfigError, SdarError
from sdar_jax.planning import compile_step, nearest, nearest_lines, roofline, table, values
from sdar_jax.training import read_command_line
from sdar_jax.training.recipes import config_text

_PROGRAM = "sdar-jax plan"
# Without these libtpu looks for the TPU host that it runs on, and complains that there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


def main(arguments: Sequence[str] | None = None, program: str = _PROGRAM) -> int:
    """Prints the plan; returns the exit status."""
    options, rest = _parser(program).parse_known_args(arguments)
    use_compilers(options.compilers)
    try:
        return _plan(options, rest)
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def use_compilers(directory: Path = COMPILERS) -> None:
    """Lets JAX find the compilers that are installed there, if none are elsewhere, and compute on the CPU alone."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None and directory.is_dir():
        sys.path.insert(0, str(directory.absolute()))


def named_topology(config: str | Path) -> str:
    """That of a recipe's line "# plan: TOPOLOGY".

    Raises:
        ConfigError: no such line, or no such file.
    """
    found = re.search(r"^# plan: (\S+)", config_text(config), re.MULTILINE)
    if found is None:
        raise ConfigError(
            f"{config} names no topology in a line '# plan: v5p:4x4x4'; give --topology"
        )
    return found[1]


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    config = read_command_line([options.config, *overrides], program="sdar-jax train")
    step = compile_step(config, options.topology or named_topology(options.config))
    tokens = options.tokens or float(config.total_steps * step.tokens)
    roof = None if step.counts is None else roofline(step, step.counts)
    plan = values(step, roof, tokens)
    if not options.json:
        print(table(plan), flush=True)
    if not step.fits and options.attempts:
        change, tried = nearest(step, attempts=options.attempts)
        plan["nearest"] = change and change.options
        plan["tried"] = {change.options: found.memory.total for change, found in tried}
        if not options.json:
            print("\n".join(["", *nearest_lines(change, tried)]))
    if options.json:
        print(json.dumps(plan, indent=1))
    return 0 if step.fits else 1


def _parser(program: str = _PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a YAML file or a recipe, as for train.py")
    parser.add_argument("--topology", help="a chip and a shape: v5p:4x4x4, h200:8, h200:4x8")
    parser.add_argument(
        "--tokens", type=float, help="of the whole run; by default steps * batch * length"
    )
    parser.add_argument(
        "--json", action="store_true", help="values instead of a table: bytes, FLOPs, seconds"
    )
    parser.add_argument(
        "--attempts", type=int, default=6, help="changes to try where it does not fit"
    )
    parser.add_argument(
        "--compilers", type=Path, default=COMPILERS, help="where they are installed (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
