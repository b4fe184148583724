"""JAX's Mosaic GPU interpreter, extended to run kernels as they are compiled: specialised warps, accumulators that are
carried in registers, products with a register operand.

JAX 0.12 lacks `pl.run_state` over accumulators, `wgmma` with its first operand in registers and `wgmma_wait`, and takes
each `wgmma` as done when it is issued, without seeing what it reads. Here a `wgmma` is an agent of its own: it reads
shared memory through the asynchronous proxy, at any time from its issue until a wait for it, and until then its
accumulator must not be read. So a slot that is released too early, or bytes that were not fenced, are races.

The extension handles those equations and gives every other one to JAX, one at a time. It is written against private
code, hence the version check: on another one, read jax/_src/pallas/mosaic_gpu/interpret again. With JAX 0.11 what needs
it is skipped; kernels are compiled with that version too, in tests/compile.
"""

import contextlib
import dataclasses
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
)
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax._src.util import split_list

WRITTEN_FOR = "0.12.0.1"
_TOO_OLD = jax.__version_info__ < (0, 12)
_REASON = "JAX 0.11's interpreter has no layouts and no padded copies, and goes on after a race or a failed thread"
needs_interpreter = pytest.mark.skipif(_TOO_OLD, reason=_REASON)

Interpreter = jaxpr_interpret.JaxprInterpreter
_stock_interpret = Interpreter.interpret

# Called before each equation with the interpreter, the jaxpr, the equation, the token and the environment; returns the
# token, and whether the equation has been seen to. For seeding bugs.
Hook = Callable[
    [Interpreter, jax_core.Jaxpr, jax_core.JaxprEqn, jax.Array, interpret_utils.JaxprEnv],
    tuple[jax.Array, bool],
]


class _Agents:
    """The products in flight of each thread, oldest first: which accumulator, and the agent's clock."""

    def __init__(self):
        self.lock = threading.Lock()
        self.pending: dict = defaultdict(deque)
        self.issued: dict = defaultdict(int)

    def issue(self, shared: memory.GPUSharedMemory, thread, accumulator) -> memory.GpuClockBundle:
        """The clock of a new agent: what its thread knows now, and a tick that only a wait for it makes known.

        The tick is counted in the place of the thread's first warp, which nothing else uses, and never taken twice.
        """
        clock = shared.incr_clock(thread)
        place = shared.thread_to_vc_position(thread.warp(0))
        with self.lock:
            self.issued[thread] += 1
            for proxy in (clock.generic_clock, clock.async_smem_clock):
                proxy.clock[place] = self.issued[thread]
            self.pending[thread].append((accumulator, clock.copy()))
        return clock

    def wait(self, shared: memory.GPUSharedMemory, thread, outstanding: int) -> None:
        with self.lock:
            while len(self.pending[thread]) > outstanding:
                _, clock = self.pending[thread].popleft()
                with shared.lock:
                    shared.clocks[thread].update(clock)

    def check_done(self, thread, accumulator) -> None:
        with self.lock:
            if any(pending == accumulator for pending, _ in self.pending[thread]):
                raise RuntimeError(
                    f"the accumulator {accumulator} is read before the product into it is awaited"
                )


_agents = _Agents()


def _host(function):
    # What is not there in JAX 0.11 is not used there; this file is still imported.
    return function if _TOO_OLD else gpu_callbacks.fail_on_exception(function)


@_host
def _wgmma(
    token,
    thread,
    accumulator,
    a,
    a_transforms,
    b,
    b_transforms,
    *,
    mesh_location,
    a_is_ref,
    source_info,
):
    shared, races = gpu_callbacks._get_shared_memory(), gpu_callbacks.get_races()
    info = memory.GPULoggingInfo(mesh_location, thread, source_info)
    key = memory.HostAllocationKey.from_array(accumulator)
    clock = _agents.issue(shared, thread, key)

    def read(array, transforms) -> np.ndarray:
        source = memory.HostAllocationKey.from_array(array)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        access = shared.access(source, transforms)
        value, _, _ = shared.get_buffer_content(source, access, thread, logging_info=info)
        races.check_read(
            thread, clock.async_smem_clock.copy(), source, access, source_info=source_info
        )
        return value

    left = read(a, a_transforms) if a_is_ref else np.asarray(a)
    product = left.astype(np.float32) @ read(b, b_transforms).astype(np.float32)
    whole = shared.access(key, ())
    before, _, _ = shared.get_buffer_content(key, whole, thread, logging_info=info)
    shared.store_buffer_content(key, whole, before + product, thread, logging_info=info)
    return token


@_host
def _wait(token, thread, *, outstanding):
    _agents.wait(gpu_callbacks._get_shared_memory(), thread, outstanding)
    return token


@_host
def _read_accumulator(token, thread, accumulator, *, mesh_location, outstanding, source_info):
    if outstanding is not None:
        _agents.wait(gpu_callbacks._get_shared_memory(), thread, outstanding)
    _agents.check_done(thread, memory.HostAllocationKey.from_array(accumulator))
    return gpu_callbacks.wgmma_accumulator_deref(
        token=token,
        mesh_location=mesh_location,
        thread=thread,
        acc_allocation_key_as_array=accumulator,
        wait_n=outstanding,
        source_info=source_info,
    )


def _call(function, token, *arguments, outputs=(), **settings):
    shapes = (
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, *outputs) if outputs else gpu_callbacks.TOKEN_SHAPE_DTYPE
    )
    result = callback.io_callback(partial(function, **settings), shapes, token, *arguments)
    return result if outputs else (result,)


