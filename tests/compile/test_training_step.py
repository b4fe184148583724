"""A whole training step, with the kernels inside the scanned and rematerialised layers, for chips that are not here."""

import json

import pytest

from sdar_jax.devices.chips import CHIPS
from tests.compilers import needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

# Arguments: topology, implementation. Three layers of the 1.7B shape at its vocabulary, L = 4096, bfloat16.
STEP = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp
from sdar_jax import ModelConfig
from sdar_jax.attention import api
from sdar_jax.devices.chips import topology
from sdar_jax.data import DataConfig
from sdar_jax.model import Model, Stack
from sdar_jax.objectives import Batch
from sdar_jax.training import TrainConfig
from sdar_jax.training.config import InitConfig
from sdar_jax.training.optimizer import adamw
from sdar_jax.training.setup import configured_step
from sdar_jax.training.step import initial_state, model_weights

purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 151669}
shape = dataclasses.replace(ModelConfig.preset("sdar-1.7b"), num_layers=3, **purpose)
data = DataConfig((), sequence_length=4096, batch_size=1)
init = InitConfig(shape=shape, tokenizer="unread")
config = TrainConfig("unwritten", 10, init, data, compute_dtype="bfloat16", remat="full")

def stacked():
    model = Model(shape, jax.random.key(0))
    *body, last = model.layers
    model.layers = Stack(None, jax.tree.map(lambda *parts: jnp.stack(parts), *body), last)
    return model

weights, rebuild = model_weights(jax.eval_shape(stacked))
device = jax.sharding.SingleDeviceSharding(topology(sys.argv[1]).devices[0])
place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
state = jax.eval_shape(lambda w: initial_state(adamw(config.optimizer), w, jax.random.key(0), averaged=False), weights)
row = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
batch = Batch(row, row, jax.ShapeDtypeStruct((1, 4096), bool))
with api.override(sys.argv[2]):
    lowered = configured_step(config, shape, rebuild).lower(place(state), place(batch))
memory = lowered.compile().memory_analysis()
calls = re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu)", lowered.as_text())
print(json.dumps({"calls": len(calls), "held": memory.temp_size_in_bytes + memory.argument_size_in_bytes}))
"""


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param("v5p:2x2x1", "mosaic_tpu", marks=pytest.mark.ci),
        pytest.param("h200:1", "mosaic_gpu", marks=pytest.mark.ci),
        ("v6e:2x2", "mosaic_tpu"),
    ],
)
def test_a_training_step_compiles_and_fits(name, implementation):
    """In the scan and in the last layer: the forward, its recomputation, dQ and dK/dV."""
    child = run_python(STEP, name, implementation)
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["calls"] == 8
    assert found["held"] < CHIPS[name.partition(":")[0]].memory
