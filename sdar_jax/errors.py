"""Typed errors. Each message is one line that names the offending value and the fix."""

import dataclasses
import math
from typing import Any, get_args


class SdarError(ValueError):
    """Base of every error that bad input can cause; the commands print it as one line."""


class ConfigError(SdarError):
    """A configuration value that cannot be honoured."""


class CheckpointError(SdarError):
    """A model directory or training checkpoint that cannot be read, or that does not fit."""


class DataError(SdarError):
    """A training record, file or batch that cannot be used."""


class DecodingError(SdarError):
    """A prompt or a decoding request that cannot be served."""


class KernelError(SdarError):
    """A kernel that holds a chip and cannot be stopped."""


class TrainingError(SdarError):
    """A training run that cannot continue."""


class TrainingInterrupted(TrainingError):
    """A training run that a signal stopped, with all of its steps saved; started again, it resumes.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def require(name: str, value: object, good: bool, wanted: str) -> None:
    """Raises ConfigError, with what is wanted, unless the setting's value is good."""
    if not good:
        raise ConfigError(f"{name} is {value!r}; give {wanted}")


def check_choices(config: Any, prefix: str = "") -> None:
    """Raises ConfigError unless each field of a dataclass whose type is a `Literal` of names has one of them.

    Args:
        prefix: what the message puts before the field's name.
    """
    for field in dataclasses.fields(config):
        names = get_args(field.type)
        value = getattr(config, field.name)
        if names and isinstance(names[0], str) and value not in names:
            raise ConfigError(f"{prefix}{field.name} {value!r} is unknown; use one of {names}")


def is_int(value: Any) -> bool:
    """Returns whether a setting is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a setting is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
