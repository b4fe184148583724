"""A door whose kernels are those of `fakes`, on a CPU, with a cache of its own."""

from pathlib import Path

import jax
import pytest

from sdar_jax import verdicts
from sdar_jax.attention import api, implementations

FAKES = tuple(
    path.stem for path in Path(__file__).with_name("fakes").glob("*.py") if path.stem != "__init__"
)


class Door:
    """Attention as users call it, of which the kernel is one of the fakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path):
        self._monkeypatch = monkeypatch
        self.cache = cache

    def use(self, fake: str) -> None:
        self._monkeypatch.setitem(implementations._KERNELS, "cpu", fake)

    def restart(self) -> None:
        """Forgets what a process knows."""
        self._monkeypatch.setattr(verdicts, "_settled", {})

    def verdicts(self) -> list[Path]:
        return sorted(self.cache.rglob("*.json"))


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Door:
    monkeypatch.delenv("SDAR_JAX_PROVE")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("SDAR_JAX_CACHE_DIR", str(tmp_path / "cache"))
    op = implementations.Implementations("attention", "tests.proof.fakes", FAKES)
    monkeypatch.setattr(api, "OP", op)
    found = Door(monkeypatch, tmp_path / "cache")
    found.restart()
    return found
