"""Decode with a model: one prompt, a chat, or a file of prompts.

    python sample.py --model DIR --prompt "The capital of France is"
    python sample.py --model DIR --chat
    python sample.py --model DIR --input prompts.jsonl --output answers.jsonl
    python sample.py --model DIR --prompt-ids 5,9,12 --json

An input line is {"prompt": text}, {"prompt_ids": [ids]} or {"messages": [...]}; what else it holds is copied to the
output line. Lines that the output file already holds are not decoded again, so an interrupted run goes on.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from sdar_jax import Completion, DecodingConfig, generate, load_pretrained
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.tokenizer import Encoder, load_tokenizer
from sdar_jax.errors import DataError, DecodingError, SdarError
from sdar_jax.model import Model
from sdar_jax.pretrained import model_directory


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Decode with a block-diffusion or autoregressive model.

    Attributes:
        model: a Hugging Face directory, or a hub id.
        prompt: a text to continue, as it is.
        prompt_ids: a prompt as comma-separated token ids; needs no tokenizer.
        chat: talk, one line a turn, through the model's chat template; ends with the input.
        input: a JSONL file of prompts; needs --output.
        output: the JSONL file that completions are added to.
        batch_size: prompts of --input decoded together.
        max_new_tokens: at most this many tokens a completion.
        stop_token_ids: comma-separated ids that end a completion; by default the model's own, "" for none.
        seed: for sampling; prompt i uses seed + i.
        json: print one JSON object a completion.
        dtype: of the weights: auto (bfloat16 on GPU and TPU, float32 on CPU) or a name.
        mask_token_id: where the model's config.json has none.
        decoding: how to decode.
    """

    model: str
    prompt: str | None = None
    prompt_ids: str | None = None
    chat: bool = False
    input: Path | None = None
    output: Path | None = None
    batch_size: int = 8
    max_new_tokens: int = 256
    stop_token_ids: str | None = None
    seed: int = 0
    json: bool = False
    dtype: str = "auto"
    mask_token_id: int | None = None
    decoding: Annotated[DecodingConfig, tyro.conf.arg(name="")] = DecodingConfig()


class Sampler:
    """A loaded model with what every call of `generate` shares. `texts`: whether a tokenizer is needed."""

    def __init__(self, config: SampleConfig, *, texts: bool):
        self.config = config
        self.stop_token_ids = None if config.stop_token_ids is None else parse_ids(config.stop_token_ids)
        directory = model_directory(config.model)
        self.tokenizer = load_tokenizer(directory) if texts else None
        self.model: Model = load_pretrained(
            directory,
            dtype=config.dtype,
            block_size=config.decoding.block_size,
            mask_token_id=config.mask_token_id,
        )

    def __call__(self, prompts: list, seed: int) -> list[Completion]:
        return generate(
            self.model,
            prompts,
            self.config.decoding,
            max_new_tokens=self.config.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            tokenizer=self.tokenizer,
            seed=seed,
        )

    def render(self, conversation: dict[str, Any]) -> list[int]:
        """Ids of {"messages": [...]}, up to where the assistant answers."""
        assert self.tokenizer is not None
        return Encoder(self.tokenizer)(ChatRenderer(self.tokenizer).prompt(conversation))


