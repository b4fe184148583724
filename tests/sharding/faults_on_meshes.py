"""What goes wrong on eight devices is one line, and leaves what was there: `python -m ... DIRECTORY`."""

import contextlib
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdar_jax.devices.sharding import MeshConfig, make_mesh
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.axes import shardings
from sdar_jax.model.config import ModelConfig
from sdar_jax.training import CheckpointConfig, TrainConfig, run
from sdar_jax.training.checkpoint import Checkpoints, HostState
from sdar_jax.training.config_io import from_values, to_values
from sdar_jax.training.optimizer import adamw
from sdar_jax.training.step import TrainState, initial_state, model_weights
from tests.bad_input import refused
from tests.tiny import tiny_moe
from tests.training.conftest import merged, run_values, write_sums, write_tokenizer

SHAPE = {"num_experts": 4, "num_layers": 1}


def on_mesh(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**sizes))


@contextlib.contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: as on a full disk, the system refuses the write."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, allowed[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


def bytes_of(directory: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def check_loading(home: Path) -> None:
    mesh = on_mesh(expert=2, tensor=2, fsdp=2)
    save_pretrained(tiny_moe(jnp.float32, **SHAPE), home / "whole", max_shard_bytes=8000)
    faults = {
        "this shard is missing; download it again": lambda shard: shard.unlink(),
        "not a whole safetensors file": lambda shard: shard.write_bytes(shard.read_bytes()[:-10]),
    }
    for told, damage in faults.items():
        directory = Path(shutil.copytree(home / "whole", home / "damaged"))
        shard = sorted(directory.glob("*.safetensors"))[-1]
        damage(shard)
        for dtype in ("float32", "int8"):
            with refused(CheckpointError, shard.name, told):
                load_pretrained(directory, dtype=dtype, mesh=mesh)
        shutil.rmtree(directory)
    for dtype in ("float32", "int8"):
        with refused(ConfigError, "mesh.expert is 8 and the model has 4 experts; use 1, 2 or 4"):
            load_pretrained(home / "whole", dtype=dtype, mesh=on_mesh(expert=8, fsdp=1))
    with refused(
        ConfigError,
        "two axes of weight 'gate_up' map to mesh axis 'fsdp'; give each one of its own",
    ):
        shardings(tiny_moe(jnp.float32, **SHAPE), mesh, {"embed": "fsdp", "mlp": "fsdp"})


def check_saving(home: Path) -> None:
    model = tiny_moe(jnp.float32, **SHAPE)
    placed = jax.device_put(model, shardings(model, on_mesh(expert=4, tensor=2, fsdp=1)))
    save_pretrained(placed, home / "saved")
    before = bytes_of(home / "saved")
    other = jax.tree.map(lambda x: x + 1, placed)
    with (
        no_room(10_000),
        refused(CheckpointError, "saved: cannot be written", "make room", "nothing was replaced"),
    ):
        save_pretrained(other, home / "saved")
    assert bytes_of(home / "saved") == before
    assert not list(home.glob(".saved*"))
    save_pretrained(other, home / "saved")
    assert bytes_of(home / "saved").keys() == before.keys()


def state_on(mesh: Mesh, config: TrainConfig, model: Model, step: int) -> TrainState:
    weights = jax.tree.map(lambda x: x * step, model_weights(model)[0])
    state = initial_state(
        adamw(config.optimizer),
        weights,
        jax.random.key(step),
        averaged=config.ema_decay is not None,
    )._replace(step=jnp.int32(step))
    return jax.device_put(state, shardings(state, mesh))


def check_checkpoints(run_dir: Path, config: TrainConfig, model: Model) -> None:
    """The one that does not fit the disk leaves the one before it, which other meshes read."""
    host_state = HostState({}, {}, to_values(config), to_values(model.config))
    mesh = on_mesh(fsdp=4, tensor=2)
    with Checkpoints(run_dir, CheckpointConfig()) as checkpoints:
        checkpoints.save(state_on(mesh, config, model, 1), host_state)
    first = run_dir / "checkpoints" / "1"
    before = bytes_of(first)
    told = "checkpoint 2 cannot be written", "make room, then start again"
    with (
        no_room(10_000),
        refused(CheckpointError, *told),
        Checkpoints(run_dir, CheckpointConfig()) as checkpoints,
    ):
        checkpoints.save(state_on(mesh, config, model, 2), host_state)
        checkpoints.wait()
    assert bytes_of(first) == before
    with Checkpoints(run_dir, CheckpointConfig()) as again:
        assert (again.latest, again.host_state()) == (1, host_state)
        wanted = state_on(on_mesh(data=2, fsdp=2, tensor=2), config, model, 1)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        jax.tree.map(np.testing.assert_array_equal, again.state(like), wanted)


def check_resuming(values: dict) -> None:
    """From the checkpoint that `check_checkpoints` left."""
    changes = {
        r"optimizer.learning_rate (was 0.01, is 0.02)": {"optimizer": {"learning_rate": 0.02}},
        r"model.shape.num_kv_heads (was 2, is 1)": {"model": {"shape": {"num_kv_heads": 1}}},
        "mesh.tensor is 8 and the model has 2 key-value heads": {"mesh": {"tensor": 8, "fsdp": 1}},
        "fsdp 3 is 3 devices and there are 8": {"mesh": {"fsdp": 3}},
        "mesh.expert is 4 and the model has 0 experts; use 1": {"mesh": {"expert": 4, "fsdp": 2}},
    }
    checkpoint = Path(values["run_dir"]) / "checkpoints" / "1"
    before = bytes_of(checkpoint)
    for told, change in changes.items():
        with refused(ConfigError, told, "; "):
            run(from_values(TrainConfig, merged(values, change)))
    assert bytes_of(checkpoint) == before


def main(directory: str) -> None:
    home = Path(directory)
    check_loading(home)
    check_saving(home)
    write_tokenizer(home / "tokenizer")
    write_sums(home / "sums.jsonl")
    changes = {"data": {"batch_size": 8}, "model": {"shape": {"num_heads": 4, "num_kv_heads": 2}}}
    values = merged(run_values(home, home / "run"), changes)
    config = from_values(TrainConfig, values)
    diffusion = {
        "objective": "block_diffusion",
        "block_size": 4,
        "mask_token_id": 31,
        "eos_token_id": 0,
    }
    shape = {**values["model"]["shape"], **diffusion}
    model = Model(from_values(ModelConfig, shape), jax.random.key(0), stacked=True)
    check_checkpoints(home / "run", config, model)
    check_resuming(values)


if __name__ == "__main__":
    main(*sys.argv[1:])
