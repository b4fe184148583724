"""`infill`: the masks of given canvases, filled block by block."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdar_jax.decoding.completions import completion
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.decode_state import first_mask, sequence_at
from sdar_jax.decoding.generate import decode_batch, one_each
from sdar_jax.decoding.prompts import (
    Prompt,
    check_ids,
    check_options,
    check_seed,
    check_slots,
    checked_stops,
    to_ids,
)
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model
from sdar_jax.paradigm import Paradigm, fills_masks

_DEFAULT = DecodingConfig()


def infill(
    model: Model,
    canvases: Sequence[Prompt],
    config: DecodingConfig | Sequence[DecodingConfig] = _DEFAULT,
    *,
    stop_token_ids: Sequence[int] | None = (),
    tokenizer: Any = None,
    seed: int = 0,
    window_slots: int = 2,
) -> list[Completion]:
    """Fills every mask of each canvas, blocks from left to right; what is given stays as it is.

    With "semi_autoregressive" a mask is filled with all of the canvas in sight. A block-diffusion model fills it from
    what precedes it and from its own block: it cannot see what follows, and a warning says so where something does. A
    prompt with masks behind it alone gives what `generate` gives.

    Args:
        canvases: token id lists with the model's mask token wherever a token is wanted, or texts (with `tokenizer`).
        config: one for all, or one for each canvas, of one block size.
        stop_token_ids: a canvas ends before the first of these that fills a mask behind the last token that is given;
            `min_new_tokens` counts from there, too. () is none, so that all masks are filled; None is the model's own
            list.
        tokenizer: a Hugging Face tokenizer; completions then have `text`, and ids that it does not have are never
            proposed.
        seed: canvas i samples with seed + i.
        window_slots: K, as for `generate`.

    Returns:
        One `Completion` per canvas, in order. `tokens` is the whole canvas, filled; of what was given, `logprobs` are
        0, `steps` -1, and `top_logprobs` empty.

    Raises:
        DecodingError: an autoregressive model, or what `generate` refuses.
    """
    if isinstance(canvases, str):
        raise DecodingError(f"canvases is one text, {canvases[:20]!r}; give a list of canvases")
    if not fills_masks(model.config.objective):
        raise DecodingError(
            "infill needs a diffusion model and this one is autoregressive; see sdar_jax.to_diffusion"
        )
    configs = one_each(config, len(canvases), model.config)
    if not all(each.strategy_for(model.config).fills_masks for each in configs):
        raise DecodingError(
            "strategy 'autoregressive' fills no masks; use strategy='low_confidence_dynamic'"
        )
    ids = [to_ids(canvas, i, tokenizer) for i, canvas in enumerate(canvases)]
    for i, canvas in enumerate(ids):
        check_ids(canvas, i, model.config, 0)
    check_seed(seed, len(ids))
    check_slots(window_slots)
    stops = (
        model.config.stop_token_ids
        if stop_token_ids is None
        else checked_stops(stop_token_ids, model.config)
    )
    for each in {*configs}:
        check_options(each, model.config, stops, tokenizer, None)
    if not ids:
        return []
    masks = [canvas == model.config.mask_token_id for canvas in ids]
    paradigm = configs[0].paradigm(model.config)
    for i, masked in enumerate(masks):
        if paradigm.shifted and masked[:1].any():
            raise DecodingError(
                f"prompt {i} begins with a mask and each token is predicted by the one before it; give its first token"
            )
    if paradigm.cached:
        _warn_of_what_follows(masks, paradigm, configs[0].resolve_block_size(model.config))
    behind = [_masks_at_end(masked) for masked in masks]
    heads = [canvas[: len(canvas) - count] for canvas, count in zip(ids, behind, strict=True)]
    options = {
        "stop_ids": stops,
        "seed": seed,
        "window_slots": window_slots,
        "tokenizer": tokenizer,
    }
    batch = decode_batch(model, heads, configs, max_new_tokens=behind, **options)
    return [completion(sequence_at(batch, i), tokenizer, start=0) for i in range(len(ids))]


def _masks_at_end(masked: np.ndarray) -> int:
    """How many masks there are behind the last token that is given."""
    return len(masked) if masked.all() else int((~masked[::-1]).argmax())


def _warn_of_what_follows(masks: Sequence[np.ndarray], paradigm: Paradigm, block_size: int) -> None:
    if any(_unseen(masked, paradigm, block_size) for masked in masks):
        warnings.warn(
            "a block-diffusion model fills a mask from what precedes it and its own block; later blocks are kept as "
            "they are, and not seen",
            stacklevel=3,
        )


def _unseen(masked: np.ndarray, paradigm: Paradigm, block_size: int) -> bool:
    """Whether something is given in a later block than that of the first mask."""
    first = first_mask(~masked)
    origin = paradigm.origin_of(first)
    end = origin + ((first - origin) // block_size + 1) * block_size
    return bool((~masked[end:]).any())
