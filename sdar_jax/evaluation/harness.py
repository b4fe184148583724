"""A model for lm-evaluation-harness (0.4.13 and later), which finds it by its entry point, or is given the object.

    lm-eval run --model sdar_jax --model_args pretrained=DIR --tasks gsm8k_cot --apply_chat_template
    lm_eval.simple_evaluate(model=HarnessModel("DIR", confidence_threshold=0.9), tasks=["gsm8k_cot"])

The first needs a release of the harness with plugins; the second works with any. Answers are decoded by the engine.
Likelihoods are the diffusion bound (Eq. 5), a Monte Carlo estimate of the same draws each time; with
`likelihood_block_size=1` they are the chain rule's exact value of the model read one token at a time, and of an
autoregressive model they are exact.
"""

import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from lm_eval import utils as harness_utils  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
except ImportError as error:  # pragma: no cover (tests of it have an environment of their own)
    raise ImportError(
        "sdar_jax.evaluation.harness needs lm-eval: pip install 'lm-eval>=0.4.13'"
    ) from error

from sdar_jax.arithmetic import round_up
from sdar_jax.data.tokenizer import Encoder, load_tokenizer
from sdar_jax.decoding import Completion, DecodingConfig, Engine, generate
from sdar_jax.decoding.speed import speed
from sdar_jax.devices.sharding import tensor_mesh
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.likelihood import log_likelihoods
from sdar_jax.hf import load_pretrained
from sdar_jax.hf.released import model_directory

log = logging.getLogger(__name__)

# Likelihoods are computed at multiples of it, and at no more than two lengths from each power of two to the next.
_LENGTHS = 64
_DECODING = {field.name: field for field in dataclasses.fields(DecodingConfig)}


