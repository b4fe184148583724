"""What the decoding benchmark makes of its measurements, with runs made up, and its own side on a tiny model."""

import jax.numpy as jnp
import pytest

from benchmarks.decoding import Run, crossing, decode, split, static
from tests.tiny import tiny_model


def test_the_split_multiplies_to_the_whole():
    pairs = [
        (Run(2.0, 96, []), Run(9.0, 120, [])),
        (Run(2.0, 96, []), Run(5.0, 120, [])),
        (Run(1.0, 96, []), Run(3.0, 120, [])),
    ]
    result = split(pairs)
    assert result.total == (3.0, 2.5, 4.5)
    assert result.fewer == 1.25
    assert result.faster == pytest.approx((2.4, 2.0, 3.6))
    seconds_a_forward = pairs[0][1].a_forward / pairs[0][0].a_forward
    assert result.fewer * seconds_a_forward == pytest.approx(4.5)


def test_the_crossing_is_interpolated():
    assert crossing([1, 2, 4], [0.5, 0.8, 1.6]) == pytest.approx(2.5)
    assert crossing([4, 1, 2], [1.6, 0.5, 0.8]) == pytest.approx(2.5)
    assert crossing([1, 2], [1.1, 1.9]) is None
    assert crossing([1, 2], [0.3, 0.9]) is None


@pytest.mark.parametrize(("tokens_a_step", "forwards"), [(1, 8), (2, 4), (4, 2)])
def test_forwards_are_what_the_schedule_says(tokens_a_step, forwards):
    run = decode(tiny_model(jnp.float32), [[5, 6, 7, 8]], static(4, tokens_a_step), new_tokens=8)
    assert run.forwards == forwards
    assert len(run.tokens) == 8
    assert run.seconds > 0
