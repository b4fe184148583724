"""The net that catches synchronisation bugs is tested with bugs: seeded in the real kernels, each must be caught.

A bug is seeded where the interpreter reads the kernel, by the source line of what is left out or moved, so that the
kernels know nothing of it. Each runs in a process of its own, as some of them wait for ever.
"""

import contextlib
import linecache
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import source_info_util
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax.experimental.pallas import mosaic_gpu as plgpu

from sdar_jax import visibility
from sdar_jax.attention.mosaic_gpu.forward import outputs
from sdar_jax.attention.mosaic_gpu.key_gradients import key_gradients
from sdar_jax.attention.mosaic_gpu.query_gradient import Residuals, query_gradient
from sdar_jax.attention.tile_sizes import TileSizes
from sdar_jax.visibility import Ranges
from tests.attention.mosaic_gpu_interpreter import (
    Hook,
    extended_interpreter,
    needs_interpreter,
    step,
)
from tests.compilers import ROOT

pytestmark = needs_interpreter

TIMEOUT = 60
CAUGHT, MISSED = "CAUGHT", "MISSED"
# What the interpreter says of a race, of a barrier used wrongly, of a copy and of a product that is not awaited.
SIGNS = (
    "RACE DETECTED",
    "arrier",
    "Not all copy_smem_to_gmem",
    "before the product into it is awaited",
)


def line_of(eqn) -> str:
    """The functions and lines of the kernels that an equation comes from, innermost first."""
    frames = source_info_util.user_frames(eqn.source_info.traceback)
    frames = [frame for frame in frames if "sdar_jax/" in frame.file_name]
    return "".join(
        f"{f.function_name}: {linecache.getline(f.file_name, f.start_line).lstrip()}"
        for f in frames
    )


def left_out(line: str, seen: list[str]) -> Hook:
    """Without the equations that wait, arrive or fence on a line."""
    primitives = (
        gpu_primitives.barrier_wait_p,
        gpu_primitives.barrier_arrive_p,
        gpu_primitives.commit_smem_p,
        gpu_primitives.wait_smem_to_gmem_p,
    )

    def hook(interpreter, jaxpr, eqn, token, env):
        found = eqn.primitive in primitives and line in line_of(eqn)
        seen.extend([line] * found)
        return token, found

    return hook


def released_early(release: str, product: str, seen: list[str], *, issued: bool) -> Hook:
    """The slot is released before the product that reads it is issued, or when it is but not yet awaited."""
    due: list[Callable] = []

    def ahead_of_time(interpreter, jaxpr, eqn, token, env):
        """Interprets the release where the product is, and what it needs, found backwards from it."""
        needed, wanted = [], set(eqn.invars)
        for other in reversed(jaxpr.eqns[: jaxpr.eqns.index(eqn)]):
            if wanted & set(other.outvars) and any(v not in env._env for v in other.outvars):
                needed.append(other)
                wanted |= {v for v in other.invars if not isinstance(v, jax.extend.core.Literal)}
        for other in reversed(needed):
            token = step(interpreter, jaxpr, other, token, env)
        return step(interpreter, jaxpr, eqn, token, env)

    def hook(interpreter, jaxpr, eqn, token, env):
        is_release = lambda e: (
            e.primitive is gpu_primitives.barrier_arrive_p and release in line_of(e)
        )
        if is_release(eqn):
            return token, True
        if due and eqn.primitive is gpu_primitives.wgmma_ref_p:
            token = step(interpreter, jaxpr, eqn, token, env)
            return due.pop()(token), True
        later = [e for e in jaxpr.eqns[jaxpr.eqns.index(eqn) :] if is_release(e)]
        if later and product in line_of(eqn) and eqn.primitive.name in ("run_state", "run_scoped"):
            seen.append(release)
            now = lambda token: ahead_of_time(interpreter, jaxpr, later[0], token, env)
            if issued:
                due.append(now)
                return token, False
            return now(token), False
        return token, False

    return hook


