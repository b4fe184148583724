"""The model that a run starts from: read or random, and converted where another objective is wanted."""

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from sdar_jax.data.tokenizer import TokenIds, token_ids
from sdar_jax.errors import ConfigError
from sdar_jax.hf.pretrained import load_pretrained
from sdar_jax.hf.released import model_directory, read_model_config
from sdar_jax.model import Model
from sdar_jax.model.axes import shardings
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.conversion import to_diffusion
from sdar_jax.paradigm import fills_masks
from sdar_jax.training.config import InitConfig

log = logging.getLogger(__name__)


def first_shape(config: InitConfig, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Reads the shape of the model that training starts from, before it is converted."""
    if config.init_from is not None:
        return read_model_config(config.init_from, **_told(config))
    shape = config.shape or ModelConfig.preset(config.preset or "")
    if shape.eos_token_id is None:
        shape = replace(shape, eos_token_id=tokenizer.eos_token_id)
    return shape


def _told(config: InitConfig) -> dict[str, int | None]:
    """Returns what the run's config says in place of the files of a model that fills masks already."""
    own = ModelConfig.from_hf(model_directory(config.init_from or ""))
    names = ("block_size", "mask_token_id") if fills_masks(own.objective) else ()
    return {name: getattr(config, name) for name in names}


def initial_model(
    config: InitConfig,
    tokenizer: PreTrainedTokenizerBase,
    key: jax.Array,
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """Makes the model before the first step: loaded or random, converted where another objective is wanted.

    Its weights are made or read where they belong: no device, and of loaded ones no host, holds all of them.

    Raises:
        ConfigError: a conversion that is not possible, or a tokenizer with ids past the vocabulary.
        CheckpointError: weights that cannot be read.
    """
    weights_key, mask_key = jax.random.split(key)
    shape = first_shape(config, tokenizer)
    ids = token_ids(tokenizer)
    check_vocabulary(config, shape, tokenizer, ids)
    if config.init_from is not None:
        told = _told(config)
        model = load_pretrained(config.init_from, dtype=dtype, mesh=mesh, **told)
    else:
        make = partial(Model, shape, dtype=dtype, stacked=True)
        places = shardings(jax.eval_shape(make, weights_key), mesh)
        model = jax.jit(make, out_shardings=places)(weights_key)
    model = _for_objective(model, config, ids, mask_key)
    if model.config.paradigm.masks and model.config.mask_token_id is not None:
        _check_mask(model.config, model.config.mask_token_id, tokenizer)
    return model


def check_vocabulary(
    config: InitConfig, shape: ModelConfig, tokenizer: PreTrainedTokenizerBase, ids: TokenIds
):
    """Raises ConfigError if the tokenizer has an id that the model has no row for, before any weight is read."""
    # For a mask token just past the last row, conversion appends one.
    last = ids.size - 1 if ids.mask == shape.vocab_size else ids.largest
    if last < shape.vocab_size:
        return
    fix = "resize its embeddings to as many rows, or give the tokenizer it was trained with as model.tokenizer"
    if config.init_from is None:
        fix = f"give model.shape a vocab_size of {last + 1} or more"
    elif config.tokenizer is not None:
        fix = "leave model.tokenizer out, which takes the model's own"
    raise ConfigError(past_the_vocabulary(last, tokenizer, shape) + fix)


def past_the_vocabulary(last: int, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> str:
    token = tokenizer.convert_ids_to_tokens(last)
    return f"the tokenizer has ids up to {last} ({token!r}), the model's vocabulary ends at {model.vocab_size - 1}; "


def _for_objective(model: Model, config: InitConfig, ids: TokenIds, key: jax.Array) -> Model:
    objective = config.objective or model.config.objective
    if fills_masks(objective):
        declared = ids.mask if model.config.mask_token_id is None else None
        return to_diffusion(
            model,
            objective=objective,
            mask_token_id=declared if config.mask_token_id is None else config.mask_token_id,
            tokenizer_size=ids.size,
            mask_init=config.mask_init,
            key=key,
            **config.paradigm_values,
        )
    if fills_masks(model.config.objective):
        raise ConfigError(
            f"model.objective is {objective!r} and the weights are {model.config.objective}; keep theirs"
        )
    for name, value in (config.paradigm_values | {"mask_token_id": config.mask_token_id}).items():
        if value is not None:
            raise ConfigError(
                f"model.{name} is {value!r} and the model autoregressive; leave it out"
            )
    return model


def _check_mask(model: ModelConfig, mask: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError if the mask ends texts too, and warns if it is a token that ordinary text can hold."""
    eos = tokenizer.eos_token_id if model.eos_token_id is None else model.eos_token_id
    if mask == eos:
        raise ConfigError(
            f"the mask's id {mask} is the end-of-text token's; set model.mask_token_id to a spare id"
        )
    token = tokenizer.convert_ids_to_tokens(mask)
    added = tokenizer.added_tokens_decoder.get(mask)
    if token is not None and (added is None or not added.special):
        log.warning(
            "mask_token_id %d is the tokenizer's %r, which texts may hold; a spare id is safe",
            mask,
            token,
        )
