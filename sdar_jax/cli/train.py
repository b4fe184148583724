"""Trains a model as a recipe or a YAML file says: `sdar-jax train CONFIG.yaml [--field.path value ...]`.

`--help` lists the fields. The name of a recipe of the package, such as study2/8b_cpt, may stand for a file.
In a checkout `python train.py` is the same.

With `--tiny` anywhere behind it, the same run on made-up inputs and so small that it ends within a minute on any
machine, under run_dir + "-tiny" (`sdar_jax/training/tiny.py`).

Started again, it goes on from the newest checkpoint of its run directory by itself. Exit status: 0 finished, 2 an error
in what was given (one line on stderr), 128 + n stopped by signal n and saved (143 for SIGTERM, 130 for Ctrl-C).

Started once a process under SLURM, Open MPI, on a TPU pod, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID set, the processes are one job (docs/scaling.md). They end together; 1: one of them was lost.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence

from sdar_jax.cli.compilation import for_commands
from sdar_jax.cli.flags import Flags
from sdar_jax.devices import processes
from sdar_jax.errors import SdarError
from sdar_jax.training import TrainConfig, read_command_line, run, tiny
from sdar_jax.training.config import InitConfig

# As in the file, and on the command line behind "--".
_FLAGS = Flags({field.name: f"model.{field.name}" for field in dataclasses.fields(InitConfig)})


def main(arguments: Sequence[str], program: str = "sdar-jax train") -> int:
    """Trains; returns the exit status."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger().handlers[0].addFilter(_FLAGS)
    logging.getLogger("sdar_jax").setLevel(logging.INFO)
    # Orbax logs what it also raises, a page of it, from several threads.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with processes.distributed():
            main_process = processes.is_main_process()
            if not main_process:
                logging.getLogger("sdar_jax").setLevel(logging.WARNING)
            with for_commands(quiet=not main_process):
                outcome = run(_config(arguments, program))
    except SdarError as error:
        print(f"error: {_FLAGS(str(error))}", file=sys.stderr)
        return 2
    return 128 + outcome.signal if outcome.signal else 0


def _config(arguments: Sequence[str], program: str) -> TrainConfig:
    if "--tiny" not in arguments:
        return read_command_line(arguments, program=program)
    rest = [argument for argument in arguments if argument != "--tiny"]
    return read_command_line(rest, change=tiny, program=program)
