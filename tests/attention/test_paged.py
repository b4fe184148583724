"""Paged attention against naive attention in numpy, whoever computes it; and writing pages."""

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.attention import api
from sdar_jax.attention.paged import mosaic_gpu, mosaic_tpu, paged_attention, write_pages, xla
from sdar_jax.attention.paged import pages as paging
from sdar_jax.errors import ConfigError
from tests.attention.mosaic_gpu_interpreter import extended_interpreter
from tests.bad_input import refused

GARBAGE = [-(2**31), -1, 10**6, 2**31 - 1]


class Shape(NamedTuple):
    rows: int
    window: int
    heads: int
    kv_heads: int
    dim: int
    page: int
    table: int


class Case(NamedTuple):
    """Arguments of `paged_attention`, numpy."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_table: np.ndarray
    visible: np.ndarray

    def row(self, n: int) -> "Case":
        return self._replace(
            q=self.q[n : n + 1],
            page_table=self.page_table[n : n + 1],
            visible=self.visible[n : n + 1],
        )

    def cast(self, dtype) -> "Case":
        return Case(*(jnp.asarray(x, dtype) for x in self[:3]), *(jnp.asarray(x) for x in self[3:]))


SHAPES = [
    Shape(3, 4, 4, 2, 8, 4, 5),
    Shape(2, 1, 3, 3, 4, 2, 7),
    Shape(4, 7, 4, 1, 6, 3, 4),
    Shape(1, 128, 2, 1, 4, 16, 9),
]


def random_case(
    shape: Shape, seed: int, lengths: list[int] | None = None, block: int | None = None
) -> Case:
    """Rows of random lengths (or these), block-causal windows at their ends, or any `visible` where `block` is None.

    Pages are shuffled and the first of them is every row's; unused entries are garbage, and what nobody sees is NaN.
    """
    random = np.random.default_rng(seed)
    rows, window, heads, kv_heads, dim, page, table = shape
    if lengths is None:
        lengths = [int(x) for x in random.integers(0, table * page + 1, rows)]
    pool = rows * table + 1
    own = 1 + random.permutation(pool - 1).reshape(rows, table)
    own[:, 0] = 0
    pages = [np.full((pool, kv_heads, page, dim), np.nan) for _ in range(2)]
    page_table = random.choice(GARBAGE, size=(rows, table)).astype(np.int32)
    for row, length in enumerate(lengths):
        used = -(-length // page)
        page_table[row, :used] = own[row, :used]
        for pool_of in pages:
            for slot in range(used):
                seen = min(page, length - slot * page)
                fresh = random.normal(size=(kv_heads, seen, dim))
                known = pool_of[own[row, slot], :, :seen]
                np.copyto(known, fresh, where=np.isnan(known))
    visible = np.stack([_visible(random, length, window, block) for length in lengths]).astype(
        np.int32
    )
    return Case(random.normal(size=(rows, window, heads, dim)), *pages, page_table, visible)


def _visible(random, length: int, window: int, block: int | None) -> np.ndarray:
    if block is None:
        visible = random.integers(0, length + 1, window)
        visible[random.integers(window)] = length
        return visible
    ends = length - (window - 1 - np.arange(window)) // block * block
    return np.maximum(ends, 0)


def naive(case: Case, scale: float) -> np.ndarray:
    """In float64, query by query and head by head; reads only what is visible."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in case[:3])
    page_table, visible = (np.asarray(x) for x in case[3:])
    out = np.zeros(q.shape)
    groups, page = q.shape[2] // k_pages.shape[1], k_pages.shape[2]
    for n, w in np.ndindex(visible.shape):
        if visible[n, w] == 0:
            continue
        ids = page_table[n, : -(-visible[n, w] // page)]
        k, v = (
            x[ids].transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3])
            for x in (k_pages, v_pages)
        )
        for h in range(q.shape[2]):
            scores = k[h // groups, : visible[n, w]] @ q[n, w, h] * scale
            exp = np.exp(scores - scores.max())
            out[n, w, h] = exp @ v[h // groups, : visible[n, w]] / exp.sum()
    return out


@partial(jax.jit, static_argnames=("implementation", "keys", "few", "one_by_one", "scale"))
def attend(case: Case, implementation, keys=256, few=64, one_by_one=True, scale=None):
    with (
        mock.patch.object(xla, "_KEYS", keys),
        mock.patch.object(xla, "_FEW_KEYS", few),
        mock.patch.object(xla, "_rows_one_by_one", return_value=one_by_one),
    ):
        return paged_attention(*case, scale=scale, implementation=implementation)


@pytest.mark.parametrize(
    ("implementation", "keys", "few", "one_by_one"),
    [
        ("reference", 1, 1, True),
        ("xla", 5, 5, True),
        ("xla", 8, 8, False),
        ("xla", 256, 64, True),
        ("xla", 256, 256, False),
        ("xla", 256, 8, False),
    ],
)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    block=st.sampled_from([None, 1, 2, 4]),
)
def test_equals_naive_attention(implementation, keys, few, one_by_one, shape, seed, block):
    case = random_case(shape, seed, block=block)
    with jax.enable_x64(True):
        got = attend(case, implementation, keys, few, one_by_one)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, naive(case, shape.dim**-0.5), rtol=1e-11, atol=1e-12)


