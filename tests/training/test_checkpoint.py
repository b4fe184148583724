"""Checkpoints come back bit for bit, are there or not, and a damaged one is not used."""

import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.errors import CheckpointError
from sdar_jax.training.checkpoint import Checkpoints, HostState
from sdar_jax.training.config import CheckpointConfig
from sdar_jax.training.step import TrainState


def make_state(step: int, ema: bool = True) -> TrainState:
    draw = np.random.default_rng(step)
    weights = {
        name: jnp.asarray(draw.normal(size=(40, 50)), jnp.float32)
        for name in ("embedding", "layers.last.qkv")
    }
    average = jax.tree.map(lambda w: w / 3, weights) if ema else None
    moments = (jnp.int32(step), jax.tree.map(jnp.square, weights))
    key = jax.random.key_data(jax.random.key(7))
    return TrainState(weights, moments, average, key, jnp.int32(step))


def make_host_state(step: int) -> HostState:
    data = {"order": {"weights": [1.0, 0.1]}, "open": [[step, [1, 2]]], "none": None}
    return HostState(data, {"sums": [0.1, 1 / 3, 1e-300]}, {"run_dir": "a"}, {"vocab_size": 5})


def opened(run_dir: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(run_dir, CheckpointConfig(every=1, keep=keep))


def placed(state: TrainState) -> TrainState:
    """Its shapes, on the one device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def assert_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def test_arrays_of_other_shapes_are_refused(tmp_path):
    """As a version that lays weights out otherwise left them."""
    with opened(tmp_path) as checkpoints:
        checkpoints.save(make_state(3), make_host_state(3))
    turned = jax.eval_shape(lambda: jax.tree.map(jnp.transpose, make_state(0)))
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"embedding as \[40, 50\], .* as \[50, 40\]; .* use a new run_dir",
        ),
    ):
        checkpoints.state(placed(turned))


@pytest.mark.parametrize("ema", [True, False])
def test_all_of_a_state_comes_back(ema, tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest is None and checkpoints.host_state() is None
        checkpoints.save(make_state(3, ema), make_host_state(3))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.host_state() == make_host_state(3)
        assert_equal(
            checkpoints.state(placed(jax.eval_shape(partial(make_state, 0, ema)))),
            make_state(3, ema),
        )


def test_steps_that_go_on_do_not_reach_a_state_being_saved(tmp_path):
    """The next steps write into donated memory while the checkpoint is still being written."""
    change = jax.jit(partial(jax.tree.map, lambda x: x * 3), donate_argnums=0)
    state = TrainState(
        {"w": jnp.ones((2000, 1000))}, (), None, jnp.zeros(2, jnp.uint32), jnp.int32(1)
    )
    with opened(tmp_path) as checkpoints:
        state = change(state)
        expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(state, make_host_state(3))
        for _ in range(5):
            state = change(state)
        jax.block_until_ready(state)
    with opened(tmp_path) as checkpoints:
        assert_equal(jax.device_get(checkpoints.state(placed(state))), expected)


def test_the_newest_are_kept(tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(make_state(step), make_host_state(step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


@pytest.mark.parametrize("name", ["sweep [a=1]", "back\\slash", "a]b", "100% {b}*?#x é"])
def test_a_directory_may_have_any_name(name, tmp_path):
    run_dir = tmp_path / name
    run_dir.mkdir()
    with opened(run_dir) as checkpoints:
        checkpoints.save(make_state(2), make_host_state(2))
        checkpoints.save(make_state(3), make_host_state(3))
    flip(files_of(run_dir, 3)[0])
    with opened(run_dir) as checkpoints:
        assert checkpoints.latest == 2 and checkpoints.host_state() == make_host_state(2)
        assert_equal(checkpoints.state(placed(make_state(0))), make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing beside it"


@pytest.fixture
def saved(tmp_path) -> Path:
    with opened(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), make_host_state(step))
    return tmp_path


def files_of(run_dir: Path, step: int) -> list[Path]:
    """Every file that holds part of a state."""
    root = run_dir / "checkpoints" / str(step)
    inside = [path for part in ("state", "position") for path in (root / part).rglob("*")]
    return sorted(
        path for path in [*inside, root / "sha256.json"] if path.is_file() and path.stat().st_size
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_set_aside_whichever_file_it_is(kind, saved, caplog):
    for path in files_of(saved, 3):
        content = path.read_bytes()
        DAMAGE[kind](path)
        with caplog.at_level(logging.WARNING, "sdar_jax"), opened(saved, keep=3) as checkpoints:
            assert checkpoints.latest == 2, f"{path.name} was {kind}"
            assert checkpoints.host_state() == make_host_state(2)
        assert "checkpoint 3 is damaged" in caplog.records[-1].message
        (saved / "damaged" / "3").rename(saved / "checkpoints" / "3")
        path.write_bytes(content)
    with opened(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 3


def test_two_damaged_ones_leave_the_third_and_the_step_can_be_saved_again(saved):
    for step in (2, 3):
        flip(files_of(saved, step)[-1])
    with opened(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(make_state(3), make_host_state(3))
    with opened(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 3
        assert_equal(checkpoints.state(placed(make_state(0))), make_state(3))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(saved):
    for step in (1, 2, 3):
        flip(files_of(saved, step)[0])
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match="every checkpoint is damaged; restore one or use a new run_dir"
        ):
            opened(saved)


def test_what_a_kill_left_half_written_is_removed(saved):
    half = saved / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with opened(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.save(make_state(4), make_host_state(4))
    assert not half.exists()
    with opened(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 4


def test_what_cannot_be_written_is_one_line(saved, monkeypatch):
    def no_room(*_, **__):
        raise OSError("[Errno 28] No space\nleft on device")

    with opened(saved) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", no_room)
        with pytest.raises(
            CheckpointError, match=r"checkpoint 4 cannot be written \(.* No space left"
        ) as raised:
            checkpoints.save(make_state(4), make_host_state(4))
    assert "\n" not in str(raised.value)
