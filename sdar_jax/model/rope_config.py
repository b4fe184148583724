"""`RopeConfig`: the rotary embedding of a model, read from and written to the fields of config.json."""

import dataclasses
import math
from typing import Any, Literal

from sdar_jax.errors import ConfigError, is_int, is_number
from sdar_jax.model.hf_fields import ROPE_HARMLESS, is_harmless, warn_once

RopeType = Literal["default", "linear", "llama3", "yarn"]

# What Hugging Face calls each RoPE parameter is what we call it, so one list serves reading and writing.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# A type that is named does not use the parameters of another, which are left behind when a type is changed.
_ROPE_UNUSED = {**{name: () for names in ROPE_FIELDS.values() for name in names}, **ROPE_HARMLESS}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and how its frequencies are scaled, with Hugging Face's parameter names.

    `partial_rotary_factor` is the share of each head's dimensions, the first ones, that are rotated.
    """

    theta: float = 1_000_000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self):
        if self.rope_type not in ROPE_FIELDS:
            raise ConfigError(
                f"rope_type {self.rope_type!r} is not supported; use one of {list(ROPE_FIELDS)}"
            )
        if self.rope_type == "llama3" and self.original_max_position_embeddings is None:
            raise ConfigError(
                "rope_type 'llama3' needs original_max_position_embeddings; add it to rope_scaling"
            )
        for name in (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        ):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"rope {name} is {getattr(self, name)!r}; give a positive number")
        if self.attention_factor is not None and not is_number(self.attention_factor):
            raise ConfigError(
                f"rope attention_factor is {self.attention_factor!r}; give a number, or leave it out"
            )
        original = self.original_max_position_embeddings
        if original is not None and not (is_int(original) and original > 0):
            raise ConfigError(
                f"rope original_max_position_embeddings is {original!r}; give a positive integer"
            )
        part = self.partial_rotary_factor
        if not is_number(part) or not 0 < part <= 1:
            raise ConfigError(
                f"rope partial_rotary_factor is {part!r}; give a number above 0, and 1 at most"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            factors = f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            raise ConfigError(f"rope {factors}; give a lower one")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "RopeConfig":
        """Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

        Where both are there, `rope_scaling` was added by hand and is what counts, as in transformers 5.
        """
        written = _rope_table(config, "rope_parameters")
        added = _rope_table(config, "rope_scaling")
        scaling = added or written
        rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
        if added and written.get("rope_type", "default") not in ("default", rope_type):
            warn_once(
                "config.json: rope_scaling is read and rope_parameters, which says otherwise, is ignored"
            )
        thetas = (
            scaling.get("rope_theta"),
            config.get("rope_theta"),
            written.get("rope_theta"),
            10_000.0,
        )
        theta = next(theta for theta in thetas if theta is not None)
        # Files write 1000000, without a point.
        theta = float(theta) if is_int(theta) else theta
        if rope_type not in ROPE_FIELDS:
            raise ConfigError(
                f"rope_type {rope_type!r} is not supported; use one of {list(ROPE_FIELDS)}"
            )
        given = {
            name: scaling[name] for name in ROPE_FIELDS[rope_type] if scaling.get(name) is not None
        }
        if rope_type == "yarn":
            scaling, given = _with_mscale(scaling, given)
        unread = {
            name
            for name in set(scaling) - set(given)
            if not is_harmless(name, scaling[name], _ROPE_UNUSED)
        }
        if unread:
            raise ConfigError(
                f"rope_scaling of type {rope_type!r} has unsupported fields {sorted(unread)}; remove them, or give the "
                "rope_type that they belong to"
            )
        lacking = [name for name in _ROPE_REQUIRED.get(rope_type, ()) if name not in given]
        if lacking:
            raise ConfigError(
                f"rope_scaling of type {rope_type!r} lacks {', '.join(lacking)}; add what the model had"
            )
        part = config.get("partial_rotary_factor")
        part = 1.0 if part is None else part
        # Files write 1, without a point.
        part = float(part) if is_int(part) else part
        return cls(theta=theta, rope_type=rope_type, partial_rotary_factor=part, **given)

    def to_hf(self) -> dict[str, Any]:
        """Writes the classic keys, which every transformers version reads."""
        whole = self.partial_rotary_factor == 1
        table = {} if whole else {"partial_rotary_factor": self.partial_rotary_factor}
        table["rope_theta"] = self.theta
        if self.rope_type == "default":
            return table
        values = {name: getattr(self, name) for name in ROPE_FIELDS[self.rope_type]}
        given = {name: value for name, value in values.items() if value is not None}
        return {**table, "rope_scaling": {"rope_type": self.rope_type, **given}}

    def rotary_dim(self, head_dim: int) -> int:
        """Counts the dimensions of a head that are rotated, the first ones."""
        return int(head_dim * self.partial_rotary_factor)


def _rope_table(config: dict[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise ConfigError(
            f"{name} is {table!r}; give an object such as {{'rope_type': 'yarn', 'factor': 4.0}}"
        )
    # transformers 5 may write a table for each kind of attention; other kinds are refused by layer_types.
    return table.get("full_attention", table)


def _with_mscale(
    scaling: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Derives YaRN's attention factor from DeepSeek's two scales, where both are there, and takes these out."""
    names = ("mscale", "mscale_all_dim")
    scales = [scaling.get(name, 0) for name in names]
    factor = given.get("factor", 0)
    if not all(is_number(value) and value > 0 for value in (*scales, factor)):
        return scaling, given
    numerator, denominator = (0.1 * scale * math.log(max(factor, 1)) + 1.0 for scale in scales)
    rest = {name: value for name, value in scaling.items() if name not in names}
    return rest, {"attention_factor": numerator / denominator, **given}
