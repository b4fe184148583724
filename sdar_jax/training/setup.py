"""From a config to what a run needs: the tokenizer, the model it starts with, its data."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from sdar_jax.chips import peak_flops
from sdar_jax.config import ModelConfig
from sdar_jax.conversion import to_diffusion
from sdar_jax.data import DataConfig, PackedDataset, make_dataset
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, stack_layers
from sdar_jax.pretrained import load_pretrained, model_directory
from sdar_jax.training.checkpoint import Checkpoints, Position
from sdar_jax.training.config import InitConfig, TrainConfig
from sdar_jax.training.reading import from_values
from sdar_jax.training.step import Rebuild, TrainState, initial_state, model_weights
from sdar_jax.training.trackers import Meter


class Setup(NamedTuple):
    """A run where it starts or goes on. rebuild: weights by name -> model, its layers stacked."""

    model: ModelConfig
    rebuild: Rebuild
    state: TrainState
    data: PackedDataset
    meter: Meter


def prepare(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, checkpoints: Checkpoints, position: Position | None
) -> Setup:
    """From the newest checkpoint, whose `position` is given, or from the beginning if that is None."""
    model_key, step_key = jax.random.split(jax.random.key(config.seed))
    if position is None:
        model = initial_model(config.model, tokenizer, model_key)
    else:
        # Only the structure of these random weights is used.
        model = Model(from_values(ModelConfig, position.model), model_key)
    weights, rebuild = model_weights(stack_layers(model))
    data = open_dataset(config.data, tokenizer, model.config)
    meter = Meter(model.config, config.peak_flops or peak_flops(jax.devices()[0].device_kind))
    if position is None:
        # Placed as a restored one is, or JAX would compile the step anew for a run that goes on.
        state = jax.device_put(initial_state(config, weights, step_key), jax.devices()[0])
        return Setup(model.config, rebuild, state, data, meter)
    like = jax.eval_shape(partial(initial_state, config), weights, step_key)
    for array in weights.values():
        array.delete()
    data.set_state(position.data)
    meter.set_state(position.meter)
    return Setup(model.config, rebuild, checkpoints.state(like), data, meter)


def initial_model(config: InitConfig, tokenizer: PreTrainedTokenizerBase, key: jax.Array) -> Model:
    """The model before the first step, float32: loaded or random, and converted where another objective is wanted.

    Raises:
        ConfigError: a conversion that is not possible, or a vocabulary that is smaller than the tokenizer's.
        CheckpointError: weights that cannot be read.
    """
    weights_key, mask_key = jax.random.split(key)
    if config.init_from is not None:
        model = load_pretrained(config.init_from, dtype=jnp.float32)
    else:
        shape = config.shape or ModelConfig.preset(config.preset or "")
        if shape.eos_token_id is None:
            shape = replace(shape, eos_token_id=tokenizer.eos_token_id)
        model = Model(shape, weights_key)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}; use the "
            "model's own tokenizer, or a larger vocab_size"
        )
    return _for_objective(model, config, len(tokenizer), mask_key)


def _for_objective(model: Model, config: InitConfig, tokenizer_size: int, key: jax.Array) -> Model:
    objective = config.objective or model.config.objective
    if objective != "autoregressive":
        return to_diffusion(
            model,
            objective=objective,
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            tokenizer_size=tokenizer_size,
            mask_init=config.mask_init,
            key=key,
            block_origin=config.block_origin,
        )
    if model.config.objective != "autoregressive":
        raise ConfigError(f"model.objective is {objective!r} and the weights are {model.config.objective}; keep theirs")
    for name in ("block_size", "block_origin", "mask_token_id"):
        if getattr(config, name) is not None:
            raise ConfigError(f"model.{name} is {getattr(config, name)!r} and the model autoregressive; leave it out")
    return model


def tokenizer_directory(config: InitConfig) -> Path:
    """Where the tokenizer lies on this machine; that of a hub id is fetched."""
    return Path(config.tokenizer) if config.tokenizer else model_directory(config.init_from or "")


def open_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> PackedDataset:
    """This process' share of the data, laid out for the model.

    Raises:
        ConfigError: neither model nor tokenizer has an end-of-text token, or as `make_dataset`. DataError: likewise.
    """
    eos = tokenizer.eos_token_id if model.eos_token_id is None else model.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            "neither model nor tokenizer has an end-of-text token; set eos_token_id in the model's config"
        )
    return make_dataset(
        config,
        tokenizer,
        block_size=model.block_size if model.objective == "block_diffusion" else None,
        eos_token_id=eos,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
