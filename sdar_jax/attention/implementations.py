"""Implementations of an op: modules of one package, of which one is chosen for each call."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

from jaxtyping import Array

from sdar_jax import verdicts
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
        """Returns the platform's kernel, if there is one, it takes these inputs, and it is right on the chip here.

        What is not known of it is found out, which takes seconds.
        """
        if self.no_kernel(*inputs) is not None:
            return None
        name = _KERNELS[platform()]
        return Choice(name) if verdicts.trusted(self.op, self._path(name)) else None

    def kernel_here(self) -> tuple[str, str] | None:
        """Returns the op and the name of the module of the platform's kernel, if there is one."""
        name = _KERNELS.get(platform())
        return (self.op, self._path(name)) if name in self.names else None

    def no_kernel(self, *inputs: Array) -> str | None:
        """Says why no kernel of the platform takes these inputs; None if one does."""
        name = _KERNELS.get(platform())
        if name is None:
            return f"there are kernels for {' and '.join(_KERNELS)}, none for {platform()}"
        return self._module(name).unsupported(*inputs)

    def function(self, choice: Choice, name: str) -> Callable:
        """Returns the function `name` of the chosen module."""
        function = getattr(self.module(choice), name)
        return partial(function, interpret=True) if choice.interpret else function

    def module(self, choice: Choice) -> ModuleType:
        """Returns the chosen module."""
        return self._module(choice.implementation)

    def _module(self, name: str) -> ModuleType:
        # Imported when it is asked for: not every platform's jaxlib carries every compiler.
        return importlib.import_module(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.package}.{name}"
