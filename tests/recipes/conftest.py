"""The recipes of the paper's studies, and where their paths are relative to."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS)).removesuffix(".yaml") for path in CONFIGS.glob("study*/*.yaml")
)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as {"data.sources.0.path": ...}."""
    if not isinstance(values, dict | list):
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {
        name: leaf
        for key, item in items
        for name, leaf in flat(item, f"{path}.{key}".lstrip(".")).items()
    }
