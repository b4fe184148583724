"""Experts over meshes of eight devices equal those of one, whatever the routing: `python -m ... quick` or `all`."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sdar_jax.devices.sharding import MeshConfig, activate_mesh, batch_sharding, make_mesh
from sdar_jax.experts import ExpertAdapters, LowRank, expert_mlp
from sdar_jax.experts.exchange import exchange
from sdar_jax.experts.mlp import mlp
from sdar_jax.hf.pretrained import load_pretrained
from sdar_jax.hf.tensor_files import TensorReader
from sdar_jax.model import stack_layers
from sdar_jax.model.axes import shardings
from sdar_jax.objectives import ObjectiveConfig, make_inputs
from sdar_jax.weighted_loss import training_loss
from tests.sharding.losses_on_meshes import on_host, packed_batch
from tests.tiny import tiny_moe

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "qwen3-moe"
EXPERTS = 8
# data, fsdp, expert, context, tensor, and experts for a token: pairs are sent where those are fewer than the devices
# that share the experts, else tokens are gathered.
QUICK = [((1, 1, 8, 1, 1), 2), ((1, 2, 2, 1, 2), 3)]
ALL = [
    *QUICK,
    ((1, 1, 8, 1, 1), 8),
    ((2, 1, 4, 1, 1), 3),
    ((1, 1, 4, 2, 1), 1),
    ((1, 4, 1, 1, 2), 2),
]


def mesh_of(sizes: tuple[int, ...]):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def routings(tokens: int, top_k: int):
    """Any; all to the experts of one device; and some devices without a token."""
    random = np.random.default_rng(top_k)
    spread = np.stack([random.permutation(EXPERTS)[:top_k] for _ in range(tokens)])
    return {
        "spread": spread,
        "one": np.tile(np.arange(top_k), (tokens, 1)),
        "odd": (spread // 2 * 2 + 1) % EXPERTS,
    }


def check_experts(sizes: tuple[int, ...], top_k: int, rows: int = 8) -> None:
    random = np.random.default_rng(0)
    length, hidden, width = 6, 4, 6
    shapes = (
        (rows, length, hidden),
        (rows * length, top_k),
        (EXPERTS, hidden, 2, width),
        (EXPERTS, width, hidden),
    )
    arrays = [jnp.asarray(random.normal(size=shape)) for shape in shapes]

    def squares(function, experts, x, *rest):
        return (function(x, experts, *rest) ** 2).sum()

    def one_device(x, *rest):
        return mlp(x.reshape(-1, hidden), *rest)

    gradients = lambda function: jax.jit(
        jax.value_and_grad(partial(squares, function), argnums=(1, 2, 3, 4))
    )
    plain, meshed = gradients(one_device), gradients(expert_mlp)
    for name, experts in routings(rows * length, top_k).items():
        expected = plain(jnp.asarray(experts), *arrays)
        with activate_mesh(mesh_of(sizes)):
            found = meshed(jnp.asarray(experts), *arrays)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
            on_host(found),
            on_host(expected),
        )
        print("experts", sizes, top_k, rows, name, flush=True)


def check_low_rank(sizes: tuple[int, ...], top_k: int) -> None:
    """Matrices beside the experts' weights, and their gradients."""
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    rows, length, hidden, width, rank = 8, 6, 4, 6, 3
    weights = draw(EXPERTS, hidden, 2, width), draw(EXPERTS, width, hidden)
    up = [LowRank(draw(EXPERTS, rank, hidden), draw(EXPERTS, width, rank)) for _ in range(2)]
    down = LowRank(draw(EXPERTS, rank, width), draw(EXPERTS, hidden, rank))
    x, gates = draw(rows, length, hidden), draw(rows * length, top_k)
    experts = jnp.asarray(routings(rows * length, top_k)["spread"])
    loss = lambda x, adapters: (expert_mlp(x, experts, gates, *weights, adapters) ** 2).sum()
    for adapters in (ExpertAdapters(*up, down), ExpertAdapters(up=up[1])):
        run = lambda adapters=adapters: jax.jit(jax.value_and_grad(loss, (0, 1)))(x, adapters)
        expected = run()
        with activate_mesh(mesh_of(sizes)):
            found = run()
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
            on_host(found),
            on_host(expected),
        )
    print("low rank", sizes, top_k, flush=True)


def check_exchange() -> None:
    """Rows that say where they come from, some of which stay, against lists."""
    devices, held, capacity = 8, 12, 40
    random = np.random.default_rng(1)
    counts = random.multinomial(9, np.ones(devices) / devices, size=devices)
    counts[2] = 0
    rows = np.arange(devices * held, dtype=np.float64).reshape(devices, held, 1)
    body = lambda rows, counts: exchange(rows[0], counts, ("expert",), capacity=capacity)[None]
    split = PartitionSpec("expert")
    mesh = mesh_of((1, 1, 8, 1, 1))
    specs = {"in_specs": (split, PartitionSpec()), "out_specs": split, "check_vma": False}
    found = jax.jit(jax.shard_map(body, mesh=mesh, **specs))(rows, jnp.asarray(counts))
    parts = [np.split(own[:, 0], np.cumsum(sent)) for own, sent in zip(rows, counts, strict=True)]
    for receiver in range(devices):
        expected = np.concatenate([parts[sender][receiver] for sender in range(devices)])
        np.testing.assert_array_equal(found[receiver, : len(expected), 0], expected)
        assert not found[receiver, len(expected) :].any()


def check_loss(sizes: tuple[int, ...]) -> None:
    """With both of the router's losses, in stacked layers that are recomputed."""
    model = stack_layers(
        tiny_moe.__wrapped__(num_experts=EXPERTS, num_experts_per_token=2, num_layers=2)
    )
    config = ObjectiveConfig(router_balance=0.3, router_z=0.1)
    batch = packed_batch(noisy_index=True)

    def run(model, batch):
        inputs = make_inputs(batch, jax.random.key(3), config, model.config)
        return jax.value_and_grad(training_loss, has_aux=True)(model, inputs, config, remat="full")

    expected = on_host(jax.jit(run)(model, batch))
    mesh = mesh_of(sizes)
    with activate_mesh(mesh):
        found = jax.jit(run)(
            jax.device_put(model, shardings(model, mesh)),
            jax.device_put(batch, batch_sharding(mesh)),
        )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), on_host(found), expected
    )
    print("loss", sizes, flush=True)


def check_loading() -> None:
    """Each device gets its experts, and each tensor of theirs is read once."""
    reads, read = Counter(), TensorReader.read
    TensorReader.read = lambda self, name, row=None: reads.update([name]) or read(self, name, row)
    mesh = mesh_of((1, 2, 2, 1, 1))
    model, plain = load_pretrained(FIXTURE, mesh=mesh), load_pretrained(FIXTURE)
    weights = model.layers[0].experts_gate_up
    assert weights.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, PartitionSpec("expert", "fsdp")), weights.ndim
    )
    jax.tree.map(np.testing.assert_array_equal, on_host(model), on_host(plain))
    assert {count for name, count in reads.items() if "experts" in name} == {2}


def main(extent: str) -> None:
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    check_exchange()
    check_loading()
    for sizes, top_k in QUICK if extent == "quick" else ALL:
        check_experts(sizes, top_k)
        check_low_rank(sizes, top_k)
    if extent == "all":
        # Three rows do not divide: they are whole on each device, which adds what its experts add.
        check_experts((1, 1, 4, 1, 2), 2, rows=3)
        check_loss((1, 1, 8, 1, 1))
        check_loss((1, 2, 2, 1, 2))


if __name__ == "__main__":
    main(*sys.argv[1:])
