"""`EvalConfig`: the data that a model is evaluated on while it is trained."""

from dataclasses import dataclass

from sdar_jax.data import DataConfig
from sdar_jax.errors import require


@dataclass(frozen=True)
class EvalConfig:
    """Held-out likelihood during training: the NELBO with its standard error, or the exact NLL of an AR model."""

    data: DataConfig
    """Held-out data; its first rows are used, the same each time."""
    every: int = 500
    """Steps between two; the last step is always evaluated."""
    rows: int = 64
    """How many rows, rounded up to whole batches."""
    samples: int = 4
    """Monte Carlo samples of the NELBO."""
    seed: int = 0
    """Fixes the masks."""

    def __post_init__(self):
        for name, least in (("every", 1), ("rows", 1), ("samples", 2), ("seed", 0)):
            value = getattr(self, name)
            require(name, value, value >= least, f"at least {least}")
