"""Sizes that an engine is not told follow from the model and from the memory beside its weights."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from sdar_jax import DecodingConfig, Engine, generate
from sdar_jax.decoding.engine.sizes import Room, engine_sizes, free_bytes, room_for_pages
from sdar_jax.errors import ConfigError, DecodingError
from tests.bad_input import refused
from tests.tiny import tiny_model

NO_LIMIT = Room(position_bytes=100, free_bytes=None)


def sizes(room: Room = NO_LIMIT, **given) -> tuple[int, int, int]:
    unsaid = dict(max_length=None, pages=None, page_size=None)
    return tuple(
        engine_sizes(
            room, **{"context": 32768, "batch_slots": 8, "block_size": 4, **unsaid, **given}
        )
    )


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, (4096, 8 * 65, 64)),
        ({"context": 1000}, (1000, 8 * 16, 64)),
        ({"max_length": 60, "batch_slots": 2}, (60, 2, 64)),
        ({"max_length": 61, "batch_slots": 2}, (61, 4, 64)),
        ({"max_length": 5000, "context": 100}, (100, 16, 64)),
        ({"block_size": 3}, (4096, 8 * 63, 66)),
        ({"page_size": 8, "max_length": 20, "batch_slots": 1}, (20, 3, 8)),
        ({"pages": 5, "page_size": 8}, (40, 5, 8)),
        ({"pages": 5, "page_size": 8, "max_length": 30}, (30, 5, 8)),
        ({"pages": 5, "page_size": 8, "max_length": 50}, (40, 5, 8)),
        ({"pages": 2}, (128, 2, 64)),
    ],
    ids=str,
)
def test_what_is_not_given(given, wanted):
    assert sizes(**given) == wanted


def test_memory_limits_pages_that_are_not_given():
    page = 64 * 100
    assert sizes(Room(100, 1000 * page)) == (4096, 520, 64)
    assert sizes(Room(100, 100 * page + 1)) == (4096, 100, 64)
    # Too little for one request of 4096 tokens, which nobody asked for.
    assert sizes(Room(100, 10 * page)) == (640, 10, 64)
    assert sizes(Room(100, 16 * page), max_length=1000) == (1000, 16, 64)
    with refused(DecodingError, "1024 tokens need 0.00 GB", "a smaller max_length"):
        sizes(Room(100, 15 * page), max_length=1000)
    with refused(DecodingError, "the device has 0.00 GB left"):
        sizes(Room(100, 0))
    # Who gives pages has reckoned with the memory.
    assert sizes(Room(100, 0), pages=7) == (448, 7, 64)


def test_a_page_of_broken_blocks():
    with refused(ConfigError, "page_size is 6", "block size 4"):
        sizes(page_size=6)


def device(limit: int, used: int):
    return SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": used})


def test_the_fullest_device_decides():
    assert free_bytes([device(1000, 100), device(1000, 300)]) == 600
    assert free_bytes([device(1000, 950)]) == 0
    assert free_bytes([device(1000, 100), SimpleNamespace(memory_stats=lambda: None)]) is None


def test_bytes_of_a_position():
    """Keys and values of two layers with two heads of eight."""
    assert room_for_pages(tiny_model(jnp.float32)).position_bytes == 2 * 2 * 2 * 8 * 4


def test_an_engine_without_numbers():
    model = tiny_model(jnp.float32, max_position_embeddings=100)
    engine = Engine(model)
    assert engine.max_length == 100 and engine.stats().pages_available == 8 * 2
    engine.warm_up()
    config = DecodingConfig(confidence_threshold=0.2)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    got = engine.generate(prompts, config, max_new_tokens=9, stop_token_ids=())
    wanted = generate(model, prompts, config, max_new_tokens=9, stop_token_ids=())
    assert [c.tokens for c in got] == [c.tokens for c in wanted]
