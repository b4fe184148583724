"""`to_diffusion`: makes an autoregressive model ready to be trained as a diffusion model."""

from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sdar_jax.errors import ConfigError
from sdar_jax.model import Model
from sdar_jax.model.config import BlockOrigin, ModelConfig
from sdar_jax.paradigm import DiffusionObjective, fills_masks, has_blocks

MaskInit = Literal["mean", "normal", "zeros", "keep"]


def to_diffusion(
    model: Model,
    *,
    objective: DiffusionObjective = "block_diffusion",
    block_size: int | None = None,
    mask_token_id: int | None = None,
    tokenizer_size: int | None = None,
    mask_init: MaskInit = "mean",
    key: jax.Array | None = None,
    block_origin: BlockOrigin | None = None,
    shifted: bool | None = None,
    causal_clean: bool | None = None,
    bidirectional_prompt: bool | None = None,
) -> Model:
    """Unties the model's output head, gives it a row for the mask token, and a config that says what it is to be.

    Layers are shared with the given model, stacked or not. A model that is a diffusion model already keeps its weights
    and its mask, and takes the objective and what belongs to it (block size, origin and the like) alone.

    Args:
        block_size: S; block diffusion needs one, here or in the model's config.
        mask_token_id: the mask's row. If None, `tokenizer_size` is (151669 in Qwen3, as in SDAR). A row is appended, to
            embedding and head, where that is just past the last one.
        tokenizer_size: the tokenizer's largest id plus one, which is not `len(tokenizer)` where its ids have gaps; rows
            from there on do not enter the mean.
        mask_init: the mask's embedding: "mean" of the tokenizer's rows; "normal" of scale `initializer_range`;
            "zeros"; or "keep", the spare row as it is, which is what SDAR's own conversion of Qwen3 amounts to.
        key: for "normal".
        block_origin, shifted, causal_clean, bidirectional_prompt: as in `Paradigm`; the model's own if None.

    The mask's column of the head stays as it is, as it is never predicted; an appended one is the mean column.

    Raises:
        ConfigError: no room for the mask, or no way to tell where it goes; no block size; an unknown choice; values of
            the paradigm that contradict each other.
    """
    config = with_purpose(
        model.config,
        objective,
        block_size=block_size,
        block_origin=block_origin,
        shifted=shifted,
        causal_clean=causal_clean,
        bidirectional_prompt=bidirectional_prompt,
    )
    if fills_masks(model.config.objective):
        return _with(
            model, replace(config, mask_token_id=_own_mask(config.mask_token_id, mask_token_id))
        )
    mask = _mask_row(config, mask_token_id, tokenizer_size)
    initial = _initial(mask_init, model.embedding[:tokenizer_size], config, mask, key)
    embedding = model.embedding[...]
    head = embedding if model.head is None else model.head[...]
    if mask == config.vocab_size:
        embedding = jnp.concatenate([embedding, embedding[:1]])
        head = jnp.concatenate([head, _mean(head[:tokenizer_size])[None]])
    if initial is not None:
        embedding = embedding.at[mask].set(initial)
    config = replace(config, vocab_size=len(embedding), tie_embeddings=False, mask_token_id=mask)
    return _with(model, config, embedding=nnx.Param(embedding), head=nnx.Param(head))


def with_purpose(config: ModelConfig, objective: str, **values: Any) -> ModelConfig:
    """Makes the config of a model that is to fill masks.

    Args:
        values: block_size, block_origin, shifted, causal_clean and bidirectional_prompt; where None, the model's own.

    Raises:
        ConfigError: no diffusion, block diffusion without a block size, or values that contradict each other.
    """
    if not fills_masks(objective):
        raise ConfigError(
            f"objective {objective!r} is no diffusion; use 'block_diffusion' or 'masked_diffusion'"
        )
    given = {name: value for name, value in values.items() if value is not None}
    new = replace(config, objective=objective, **given)
    if has_blocks(objective) and new.block_size is None:
        raise ConfigError(
            "block_size is None and the model has none; block diffusion needs one, such as 4"
        )
    return new


def _own_mask(own: int | None, given: int | None) -> int:
    if own is None and given is None:
        raise ConfigError(
            "mask_token_id is None and this diffusion model has none; give the one it was trained with"
        )
    if own is not None and given not in (None, own):
        raise ConfigError(f"mask_token_id {given} is not the model's own, {own}; leave it out")
    return next(value for value in (own, given) if value is not None)


def _mask_row(config: ModelConfig, mask_token_id: int | None, tokenizer_size: int | None) -> int:
    size = config.vocab_size
    if tokenizer_size is not None and not 0 < tokenizer_size <= size:
        raise ConfigError(
            f"tokenizer_size is {tokenizer_size} and the model has {size} rows; give the tokenizer's largest id plus "
            f"one, at most {size}"
        )
    known = (mask_token_id, config.mask_token_id, tokenizer_size)
    mask = next((value for value in known if value is not None), None)
    if mask is None:
        raise ConfigError(
            "neither mask_token_id nor tokenizer_size is given; the mask needs a row of its own"
        )
    if not 0 <= mask <= size:
        raise ConfigError(
            f"mask_token_id is {mask}; give a spare id below {size}, or {size} to append a row"
        )
    return mask


def _initial(
    mask_init: str, used: Float[Array, "V D"], config: ModelConfig, mask: int, key: jax.Array | None
) -> Float[Array, " D"] | None:
    """Makes the mask's embedding; None keeps the row."""
    if mask_init == "mean":
        return _mean(used)
    if mask_init == "zeros":
        return jnp.zeros_like(used[0])
    if mask_init == "normal" and key is not None:
        return config.initializer_range * jax.random.normal(key, used.shape[1:], used.dtype)
    if mask_init == "normal":
        raise ConfigError("mask_init 'normal' needs a random key; give key=jax.random.key(...)")
    if mask_init != "keep":
        raise ConfigError(f"mask_init {mask_init!r} is unknown; use one of {get_args(MaskInit)}")
    if mask == config.vocab_size:
        raise ConfigError("mask_init 'keep' has no row to keep, as none is spare; use 'mean'")
    return None


def _mean(rows: Array) -> Array:
    return jnp.mean(rows, axis=0, dtype=jnp.promote_types(rows.dtype, jnp.float32)).astype(
        rows.dtype
    )


def _with(model: Model, config: ModelConfig, **weights: nnx.Param) -> Model:
    new = jax.tree.map(lambda leaf: leaf, model)
    new.config = config
    for name, weight in weights.items():
        setattr(new, name, nnx.data(weight))
    return new
