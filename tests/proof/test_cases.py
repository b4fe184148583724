"""The cases: right kernels pass them, as far as an interpreter runs them, and small mistakes do not."""

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import verdicts
from sdar_jax.attention import chunked, mosaic_gpu, mosaic_tpu
from sdar_jax.attention.paged import mosaic_gpu as paged_gpu
from sdar_jax.attention.paged import mosaic_tpu as paged_tpu
from sdar_jax.attention.paged import xla
from sdar_jax.attention.tile_sizes import Row, TileSizes, trial
from sdar_jax.experts import mosaic_gpu as experts_gpu
from sdar_jax.proof.__main__ import main
from sdar_jax.proof.cases import Case, cases, exact_attention
from sdar_jax.proof.check import check, compare
from tests.attention.mosaic_gpu_interpreter import extended_interpreter, needs_interpreter

SLOW = [pytest.mark.slow, pytest.mark.ci]


def case(op: str, words: str) -> Case:
    (found,) = (case for case in cases(op, 128) if words in case.name)
    return found


def interpreted(module: Any) -> Any:
    names = [name for name in ("forward", "backward", "product") if hasattr(module, name)]
    names += ["weight_gradient"] * hasattr(module, "weight_gradient")
    return SimpleNamespace(**{n: partial(getattr(module, n), interpret=True) for n in names})


@pytest.mark.parametrize(
    ("op", "module", "words"),
    [
        ("attention", chunked, "hybrid"),
        ("paged attention", xla, "windows of 4"),
        ("paged attention", xla, "windows of 1,"),
    ],
)
def test_xla_passes(op, module, words):
    found = check(case(op, words), module)
    assert found.wrong is None and found.error["out"] > 0


@pytest.mark.parametrize(
    "words", ["hybrid", *(pytest.param(words, marks=SLOW) for words in ("scattered", "float32"))]
)
def test_mosaic_tpu_passes(words):
    dim = 64 if words == "hybrid" else 128
    with contextlib.ExitStack() as stack:
        for kernel in ("forward", "dq", "dkv"):
            stack.enter_context(trial(Row("mosaic_tpu", kernel, dim), TileSizes(128, 128, 1)))
        assert check(case("attention", words), interpreted(mosaic_tpu)).wrong is None


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("words", ["windows of 4", "windows of 32", "windows of 1,"])
def test_paged_mosaic_tpu_passes(words):
    assert check(case("paged attention", words), interpreted(paged_tpu)).wrong is None


@needs_interpreter
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("op", "module", "words"),
    [
        ("attention", mosaic_gpu, "hybrid"),
        ("attention", mosaic_gpu, "scattered"),
        ("attention", mosaic_gpu, ", float16"),
        ("paged attention", paged_gpu, "windows of 4"),
        ("paged attention", paged_gpu, "windows of 32"),
        ("experts", experts_gpu, "bfloat16"),
        ("experts", experts_gpu, ", float16"),
    ],
)
def test_kernels_for_hopper_pass(op, module, words):
    with extended_interpreter():
        assert check(case(op, words), interpreted(module)).wrong is None


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        ("right", None),
        ("nan_where_empty", "out is not finite at [0, "),
        ("one_gradient", "dk is off by"),
    ],
)
def test_what_is_found_wrong(fake, says, tmp_path):
    """As the process finds it, in this one."""
    report = tmp_path / "events"
    main(["check", str(report), "attention", f"tests.proof.fakes.{fake}"])
    outcome, reason = verdicts.judge(verdicts.read_events(report), None)
    assert (outcome, reason) == ("right", "") if says is None else says in reason


@pytest.mark.parametrize(
    "words",
    ["hybrid", ", float32", *(pytest.param(w, marks=SLOW) for w in ("scattered", ", float16"))],
)
@pytest.mark.parametrize("change", ["a key too many", "a key too few"])
def test_one_key_in_one_row_shows(words, change):
    """However many keys the row sees, above the rounding of the results' type."""
    found = case("attention", words)
    *inputs, ranges = found.inputs
    k = inputs[1]
    sees = np.array(ranges.sees(jnp.arange(k.shape[1])))
    assert rounded(found, sees) is None
    seen = sees[0].sum(-1)
    few = change == "a key too few"
    # Of the rows that have one to lose or gain, the one that sees the most; and of those keys, one of median weight.
    row = int(np.where((seen > 0) if few else (seen < k.shape[1]), seen, -1).argmax())
    there = np.flatnonzero(sees[0, row] == few)
    weights = np.asarray(k[0, there, 0], np.float64) @ np.asarray(inputs[0][0, row, 0], np.float64)
    sees[0, row, there[np.argsort(weights)[len(there) // 2]]] = not few
    told = str(rounded(found, sees))
    assert "out is off by" in told and f"at [0, {row}, " in told


def rounded(found: Case, sees: np.ndarray) -> str | None:
    """What is wrong with the results of this mask, rounded once."""
    q, k, v, d_out, _ = found.inputs
    results = exact_attention(q, k, v, d_out, sees, q.shape[-1] ** -0.5)
    return compare(
        found, {name: np.asarray(jnp.asarray(x, found.dtype)) for name, x in results.items()}
    )[1]


def test_every_kernel_has_cases_that_it_takes():
    """In half precision and, where it takes that, in float32."""
    for op, module, dtypes in (
        ("attention", mosaic_gpu, {"bfloat16", "float16"}),
        ("attention", mosaic_tpu, {"bfloat16", "float32"}),
        ("paged attention", paged_gpu, {"bfloat16"}),
        ("paged attention", paged_tpu, {"bfloat16", "float32"}),
        ("experts", experts_gpu, {"bfloat16", "float16"}),
    ):
        taken = [case for case in cases(op, 128) if module.unsupported(*case.taken) is None]
        assert len(taken) >= 2 and {str(case.dtype) for case in taken} == dtypes


def test_more_cases_where_there_is_time():
    quick, full = (
        [case.name for case in cases("experts", 128, full=full)] for full in (False, True)
    )
    assert len(full) >= 2 * len(quick) and len(set(full)) == len(full)
