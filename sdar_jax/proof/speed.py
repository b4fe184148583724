"""How fast the kernels are on the chip that is here, beside XLA and what the chip can do: `sdar-jax doctor --prove`.

Every function yields one measurement after the other, as JSON holds it; on a CPU of tiny shapes, for tests.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import visibility
from sdar_jax.attention import chunked
from sdar_jax.attention.paged import xla
from sdar_jax.devices.chips import chip_of, device, peak_flops, platform
from sdar_jax.experts import grouped
from sdar_jax.model import Model, ModelConfig, Windows, empty_pages, unstack_layers

Measured = dict[str, Any]


def seconds(function: Callable, *args: Any, calls: int = 10, repeats: int = 5) -> float:
    """Median seconds a call of a jitted function, after one to warm up; `calls` at a time, so that launching hides."""
    jax.block_until_ready(function(*args))

    def once() -> float:
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    return statistics.median(once() for _ in range(repeats))


def kernel_speeds(op: str, module: Any) -> Iterator[Measured]:
    """Times a kernel's module, and XLA in its place."""
    return _SPEEDS[op](module)


def _attention(module: Any) -> Iterator[Measured]:
    """Hybrid rows of one document, S = 4, with the heads of SDAR-1.7B and SDAR-8B."""
    length, dim = (32, 8) if _tiny() else (4096, 128)
    ranges = visibility.hybrid(jnp.ones((1, length), jnp.int32), 4)
    for heads, kv_heads in ((16, 8), (32, 8)):
        counts = (heads, kv_heads, kv_heads, heads)
        *qkv, d_out = (_random(i, (1, 2 * length, n, dim)) for i, n in enumerate(counts))

        def forward(module: Any, q: Any, k: Any, v: Any) -> Any:
            return module.forward(q, k, v, ranges, scale=dim**-0.5)

        def backward(module: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, d: Any) -> Any:
            return module.backward(q, k, v, ranges, out, logsumexp, d, scale=dim**-0.5)

        residuals = jax.jit(partial(forward, module))(*qkv)
        # Two matmuls a visible pair forward, five backward.
        pair = 2.0 * heads * dim * float((ranges.end - ranges.start).sum())
        shape = f"{heads} heads over {kv_heads} of {dim}, {length} tokens"
        yield _compared(f"forward, {shape}", forward, module, chunked, qkv, flops=2 * pair)
        args = (*qkv, *residuals, d_out)
        yield _compared(f"backward, {shape}", backward, module, chunked, args, flops=5 * pair)


def _paged(module: Any) -> Iterator[Measured]:
    """Windows of four with the heads of SDAR-8B, of which the keys and values are read once."""
    context, dim, page = (64, 8, 16) if _tiny() else (2048, 128, 64)
    heads, kv_heads, window = 32, 8, 4
    for rows in (1, 64):
        pages = rows * context // page
        k, v = (_random(i, (pages, kv_heads, page, dim)) for i in range(2))
        table = jnp.arange(pages, dtype=jnp.int32).reshape(rows, -1)
        visible = jnp.full((rows, window), context, jnp.int32)
        args = (_random(2, (rows, window, heads, dim)), k, v, table, visible)

        def forward(module: Any, *args: Any) -> Any:
            return module.forward(*args, scale=dim**-0.5)

        name = f"{rows} windows of {window} over {context} keys"
        yield _compared(name, forward, module, xla, args, moved=float(k.nbytes + v.nbytes))


def _experts(module: Any) -> Iterator[Measured]:
    """The gate's half of SDAR-30B-A3B's experts, over rows in uneven groups."""
    rows, groups, depth, columns = (64, 4, 128, 128) if _tiny() else (32768, 128, 2048, 768)
    cuts = np.sort(np.random.default_rng(0).integers(0, rows + 1, groups - 1))
    sizes = jnp.asarray(np.diff(cuts, prepend=0, append=rows), jnp.int32)
    x, weights, d_out = map(
        _random, range(3), ((rows, depth), (groups, depth, columns), (rows, columns))
    )
    flops = 2.0 * rows * depth * columns
    scan = SimpleNamespace(
        product=partial(grouped.tiled_dot, skipping=False),
        weight_gradient=partial(grouped.tiled_weight_gradient, skipping=False),
    )
    product = lambda module, x, weights: module.product(x, weights, sizes)
    gradient = lambda module, x, d_out: module.weight_gradient(x, d_out, sizes)
    yield _compared("product", product, module, scan, (x, weights), flops=flops)
    yield _compared("weight gradient", gradient, module, scan, (x, d_out), flops=flops)