class Bug(NamedTuple):
    """kernel: which to run. leave_out: the line without its effect. early: the line of the release, and of the product
    it comes before. patch: what to replace while the kernel is traced.
    """

    kernel: str
    leave_out: str = ""
    early: tuple[str, str] = ("", "")
    issued: bool = False
    patch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def arrivals(wanted: int, given: int) -> Callable[[], contextlib.AbstractContextManager]:
    """Barriers over slots that expect `given` arrivals instead of `wanted`."""
    barrier = plgpu.Barrier
    changed = lambda **kw: barrier(
        **{**kw, **({"num_arrivals": given} if kw.get("num_arrivals", 1) == wanted else {})}
    )
    return lambda: mock.patch.object(plgpu, "Barrier", changed)


def unawaited() -> contextlib.AbstractContextManager:
    load = plgpu.wgmma_accumulator_load
    return mock.patch.object(
        plgpu, "wgmma_accumulator_load", lambda acc, wait_n: load(acc, wait_n=wait_n + 1)
    )


K_RELEASE, V_RELEASE = (
    "plgpu.barrier_arrive(tiles.k_free.at[slot])",
    "plgpu.barrier_arrive(tiles.v_free.at[slot])",
)
Q_RELEASE, D_OUT_RELEASE = (
    "plgpu.barrier_arrive(tiles.q_free",
    "plgpu.barrier_arrive(tiles.d_out_free",
)
SCORES, WEIGHTED = "scores = pl.run_scoped(score", "weighted = plus_product("
PRODUCTS, GRADIENT = "= pl.run_scoped(products", "gradient = plus_product("
D_WEIGHTS, K_GRADIENT = "d_weights = plus_product(", "k_gradient = plus_product("

BUGS = {
    "forward: keys are not waited for": Bug("forward", "plgpu.barrier_wait(tiles.k_ready"),
    "forward: values are not waited for": Bug("forward", "plgpu.barrier_wait(tiles.v_ready"),
    "forward: queries are not waited for": Bug("forward", "plgpu.barrier_wait(mine.ready)"),
    "forward: keys released before the product": Bug("forward", early=(K_RELEASE, SCORES)),
    "forward: keys released before the wait": Bug(
        "forward", early=(K_RELEASE, SCORES), issued=True
    ),
    "forward: values released before the product": Bug("forward", early=(V_RELEASE, WEIGHTED)),
    "forward: values released before the wait": Bug(
        "forward", early=(V_RELEASE, WEIGHTED), issued=True
    ),
    "forward: keys never released": Bug("forward", K_RELEASE),
    "forward: slots reused without a wait": Bug("forward", "plgpu.barrier_wait(free.at"),
    "forward: one consumer frees a slot": Bug("forward", patch=arrivals(2, 1)),
    "forward: three consumers free a slot": Bug("forward", patch=arrivals(2, 3)),
    "forward: output not fenced": Bug("forward", "plgpu.commit_smem()"),
    "forward: output not awaited": Bug("forward", "plgpu.wait_smem_to_gmem(0)"),
    "forward: a consumer never takes its turn": Bug("forward", "plgpu.barrier_arrive(turn)"),
    "dq: keys are not waited for": Bug("dq", "plgpu.barrier_wait(tiles.k_ready"),
    "dq: values are not waited for": Bug("dq", "plgpu.barrier_wait(tiles.v_ready"),
    "dq: values released before the wait": Bug("dq", early=(V_RELEASE, PRODUCTS), issued=True),
    "dq: keys released before their second product": Bug("dq", early=(K_RELEASE, GRADIENT)),
    "dq: keys released before the wait": Bug("dq", early=(K_RELEASE, GRADIENT), issued=True),
    "dq: scores read before they are there": Bug("dq", patch=unawaited),
    "dq: one consumer frees a slot": Bug("dq", patch=arrivals(2, 1)),
    "dq: output not fenced": Bug("dq", "plgpu.commit_smem()"),
    "dkv: queries are not waited for": Bug("dkv", "plgpu.barrier_wait(tiles.q_ready"),
    "dkv: gradients are not waited for": Bug("dkv", "plgpu.barrier_wait(tiles.d_out_ready"),
    "dkv: gradients released before the product": Bug("dkv", early=(D_OUT_RELEASE, D_WEIGHTS)),
    "dkv: gradients released before the wait": Bug(
        "dkv", early=(D_OUT_RELEASE, D_WEIGHTS), issued=True
    ),
    "dkv: queries released before the product": Bug("dkv", early=(Q_RELEASE, K_GRADIENT)),
    "dkv: queries released before the wait": Bug("dkv", early=(Q_RELEASE, K_GRADIENT), issued=True),
    "dkv: plain reads not fenced": Bug("dkv", "visit: plgpu.commit_smem()"),
    "dkv: output not fenced": Bug("dkv", "consume: plgpu.commit_smem()"),
    "dkv: slots reused without a wait": Bug("dkv", "plgpu.barrier_wait(free.at"),
    "dkv: one arrival fills a slot": Bug("dkv", patch=arrivals(2, 1)),
}
SOUND = {f"{kernel}: sound": Bug(kernel) for kernel in ("forward", "dq", "dkv")}
QUICK = ["forward: values released before the wait", "dkv: plain reads not fenced"]


