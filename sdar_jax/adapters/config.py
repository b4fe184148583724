"""`LoraConfig`: which low-rank matrices a model gets. Its fields are called as PEFT calls them."""

import math
from dataclasses import dataclass
from typing import Literal

from sdar_jax.errors import check_choices, require

# Modules that may be trained whole beside the low-rank matrices, by PEFT's names, and what they are called here.
SAVED_WHOLE = {"embed_tokens": "embedding", "lm_head": "head"}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685), and with an int8 base QLoRA. Everything else of the model is frozen.

    Raises:
        ConfigError: a value out of its range.
    """

    r: int = 16
    """The rank."""
    lora_alpha: float = 32.0
    """The low-rank product is scaled by lora_alpha / r."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Projections that get matrices, as the files of the model's family call them: q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj, down_proj in most, the last three those of experts too, of each its own; all-linear is all of a
    layer's, experts' too, but the router."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    modules_to_save: tuple[str, ...] = ()
    """What is trained whole as well, in float32: embed_tokens, lm_head."""
    base_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of the frozen weights. "auto": bfloat16 on GPU and TPU, else float32. int8: matmul weights of the layers as
    integers, one scale an output, the rest as "auto"."""

    def __post_init__(self):
        require("r", self.r, self.r >= 1, "a rank of at least 1")
        good = math.isfinite(self.lora_alpha) and self.lora_alpha > 0
        require("lora_alpha", self.lora_alpha, good, "a finite number above 0")
        several = bool(self.target_modules) and not isinstance(self.target_modules, str)
        require("target_modules", self.target_modules, several, 'a list such as ["all-linear"]')
        wrong = sorted(set(self.modules_to_save) - SAVED_WHOLE.keys())
        require("modules_to_save", wrong, not wrong, f"some of {', '.join(SAVED_WHOLE)}")
        check_choices(self)

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
