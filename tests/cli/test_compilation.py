"""What commands compile: kept for later starts, within bounds, and announced when it takes long."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from sdar_jax.cli import compilation
from sdar_jax.devices.user_cache import user_cache_dir

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A cache of this test's own, where the user has set none."""
    monkeypatch.setenv("SDAR_JAX_CACHE_DIR", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hits():
    found = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    monitoring.register_event_listener(listen)
    yield found
    monitoring.unregister_event_listener(listen)


def advance():
    """A new function each time, whose compiled program is the same: it updates a donated array in a loop."""

    def step(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x.at[i].add(x.sum()), x)

    return jax.jit(step, donate_argnums=0)(jnp.arange(8.0) + 0, 5)


def test_a_program_is_read_back_and_computes_the_same_in_place(programs, hits):
    assert compilation.keep_programs() == programs
    assert programs.stat().st_mode & 0o777 == 0o700
    before = np.asarray(advance())
    kept = len(list(programs.glob("jit_step-*-cache")))
    assert kept == 1 and not hits
    jax.clear_caches()
    np.testing.assert_array_equal(np.asarray(advance()), before)
    assert hits and len(list(programs.glob("jit_step-*-cache"))) == 1


def test_what_is_kept_is_bounded(programs, monkeypatch):
    monkeypatch.setattr(compilation, "_MOST_KEPT", 8_000)
    compilation.keep_programs()
    for size in range(3, 9):
        jax.jit(lambda x: x * 2 + 1)(np.ones(size)).block_until_ready()
    sizes = [file.stat().st_size for file in programs.glob("*-cache")]
    assert 0 < sum(sizes) <= 8_000


def test_what_a_killed_process_left_is_compiled_and_written_again(programs):
    compilation.keep_programs()
    advance()
    (program,) = programs.glob("jit_step-*-cache")
    whole = program.read_bytes()
    program.write_bytes(whole[:100])
    program.with_name(program.name.replace("-cache", "-atime")).unlink()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.keep_programs()
    assert not program.exists()
    jax.clear_caches()
    advance()
    assert program.stat().st_size > 100


def test_what_the_user_has_set_stays(programs, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compilation.keep_programs() == tmp_path / "own"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own") and not programs.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert compilation.keep_programs() is None and not programs.exists()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_folder_that_cannot_be_made_keeps_nothing(programs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDAR_JAX_CACHE_DIR", str(tmp_path / "file"))
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SDAR_JAX_CACHE_DIR", str(tmp_path))
    assert user_cache_dir() == tmp_path
    monkeypatch.delenv("SDAR_JAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "sdar_jax"
    # What the specification says of a relative path.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache" / "sdar_jax"


def slow_to_trace(seconds):
    def slow(x):
        time.sleep(seconds)
        return x + 1

    return slow


def test_what_takes_long_says_so_while_it_runs(monkeypatch, capfd):
    monkeypatch.setattr(compilation, "_PATIENCE", 0.2)
    said = []

    def traced(x):
        time.sleep(0.6)
        # Read while it is traced: that is the point.
        said.append(capfd.readouterr())
        return x + 1

    with compilation.for_commands():
        jax.jit(traced)(np.ones(2))
    (read,) = said
    assert (
        read.out == ""
        and read.err.startswith("compiling traced, kept in ")
        and read.err.count("\n") == 1
    )
    # Once for a program, though lowering and compiling follow; and no more where the command has ended.
    jax.jit(slow_to_trace(0.4))(np.ones(2))
    assert capfd.readouterr().err == ""


def test_what_is_quick_or_quiet_says_nothing(monkeypatch, capfd):
    with compilation.for_commands():
        jax.jit(lambda x: x - 3)(np.ones(2))
    monkeypatch.setattr(compilation, "_PATIENCE", 0.05)
    with compilation.for_commands(quiet=True):
        jax.jit(slow_to_trace(0.2))(np.ones(2))
    assert capfd.readouterr().err == ""