def parse_ids(text: str) -> list[int]:
    """Comma-separated token ids. Raises DecodingError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DecodingError(f"{text!r} is not a list of token ids; write them as 5,9,12") from None


def as_record(completion: Completion) -> dict[str, Any]:
    """A completion as a JSON object; `text` only where there was a tokenizer."""
    record = {**completion._asdict(), "tokens_per_forward": round(completion.tokens_per_forward, 4)}
    return {key: value for key, value in record.items() if key != "text" or value is not None}


def speed(completions: list[Completion], seconds: float) -> str:
    """Summary line: generated tokens, forwards by kind, tokens per forward and per second (compilation included)."""
    tokens = sum(len(c.tokens) for c in completions)
    denoising = sum(c.denoising_forwards for c in completions)
    commits = sum(c.commit_forwards for c in completions)
    rate = f"{tokens / denoising:.2f} tokens a forward, " if denoising else ""
    forwards = f"{denoising} denoising and {commits} commit forwards"
    return f"{tokens} tokens, {forwards}, {rate}{tokens / seconds:.1f} tokens/s with compilation"


def sample_once(config: SampleConfig) -> None:
    prompt = config.prompt if config.prompt_ids is None else parse_ids(config.prompt_ids)
    sampler = Sampler(config, texts=config.prompt_ids is None)
    started = time.perf_counter()
    completions = sampler([prompt], config.seed)
    if config.json:
        print(json.dumps(as_record(completions[0]), ensure_ascii=False))
        return
    text = completions[0].text
    print(text if text is not None else ",".join(map(str, completions[0].tokens)))
    print(speed(completions, time.perf_counter() - started), file=sys.stderr)


def chat(config: SampleConfig) -> None:
    sampler = Sampler(config, texts=True)
    messages: list[dict[str, Any]] = []
    while (line := _read_turn()) is not None:
        messages.append({"role": "user", "content": line})
        started = time.perf_counter()
        completions = sampler([sampler.render({"messages": messages})], config.seed + len(messages))
        answer = completions[0].text
        print(json.dumps(as_record(completions[0]), ensure_ascii=False) if config.json else answer, flush=True)
        print(speed(completions, time.perf_counter() - started), file=sys.stderr)
        # A turn that says nothing belongs in no conversation, and neither does its question.
        messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]


def _read_turn() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def sample_file(config: SampleConfig) -> None:
    assert config.input is not None
    if config.output is None:
        raise DecodingError("--input needs --output; name the file for the completions")
    records = list(read_records(config.input))
    done = _answered(config.output, records)
    sampler = Sampler(config, texts=not all(isinstance(record.get("prompt_ids"), list) for record in records))
    prompts = [_as_prompt(record, f"{config.input}:{number}", sampler) for number, record in enumerate(records, 1)]
    finished: list[Completion] = []
    started = time.perf_counter()
    with config.output.open("a", encoding="utf-8") as file:
        for first in range(done, len(records), config.batch_size):
            chosen = slice(first, first + config.batch_size)
            try:
                completions = sampler(prompts[chosen], config.seed + first)
            except DecodingError as error:
                raise DataError(f"{config.input}, of the prompts from line {first + 1} on: {error}") from None
            for record, completion in zip(records[chosen], completions, strict=True):
                file.write(json.dumps({**record, **as_record(completion)}, ensure_ascii=False) + "\n")
            file.flush()
            finished += completions
            print(f"{first + len(completions)}/{len(records)}", file=sys.stderr)
    print(speed(finished, time.perf_counter() - started), file=sys.stderr)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises DataError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            # A lone surrogate can be read but not written again.
            json.dumps(record, ensure_ascii=False).encode()
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); give one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f'{path}:{number}: not an object; write it as {{"prompt": ...}}')
        yield record


def _as_prompt(record: dict[str, Any], place: str, sampler: Sampler) -> str | list[int]:
    if isinstance(record.get("prompt_ids"), list):
        return record["prompt_ids"]
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    if "messages" not in record:
        raise DataError(f'{place}: no prompt; give "prompt", "prompt_ids" or "messages"')
    try:
        return sampler.render(record)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _answered(path: Path, records: list[dict[str, Any]]) -> int:
    """How many records an output file answers already; a last line that an interruption cut short is removed.

    Raises DataError, and leaves the file as it is, if it is not the output of these records.
    """
    try:
        with path.open("ab+") as file:
            file.seek(0)
            *lines, cut = file.read().split(b"\n")
            other = next((i for i, line in enumerate(lines) if not _answers(line, records[i : i + 1])), None)
            if other is not None or cut[:1] not in (b"", b"{"):
                place = f"{path}:{1 + (len(lines) if other is None else other)}"
                raise DataError(f"{place}: not an answer to that line of the input; choose another --output")
            file.truncate(sum(len(line) + 1 for line in lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another --output") from None
    return len(lines)


def _answers(line: bytes, asked: list[dict[str, Any]]) -> bool:
    """Whether an output line holds all of the record that it should, and a completion."""
    try:
        answer = json.loads(line)
    except ValueError:
        return False
    ours = {*Completion._fields, "tokens_per_forward"}
    kept = {key: value for record in asked for key, value in record.items() if key not in ours}
    if not asked or not isinstance(answer, dict):
        return False
    return ours - {"text"} <= set(answer) and kept.items() <= answer.items()


def main(config: SampleConfig) -> None:
    ways = {
        "--prompt": config.prompt is not None,
        "--prompt-ids": config.prompt_ids is not None,
        "--chat": config.chat,
        "--input": config.input is not None,
    }
    given = [name for name, used in ways.items() if used]
    if len(given) != 1:
        raise DecodingError(f"{' and '.join(given) or 'no prompt'} given; give one of {', '.join(ways)}")
    if config.batch_size < 1:
        raise DecodingError(f"--batch-size is {config.batch_size}; give a positive integer")
    if config.chat:
        chat(config)
    elif config.input is not None:
        sample_file(config)
    else:
        sample_once(config)


if __name__ == "__main__":
    try:
        main(tyro.cli(SampleConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
