"""Synthetic inputs for trying out a run: a tokenizer, and files in every format that sources have."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdar_jax.data import SourceConfig

_FILES, _RECORDS = 2, 400
_WORDS = (
    "the",
    "a",
    "small",
    "red",
    "old",
    "river",
    "stone",
    "letter",
    "walks",
    "finds",
    "opens",
    "under",
    "then",
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

Record = dict[str, Any]


def write_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes a Hugging Face directory: a token for each byte, ChatML's special tokens and template."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_SPECIAL[0],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def write_source(source: SourceConfig, directory: Path, length: int) -> SourceConfig:
    """Writes files of a source's format and fields to `directory`, with texts of words; gives the source that reads
    them.

    Most records fit in `length` bytes, some do not.
    """
    directory.mkdir(parents=True)
    draw = random.Random(directory.name)
    suffix = {"text": "txt", "parquet": "parquet"}.get(source.format, "jsonl")
    records = [_record(source, draw, length) for _ in range(_RECORDS)]
    # A text file without separators is one record.
    size = 1 if source.format == "text" and source.separator is None else _RECORDS // _FILES
    for start in range(0, _RECORDS, size):
        _write(source, directory / f"{start:03}.{suffix}", records[start : start + size])
    # The synthetic tokenizer's chat template has no variables.
    return replace(source, path=str(directory / f"*.{suffix}"), chat_template_kwargs={})


def _record(source: SourceConfig, draw: random.Random, length: int) -> Record:
    def text(most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(3, most)))

    if source.format == "trajectory":
        return _answer(draw, length)
    question = text(8)
    # A word has six bytes or so with its space.
    answer = text(max(4, length // 5))
    if source.format != "chat":
        record = {source.field: answer}
        if source.prompt_field:
            record[source.prompt_field] = question
        return record
    contents = [question, answer, text(4), text(4)][: draw.choice((2, 4))]
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
        ]
    }


def _answer(draw: random.Random, length: int) -> Record:
    """Makes an answer of bytes, committed one after the other from somewhere."""
    ids = range(len(_SPECIAL), len(_SPECIAL) + len(pre_tokenizers.ByteLevel.alphabet()))
    count = draw.randint(1, length)
    return {
        "prompt_ids": draw.choices(ids, k=draw.randint(1, 8)),
        "tokens": draw.choices(ids, k=count),
        "steps": draw.sample(range(count), count),
    }


def _write(source: SourceConfig, path: Path, records: list[Record]) -> None:
    if source.format == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif source.format == "text":
        path.write_text((source.separator or "").join(record[source.field] for record in records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
