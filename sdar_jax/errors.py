"""Typed errors. Each message is one line that names the offending value and the fix."""

import math
from typing import Any


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


class TrainingError(SdarError):
    """A training run that cannot go on."""


class TrainingInterrupted(TrainingError):
    """A training run that a signal stopped, with all of its steps saved; started again, it goes on.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def is_int(value: Any) -> bool:
    """Whether a setting is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
