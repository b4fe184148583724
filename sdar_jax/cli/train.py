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

import contextlib
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sdar_jax import processes
from sdar_jax.data import PackedDataset
from sdar_jax.errors import DataError, SdarError
from sdar_jax.evaluation import autoregressive_nll, nelbo
from sdar_jax.model import Model
from sdar_jax.training import EvalConfig, TrainConfig, read_command_line, tiny, train

Rows = dict[str, np.ndarray]


def main(arguments: Sequence[str], program: str = "sdar-jax train") -> int:
    """Trains; returns the exit status."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("sdar_jax").setLevel(logging.INFO)
    # Orbax logs what it also raises, a page of it, from several threads.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with processes.joined():
            if not processes.is_first():
                logging.getLogger("sdar_jax").setLevel(logging.WARNING)
            outcome = train(_config(arguments, program), make_evaluate=make_evaluate)
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 128 + outcome.signal if outcome.signal else 0


def _config(arguments: Sequence[str], program: str) -> TrainConfig:
    if "--tiny" not in arguments:
        return read_command_line(arguments, program=program)
    rest = [argument for argument in arguments if argument != "--tiny"]
    return read_command_line(rest, change=tiny, program=program)


def make_evaluate(config: EvalConfig, data: PackedDataset) -> Callable[[Model], dict[str, float]]:
    """Held-out likelihood in nats per token over the first `config.rows` rows, batch by batch."""
    with contextlib.closing(data):
        batches = list(itertools.islice(data, math.ceil(config.rows / config.data.batch_size)))
    if not any(batch["loss_mask"].any() for batch in batches):
        raise DataError("eval.data has no token that counts in its first rows; give other data, or more eval.rows")

    def evaluate(model: Model) -> dict[str, float]:
        scores = np.array(list(_scores(model, batches, config)))
        counts = scores[:, 0] / scores[:, 0].sum()
        mean, error = counts @ scores[:, 1], float(np.linalg.norm(counts * scores[:, 2]))
        if model.config.objective == "autoregressive":
            return {"nll": float(mean)}
        return {"nelbo": float(mean), "nelbo_se": error}

    return evaluate


def _scores(model: Model, batches: list[Rows], config: EvalConfig) -> Iterator[tuple[float, float, float]]:
    """(tokens counted, nats per token, standard error) of each batch that has tokens to count."""
    for i, batch in enumerate(batches):
        tokens, segments = batch["tokens"], batch["segment_ids"]
        counted = batch["loss_mask"] & (segments > 0)
        given = {"segment_ids": segments, "loss_mask": batch["loss_mask"]}
        if model.config.objective == "autoregressive":
            counted = counted[:, 1:] & (segments[:, 1:] == segments[:, :-1])
        if not counted.any():
            continue
        if model.config.objective == "autoregressive":
            yield float(counted.sum()), autoregressive_nll(model, tokens, **given), 0.0
        else:
            size = model.config.block_size if model.config.objective == "block_diffusion" else None
            bound = nelbo(model, tokens, block_size=size, samples=config.samples, seed=config.seed + i, **given)
            yield float(counted.sum()), *bound
