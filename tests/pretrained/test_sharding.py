"""Weights placed on a mesh of four virtual CPU devices, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sdar_jax.errors import ConfigError
from sdar_jax.model.axes import check_rules

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from sdar_jax.model import logits, stack_layers
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model.axes import shardings

path, saved = sys.argv[1:]
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
plain, model = load_pretrained(path), load_pretrained(path, mesh=mesh)
layer = model.layers[0]
expected = {
    "attention_norm": P(),
    "qkv": P("tensor", None, None, "fsdp"),
    "qkv_bias": P("tensor"),
    "q_norm": P(),
    "output": P("fsdp", "tensor"),
    "output_bias": P(),
    "gate_up": P(None, "tensor", "fsdp"),
    "down": P("fsdp", "tensor"),
}
for name, spec in expected.items():
    got = getattr(layer, name).sharding
    assert got.is_equivalent_to(jax.NamedSharding(mesh, spec), getattr(layer, name).ndim), (name, got)
# 61 tokens do not divide by 2, so the vocabulary stays whole.
assert model.embedding.sharding.spec == P(None, "fsdp") and model.head.sharding.spec == P(None, "fsdp")
assert layer.qkv.addressable_shards[0].data.shape == (1, 4, 8, 12)
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(model), strict=True):
    np.testing.assert_array_equal(a, b)

integers = load_pretrained(path, dtype="int8", mesh=mesh)
for a, b in zip(jax.tree.leaves(load_pretrained(path, dtype="int8")), jax.tree.leaves(integers), strict=True):
    np.testing.assert_array_equal(a, b)
for name in ("qkv", "output", "gate_up", "down"):
    got = getattr(integers.layers[0], name)[...].qvalue
    assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected[name]), got.ndim), (name, got.sharding)

tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
run = jax.jit(logits, static_argnames="block_size")
np.testing.assert_allclose(run(model, tokens, block_size=4), run(plain, tokens, block_size=4), rtol=1e-4, atol=1e-5)
save_pretrained(model, saved)
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(load_pretrained(saved)), strict=True):
    np.testing.assert_array_equal(a, b)

places = shardings(stack_layers(plain), mesh).layers
assert jax.tree.leaves(places.body.qkv)[0].spec == P(None, "tensor", None, None, "fsdp")
assert jax.tree.leaves(places.last.qkv)[0].spec == P("tensor", None, None, "fsdp")

replicated = load_pretrained(path, mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)))
assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(replicated))
print("done")
"""


def test_four_devices(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    fixture = ROOT / "tests" / "parity" / "fixtures" / "qwen3"
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(fixture), str(tmp_path / "saved")]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stdout + result.stderr


def mesh(*names: str) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(names)), names)


@pytest.mark.parametrize(
    ("names", "rules", "message"),
    [
        (("data", "model"), {}, "mesh axis 'model' is unknown; use axes out of"),
        (("fsdp",), {"embed": "pipeline"}, "mesh axis 'pipeline' is unknown; use axes out of"),
        (("fsdp",), {"heads": "fsdp"}, r"logical axes \['heads'\] are unknown; rules may map"),
        (
            ("fsdp",),
            {"embed": "fsdp", "mlp": "fsdp"},
            "two axes of weight 'gate_up' map to mesh axis 'fsdp'; give",
        ),
    ],
)
def test_bad_meshes_and_rules(names: tuple, rules: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_rules(mesh(*names), rules)
    assert "\n" not in str(caught.value)


def test_explicit_axes_are_refused() -> None:
    """jax.make_mesh makes them where it is not told otherwise; the forward leaves shardings to the compiler."""
    with pytest.raises(ConfigError, match="make the mesh with axis_types of AxisType.Auto"):
        check_rules(jax.make_mesh((1,), ("fsdp",)))
