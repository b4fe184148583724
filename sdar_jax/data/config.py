"""What to read and how to lay it out in rows. Values that contradict each other raise ConfigError at once."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from sdar_jax.data.conversation import wrong_variable
from sdar_jax.errors import ConfigError


@dataclass(frozen=True)
class SourceConfig:
    """One set of files."""

    path: str
    """A file, a directory (searched recursively by suffix), a glob, or a data set of the Hugging Face hub as
    hf://OWNER/NAME[@REVISION][/GLOB]. Files may be compressed."""
    format: Literal["text", "jsonl", "parquet", "chat", "trajectory"]
    """"text" (a document per file, or several split on `separator`), "jsonl" and "parquet" (text in `field`), "chat"
    (conversations in OpenAI's, ShareGPT's, alpaca's or TRL's form; JSONL or parquet), "trajectory" (answers with the
    denoising step of each token, as `sample.py --output` writes them). JSONL may be one JSON list."""
    field: str = "text"
    """The text of a jsonl or parquet record; with `prompt_field` set, its response, in "chat" the answer."""
    prompt_field: str | None = None
    """Text put before `field` that carries no loss under loss="response"; in "chat" the column of the question."""
    separator: str | None = None
    """For "text", what is between two documents of a file."""
    weight: float = 1.0
    """This source's share of what is drawn, relative to the other sources': of records, or of tokens (`weights`)."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For "chat", variables of the chat template, as {"enable_thinking": False}; a record's own
    "chat_template_kwargs" override them."""

    def __post_init__(self):
        _check_choice("format", self.format, ("text", "jsonl", "parquet", "chat", "trajectory"))
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"weight={self.weight} of source {self.path!r}: give a finite number above 0"
            )
        if self.separator is not None and (self.format != "text" or not self.separator):
            raise ConfigError(
                f"separator={self.separator!r} with format={self.format!r}: only text takes one, not empty"
            )
        named = self.field != "text" or self.prompt_field is not None
        if self.format in ("text", "trajectory") and named:
            raise ConfigError(
                f"field and prompt_field with format={self.format!r}, which has none; remove them"
            )
        if self.format == "chat" and self.field != "text" and self.prompt_field is None:
            raise ConfigError(
                f"field={self.field!r} with format='chat': set prompt_field, the question's column, as well"
            )
        self._check_chat_template_kwargs()

    def _check_chat_template_kwargs(self):
        if self.chat_template_kwargs and self.format != "chat":
            raise ConfigError(
                f"chat_template_kwargs with format={self.format!r}: only chat has them; leave them out"
            )
        if wrong := wrong_variable(self.chat_template_kwargs):
            raise ConfigError(f"chat_template_kwargs of source {self.path!r}: {wrong}")
        for name, value in self.chat_template_kwargs.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"chat_template_kwargs of source {self.path!r}: {name} is {value!r}; give text (quote a date),"
                    " a number, true, false, or a list or mapping of these"
                ) from None


