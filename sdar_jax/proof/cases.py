"""Small cases that a wrong kernel fails: masks of every kind, rows that see nothing, groups, ragged lengths, garbage in
what is not to be read; with the right results, in float64 by numpy.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax import visibility
from sdar_jax.visibility import Ranges

Results = dict[str, np.ndarray]


class Case(NamedTuple):
    """One computation.

    Attributes:
        name: for people.
        inputs: of `run`, after the kernel's module.
        taken: the inputs that the module's `unsupported` asks for.
        run: `run(module, *inputs)`, to be jitted: the results by name.
        exact: the same in float64.
        roundings: how far off each result may be, in roundings of the inputs' type; see `check`.
    """

    name: str
    inputs: tuple[Any, ...]
    taken: tuple[Any, ...]
    run: Callable[..., dict[str, jax.Array]]
    exact: Callable[[], Results]
    roundings: dict[str, float]

    @property
    def dtype(self) -> np.dtype:
        return self.inputs[0].dtype


def cases(op: str, tile: int, *, full: bool = False) -> Iterator[Case]:
    """Makes the cases of an op.

    Args:
        op: "attention", "paged attention" or "experts".
        tile: about the kernels' key tile, so that there are several.
        full: all heads, head sizes and types, and not one of each.
    """
    return _CASES[op](tile, full)


def _attention_cases(tile: int, full: bool) -> Iterator[Case]:
    half = jnp.bfloat16
    # A type that one platform's kernels do not take is passed over there.
    quick = [
        ("hybrid", (4, 2), 64, half),
        ("scattered", (4, 1), 128, half),
        ("causal", (2, 2), 128, jnp.float16),
        ("causal", (2, 2), 128, jnp.float32),
    ]
    more = [
        (mask, heads, dim, dtype)
        for mask in ("hybrid", "scattered", "causal")
        for heads in ((2, 2), (4, 2), (8, 1))
        for dim in (64, 128)
        for dtype in (half, jnp.float16, jnp.float32)
    ]
    for seed, (mask, heads, dim, dtype) in enumerate(more if full else quick):
        yield _attention(mask, _ranges(mask, tile), heads, dim, dtype, seed)


def _ranges(mask: str, tile: int) -> tuple[Ranges, int]:
    """Ranges, and the number of keys; none a multiple of the tile."""
    if mask == "causal":
        length = tile * 23 // 10 + 1
        return visibility.causal(jnp.ones((1, length), jnp.int32)), length
    if mask == "hybrid":
        lengths = [tile * 6 // 10 + 2, 3, tile // 10, tile * 6 // 10]
        documents = np.repeat([1, 2, 0, 4], lengths)[None].astype(np.int32)
        return visibility.hybrid(jnp.asarray(documents), 4), 2 * sum(lengths)
    random = np.random.default_rng(0)
    rows, keys = (2, tile * 7 // 10 + 1), tile * 21 // 10 + 1
    cuts = np.sort(random.integers(0, keys + 1, (*rows, 4)), axis=-1).reshape(*rows, 2, 2)
    few = np.sort(random.integers(0, 40, (*rows, 4)), axis=-1).reshape(*rows, 2, 2)
    cuts = np.where(random.random(rows)[..., None, None] < 0.3, few, cuts)
    cuts[random.random(rows) < 0.1] = 0
    cuts[0, : tile // 2] = [[0, keys], [0, 0]]
    cuts[:, ::2] = cuts[:, ::2, ::-1]
    cuts = cuts.astype(np.int32)
    return Ranges(jnp.asarray(cuts[..., 0]), jnp.asarray(cuts[..., 1])), keys


def _attention(
    mask: str, seen: tuple[Ranges, int], heads: tuple[int, int], dim: int, dtype: Any, seed: int
) -> Case:
    ranges, keys = seen
    batch, queries, _ = ranges.start.shape
    random = np.random.default_rng(seed)
    sizes = [(queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0])]
    q, k, v, d_out = (
        jnp.asarray(random.normal(size=(batch, *size, dim)).astype(dtype)) for size in sizes
    )
    scale = dim**-0.5

    def run(module: Any, q, k, v, d_out, ranges) -> dict[str, jax.Array]:
        out, logsumexp = module.forward(q, k, v, ranges, scale=scale)
        dq, dk, dv = module.backward(q, k, v, ranges, out, logsumexp, d_out, scale=scale)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    name = f"{mask}, {heads[0]} heads over {heads[1]} of {dim}, {q.dtype}"
    return Case(
        name,
        (q, k, v, d_out, ranges),
        (q, k, v),
        run,
        lambda: exact_attention(q, k, v, d_out, np.asarray(ranges.sees(jnp.arange(keys))), scale),
        # That of the result, as those of probabilities cancel; for q and k also that of a score's gradient and of the
        # output inside it, which weighs more as it is part of a difference.
        {"out": 1, "dq": 3, "dk": 3, "dv": 1},
    )


def exact_attention(q, k, v, d_out, sees: np.ndarray, scale: float) -> Results:
    """Computes the output and the gradients, head by head; sees: [B, Q, K]."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[2] // k.shape[2]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        key = b, slice(None), h // group
        query = b, slice(None), h
        probs = _softmax(np.where(sees[b], q[query] @ k[key].T * scale, -np.inf))
        out[query] = probs @ v[key]
        d_probs = d_out[query] @ v[key].T
        d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * scale
        dq[query] = d_scores @ k[key]
        dk[key] += d_scores.T @ q[query]
        dv[key] += probs.T @ d_out[query]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; zero where all scores are -inf."""
    exp = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e300))
    return exp / np.maximum(exp.sum(axis=-1, keepdims=True), 1e-300)


class _Windows(NamedTuple):
    """Windows of queries, and how many keys each sequence has."""

    lengths: tuple[int, ...]
    window: int
    heads: tuple[int, int]
    dim: int
    page: int


def _paged_cases(tile: int, full: bool) -> Iterator[Case]:
    # Several steps and parts beside sequences of one and of none; a head's rows within one tile and in several.
    narrow = _Windows((700, 60, 0, 256), 4, (8, 2), 128, 64)
    wide = _Windows((230, 33), 32, (8, 2), 64, 16)
    shapes = [
        (narrow, jnp.bfloat16),
        (wide, jnp.bfloat16),
        (narrow._replace(window=1, page=16), jnp.float32),
    ]
    if full:
        shapes[:2] = [
            (windows._replace(window=window, page=page, dim=dim), jnp.bfloat16)
            for windows, window in ((narrow, 1), (narrow, 4), (wide, 16), (wide, 128))
            for page in (16, 32, 64, 128)
            for dim in (64, 128)
        ]
    for seed, (windows, dtype) in enumerate(shapes):
        yield _paged(windows, dtype, seed)


def _paged(windows: _Windows, dtype: Any, seed: int) -> Case:
    random = np.random.default_rng(seed)
    lengths, window, (heads, kv_heads), dim, page = windows
    rows, table = len(lengths), -(-max(lengths) // page) + 1
    # Entries past a sequence are garbage, and keys past it NaN.
    page_table = np.full((rows, table), 2**31 - 1, np.int32)
    k_pages, v_pages = (np.full((rows * table, kv_heads, page, dim), np.nan) for _ in range(2))
    free = iter(random.permutation(rows * table))
    for row, length in enumerate(lengths):
        for slot, start in enumerate(range(0, length, page)):
            at = page_table[row, slot] = next(free)
            seen = min(page, length - start)
            for pages in (k_pages, v_pages):
                pages[at, :, :seen] = random.normal(size=(kv_heads, seen, dim))
    # Blocks of two, the last of them at the sequence's end.
    ends = np.array(lengths)[:, None] - (window - 1 - np.arange(window)) // 2 * 2
    visible = np.maximum(ends, 0).astype(np.int32)
    q = random.normal(size=(rows, window, heads, dim))
    floats = (jnp.asarray(x.astype(dtype)) for x in (q, k_pages, v_pages))
    inputs: tuple[Any, ...] = (*floats, jnp.asarray(page_table), jnp.asarray(visible))

    def run(module: Any, *inputs) -> dict[str, jax.Array]:
        return {"out": module.forward(*inputs, scale=dim**-0.5)}

    name = f"{rows} windows of {window}, {heads} heads over {kv_heads} of {dim}, pages of {page}, {inputs[0].dtype}"
    exact = lambda: {"out": _exact_paged(inputs, dim**-0.5)}
    return Case(name, inputs, inputs, run, exact, {"out": 1})


def _exact_paged(inputs: tuple[Any, ...], scale: float) -> np.ndarray:
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in inputs[:3])
    page_table, visible = map(np.asarray, inputs[3:])
    out = np.zeros(q.shape)
    kv_heads, page, dim = k_pages.shape[1:]
    group = q.shape[2] // kv_heads
    for row, query in np.argwhere(visible):
        seen = visible[row, query]
        at = page_table[row, : -(-seen // page)]
        k, v = (
            x[at].swapaxes(0, 1).reshape(kv_heads, -1, dim)[:, :seen] for x in (k_pages, v_pages)
        )
        queries = q[row, query].reshape(kv_heads, group, dim)
        probs = _softmax(queries @ k.swapaxes(1, 2) * scale)
        out[row, query] = (probs @ v).reshape(-1, dim)
    return out


def _expert_cases(tile: int, full: bool) -> Iterator[Case]:
    half = jnp.bfloat16
    shapes = [
        (300, (30, 0, 60, 37, 173), 128, 256, half),
        # Rows after the last group are of none.
        (300, (0, 70, 3), 256, 128, jnp.float16),
    ]
    if full:
        shapes += [
            (256, (128, 128), 256, 256, half),
            (77, (5, 72), 256, 128, half),
            (300, (0, 0, 0), 128, 128, half),
            (2048, tuple(range(64)), 512, 384, half),
            (2048, tuple(range(64)), 512, 384, jnp.float16),
        ]
    for seed, shape in enumerate(shapes):
        yield _experts(seed, *shape)


def _experts(
    seed: int, rows: int, sizes: tuple[int, ...], depth: int, columns: int, dtype: Any
) -> Case:
    random = np.random.default_rng(seed)
    shapes = ((rows, depth), (len(sizes), depth, columns), (rows, columns))
    x, weights, d_out = (jnp.asarray(random.normal(size=shape).astype(dtype)) for shape in shapes)

    def run(module: Any, x, weights, d_out, sizes) -> dict[str, jax.Array]:
        return {
            "out": module.product(x, weights, sizes),
            "dx": module.product(d_out, weights, sizes, transposed=True),
            "dw": module.weight_gradient(x, d_out, sizes),
        }

    def exact() -> Results:
        wide = [np.asarray(array, np.float64) for array in (x, weights, d_out)]
        out, dx, dw = np.zeros(shapes[2]), np.zeros(shapes[0]), np.zeros(shapes[1])
        ends = np.cumsum(sizes)
        for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
            out[start:end] = wide[0][start:end] @ wide[1][group]
            dx[start:end] = wide[2][start:end] @ wide[1][group].T
            dw[group] = wide[0][start:end].T @ wide[2][start:end]
        return {"out": out, "dx": dx, "dw": dw}

    name = f"{rows} rows in groups of {sizes[:5]}, {depth} x {columns}, {x.dtype}"
    inputs = (x, weights, d_out, jnp.asarray(sizes, jnp.int32))
    return Case(name, inputs, inputs[:2], run, exact, {"out": 1, "dx": 1, "dw": 1})


_CASES = {"attention": _attention_cases, "paged attention": _paged_cases, "experts": _expert_cases}
