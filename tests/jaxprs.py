"""Looking into what JAX is about to compile."""

import math
from collections.abc import Callable, Iterator

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
    shapes = [getattr(out.aval, "shape", ()) for equation in equations(function, *args) for out in equation.outvars]
    return max(math.prod(shape) for shape in shapes)
