"""Tokens decoded by a model on a mesh are those of one device."""

import sys
from typing import Any

import jax
import numpy as np

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import Engine
from sdar_jax.model import Model
from sdar_jax.sharding import MeshConfig, make_mesh, shardings
from tests.tiny import tiny_model

# No empty prompt: its masks would see only each other, tie exactly, and be told apart by rounding.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3] * 13]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": ()}
GREEDY = DecodingConfig(confidence_threshold=0.5)
SAMPLED = DecodingConfig(temperature=1.0, top_k=5, confidence_threshold=0.6)


def generated(model: Model, config: DecodingConfig) -> list:
    return [(done.tokens, done.denoising_forwards) for done in generate(model, PROMPTS, config, **OPTIONS)]


def served(model: Model) -> tuple[list, Any]:
    engine = Engine(model, batch_slots=2, pages=24, page_size=8)
    return [done.tokens for done in engine.generate(PROMPTS, GREEDY, **OPTIONS)], engine._state.cache[0].k


def main(*sizes: str) -> None:
    jax.config.update("jax_enable_x64", True)
    model = tiny_model()
    expected = generated(model, GREEDY), generated(model, SAMPLED), served(model)[0]
    for size in sizes:
        mesh = make_mesh(MeshConfig(*map(int, size.split(","))), jax.devices()[: np.prod([*map(int, size.split(","))])])
        placed = jax.device_put(model, shardings(model, mesh))
        tokens, pages = served(placed)
        assert (generated(placed, GREEDY), generated(placed, SAMPLED), tokens) == expected, size
        # Two key-value heads, one on each device of the tensor axis.
        assert pages.addressable_shards[0].data.shape[1] == 2 // mesh.shape["tensor"]
        print(size, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
