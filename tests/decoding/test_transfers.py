"""What crosses between host and device keeps its dtype, whatever fields there are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.decoding.transfers import pack, unpack


class Fields(NamedTuple):
    """As a state with a new field: a float is in no list of names."""

    count: np.ndarray
    done: np.ndarray
    score: np.ndarray
    start: np.ndarray


def test_every_field_comes_back_as_it_was():
    fields = Fields(
        count=np.array([3, -1], np.int32),
        done=np.array([[True, False, True], [False, False, True]]),
        score=np.array([0.25, -np.inf], np.float32),
        start=np.arange(8, dtype=np.int32).reshape(2, 2, 2) + (2**31 - 8),
    )
    on_host = pack(fields)
    packed = jax.device_get(jax.jit(pack)(fields))
    # One array for the integers and flags, one for the floats.
    assert {name: array.shape for name, array in packed.items()} == {
        "int32": (2, 8),
        "float32": (2, 1),
    }
    like = jax.tree.map(lambda field: field[0], fields)
    for each in (packed, on_host):
        for name, before, after in zip(Fields._fields, fields, unpack(each, like), strict=True):
            assert before.dtype == after.dtype, name
            np.testing.assert_array_equal(before, after)


def test_wide_floats_are_not_narrowed(x64):
    fields = Fields(*[np.array([1 / 3])] * 4)
    packed = jax.device_get(pack(jax.tree.map(jnp.asarray, fields)))
    back = unpack(packed, jax.tree.map(lambda field: field[0], fields))
    assert all(field == 1 / 3 and field.dtype == np.float64 for field in back)
