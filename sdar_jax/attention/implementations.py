"""Implementations of an op: modules of one package, of which one is chosen for each call."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

from jaxtyping import Array

from sdar_jax.devices.chips import platform
from sdar_jax.errors import ConfigError

_KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


class Choice(NamedTuple):
    """A chosen implementation, and whether its kernel runs in the interpreter."""

    implementation: str
    interpret: bool = False


class Implementations(NamedTuple):
    """The implementations of one op.

    Each is a module with `unsupported(*inputs) -> str | None`, which says why it cannot take these shapes and types.

    Attributes:
        op: its name, for messages.
        package: the package that has a module for each of the names.
        names: of the implementations.
    """

    op: str
    package: str
    names: tuple[str, ...]

    def requested(self, name: str | None, override: Choice | None, *inputs: Array) -> Choice | None:
        """Returns the named implementation, or the override's, if any.

        Raises:
            ConfigError: it is unknown, or cannot take these inputs.
        """
        choice = override if name is None else Choice(name)
        if choice is None:
            return None
        if choice.implementation not in self.names:
            raise ConfigError(
                f"{self.op} implementation {choice.implementation!r} is unknown; use one of {self.names}"
            )
        reason = self._module(choice.implementation).unsupported(*inputs)
        if reason is not None:
            raise ConfigError(f"{self.op} implementation {choice.implementation!r}: {reason}")
        return choice

    def kernel(self, *inputs: Array) -> Choice | None:
        """Returns the platform's kernel, if there is one and it takes these inputs."""
        if self.no_kernel(*inputs) is not None:
            return None
        return Choice(_KERNELS[platform()])

    def no_kernel(self, *inputs: Array) -> str | None:
        """Says why no kernel of the platform takes these inputs; None if one does."""
        name = _KERNELS.get(platform())
        if name is None:
            return f"there are kernels for {' and '.join(_KERNELS)}, none for {platform()}"
        return self._module(name).unsupported(*inputs)

    def function(self, choice: Choice, name: str) -> Callable:
        """Returns the function `name` of the chosen module."""
        function = getattr(self._module(choice.implementation), name)
        return partial(function, interpret=True) if choice.interpret else function

    def _module(self, name: str) -> ModuleType:
        # Imported when it is asked for: not every platform's jaxlib carries every compiler.
        return importlib.import_module(f"{self.package}.{name}")
