"""`EvalConfig`: what a model is evaluated on while it is trained."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sdar_jax.data import DataConfig
from sdar_jax.decoding.config import DecodingConfig
from sdar_jax.errors import ConfigError, require

# Held-out numbers, of which less is better.
LIKELIHOODS = ("nelbo", "nll")
By = Literal["source", "position"]


def is_likelihood(name: str) -> bool:
    """Returns whether a number's name is of a held-out likelihood, or of a part of one as "nelbo/web"."""
    return name.partition("/")[0].removesuffix("_position") in LIKELIHOODS


@dataclass(frozen=True)
class EvalConfig:
    """Held-out likelihood during training (the NELBO with its standard error, or the exact NLL of an AR model), and
    scores on benchmarks."""

    data: DataConfig | None = None
    """Held-out data; its first rows are used, the same each time."""
    every: int = 500
    """Steps between two; the last step is always evaluated."""
    rows: int = 64
    """How many rows, rounded up to whole batches."""
    samples: int = 4
    """Monte Carlo samples of the NELBO."""
    seed: int = 0
    """Fixes the masks."""
    by: tuple[By, ...] = ()
    """The likelihood by "source" of `data` as well, and by "position" in the block (0 to 3, then 4-7, 8-15, ...)."""
    tasks: tuple[str, ...] = ()
    """Benchmarks to decode, each as NAME or NAME=PATH, as for `sdar-jax evaluate`; none that runs programs."""
    limit: int = 32
    """Of each the first so many problems."""
    max_new_tokens: int = 256
    """Of an answer at most."""
    batch_size: int = 8
    """Problems decoded at once."""
    plain: bool = False
    """Problems as text, for a tokenizer without a chat template."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """Fields of `DecodingConfig`, as {"confidence_threshold": 0.9}."""
    best: str | None = None
    """Keep the model of the best evaluation by this number, in run_dir/best: "nelbo", "nll", or a task's name."""

    def __post_init__(self):
        for name, least in (("every", 1), ("rows", 1), ("samples", 2), ("seed", 0)):
            value = getattr(self, name)
            require(name, value, value >= least, f"at least {least}")
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(name, value, value >= 1, "at least 1")
        if self.data is None and not self.tasks:
            raise ConfigError(
                "eval has neither data nor tasks; give one of them, or leave eval out"
            )
        for each in self.by:
            require("by", each, each in get_args(By), f"any of {', '.join(get_args(By))}")
        if self.by and self.data is None:
            raise ConfigError(
                f"by is {', '.join(self.by)} and there is no data to score; give data"
            )
        known = [each.name for each in dataclasses.fields(DecodingConfig)]
        if unknown := set(self.decoding) - set(known):
            raise ConfigError(
                f"decoding has {min(unknown)!r}, which is no field of it; choose from {', '.join(known)}"
            )
        DecodingConfig(**self.decoding)
