"""The choice and the table that autotune writes, with times made up: real ones need the chip."""

import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import autotune
from sdar_jax.attention import tile_sizes as tile_sizes_module
from sdar_jax.attention.tile_sizes import TABLE, Row, TileSizes, tile_sizes_for, trial
from sdar_jax.errors import ConfigError
from sdar_jax.proof import tiles
from tests.bad_input import refused

ROW = Row("mosaic_gpu", "dq", 128, "NVIDIA H200")


@pytest.fixture
def table(tmp_path: Path, monkeypatch) -> Path:
    """A copy of the table, which autotune writes and tile_sizes_for reads."""
    copy = tmp_path / "tile_sizes.toml"
    copy.write_text(TABLE.read_text())
    monkeypatch.setattr(autotune, "TABLE", copy)
    monkeypatch.setattr(tile_sizes_module, "TABLE", copy)
    return copy


def test_written_rows_are_read_on_their_chip_alone(table, monkeypatch):
    shipped = tile_sizes_for("mosaic_gpu", "dq", 128)
    before = tomllib.loads(table.read_text())["tile_sizes"]
    autotune.write({ROW: (TileSizes(64, 128, 4), "measured")})
    tile_sizes_module._table.cache_clear()
    assert tile_sizes_for("mosaic_gpu", "dq", 128) == shipped
    monkeypatch.setattr(tile_sizes_module, "chip_here", lambda: "NVIDIA H200")
    assert tile_sizes_for("mosaic_gpu", "dq", 128) == TileSizes(64, 128, 4)
    assert table.read_text().startswith(TABLE.read_text().partition("[[tile_sizes]]")[0])
    after = tomllib.loads(table.read_text())["tile_sizes"]
    assert after[:-1] == before and after[-1]["reason"] == "measured"
    autotune.write({ROW: (TileSizes(128, 64, 2), "measured again")})
    assert len(tomllib.loads(table.read_text())["tile_sizes"]) == len(after)


def test_the_fastest_that_compiles_is_chosen(monkeypatch, capsys):
    times = {TileSizes(64, 64, 2): 3.0, TileSizes(64, 64, 3): 1.0, TileSizes(64, 64, 4): 2.0}

    def seconds(function, *args):
        tile_sizes = tile_sizes_for(*ROW[:3])
        if tile_sizes not in times:
            raise ValueError("too much shared memory")
        return times[tile_sizes]

    monkeypatch.setattr(tiles, "seconds", seconds)
    monkeypatch.setattr(tiles, "work", lambda *_: (lambda: None, ()))
    monkeypatch.setattr(tile_sizes_module, "chip_here", lambda: ROW.chip)
    best = autotune.tune(ROW, 4096)
    assert best is not None and best[0] == TileSizes(64, 64, 3) and "1000.000 ms" in best[1]
    assert "too much shared memory" in capsys.readouterr().out
    monkeypatch.setattr(tiles, "seconds", lambda *_: 1 / 0)
    assert autotune.tune(ROW, 4096) is None


def test_one_that_gives_other_results_is_out(monkeypatch):
    """However fast."""
    monkeypatch.setattr(tiles, "seconds", lambda *_: 1.0)
    monkeypatch.setattr(tiles, "candidates", lambda _: [TileSizes(1, 1, n) for n in (1, 2, 3)])
    results = iter([1.0, 1.001, 1.1])
    monkeypatch.setattr(tiles, "work", lambda *_: (lambda: jnp.full(3, next(results)), ()))
    monkeypatch.setattr(tile_sizes_module, "chip_here", lambda: ROW.chip)
    assert [took for _, took in tiles.measure(ROW, 4096)] == [1.0, 1.0, "other results"]


@pytest.mark.parametrize("kernel, outputs", [("forward", 1), ("dq", 1), ("dkv", 2)])
def test_the_work_is_what_the_kernel_makes(kernel, outputs, monkeypatch):
    monkeypatch.setattr(tiles, "HEADS", 4)
    monkeypatch.setattr(tiles, "KV_HEADS", 2)
    function, args = tiles.work(kernel, 8, 32)
    out = function(*args)
    parts = out if isinstance(out, tuple) else (out,)
    assert len(parts) == outputs
    assert all(part.shape == (1, 64, 4 if kernel != "dkv" else 2, 8) for part in parts)
    assert all(jnp.isfinite(part.astype(jnp.float32)).all() for part in parts)


def test_a_trial_ends_with_its_block():
    shipped = tile_sizes_for("mosaic_gpu", "forward", 128)
    with trial(Row("mosaic_gpu", "forward", 128), TileSizes(1, 2, 3)):
        assert tile_sizes_for("mosaic_gpu", "forward", 128) == TileSizes(1, 2, 3)
    assert tile_sizes_for("mosaic_gpu", "forward", 128) == shipped


def test_a_head_size_without_a_row():
    with refused(ConfigError, "mosaic_gpu forward", "80", "add one"):
        tile_sizes_for("mosaic_gpu", "forward", 80)


def test_every_row_says_why():
    rows = tomllib.loads(TABLE.read_text())["tile_sizes"]
    assert all(len(row["reason"]) > 20 for row in rows)
    assert len({tuple(row[name] for name in Row._fields) for row in rows}) == len(rows)
