"""A kernel on a case: whether what it gives is right."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from sdar_jax.proof.cases import Case

# How many times its roundings the worst row of a right kernel may be off. In their interpreters all are below a half;
# a key too many or too few in one row is ten and more.
_SLACK = 2
# XLA and the kernels sum and take exponentials in float32, some of them approximated.
_FLOAT32 = 2.0**-15


class Found(NamedTuple):
    """What came of a case; JSON holds it.

    Attributes:
        case: its name.
        error: of each result that of its worst row.
        wrong: what is wrong with it, None if nothing is.
        seconds: that it took, compiling and the right results included.
    """

    case: str
    error: dict[str, float]
    wrong: str | None
    seconds: float


def check(case: Case, module: Any) -> Found:
    """Runs a kernel's module on a case."""
    begun = time.perf_counter()
    run = jax.jit(lambda *inputs: case.run(module, *inputs))
    results = jax.block_until_ready(run(*case.inputs))
    error, wrong = compare(case, {name: np.asarray(x) for name, x in results.items()})
    return Found(case.name, error, wrong, round(time.perf_counter() - begun, 3))


def compare(case: Case, results: dict[str, np.ndarray]) -> tuple[dict[str, float], str | None]:
    """Computes the largest error of a row (the last axis) of each result, and says what is wrong with a bad one.

    The error is |got - exact| / (|exact| + the root mean square of all rows' |exact|): an error shows where rows are
    small, and a row that is zero but for cancellation may have noise.
    """
    unit = max(float(jax.numpy.finfo(case.dtype).eps) / 2, _FLOAT32)
    errors, wrong = {}, None
    for name, exact in case.exact().items():
        got = results[name].astype(np.float64)
        size = np.linalg.norm(exact, axis=-1)
        typical = np.sqrt((size**2).mean()) or 1.0
        error = np.linalg.norm(got - exact, axis=-1) / (size + typical)
        error = np.where(np.isfinite(error), error, np.inf)
        worst = np.unravel_index(error.argmax(), error.shape)
        allowed = _SLACK * case.roundings[name] * unit
        errors[name] = float(error[worst])
        if wrong is None and errors[name] > allowed:
            at = [int(index) for index in worst]
            off = f"off by {errors[name]:.2g} ({allowed:.2g} allowed)"
            wrong = f"{name} is {off if np.isfinite(errors[name]) else 'not finite'} at {at}"
    return errors, wrong
