"""The rooms of the package stand on floors: a room imports only from those below it."""

import ast
from pathlib import Path

from scripts import house

ROOT = Path(__file__).parents[1]


def test_no_import_runs_up():
    assert house.imports_up(ROOT) == []


def test_an_import_that_runs_up_is_found(tmp_path):
    room = tmp_path / "sdar_jax" / "model"
    room.mkdir(parents=True)
    (room / "config.py").write_text("from sdar_jax.decoding import generate\n")
    assert house.imports_up(tmp_path) == ["sdar_jax/model/config.py: decoding"]


def test_a_comparison_with_a_name_is_found():
    assert house.name_comparisons(
        ast.parse('if config.objective == "masked_diffusion":\n    pass\n')
    ) == [1]
