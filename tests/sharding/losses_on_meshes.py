"""Loss, scores and gradients over meshes of eight devices equal those of one: `python -m ... quick` or `all`."""

import itertools
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sdar_jax.attention import api
from sdar_jax.corruption import CorruptionConfig
from sdar_jax.devices.sharding import MeshConfig, activate_mesh, batch_sharding, make_mesh
from sdar_jax.model import Model, Remat
from sdar_jax.model.axes import shardings
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.weighted_loss import training_loss
from tests.tiny import LLADA2, VOCAB, pack, tiny_model

ROWS, LENGTH = 8, 24

# data, fsdp, expert, context, tensor; those of fewer than eight devices leave the rest idle. Two key-value heads: a
# context of 2 exchanges heads, more gather keys, and so does 2 beside a tensor axis.
AXES = [(8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 1, 8, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2)]
PRODUCTS = [(2, 2, 1, 1, 2), (1, 4, 1, 2, 1), (1, 2, 1, 2, 2)]


class Case(NamedTuple):
    objective: str
    noisy_index: bool = False
    complementary: bool = False
    tied: bool = False
    remat: Remat = "none"
    confidence_beta: float = 0.0


QUICK = Case("block_diffusion", noisy_index=True, remat="full", confidence_beta=0.5)
ALL = [
    Case("block_diffusion"),
    Case("block_diffusion", noisy_index=True, tied=True, remat="dots"),
    Case("masked_diffusion", complementary=True, remat="full"),
    Case("autoregressive", tied=True),
]


def packed_batch(noisy_index: bool) -> Batch:
    """Documents and padding; one row is all padding."""
    segments = pack(*[(9, 11, -4), (24,), (5, 5, 5, 5, 4), (-24,)] * 2, length=LENGTH)
    tokens = np.random.default_rng(0).integers(0, VOCAB - 1, (ROWS, LENGTH)).astype(np.int32)
    index = np.full((ROWS, 16), -1, np.int32)
    for row, length in enumerate([8, 16, 5, 0] * 2):
        index[row, :length] = np.arange(length)
    return Batch(tokens, segments, segments > 0, index if noisy_index else None)


def run(model: Model, batch: Batch, case: Case, config: ModelConfig):
    corruption = CorruptionConfig(complementary=case.complementary)
    objective = ObjectiveConfig(corruption, confidence_beta=case.confidence_beta)
    inputs = make_inputs(batch, jax.random.key(3), objective, config)

    def mean(model: Model):
        total, scores = training_loss(model, inputs, objective, remat=case.remat)
        return total / inputs.normalizer.sum(), scores

    return jax.value_and_grad(mean, has_aux=True)(model)


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def check(case: Case, sizes: list[tuple[int, ...]], **changes: Any) -> None:
    changes = {"num_layers": 3, "objective": case.objective, "tie_embeddings": case.tied} | changes
    config, key = tiny_model(**changes).config, jax.random.key(1)
    make = partial(Model, config, dtype=np.float64, stacked=True)
    model = jax.jit(make)(key)
    batch = packed_batch(case.noisy_index)
    compute = partial(run, case=case, config=config)
    expected = on_host(jax.jit(compute)(model, batch))
    for size in sizes:
        mesh = make_mesh(MeshConfig(*size), jax.devices()[: int(np.prod(size))])
        placed = jax.jit(make, out_shardings=shardings(model, mesh))(key)
        # The walk over tiles as well, and not the dense reference alone, that such short rows would be given.
        with activate_mesh(mesh), api.override("chunked"):
            found = jax.jit(compute)(placed, jax.device_put(batch, batch_sharding(mesh)))
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), on_host(found), expected
        )
        print(case, changes, size, flush=True)


def main(extent: str) -> None:
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    if extent == "quick":
        check(QUICK, [(1, 2, 1, 2, 2)], num_layers=2)
        return
    for case, sizes in itertools.product(ALL, [AXES + PRODUCTS]):
        check(case, sizes)
    check(QUICK, [(1, 2, 2, 1, 2), (1, 1, 4, 2, 1)], **LLADA2)


if __name__ == "__main__":
    main(*sys.argv[1:])