@dataclass(frozen=True)
class DataConfig:
    """The layout of batches: rows of `sequence_length` tokens, `batch_size` of them per global batch."""

    sources: tuple[SourceConfig, ...]
    sequence_length: int
    batch_size: int
    weights: Literal["records", "tokens"] = "records"
    """What a source's `weight` is a share of. For tokens a sample of each source's records is measured first."""
    noisy_length: int | None = None
    """How many noisy positions a row may hold; None leaves `noisy_index` out of the batch."""
    packing: Literal["split", "fit"] = "split"
    """"split" joins documents and cuts exactly full rows, "fit" never cuts a document in two."""
    segments: Literal["document", "row"] = "document"
    """"document" gives each document of a row its own segment, "row" makes the packed row one."""
    loss: Literal["all", "response"] = "all"
    """"all" tokens carry loss, or only those of the "response" (a text without a prompt is all response)."""
    too_long: Literal["drop", "cut"] = "drop"
    """Whether a document that no row can hold ("fit") is dropped or cut. Both are counted."""
    pad_to_block: bool = False
    """Fill each document up to a multiple of block_size with end-of-text tokens."""
    pad_to_row: bool = False
    """Fill each document up to sequence_length with end-of-text tokens, so that it is a row of its own (D2F, LLaDA)."""
    pad_loss: bool = True
    """Let that filling carry loss wherever the document's own end-of-text token does."""
    shuffle: bool = True
    """Draw records in a new global order each epoch, from `seed`."""
    seed: int = 0
    epochs: int | None = None
    """Passes over the records; None repeats for ever."""
    on_error: Literal["fatal", "skip"] = "fatal"
    """Whether a malformed record stops the run ("fatal"), or is counted, logged and left out ("skip")."""
    token_cache: str | None = None
    """A folder in which the documents' tokens are kept: tokenised once, and read from there by this run, by others of
    the same data, and after a restart. It is never emptied."""
    num_threads: int = 4
    """Threads that read and tokenise ahead, at least one per shard; 0 works in the caller's thread."""
    shards: int = 1
    """How many streams the records are dealt to; each fills its own part of every batch, and a process reads only
    those whose rows it computes. They fix the order of the data, the number of processes does not. A divisor of
    batch_size; with more than one there are no epochs, as the streams would not end together."""

    def __post_init__(self):
        for name in ("sequence_length", "batch_size", "noisy_length", "epochs", "shards"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("num_threads", self.num_threads, 0)
        _check_at_least("seed", self.seed, 0)
        _check_choice("weights", self.weights, ("records", "tokens"))
        _check_choice("packing", self.packing, ("split", "fit"))
        _check_choice("segments", self.segments, ("document", "row"))
        _check_choice("loss", self.loss, ("all", "response"))
        _check_choice("too_long", self.too_long, ("drop", "cut"))
        _check_choice("on_error", self.on_error, ("fatal", "skip"))
        self._check_noisy_length()
        if self.has_order and self.loss == "all":
            raise ConfigError(
                "loss='all' with format='trajectory': a prompt has no steps to be learned; use loss='response'"
            )
        self._check_pad_to_row()
        if self.batch_size % self.shards:
            raise ConfigError(
                f"shards={self.shards} does not divide batch_size={self.batch_size}: use a divisor of it"
            )
        if self.shards > 1 and self.epochs is not None:
            raise ConfigError(
                f"shards={self.shards} with epochs={self.epochs}: streams end apart; leave epochs out"
            )

    @property
    def has_order(self) -> bool:
        """Whether batches say when each token was committed."""
        return any(source.format == "trajectory" for source in self.sources)

    def _check_pad_to_row(self):
        if self.pad_to_row and self.packing == "split":
            raise ConfigError(
                "pad_to_row with packing='split', which cuts documents: use packing='fit'"
            )
        if self.pad_to_row and self.pad_to_block:
            raise ConfigError(
                "pad_to_row with pad_to_block: a row that is filled has no block to fill; leave pad_to_block out"
            )

    def _check_noisy_length(self):
        if self.noisy_length is None or self.noisy_length == self.sequence_length:
            return
        shown = f"noisy_length={self.noisy_length}"
        if self.noisy_length > self.sequence_length:
            raise ConfigError(
                f"{shown} is above sequence_length={self.sequence_length}: lower it, or leave it out"
            )
        if self.packing == "split":
            raise ConfigError(
                f"{shown} with packing='split', which fills rows by length alone: use packing='fit'"
            )
        if self.segments == "row" and not self.pad_to_block:
            raise ConfigError(
                f"{shown} with segments='row': set pad_to_block, so that no block spans two documents"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def _check_at_least(name: str, value: int | None, least: int):
    if value is not None and value < least:
        raise ConfigError(f"{name}={value}: give a whole number of at least {least}")
