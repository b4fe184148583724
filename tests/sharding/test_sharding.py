"""Meshes: what they refuse, where things lie, and that what is computed on them is what one device computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sdar_jax.devices import sharding
from sdar_jax.devices.sharding import MESH_AXES, MeshConfig, make_mesh
from sdar_jax.errors import ConfigError
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.axes import check_mesh, shardings
from sdar_jax.model.config import PRESETS, ModelConfig
from sdar_jax.training import run
from sdar_jax.training.config import TrainConfig
from sdar_jax.training.config_io import from_values
from sdar_jax.weighted_loss import block_diffusion_loss
from tests.bad_input import refused
from tests.tiny import tiny_model
from tests.training.conftest import data_values, inputs, merged, metrics_of, run_values  # noqa: F401
from tests.virtual_devices import run_module

QWEN3_8B = ModelConfig.preset("qwen3-8b")


def abstract(**sizes: int) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_one_axis_takes_the_devices_that_the_others_leave():
    assert MeshConfig().sizes(8) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert MeshConfig(data=-1, fsdp=2, tensor=2).sizes(8)["data"] == 2
    assert MeshConfig(data=2, fsdp=2, tensor=2).sizes(8)["fsdp"] == 2
    assert make_mesh(MeshConfig()).shape == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(
    ("sizes", "devices", "told"),
    [
        ({"fsdp": 0}, 8, "fsdp is 0; give a positive integer, or -1"),
        ({"tensor": True}, 8, "tensor is True; give a positive integer"),
        ({"data": -1}, 8, "data and fsdp are -1; only one axis"),
        (
            {"fsdp": 3, "tensor": 2},
            8,
            "fsdp 3 x tensor 2 is 6 devices and there are 8; give sizes whose product",
        ),
        ({"tensor": 3}, 8, "tensor 3 does not divide 8 devices; use 1, 2, 4 or 8"),
        ({"fsdp": 1}, 8, "a mesh of 1 is 1 devices and there are 8; give"),
    ],
)
def test_sizes_that_are_not_the_devices_are_refused(sizes, devices, told):
    with refused(ConfigError, told):
        MeshConfig(**sizes).sizes(devices)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (
            {"tensor": 16},
            "mesh.tensor is 16 and the model has 8 key-value heads and intermediate_size 12288; use 1, 2, 4 or 8",
        ),
        ({"fsdp": 3}, "mesh.fsdp is 3 and the model has hidden_size 4096; use 1, 2, 4, 8"),
        ({"expert": 2}, "mesh.expert is 2 and the model has 0 experts; use 1"),
        (
            {"context": 3},
            "mesh.context is 3 and rows are computed over 8192 and 4096 positions; use 1, 2, 4",
        ),
        (
            {"data": 4, "fsdp": 8},
            "mesh.data * mesh.fsdp * mesh.expert is 32 and 16 rows are computed at once; use 1, 2",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_sizes_that_would_do(sizes, told):
    with refused(ConfigError, told):
        check_mesh(abstract(**sizes), QWEN3_8B, batch_size=16, lengths=(8192, 4096))


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"expert": 3}, "mesh.expert is 3 and the model has 128 experts; use 1, 2, 4, 8"),
        (
            {"tensor": 8},
            "mesh.tensor is 8 and the model has 4 key-value heads and moe_intermediate_size 768; use 1, 2",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_an_moe(sizes, told):
    with refused(ConfigError, told):
        check_mesh(abstract(**sizes), ModelConfig.preset("qwen3-30b-a3b"))


def test_a_mesh_that_divides_is_taken():
    check_mesh(
        abstract(data=2, fsdp=8, context=4, tensor=8), QWEN3_8B, batch_size=16, lengths=(8192, 4096)
    )


def test_an_axis_is_split_as_far_as_it_divides():
    mesh = abstract(data=2, fsdp=4, tensor=2)
    assert sharding.spec(mesh, sharding.HIDDEN_STATES, (8, 6, 5)) == PartitionSpec(
        ("data", "fsdp"), None, None
    )
    assert sharding.spec(mesh, sharding.HIDDEN_STATES, (4, 6, 5)) == PartitionSpec(
        "data", None, None
    )
    assert sharding.spec(mesh, sharding.PAGES, (9, 3, 8, 8)) == PartitionSpec(
        None, None, None, None
    )
    assert sharding.spec(mesh, sharding.PAGES, (9, 4, 8, 8)) == PartitionSpec(
        None, "tensor", None, None
    )


def test_an_array_that_is_not_in_the_table_is_refused():
    with refused(ConfigError, "layers.0.adapter is not a known weight; add its logical axes"):
        shardings({"layers.0.adapter": jnp.zeros((2, 2))}, make_mesh(MeshConfig()))


def test_every_weight_of_every_kind_of_model_is_in_the_table():
    for config in PRESETS.values():
        for stacked in (True, False):
            model = jax.eval_shape(
                lambda key, c=config, s=stacked: Model(c, key, stacked=s), jax.random.key(0)
            )
            shardings(model, make_mesh(MeshConfig()))


def test_one_device_computes_what_it_would_without_a_mesh():
    tokens = jnp.zeros((2, 8), jnp.int32)
    loss = lambda model: block_diffusion_loss(model, tokens, tokens, jnp.ones((2, 8)), block_size=4)
    model = tiny_model(jnp.float32)
    plain = str(jax.make_jaxpr(loss)(model))
    with sharding.activate_mesh(make_mesh(MeshConfig())):
        assert str(jax.make_jaxpr(loss)(model)) == plain
    assert "sharding_constraint" not in plain and "shard_map" not in plain


def test_losses_and_gradients():
    """Rows, weights, heads and positions split at once."""
    assert len(run_module("tests.sharding.losses_on_meshes", "quick").splitlines()) == 1


@pytest.mark.slow
def test_losses_and_gradients_of_every_objective_on_every_axis_and_product():
    assert len(run_module("tests.sharding.losses_on_meshes", "all").splitlines()) == 34


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "meshes"),
    [
        # data, fsdp, expert, context, tensor
        ("dense", ["1,1,1,1,2", "2,2,1,1,2", "1,8,1,1,1"]),
        pytest.param("moe", ["1,1,2,1,2"], marks=pytest.mark.ci),
        ("moe", ["1,1,1,1,2", "1,1,4,1,1", "1,2,2,1,1"]),
        pytest.param("int8", ["1,1,1,1,2"], marks=pytest.mark.ci),
        # What does not divide is whole on each device.
        ("int8", ["1,2,1,1,2", "1,1,1,1,3"]),
        ("autoregressive", ["1,1,1,1,2", "2,1,1,1,4"]),
        # The canvas splits its rows over the first three axes.
        ("canvas", ["1,1,1,1,2", "2,2,1,1,2", "3,1,1,1,2"]),
        ("canvas_moe", ["1,1,2,1,2", "1,2,2,1,1"]),
    ],
)
def test_decoding(case, meshes):
    printed = run_module("tests.sharding.decoding_on_meshes", case, *meshes)
    assert printed.splitlines() == [f"{case} {mesh}" for mesh in meshes]


@pytest.mark.slow
@pytest.mark.ci
def test_faults(tmp_path: Path):
    """A shard of weights that is missing or cut short, a full disk, and a run that goes on otherwise."""
    run_module("tests.sharding.faults_on_meshes", tmp_path)


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_goes_on_over_other_devices_and_is_that_of_one(inputs: Path, tmp_path: Path):  # noqa: F811
    """Eight devices until a signal, then four in another shape; metrics and model as from one device.

    From a directory of an autoregressive model, which is converted.
    """
    config = ModelConfig(32, 16, 32, 3, 4, 2, 8, tie_embeddings=True, eos_token_id=0)
    save_pretrained(
        Model(config, jax.random.key(0)), tmp_path / "base", tokenizer_from=inputs / "tokenizer"
    )
    held_out = data_values(inputs / "held-out.jsonl", epochs=1, batch_size=8)
    changes = {
        "model": {"shape": None, "init_from": str(tmp_path / "base"), "mask_init": "normal"},
        "data": {"batch_size": 8},
        "micro_batch_size": 4,
        "ema_decay": 0.5,
        "eval": {"data": held_out, "every": 3},
    }

    def values(name: str, **mesh: int):
        return merged(merged(run_values(inputs, tmp_path / name), changes), {"mesh": mesh})

    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(values("sharded", data=2, fsdp=2, tensor=2)))
    assert "step=3" in run_module("tests.sharding.train_on_mesh", file, "1")
    file.write_text(yaml.safe_dump(values("sharded", fsdp=2, context=2)))
    assert "step=6" in run_module("tests.sharding.train_on_mesh", file, devices=4)
    run(from_values(TrainConfig, values("one")))
    ours, expected = metrics_of(tmp_path / "sharded"), metrics_of(tmp_path / "one")
    assert [line.keys() for line in ours] == [line.keys() for line in expected]
    for line, wanted in zip(ours, expected, strict=True):
        for name, value in wanted.items():
            # A standard error is a difference of numbers of which float32 leaves seven digits.
            small = 1e-6 if name == "eval_nelbo_se" else 0
            np.testing.assert_allclose(
                line[name] or 0, value or 0, rtol=1e-5, atol=small, err_msg=name
            )
    weights = (load_pretrained(tmp_path / name / "model") for name in ("sharded", "one"))
    # As wholes: where a gradient is all but zero, rounding decides how far Adam moves a single entry.
    jax.tree.map(assert_near, *weights)


def assert_near(ours: jax.Array, expected: jax.Array) -> None:
    assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected)