def run(kernel: str) -> None:
    """More visits than slots, masked and full, in two consumers."""
    queries, keys = (320, 128) if kernel == "dkv" else (128, 320)
    random = np.random.default_rng(0)
    q, d_out = (
        jnp.asarray(random.normal(size=(1, queries, 1, 64)), jnp.bfloat16) for _ in range(2)
    )
    k, v = (jnp.asarray(random.normal(size=(1, keys, 1, 64)), jnp.bfloat16) for _ in range(2))
    whole = visibility.bidirectional(jnp.ones((1, queries), jnp.int32))
    ranges = Ranges(
        whole.start, jnp.full_like(whole.end, keys).at[:, :, 1].set(0).at[:, 0, 0].set(keys - 3)
    )
    residuals = Residuals(*(jnp.ones((1, queries, 1), jnp.float32) for _ in range(2)))
    settings = {"scale": 0.1, "interpret": True}
    tile_sizes = TileSizes(64, 64) if kernel != "dkv" else TileSizes(64, 128)
    calls = {
        "forward": partial(outputs, q, k, v, ranges, tile_sizes=tile_sizes, **settings),
        "dq": partial(
            query_gradient, q, k, v, ranges, residuals, d_out, tile_sizes=tile_sizes, **settings
        ),
        "dkv": partial(
            key_gradients, q, k, v, ranges, residuals, d_out, tile_sizes=tile_sizes, **settings
        ),
    }
    jax.block_until_ready(jax.jit(calls[kernel])())


@contextlib.contextmanager
def seeded(bug: Bug) -> Iterator[None]:
    seen: list[str] = []
    hook = None
    if bug.leave_out:
        hook = left_out(bug.leave_out, seen)
    elif bug.early[0]:
        hook = released_early(*bug.early, seen, issued=bug.issued)
    with bug.patch(), extended_interpreter(hook):
        try:
            yield
        finally:
            if hook is not None and not seen:
                print("the line of the bug is not in the kernel", flush=True)


def main(name: str) -> None:
    bug = {**BUGS, **SOUND}[name]
    try:
        with seeded(bug):
            run(bug.kernel)
    except Exception as error:
        known = any(sign in str(error) for sign in SIGNS)
        print(CAUGHT if known else "FAILED", " ".join(str(error).split())[-1500:])
    else:
        print(MISSED)


def outcome(name: str) -> str:
    program = f"from tests.attention.test_race_detection import main; main({name!r})"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    except subprocess.TimeoutExpired as expired:
        return f"{CAUGHT} waits for ever {(expired.stdout or b'').decode()}"
    assert "is not in the kernel" not in done.stdout, done.stdout
    return done.stdout or done.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in BUGS]
)
def test_seeded_bugs_are_caught(name):
    result = outcome(name)
    print(result[:600])
    assert result.startswith(CAUGHT), result[-600:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_sound_kernels_are_not(name):
    assert outcome(name).startswith(MISSED)
