"""Block shapes of the kernels, read from blocks.toml: a row a kernel and head size, with the reason for it.

`benchmarks/autotune.py` measures the candidates on a real chip and writes rows for that chip.
"""

import contextlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sdar_jax.devices.chips import device, platform
from sdar_jax.errors import ConfigError

TABLE = Path(__file__).with_name("blocks.toml")
ANY_CHIP = "any"


class Blocks(NamedTuple):
    """The shape of one kernel's work.

    query_tile: rows a program, query positions times the query heads that share a key-value head. key_tile: keys a
    step. stages: tiles in flight (GPU), sub-blocks of scores computed ahead (TPU).
    """

    query_tile: int
    key_tile: int
    stages: int = 2


class Row(NamedTuple):
    """Which kernel a row of the table is for; `chip` is a `device_kind`, or "any"."""

    implementation: str
    kernel: str
    head_dim: int
    chip: str = ANY_CHIP


_trials: dict[Row, Blocks] = {}


def blocks_for(implementation: str, kernel: str, head_dim: int) -> Blocks:
    """The row of the chip that is here, or the one for any chip.

    Raises:
        ConfigError: no row for this kernel and head size.
    """
    table = _table(TABLE) | _trials
    for chip in (chip_here(), ANY_CHIP):
        row = Row(implementation, kernel, head_dim, chip)
        if row in table:
            return table[row]
    raise ConfigError(f"{TABLE.name} has no {implementation} {kernel} row for head_dim {head_dim}; add one")


def chip_here() -> str:
    """The `device_kind` of the accelerator that is here or compiled for; "any" on a CPU."""
    return ANY_CHIP if platform() == "cpu" else device().device_kind


def head_dims(implementation: str, kernel: str) -> list[int]:
    """Head sizes that the table has for a kernel, ascending."""
    return sorted(
        {row.head_dim for row in _table(TABLE) if (row.implementation, row.kernel) == (implementation, kernel)}
    )


@contextlib.contextmanager
def trial(row: Row, blocks: Blocks) -> Iterator[None]:
    """What is traced inside uses these blocks for that kernel."""
    _trials[row] = blocks
    try:
        yield
    finally:
        del _trials[row]


@cache
def _table(path: Path) -> dict[Row, Blocks]:
    rows = tomllib.loads(path.read_text())["blocks"]
    pick = lambda kind, row: kind(*(row[name] for name in kind._fields))
    return {pick(Row, row): pick(Blocks, row) for row in rows}