class HarnessModel(TemplateLM):
    """A Hugging Face directory or hub id, as the harness asks for it.

    Args:
        pretrained: the directory, or the hub id.
        dtype: of the weights: auto, int8, or a name.
        tensor: devices that share heads, feed-forward width and vocabulary; -1 is all that are here.
        batch_size: requests decoded or scored at once.
        max_gen_toks: new tokens at most, where a task does not say.
        samples: Monte Carlo samples of the bound.
        window_slots: K, blocks of a request that one forward may read, as of `Engine`.
        likelihood_block_size: block size of likelihoods; the model's own if None.
        decoding: fields of `DecodingConfig`, such as strategy or confidence_threshold.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        tensor: int = 1,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        samples: int = 32,
        window_slots: int = 2,
        likelihood_block_size: int | None = None,
        **decoding: Any,
    ):
        super().__init__()
        if unknown := set(decoding) - set(_DECODING):
            raise ConfigError(
                f"{min(unknown)}={decoding[min(unknown)]!r} is no argument of this model; fields of DecodingConfig are"
                f" {', '.join(_DECODING)}"
            )
        directory = model_directory(pretrained)
        self.model = load_pretrained(
            directory,
            dtype=dtype,
            block_size=decoding.get("block_size"),
            mesh=tensor_mesh(int(tensor)),
        )
        self.tokenizer = load_tokenizer(directory)
        self.config = DecodingConfig(**decoding)
        self.batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self._name = pretrained
        self._encode = Encoder(self.tokenizer)
        self._samples = samples
        self._window_slots = int(window_slots)
        self._likelihood_block = likelihood_block_size
        self._engine: Engine | None = None

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        eos = self.model.config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        assert isinstance(eos, int)
        return eos

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; with what the tokenizer sets before every text only where that is asked for."""
        ids = self._encode(string)
        return [*self._encode.leading, *ids] if add_special_tokens else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation behind its context, nats, and whether greedy decoding gives it."""
        cut = [(context[-(self.max_length - len(rest)) :], rest) for _, context, rest in requests]
        sums = self._log_likelihoods([(context + rest, len(rest)) for context, rest in cut])
        greedy = DecodingConfig(block_size=self.config.block_size)
        decoded = self._decode(
            [(context, greedy, len(rest), ()) for context, rest in cut], stop_token_ids=()
        )
        return [
            (total, completion.tokens == list(rest))
            for total, completion, (_, rest) in zip(sums, decoded, cut, strict=True)
        ]

    def _log_likelihoods(self, asked: Sequence[tuple[list[int], int]]) -> list[float]:
        """log p of the last tokens of each (tokens, how many), nats.

        Shorter ones are scored first, in batches that are always full, in an order that is theirs and not the caller's.
        """
        found = [0.0] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: (len(asked[i][0]), asked[i]))
        for chosen in itertools.batched(order, self.batch_size):
            sums = self._scored([asked[i] for i in chosen])
            for i, total in zip(chosen, sums, strict=False):
                found[i] = float(total)
        return found

    def _scored(self, asked: Sequence[tuple[list[int], int]]) -> np.ndarray:
        """log p of the requests of one batch, whose rows past the last one are empty."""
        longest = max(len(ids) for ids, _ in asked)
        step = max(_LENGTHS, 1 << max(longest.bit_length() - 2, 0))
        length = round_up(round_up(longest, step), self.model.config.paradigm.block_size or 1)
        tokens, segment_ids = np.zeros((2, self.batch_size, length), np.int32)
        counted = np.zeros((self.batch_size, length), bool)
        for row, (ids, last) in enumerate(asked):
            tokens[row, : len(ids)] = ids
            segment_ids[row, : len(ids)] = 1
            counted[row, len(ids) - last : len(ids)] = True
        return log_likelihoods(
            self.model,
            tokens,
            segment_ids=segment_ids,
            loss_mask=counted,
            block_size=self._likelihood_block or self.model.config.paradigm.block_size,
            samples=self._samples,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, nats; of one that is longer than the context in windows."""
        texts = []
        for (text,) in (request.args for request in requests):
            windows = harness_utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = map(harness_utils.make_disjoint_window, windows)
            texts.append([([*context, *rest], len(rest)) for context, rest in pairs])
        scores = iter(self._log_likelihoods(list(itertools.chain.from_iterable(texts))))
        return [sum(itertools.islice(scores, len(windows))) for windows in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the task's stop strings."""
        asked = []
        for text, options in (request.args for request in requests):
            config, new, until = self._options(dict(options))
            context = self.tok_encode(text, add_special_tokens=True)
            room = self.max_length - new
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks={new} leaves no room in the context of {self.max_length}; give less"
                )
            if len(context) > room:
                log.warning("a prompt of %d tokens is cut on the left to %d", len(context), room)
            asked.append((context[-room:], config, new, until))
        started = time.perf_counter()
        completions = self._decode(asked)
        print(speed(completions, time.perf_counter() - started, self.batch_size), file=sys.stderr)
        return [completion.text or "" for completion in completions]

    def _options(self, options: dict[str, Any]) -> tuple[DecodingConfig, int, tuple[str, ...]]:
        until = options.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        new = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
        sampled = options.pop("do_sample", bool(options.get("temperature")))
        changes = {"temperature": float(options.pop("temperature", 1.0)) if sampled else 0.0}
        for name in ("top_p", "top_k"):
            if sampled and options.get(name) is not None:
                changes[name] = options[name]
            options.pop(name, None)
        if options:
            log.warning("generation arguments that are not read: %s", ", ".join(options))
        return (
            dataclasses.replace(self.config, **changes),
            new,
            tuple(text for text in until if text),
        )

    def _decode(
        self,
        asked: Sequence[tuple[list[int], DecodingConfig, int, tuple[str, ...]]],
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Decodes (prompt, config, new tokens, stop strings), in order."""
        if not self.config.paradigm(self.model.config).cached:
            return [
                generate(
                    self.model,
                    [ids],
                    config,
                    max_new_tokens=new,
                    stop_token_ids=stop_token_ids,
                    stop_strings=stops,
                    tokenizer=self.tokenizer,
                )[0]
                for ids, config, new, stops in asked
            ]
        engine = self._engine_for(max((len(ids) + new for ids, _, new, _ in asked), default=1))
        found: list[Completion] = []
        waiting: list[int] = []
        for ids, config, new, stops in asked:
            if len(waiting) == 4 * self.batch_size:
                found.append(engine.result(waiting.pop(0)))
            options = {"stop_token_ids": stop_token_ids, "stop_strings": stops}
            waiting.append(engine.submit(ids, config, max_new_tokens=new, **options))
        return found + [engine.result(request) for request in waiting]

    def _engine_for(self, length: int) -> Engine:
        if self._engine is None or self._engine.max_length < length:
            self._engine = None  # Its pages make room.
            self._engine = Engine(
                self.model,
                tokenizer=self.tokenizer,
                batch_slots=self.batch_size,
                window_slots=self._window_slots,
                max_length=min(2 * length, self.max_length),
                block_size=self.config.block_size,
                strategies=() if self.config.strategy is None else (self.config.strategy,),
            )
        return self._engine