_SPEEDS = {"attention": _attention, "paged attention": _paged, "experts": _experts}


def _compared(
    name: str,
    run: Callable,
    module: Any,
    other: Any,
    args: Any,
    flops: float | None = None,
    moved: float | None = None,
) -> Measured:
    """Times `run(module, *args)` and the same of XLA; rates are per second."""
    took, xla_took = (seconds(jax.jit(partial(run, each)), *args) for each in (module, other))
    found: Measured = {"measured": name, "seconds": took, "xla_seconds": xla_took}
    kind = device().device_kind
    if flops is not None:
        peak = peak_flops(kind)
        found |= {"flops": flops / took, "of_peak": peak and flops / took / peak}
    if moved is not None:
        chip = chip_of(kind)
        found |= {"bytes": moved / took, "of_peak": chip and moved / took / chip.bandwidth}
    return found


def decoding_forwards() -> Iterator[Measured]:
    """Times a decoding forward, t_f, with random weights: blocks of four tokens beside one token, over 2048 keys.

    The floor is what reading the weights and the keys and values once takes at the chip's full bandwidth.
    """
    config = ModelConfig.preset("qwen3-1.7b")
    context, page = 2048, 64
    if _tiny():
        config, context = ModelConfig(64, 16, 32, 2, 2, 1, 8), 64
    make = jax.jit(partial(Model, config, dtype=jnp.bfloat16))
    model = unstack_layers(make(jax.random.key(0)), donate=True)
    chip = chip_of(device().device_kind)
    for rows in (1, 16):
        pages = empty_pages(config, rows * context // page, page, jnp.bfloat16)
        table = jnp.arange(rows * context // page, dtype=jnp.int32).reshape(rows, -1)
        for width in (1, 4):
            windows = _windows(rows, width, context, table)

            def forward(model: Model, pages: Any, windows: Windows) -> tuple[jax.Array, Any]:
                (hidden,), pages = model.hidden_paged([windows], pages)
                return model.unembed(hidden).argmax(axis=-1), pages

            step = jax.jit(forward, donate_argnums=1)
            took, pages = _repeated(step, model, pages, windows)
            yield {
                "measured": f"t_f of qwen3-1.7b, {rows} x {width} tokens over {context} keys",
                "seconds": took,
                "floor_seconds": chip and _read_bytes(model, pages) / chip.bandwidth,
            }


def _windows(rows: int, width: int, context: int, table: jax.Array) -> Windows:
    full = partial(jnp.full, dtype=jnp.int32)
    return Windows(
        tokens=full((rows, width), 1),
        start=full((rows,), context - width),
        count=full((rows,), width),
        visible=full((rows, width), context),
        page_table=table,
    )


def _repeated(
    step: Callable, model: Model, pages: Any, windows: Windows, calls: int = 20
) -> tuple[float, Any]:
    """Median seconds of a step that gives the pages back."""
    tokens, pages = step(model, pages, windows)
    times = []
    for _ in range(3):
        jax.block_until_ready(tokens)
        start = time.perf_counter()
        for _ in range(calls):
            tokens, pages = step(model, pages, windows)
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times), pages


def _read_bytes(model: Model, pages: Any) -> float:
    """Bytes that a forward reads at least; of an embedding that is not the head as well, some rows."""
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((model, pages)))
    return float(read - (0 if model.head is None else model.embedding[...].nbytes))


def _tiny() -> bool:
    return platform() == "cpu"


def _random(seed: int, shape: tuple[int, ...]) -> jax.Array:
    dtype = jnp.float32 if _tiny() else jnp.bfloat16
    return jax.random.normal(jax.random.key(seed), shape, dtype)
