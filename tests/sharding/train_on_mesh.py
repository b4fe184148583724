"""A run over the devices of this process: `python -m ... CONFIG.yaml [EVALUATION]`, stopped in that evaluation."""

import os
import signal
import sys
from pathlib import Path

import jax

from sdar_jax.devices.sharding import make_mesh
from sdar_jax.model.axes import shardings
from sdar_jax.training import loop as training_loop
from sdar_jax.training import read_config, run
from sdar_jax.training.extensions import Extensions
from sdar_jax.training.setup import Setup


def checked(setup: Setup) -> Setup:
    """Every weight, moment and average lies where the table says."""
    wanted = shardings(setup.state, setup.mesh)
    same = jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), setup.state, wanted
    )
    assert all(jax.tree.leaves(same)), same
    return setup


def main(path: str, stop: str = "0") -> None:
    config = read_config(path)
    assert make_mesh(config.mesh).size == jax.device_count()
    calls = []

    def stopping(model, step):
        calls.append(step)
        if len(calls) == int(stop):
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    prepare = training_loop.prepare
    training_loop.prepare = lambda *arguments: checked(prepare(*arguments))
    print(run(config, Extensions(evaluators=(stopping,))), Path(config.run_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