PLAIN = ["reference", "xla"]


@pytest.mark.parametrize("implementation", PLAIN)
def test_rows_and_queries_that_see_nothing_give_zero(implementation):
    shape = Shape(3, 4, 4, 2, 8, 4, 5)
    case = random_case(shape, 1, lengths=[0, 20, 3], block=1)
    case.visible[1, 2] = 0
    got = np.asarray(attend(case.cast(jnp.float32), implementation))
    empty = case.visible == 0
    assert empty.sum() == 6
    assert not got[empty].any() and got[~empty].all()


@pytest.mark.parametrize("implementation", PLAIN)
def test_visible_outside_the_table_counts_as_its_edge(implementation):
    shape = Shape(2, 3, 2, 1, 4, 4, 3)
    case = random_case(shape, 2, lengths=[12, 12], block=4)
    beyond = case._replace(visible=np.array([[12, 13, 10**9], [12, -1, -(10**9)]], np.int32))
    edge = case._replace(visible=np.array([[12, 12, 12], [12, 0, 0]], np.int32))
    got, wanted = (
        np.asarray(attend(x.cast(jnp.float32), implementation, 4)) for x in (beyond, edge)
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("largest_first", [True, False])
def test_huge_scores_do_not_overflow(implementation, largest_first, x64):
    """Scores of +-1e5 in pages that come one after the other: the running maximum must carry over."""
    case = random_case(Shape(1, 4, 1, 1, 4, 2, 6), 8, lengths=[12], block=4)
    huge = case.page_table[0, :3] if largest_first else case.page_table[0, 3:]
    case.k_pages[huge] *= 1e5
    np.testing.assert_allclose(
        attend(case, implementation, 4, scale=2.0), naive(case, 2.0), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_is_as_good_as_bfloat16(implementation):
    """Scores and sums are float32, though scores are large: one rounding each of a probability and of the result."""
    case = random_case(Shape(2, 4, 4, 2, 16, 4, 16), 3, lengths=[64, 37], block=2)
    case = case._replace(q=8 * case.q).cast(jnp.bfloat16)
    got = attend(case, implementation, 16)
    wanted = naive(case, 0.25)
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted) < 2 * 2**-9


def relocated(case: Case, seed: int) -> Case:
    """The same sequences in other pages of a larger pool."""
    random = np.random.default_rng(seed)
    pool = len(case.k_pages)
    moved = random.permutation(pool + 5)[:pool]
    pages = [np.full((pool + 5, *x.shape[1:]), np.nan) for x in case[1:3]]
    for new, old in zip(pages, case[1:3], strict=True):
        new[moved] = old
    known = (case.page_table >= 0) & (case.page_table < pool)
    table = np.where(known, moved[np.where(known, case.page_table, 0)], case.page_table).astype(
        np.int32
    )
    return Case(case.q, *pages, table, case.visible)


def assert_rows_are_independent(case: Case, call) -> None:
    """Bit for bit: alone, among others, in another order, and with other page ids."""
    together = np.asarray(call(case))
    order = np.roll(np.arange(len(case.q)), 1)
    reordered = case._replace(
        q=case.q[order], page_table=case.page_table[order], visible=case.visible[order]
    )
    np.testing.assert_array_equal(np.asarray(call(reordered)), together[order])
    np.testing.assert_array_equal(np.asarray(call(relocated(case, 0))), together)
    for n in range(len(case.q)):
        np.testing.assert_array_equal(np.asarray(call(case.row(n))), together[n : n + 1])


@pytest.mark.parametrize("window", [1, 4, 32])
@pytest.mark.parametrize(
    ("keys", "few", "one_by_one"), [(16, 16, True), (256, 64, False), (256, 16, False)]
)
def test_a_row_does_not_depend_on_its_neighbours(window, keys, few, one_by_one):
    case = random_case(Shape(3, window, 4, 2, 16, 8, 8), 11, lengths=[64, 33, 7], block=4)
    assert_rows_are_independent(
        case, lambda case: attend(case.cast(jnp.float32), "xla", keys, few, one_by_one)
    )


@pytest.mark.parametrize(
    ("pages", "window", "at_once"),
    [(4, 4, True), (5, 4, False), (4, 2**13, False)],
    ids=["", "longer", "wider"],
)
def test_a_cpu_takes_rows_at_once_where_none_can_be_long(pages, window, at_once):
    rows = []
    attended = lambda *arguments: rows.append(arguments[-1].q.shape[0]) or real(*arguments)
    real = xla._attend
    case = random_case(Shape(3, window, 4, 2, 8, 64, pages), 0)
    with mock.patch.object(xla, "_attend", attended):
        jax.eval_shape(
            lambda case: paged_attention(*case, implementation="xla"), case.cast(jnp.float32)
        )
    assert rows == [3 if at_once else 1]


def interpreted(case: Case, implementation: str, scale: float | None = None) -> np.ndarray:
    """What a kernel gives in its interpreter, which looks for races."""
    extension = (
        extended_interpreter() if implementation == "mosaic_gpu" else contextlib.nullcontext()
    )
    with extension, api.override(implementation, interpret=True):
        return np.asarray(paged_attention(*case, scale=scale), np.float64)


KERNELS = ["mosaic_gpu", "mosaic_tpu"]
# What a kernel does differently: windows and groups that fill one and several row tiles or none; pages smaller and
# larger than a key tile; a row of several steps beside one that sees nothing; keys that are split, some parts empty.
KERNEL_CASES = {
    "one query": (Shape(2, 1, 4, 2, 64, 16, 10), [130, 17], None),
    "rows that see nothing": (Shape(4, 4, 4, 2, 64, 32, 4), [0, 100, 0, 3], 4),
    "large pages": (Shape(2, 8, 2, 1, 128, 128, 2), [256, 131], 8),
    "a wide window": (Shape(1, 128, 2, 1, 64, 64, 4), [230], 32),
    "many steps": (Shape(1, 4, 2, 1, 64, 128, 9), [1100], 4),
    "split keys": (Shape(2, 4, 4, 2, 64, 64, 16), [700, 60], 2),
}


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernels_equal_naive_attention(implementation, name):
    shape, lengths, block = KERNEL_CASES[name]
    case = random_case(shape, 5, lengths=lengths, block=block).cast(jnp.bfloat16)
    got, wanted = interpreted(case, implementation), naive(case, shape.dim**-0.5)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 2 * 2**-9
    # One wrong element among many would not show in the norm.
    np.testing.assert_allclose(got, wanted, atol=2**-6)
    assert not got[case.visible == 0].any()


def test_mosaic_tpu_in_float32():
    shape = Shape(3, 4, 4, 2, 128, 16, 40)
    case = random_case(shape, 6, lengths=[600, 0, 70], block=2).cast(jnp.float32)
    np.testing.assert_allclose(interpreted(case, "mosaic_tpu", 0.1), naive(case, 0.1), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("window", [1, 16, 64])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_kernels_on_random_rows(implementation, window, page):
    shape = Shape(3, window, 8, 2, 64 if page < 64 else 128, page, 640 // page)
    case = random_case(shape, page + window).cast(jnp.bfloat16)
    got, wanted = interpreted(case, implementation), naive(case, shape.dim**-0.5)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 2 * 2**-9
    np.testing.assert_allclose(got, wanted, atol=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernel_rows_do_not_depend_on_their_neighbours(implementation):
    """The keys are not split here, as they would be into other parts for another number of rows."""
    case = random_case(Shape(2, 4, 4, 2, 64, 16, 12), 12, lengths=[190, 33], block=4)
    assert_rows_are_independent(
        case, lambda case: interpreted(case.cast(jnp.bfloat16), implementation)
    )


def test_the_number_of_parts_depends_on_shapes_alone():
    parts = lambda *sizes: mosaic_gpu._Problem.of(*abstract_case(*sizes), None).parts
    # 132 SMs over sequences, key-value heads and pairs of row tiles; at least four key tiles a part.
    assert parts(Shape(1, 4, 32, 8, 128, 64, 64)) == 132 // 8
    assert parts(Shape(4, 64, 32, 8, 128, 64, 64)) == 132 // (4 * 8 * 2)
    assert parts(Shape(1, 4, 32, 8, 128, 64, 8)) == 2
    assert parts(Shape(64, 4, 32, 8, 128, 64, 64)) == 1


def abstract_case(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, pages and page table."""
    floats = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
    rows, window, heads, kv_heads, dim, page, table = shape
    ints = jax.ShapeDtypeStruct((rows, table), jnp.int32)
    return floats(rows, window, heads, dim), floats(rows * table, kv_heads, page, dim), ints


@pytest.mark.parametrize(
    ("implementation", "change", "names"),
    [
        ("mosaic_gpu", {"dtype": jnp.float32}, ["bfloat16", "float32"]),
        ("mosaic_gpu", {"dim": 96}, ["[64, 128]", "96"]),
        ("mosaic_gpu", {"page": 48}, ["16, 32, 64 or 128", "48"]),
        ("mosaic_gpu", {"window": 129}, ["128 queries", "129"]),
        ("mosaic_tpu", {"dtype": jnp.float16}, ["bfloat16 or float32", "float16"]),
        ("mosaic_tpu", {"dim": 96}, ["[64, 128]", "96"]),
        ("mosaic_tpu", {"page": 8}, ["multiple of 16", "8"]),
        ("mosaic_tpu", {"window": 129}, ["128 queries", "129"]),
    ],
)
def test_a_kernel_says_what_it_does_not_take(implementation, change, names):
    dtype = change.pop("dtype", jnp.bfloat16)
    shape = Shape(2, 4, 4, 2, 64, 16, 2)._replace(**change)
    case = random_case(shape, 0).cast(dtype)
    with refused(ConfigError, implementation, *names):
        paged_attention(*case, implementation=implementation)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_the_backend_chooses(backend):
    module = {"gpu": mosaic_gpu, "tpu": mosaic_tpu}[backend]
    taken, untaken = (
        random_case(Shape(1, 1, 1, 1, dim, 16, 1), 0).cast(jnp.bfloat16) for dim in (64, 32)
    )
    with (
        mock.patch.object(jax, "default_backend", return_value=backend),
        mock.patch(
            "sdar_jax.devices.chips.device", return_value=SimpleNamespace(compute_capability="9.0")
        ),
        mock.patch.object(module, "forward", side_effect=InterruptedError),
    ):
        with pytest.raises(InterruptedError):
            paged_attention(*taken)
        assert paged_attention(*untaken).shape == untaken.q.shape


def test_the_override_is_obeyed():
    case = random_case(SHAPES[0], 4).cast(jnp.float32)
    for name, module in (("reference", "reference"), ("chunked", "xla")):
        with (
            api.override(name),
            mock.patch(f"sdar_jax.attention.paged.{module}.forward", side_effect=InterruptedError),
            pytest.raises(InterruptedError),
        ):
            paged_attention(*case)


def test_bad_shapes():
    case = random_case(SHAPES[0], 4).cast(jnp.float32)
    with refused(ConfigError, "3 query heads", "2 key-value heads", "multiple"):
        paged_attention(*case._replace(q=case.q[:, :, :3]))
    with refused(ConfigError, "(3, 4, 4, 6)", "head_dim"):
        paged_attention(*case._replace(q=case.q[..., :6]))
    with refused(ConfigError, "(2, 5)", "(3, pages)"):
        paged_attention(*case._replace(page_table=case.page_table[:2]))
    with refused(ConfigError, "(3, 3)", "(3, 4)"):
        paged_attention(*case._replace(visible=case.visible[:, :3]))


@pytest.mark.parametrize(("capability", "implementation"), [("9.0", "mosaic_gpu"), ("8.0", "xla")])
def test_gpus_before_hopper_get_xla(capability, implementation):
    chip = SimpleNamespace(compute_capability=capability, device_kind="some chip")
    like = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    case = (
        like(2, 8, 4, 128),
        like(9, 2, 16, 128),
        like(9, 2, 16, 128),
        jnp.zeros((2, 4), int),
        jnp.zeros((2, 8), int),
    )
    chosen = mock.patch(
        f"sdar_jax.attention.paged.{implementation}.forward", side_effect=InterruptedError
    )
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(jax, "devices", lambda: [chip]),
    ):
        with chosen, pytest.raises(InterruptedError):
            paged_attention(*case)
        if implementation == "xla":
            with refused(ConfigError, "mosaic_gpu", capability):
                paged_attention(*case, implementation="mosaic_gpu")


def test_unknown_implementation():
    case = random_case(SHAPES[0], 4).cast(jnp.float32)
    with refused(ConfigError, "'chunked'", "'reference', 'xla'"):
        paged_attention(*case, implementation="chunked")
    with refused(ConfigError, "'dense'", "'reference', 'xla'"), api.override("dense"):
        paged_attention(*case)


@given(st.data(), st.sampled_from([(1, 4), (6, 4), (9, 2), (128, 16)]), st.integers(0, 2**32 - 1))
def test_writing_pages(data, sizes, seed):
    window, page = sizes
    rows, kv_heads, dim, table = 3, 2, 3, 10
    random = np.random.default_rng(seed)
    pages = random.normal(size=(2, rows * table + 1, kv_heads, page, dim)).astype(np.float32)
    new = random.normal(size=(2, rows, window, kv_heads, dim)).astype(np.float32)
    page_table = (
        random.permutation(rows * table + 1)[: rows * table].reshape(rows, table).astype(np.int32)
    )
    start = np.array(
        data.draw(st.lists(st.integers(0, table * page), min_size=rows, max_size=rows)), np.int32
    )
    count = np.array(
        data.draw(st.lists(st.integers(0, window), min_size=rows, max_size=rows)), np.int32
    )
    for row in range(rows):
        page_table[row, -(-(start[row] + count[row]) // page) :] = random.choice(GARBAGE)
    wanted = pages.copy()
    for n in range(rows):
        for w in range(min(count[n], table * page - start[n])):
            slot, offset = divmod(start[n] + w, page)
            wanted[:, page_table[n, slot], :, offset] = new[:, n, w]
    got = jax.jit(write_pages)(*pages, *new, page_table, start, count)
    np.testing.assert_array_equal(np.stack(got), wanted)


def test_writing_in_turns(monkeypatch):
    """How a TPU writes large windows."""
    random = np.random.default_rng(0)
    pages, new = (
        jnp.asarray(random.normal(size=size), jnp.float32) for size in ((9, 2, 4, 3), (6, 5, 2, 3))
    )
    rows = jnp.asarray(random.permutation(80)[:60].reshape(6, 5, 2), jnp.int32)
    wanted = np.asarray(paging._write(pages, new, rows))
    for at_once in (60, 59, 29, 1):
        monkeypatch.setattr(paging, "_ROWS_AT_ONCE", at_once)
        np.testing.assert_array_equal(paging._write_in_turns(pages, new, rows), wanted)


def test_writing_donated_pages_copies_none():
    pages, new = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 2, 16, 8), (4, 8, 2, 8))
    )
    table, row = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 16), (4,)))
    compiled = (
        jax.jit(write_pages, donate_argnums=(0, 1))
        .lower(pages, pages, new, new, table, row, row)
        .compile()
    )
    memory, size = compiled.memory_analysis(), 512 * 2 * 16 * 8 * 4
    assert memory.alias_size_in_bytes == 2 * size
    assert memory.temp_size_in_bytes < size / 8
