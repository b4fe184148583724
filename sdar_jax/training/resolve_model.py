"""Resolves the models that a recipe begins and ends with, from recipes alone: no weights are read, nothing is
fetched."""

import re
from dataclasses import replace
from pathlib import Path

from sdar_jax.errors import ConfigError
from sdar_jax.hf import read_model_config
from sdar_jax.model.config import PRESETS, ModelConfig
from sdar_jax.model.conversion import with_purpose
from sdar_jax.paradigm import fills_masks
from sdar_jax.training.config import InitConfig
from sdar_jax.training.config_io import read_config
from sdar_jax.training.recipes import recipe_names

# How a hub id's name begins, and the preset, if that is not its beginning.
_RELEASED = {
    r"(qwen3|sdar)-[\d.]+b(-a\d+b)?": None,
    r"llada-8b": None,
    r"dream-v0-(base|instruct)-7b": "dream-7b",
}


def starting_shape(config: InitConfig) -> ModelConfig:
    """Resolves the shape of the model that training starts from, before it is converted.

    Where `init_from` is set: of its config.json, if that is on this machine; of what the recipe X trains, for
    runs/X/model; or of the released model that a hub id names.

    Raises:
        ConfigError: none of these.
    """
    if config.init_from is None:
        return config.shape or ModelConfig.preset(config.preset or "")
    source = Path(config.init_from)
    if (source / "config.json").is_file():
        return read_model_config(source)
    recipe = "/".join(source.parts[1:-1])
    if source == Path("runs", recipe, "model") and recipe in recipe_names():
        return trained_shape(read_config(recipe).final_model)
    for pattern, preset in _RELEASED.items():
        begins = re.match(pattern, source.name.lower())
        if begins is not None and (preset or begins[0]) in PRESETS:
            return PRESETS[preset or begins[0]]
    raise ConfigError(
        f"model.init_from {config.init_from!r} is not on this machine, and no recipe or name tells its shape; "
        "give a directory, or the hub id of a Qwen3, SDAR, LLaDA-8B or Dream-7B model"
    )


def trained_shape(config: InitConfig) -> ModelConfig:
    """Resolves the shape of the model that training ends with. Raises ConfigError as `starting_shape`.

    Where the mask's id is not known before the tokenizer is, it is the vocabulary's last.
    """
    start = starting_shape(config)
    objective = config.objective or start.objective
    if not fills_masks(objective):
        return start
    known = (config.mask_token_id, start.mask_token_id, start.vocab_size - 1)
    return replace(
        with_purpose(start, objective, **config.paradigm_values),
        tie_embeddings=False,
        mask_token_id=next(mask for mask in known if mask is not None),
    )