def _interpret_wgmma(self: Interpreter, eqn, token, invals):
    accumulator, a, b, *leaves = invals
    trees = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
    counts = [0 if tree is None else tree.num_leaves for tree in trees]
    leaves = split_list(leaves, counts)[: len(trees)]
    unflatten = lambda tree, leaves: () if tree is None else jax.tree.unflatten(tree, leaves)
    acc_transforms, a_transforms, b_transforms = map(unflatten, trees, leaves)
    assert not acc_transforms, "products into a part of an accumulator are not modelled"
    a_is_ref = isinstance(eqn.invars[1].aval, state_types.AbstractRef)
    (token,) = _call(
        _wgmma, token, self.thread, accumulator, a, a_transforms, b, b_transforms,
        mesh_location=self.mesh_location, a_is_ref=a_is_ref, source_info=eqn.source_info,
    )  # fmt: skip
    return token, []


def _interpret_wgmma_wait(self: Interpreter, eqn, token, invals):
    (token,) = _call(_wait, token, self.thread, outstanding=eqn.params["n"])
    return token, []


def _interpret_accumulator_read(self: Interpreter, eqn, token, invals):
    token, value = _deref(
        self, token, invals[0], eqn.outvars[0].aval, eqn.params["wait_n"], eqn.source_info
    )
    return token, [value]


def _deref(self: Interpreter, token, accumulator, aval, outstanding, source_info):
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return _call(
        _read_accumulator, token, self.thread, accumulator, outputs=(shape,),
        mesh_location=self.mesh_location, outstanding=outstanding, source_info=source_info,
    )  # fmt: skip


def _interpret_run_state(self: Interpreter, eqn, token, invals):
    """The state, and what JAX hoisted into it, lives in buffers of the thread while the body runs."""
    body = eqn.params["jaxpr"]
    assert all(eqn.params["is_initialized"])
    arguments = []
    for var, value in zip(eqn.invars, invals, strict=True):
        if not isinstance(var.aval, state_types.AbstractRef):
            token, value = _allocate(self, token, value, eqn.source_info)
        arguments.append(value)
    token, _ = self.interpret(body, token, *arguments)
    (token,) = _call(_wait, token, self.thread, outstanding=0)
    outputs = []
    for var, argument in zip(eqn.invars, arguments, strict=True):
        out = argument
        if not isinstance(var.aval, state_types.AbstractRef):
            token, out = _deref(self, token, argument, var.aval, 0, eqn.source_info)
            token = gpu_callbacks.call_deallocate_buffer(
                token, self.mesh_location, self.thread, argument, eqn.source_info
            )
        outputs.append(out)
    return token, outputs


def _allocate(self: Interpreter, token, value, source_info):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token, self.mesh_location, self.thread, request, value, source_info
    )


_HANDLERS = {
    gpu_primitives.wgmma_ref_p: _interpret_wgmma,
    gpu_primitives.wgmma_wait_p: _interpret_wgmma_wait,
    gpu_primitives.wgmma_accumulator_deref_p: _interpret_accumulator_read,
    discharge.run_state_p: _interpret_run_state,
}


def _alone(eqn: jax_core.JaxprEqn, debug_info: jax_core.DebugInfo) -> tuple[jax_core.Jaxpr, list]:
    """A jaxpr of one equation, and the variables it takes."""
    taken = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jax_core.Literal)))
    made = [v for v in eqn.outvars if not isinstance(v, jax_core.DropVar)]
    return jax_core.Jaxpr(
        (), taken, made, [eqn], eqn.effects, debug_info=debug_info.with_unknown_names()
    ), taken


def step(
    self: Interpreter,
    jaxpr: jax_core.Jaxpr,
    eqn: jax_core.JaxprEqn,
    token,
    env: interpret_utils.JaxprEnv,
):
    """Interprets one equation of `jaxpr`: writes what it makes, returns the token."""
    if eqn.primitive in _HANDLERS:
        token, out = _HANDLERS[eqn.primitive](self, eqn, token, env.read_many(eqn.invars))
        env.write_many(eqn.outvars, out)
        return token
    single, taken = _alone(eqn, jaxpr.debug_info)
    token, out = _stock_interpret(self, single, token, *env.read_many(taken))
    env.write_many(single.outvars, out)
    return token


def _interpret(self: Interpreter, jaxpr, token, *args, hook: Hook | None):
    env = interpret_utils.JaxprEnv(vars=jaxpr.constvars + jaxpr.invars, values=args)
    for eqn in jaxpr.eqns:
        done = False
        if hook is not None:
            token, done = hook(self, jaxpr, eqn, token, env)
        if not done:
            token = step(self, jaxpr, eqn, token, env)
    return token, env.read_many(jaxpr.outvars)


@contextlib.contextmanager
def extended_interpreter(hook: Hook | None = None) -> Iterator[None]:
    """Kernels traced and run inside are interpreted with the extension, and with `hook`, if any.

    Skips the test that enters it where JAX's own interpreter is too old.
    """
    global _agents
    if _TOO_OLD:
        pytest.skip(_REASON)
    assert jax.__version__ == WRITTEN_FOR, (
        f"written for jax {WRITTEN_FOR}; this is {jax.__version__}"
    )
    assert {f.name for f in dataclasses.fields(Interpreter)} >= {
        "thread",
        "mesh_location",
        "warp_mesh",
    }
    _agents = _Agents()

    def interpret(self, jaxpr, token, *args):
        return _interpret(self, jaxpr, token, *args, hook=hook)

    with mock.patch.object(Interpreter, "interpret", interpret):
        try:
            yield
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
