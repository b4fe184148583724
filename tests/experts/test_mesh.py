"""Experts over virtual CPU devices, and the collectives that their exchange becomes on chips that are not here."""

import json

import pytest

from tests.compilers import needs_compilers, run_python
from tests.virtual_devices import run_module


@pytest.mark.slow
@pytest.mark.parametrize("extent", [pytest.param("quick", marks=pytest.mark.ci), "all"])
def test_experts_on_meshes_equal_those_of_one_device(extent):
    print(run_module("tests.experts.on_mesh", extent))


COMPILED = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from sdar_jax.devices.chips import topology
from sdar_jax.experts import expert_mlp
from sdar_jax.devices.sharding import MESH_AXES, activate_mesh

devices = np.array(topology(sys.argv[1]).devices[:4]).reshape(1, 1, 4, 1, 1)
mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 5)
rows, length, hidden, experts, width, top_k = 4, 256, 256, 16, 128, int(sys.argv[2])
place = NamedSharding(mesh, P("expert"))
shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
routed = shape(rows * length, top_k, dtype=jnp.int32), shape(rows * length, top_k)
weights = shape(experts, hidden, 2, width), shape(experts, width, hidden)
loss = lambda x, *rest: expert_mlp(x, *rest).astype(jnp.float32).sum()
with activate_mesh(mesh):
    text = jax.jit(jax.grad(loss, argnums=(0, 2, 3, 4))).lower(shape(rows, length, hidden), *routed, *weights)
    text = text.compile().as_text()
print(json.dumps({"exchanges": len(re.findall(r" ragged-all-to-all(?:-start)?\\(", text))}))
"""


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("v5p:2x2x1", marks=pytest.mark.ci), "h200:4"])
@pytest.mark.parametrize(("top_k", "exchanges"), [(2, 4), (4, 0)])
def test_the_exchange_compiles_to_ragged_all_to_alls(name, top_k, exchanges):
    """To the experts and back, forward and backward; none where tokens are gathered."""
    child = run_python(COMPILED, name, str(top_k))
    assert child.returncode == 0, child.stderr[-4000:]
    assert json.loads(child.stdout.splitlines()[-1])["exchanges"] == exchanges
