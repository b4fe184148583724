"""What every answer to bad input has to be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jaxtyping
import pytest

from sdar_jax.errors import SdarError


@contextmanager
def refused(kind: type[SdarError], *names: str) -> Iterator[pytest.ExceptionInfo[SdarError]]:
    """Expects exactly `kind`, in one line that names each of `names`: the offending value and the fix.

    Run-time type checks, which no user has, are off inside: the error must be the library's own.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(kind) as caught:
            yield caught
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message, f"{name!r} is not named in: {message}"


def message_of(kind: type[SdarError], call: Callable[..., object], *given, **options) -> str:
    """The message with which a call is refused, as `refused` expects it."""
    with refused(kind) as caught:
        call(*given, **options)
    return str(caught.value)
