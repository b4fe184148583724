"""Looking into what JAX is about to compile, and how often it does."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.extend import core


def equations(function: Callable, *args, **kwargs) -> Iterator[core.JaxprEqn]:
    """Every equation of a traced function, those of its loops, branches and inner calls included."""
    yield from _walk(jax.make_jaxpr(function, **kwargs)(*args).jaxpr)


def _walk(jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _walk(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def largest_array(function: Callable, *args) -> int:
    """Elements of the largest intermediate of a traced function."""
    shapes = [
        getattr(out.aval, "shape", ())
        for equation in equations(function, *args)
        for out in equation.outvars
    ]
    return max(math.prod(shape) for shape in shapes)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Grows by one with each program that is compiled, large or small."""
    found: list[str] = []
    hear = lambda event, *_, **__: (
        found.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
