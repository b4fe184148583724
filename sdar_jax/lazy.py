"""Names that a package imports when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def importer(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes a package's `__getattr__`.

    Args:
        package: its `__name__`.
        homes: of each name the submodule that has it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        # Found there from now on, without a call.
        setattr(sys.modules[package], name, value)
        return value

    return get
