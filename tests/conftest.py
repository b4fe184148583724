"""Settings of the whole suite: CPU backend, run-time checks of array shapes, compilation cache, hypothesis profiles."""

import gc
import itertools
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Chips that tests only claim to have prove no kernels; tests/proof does, with kernels of its own.
os.environ["SDAR_JAX_PROVE"] = "0"
# Nearly all of a run is XLA compiling tiny programs once each: optimising their machine code costs more than it gives.
# XLA_DEFAULTS=1 leaves XLA as users have it; CI runs the tests marked `xla_defaults` so as well.
if not os.environ.get("XLA_DEFAULTS"):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    )

# Commands that tests start keep what they compile beside what the tests do, and not in the home of who runs them.
os.environ["SDAR_JAX_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "commands")

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# The hook rewrites modules as they are imported, so it stands before any import of sdar_jax.
install_import_hook("sdar_jax", "beartype.beartype")

# Most of a run is XLA compiling the same tiny programs; read from disk, a rerun takes about a quarter of that time.
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "xla-tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile("quick", max_examples=10, deadline=None, derandomize=True)
# New examples in each run of CI, which prints the seed: HYPOTHESIS_PROFILE=ci and --hypothesis-seed=N repeat a failure.
settings.register_profile(
    "ci",
    max_examples=10,
    deadline=None,
    derandomize=False,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# What slow tests took on two quiet cores. `make test PYTEST_ARGS=--measure`, without .cache/xla-tests, writes it anew.
SECONDS = Path(__file__).with_name("seconds.txt")
SLOW = 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--measure", action="store_true", help=f"write {SECONDS.name}, by which tests are slow"
    )
    parser.addoption(
        "--part", metavar="K/N", help="only the K-th of N parts of the tests, K from 0"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests that were measured to be slow, and keeps those of the part that is asked for."""
    slow = {line.split(" ", 1)[1] for line in SECONDS.read_text().splitlines()}
    for item in items if not config.getoption("--measure") else []:
        if item.nodeid in slow and item.get_closest_marker("slow") is None:
            item.add_marker("slow")
            item.add_marker("ci")
    if part := config.getoption("--part"):
        k, n = map(int, part.split("/"))
        # By name, so that a test does not change its part when others come.
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % n != k % n]
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)


_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--measure") and not hasattr(session.config, "workerinput"):
        slow = sorted((test, seconds) for test, seconds in _seconds.items() if seconds > SLOW)
        SECONDS.write_text("".join(f"{seconds:.0f} {test}\n" for test, seconds in slow))


# Tracing makes objects by the million, and few cycles: looking for those more often takes a tenth of a run.
gc.set_threshold(100_000, 20, 20)

# Compiled programs hold memory maps, and past 65,530 of a process (Linux's vm.max_map_count) XLA crashes.
_MOST_MAPS = 30_000
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Now and then lets go of what earlier tests compiled."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 and int64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """No run-time type checks for the length of one test, so that a wrong type meets what a user would."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
