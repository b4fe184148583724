"""A training step over several chips that are not here: what each holds, calls and sends."""

import json
import math
import re

import pytest

from sdar_jax.devices.chips import CHIPS
from tests.compilers import needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

# Arguments: topology, implementation, mesh. Three layers of the 1.7B shape at its vocabulary, L = 4096, bfloat16.
STEP = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp
from sdar_jax import ModelConfig
from sdar_jax.attention import api
from sdar_jax.devices.chips import topology
from sdar_jax.data import DataConfig
from sdar_jax.objectives import Batch
from sdar_jax.devices.sharding import MeshConfig, batch_sharding, make_mesh, activate_mesh
from sdar_jax.training import TrainConfig
from sdar_jax.training.config import InitConfig
from sdar_jax.training.checks import check_run
from sdar_jax.training.setup import abstract_state, configured_step

purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 151669}
shape = dataclasses.replace(ModelConfig.preset("sdar-1.7b"), num_layers=3, **purpose)
data = DataConfig((), sequence_length=4096, batch_size=4)
init = InitConfig(shape=shape, tokenizer="unread")
sizes = MeshConfig(**json.loads(sys.argv[3]))
config = TrainConfig("unwritten", 10, init, data, compute_dtype="bfloat16", remat="full", mesh=sizes)
mesh = make_mesh(sizes, topology(sys.argv[1]).devices)
check_run(config, shape, mesh)
rebuild, state, _ = abstract_state(config, shape, mesh)
row = lambda kind: jax.ShapeDtypeStruct((4, 4096), kind, sharding=batch_sharding(mesh))
with api.override(sys.argv[2]), activate_mesh(mesh):
    lowered = configured_step(config, shape, rebuild).lower(state, Batch(row(jnp.int32), row(jnp.int32), row(bool)))
compiled = lowered.compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "calls": len(re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu)", lowered.as_text())),
    "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "gathers": re.findall(r"= (.*) all-gather(?:-start)?\\(", compiled.as_text()),
}))
"""

HEAD = 151936 * 2048


@pytest.mark.parametrize(
    ("name", "implementation", "mesh"),
    [
        ("v5p:2x2x1", "mosaic_tpu", {"fsdp": 4}),
        pytest.param("h200:4", "mosaic_gpu", {"fsdp": 4}, marks=pytest.mark.ci),
        ("v5p:2x2x1", "mosaic_tpu", {"fsdp": 2, "tensor": 2}),
        ("h200:4", "mosaic_gpu", {"fsdp": 2, "context": 2}),
    ],
)
def test_a_sharded_step(name, implementation, mesh):
    """Each chip runs the kernels on its part, holds its share of the state, and gathers a layer at a time, cast."""
    child = run_python(STEP, name, implementation, json.dumps(mesh))
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["calls"] == 8
    parts = mesh["fsdp"] * mesh.get("tensor", 1)
    assert found["arguments"] < 1.001 * found["state"] / parts + 2**20
    assert found["arguments"] + found["temporaries"] < CHIPS[name.partition(":")[0]].memory / 8
    arrays = [
        match for gather in found["gathers"] for match in re.findall(r"(\w+)\[([\d,]+)\]", gather)
    ]
    assert arrays
    for dtype, shape in arrays:
        assert math.prod(map(int, shape.split(","))) <= HEAD, (dtype, shape)
        assert dtype in ("bf16", "s32"), (dtype, shape)
