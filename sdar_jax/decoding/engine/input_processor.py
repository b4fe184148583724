"""From a prompt and a config to a request that an engine can serve, or to the error that says why it cannot."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.config import DecodingConfig
from sdar_jax.decoding.decode_state import SequenceShape, SequenceState, make_sequence
from sdar_jax.decoding.engine.request import Request
from sdar_jax.decoding.engine.sizes import EngineSizes
from sdar_jax.decoding.prompts import (
    Prompt,
    check_options,
    check_prompts,
    check_seed,
    checked_stop_strings,
    checked_stops,
    to_ids,
)
from sdar_jax.decoding.text import TextReader
from sdar_jax.errors import DecodingError
from sdar_jax.model.config import ModelConfig
from sdar_jax.paradigm import fills_masks


class InputProcessor:
    """Makes the requests of an engine.

    Args:
        model: whose requests these are.
        tokenizer: for prompts as text and for stop strings, or None.
        config: what sequences read.
        shape: of each sequence.
        sizes: of the engine.
        float_type: of log-probabilities.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Any,
        config: BufferConfig,
        shape: SequenceShape,
        sizes: EngineSizes,
        float_type: np.dtype,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._shape = shape
        self._sizes = sizes
        self._float_type = float_type
        self._rules = config.rules
        self._adding = threading.Lock()

    @property
    def rules(self) -> tuple[CommitRule, ...]:
        """The commit rules of all requests so far; a sequence's `SamplingParams.rule` indexes them."""
        return self._rules

    def request(
        self,
        prompt: Prompt,
        config: DecodingConfig,
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ) -> Request:
        """A request that is in no queue yet. Raises DecodingError for one that the engine cannot serve."""
        self.check_config(config)
        ids = to_ids(prompt, 0, self._tokenizer)
        check_prompts([ids], [config], self._model, max_new_tokens)
        check_seed(seed, 1)
        self._check_lengths(ids, max_new_tokens)
        stops = self._model.stop_token_ids
        if stop_token_ids is not None:
            stops = checked_stops(stop_token_ids, self._model)
        self._check_options(config, stops, max_new_tokens)
        strings = checked_stop_strings(stop_strings, self._tokenizer)
        sequence = self._sequence(ids, config, max_new_tokens, stops, seed)
        return Request(sequence, ids, strings, self.stop_reader(strings))

    def idle(self) -> SequenceState:
        """The state of an empty slot: a sequence that is done."""
        return self._sequence(
            np.zeros(0, np.int32), own_config(self._model, self._shape.block_size), 0, (), 0
        )

    def stop_reader(self, strings: Sequence[str]) -> TextReader | None:
        """Finds stop strings in an output as it grows."""
        return TextReader(self._tokenizer.decode, strings) if strings else None

    def _sequence(
        self,
        ids: np.ndarray,
        config: DecodingConfig,
        max_new_tokens: int,
        stops: Sequence[int],
        seed: int,
    ) -> SequenceState:
        return make_sequence(
            ids,
            config,
            self._shape,
            rule=self._rule(config),
            origin=self._config.paradigm.origin_of(len(ids)),
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            mask_token_id=self._model.mask_token_id or 0,
            seed=seed,
            float_type=self._float_type,
        )

    def _rule(self, config: DecodingConfig) -> tuple[int, CommitRule]:
        rule = config.strategy_for(self._model).rule
        with self._adding:
            if rule not in self._rules:
                self._rules = (*self._rules, rule)
        return self._rules.index(rule), rule

    def check_config(self, config: DecodingConfig) -> None:
        """Raises DecodingError for a config that reads the model in another way than this engine."""
        size, served = self._shape.block_size, self._config.paradigm
        if config.block_size not in (None, size):
            raise DecodingError(
                f"block_size is {config.block_size}, the engine's {size}; leave it None"
            )
        config = replace(config, block_size=size)
        asked = config.strategy_text(self._model)
        if config.strategy_for(self._model).fills_masks and not served.masks:
            raise DecodingError(
                f"{asked} is not for an autoregressive model's engine; use strategy='autoregressive'"
            )
        paradigm = config.paradigm(self._model)
        if not paradigm.cached:
            raise DecodingError(f"{asked} has no cache to share; use sdar_jax.generate")
        if paradigm != served:
            raise DecodingError(
                f"{asked} is not for a diffusion model's engine; use sdar_jax.generate for it"
            )
        config.resolve_block_size(self._model)

    def _check_lengths(self, ids: np.ndarray, max_new_tokens: int) -> None:
        in_one_piece = self._config.paradigm.bidirectional_prompt
        if in_one_piece and len(ids) > self._config.prefill_tokens:
            raise DecodingError(
                f"the prompt has {len(ids)} tokens and the model reads a prompt in one piece; give the engine "
                f"prefill_tokens of at least that, not {self._config.prefill_tokens}"
            )
        max_length, pages, page_size = self._sizes
        if len(ids) + max_new_tokens > max_length:
            limit = "pages" if max_length == pages * page_size else "max_length"
            raise DecodingError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}; this engine holds "
                f"{max_length} per request: ask for less, or give Engine(...) a larger {limit}"
            )

    def _check_options(
        self, config: DecodingConfig, stops: Sequence[int], max_new_tokens: int
    ) -> None:
        shape = self._shape
        if len(stops) > shape.stops:
            raise DecodingError(f"{len(stops)} stop tokens are given; use at most {shape.stops}")
        check_options(config, self._model, stops, self._tokenizer, max_new_tokens)
        if (count := len(config.suppress_token_ids)) > shape.suppressed:
            raise DecodingError(
                f"{count} suppress_token_ids are given; use at most {shape.suppressed}, or sdar_jax.generate"
            )
        if (asked := config.top_logprobs) > shape.alternatives:
            raise DecodingError(
                f"top_logprobs is {asked} and the engine's {shape.alternatives}; give Engine(top_logprobs={asked})"
            )


def own_config(model: ModelConfig, block_size: int | None) -> DecodingConfig:
    """The config that an engine of this model is made for: in blocks, whatever else the model could do."""
    return DecodingConfig(
        block_size, "low_confidence_dynamic" if fills_masks(model.objective) else None
    )


def float_type_of(dtype: Any) -> np.dtype:
    """Of log-probabilities of a model with such weights: what logits have."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))
