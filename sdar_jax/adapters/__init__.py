"""LoRA: a frozen base, and low-rank matrices that are trained; PEFT's files in and out."""

from sdar_jax.adapters.config import LoraConfig
from sdar_jax.adapters.lora import add, base_dtype, frozen_base, is_trained, merge
from sdar_jax.adapters.peft_files import load, save

__all__ = ["LoraConfig", "add", "base_dtype", "frozen_base", "is_trained", "load", "merge", "save"]
