"""Tokens and forwards of a model on a mesh are those of one device: `python -m ... CASE SIZES...`."""

import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import Completion, Engine
from sdar_jax.devices.sharding import MESH_AXES, MeshConfig, make_mesh
from sdar_jax.model import Model
from sdar_jax.model.axes import shardings
from sdar_jax.model.quantization import quantize
from tests.tiny import tiny_model, tiny_moe

# No empty prompt: its masks would see only each other, tie exactly, and be told apart by rounding.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3] * 13, [11, 5, 2, 17]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": ()}
GREEDY = DecodingConfig(confidence_threshold=0.5)
SAMPLED = DecodingConfig(temperature=1.0, top_k=5, confidence_threshold=0.6)
NEXT_TOKEN = DecodingConfig(strategy="autoregressive")
CANVAS = DecodingConfig(strategy="semi_autoregressive", denoising_steps=2)


class Case(NamedTuple):
    """A model, and what decodes with it: `generate` with each config, `Engine` with the first if it is `served`."""

    model: Model
    configs: tuple[DecodingConfig, ...]
    served: bool = True


def make_case(name: str) -> Case:
    experts = {"num_experts": 4, "moe_intermediate_size": 12}
    causal = {"objective": "autoregressive", "block_size": None, "mask_token_id": None}
    masked = {"objective": "masked_diffusion"}
    cases = {
        "dense": lambda: Case(tiny_model(), (GREEDY, SAMPLED)),
        "moe": lambda: Case(tiny_moe(**experts), (GREEDY,)),
        "int8": lambda: Case(quantize(tiny_model()), (GREEDY,)),
        "int8_mixture": lambda: Case(quantize(tiny_moe(**experts)), (GREEDY,), served=False),
        "autoregressive": lambda: Case(tiny_model(**causal), (NEXT_TOKEN,)),
        "canvas": lambda: Case(tiny_model(**masked), (CANVAS,), served=False),
        "canvas_moe": lambda: Case(tiny_moe(**masked, **experts), (CANVAS,), served=False),
    }
    return cases[name]()


def result(done: Completion) -> tuple:
    return done.tokens, done.denoising_forwards, done.commit_forwards


def generated(model: Model, config: DecodingConfig) -> list[tuple]:
    return [result(done) for done in generate(model, PROMPTS, config, **OPTIONS)]


def served(model: Model, config: DecodingConfig) -> list[tuple]:
    engine = Engine(model, batch_slots=2, pages=24, page_size=8, prefill_tokens=8)
    found = [result(done) for done in engine.generate(PROMPTS, config, **OPTIONS)]
    pages = engine._core._runner.state.cache[0].k
    assert pages.addressable_shards[0].data.shape[1] == share(pages, 2, "tensor"), (
        "each device has its own heads"
    )
    return found


def share(array: jax.Array, size: int, axis: str) -> int:
    """What a device has of an axis of an array: all of it, where the mesh does not divide it."""
    number = array.sharding.mesh.shape[axis]
    return size if size % number else size // number


def check_experts(model: Model) -> None:
    """Each device holds its experts, and of them its part of the width, alone."""
    weights = model.layers[0].experts_down
    wanted = [
        share(weights, size, axis) for size, axis in ((4, "expert"), (12, "tensor"), (16, "fsdp"))
    ]
    assert weights.addressable_shards[0].data.shape == tuple(wanted)


def main(name: str, *sizes: str) -> None:
    jax.config.update("jax_enable_x64", True)
    case = make_case(name)
    expected = [generated(case.model, config) for config in case.configs]
    for size in sizes:
        numbers = [*map(int, size.split(","))]
        mesh = make_mesh(
            MeshConfig(**dict(zip(MESH_AXES, numbers, strict=True))),
            jax.devices()[: np.prod(numbers)],
        )
        placed = jax.device_put(case.model, shardings(case.model, mesh))
        assert [generated(placed, config) for config in case.configs] == expected, size
        if case.served:
            assert served(placed, case.configs[0]) == expected[0], size
        if placed.config.num_experts:
            check_experts(placed)
        print(name, size, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
