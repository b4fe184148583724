"""Decode with a model: one prompt, a chat, or a file of prompts.

    sdar-jax sample --model DIR --prompt "The capital of France is"
    sdar-jax sample --model DIR --prompt "The capital of France is" --watch
    sdar-jax sample --model DIR --chat
    sdar-jax sample --model DIR --input prompts.jsonl --output answers.jsonl
    sdar-jax sample --model DIR --prompt-ids 5,9,12 --json

An input line is {"prompt": text}, {"prompt_ids": [ids]} or {"messages": [...]}, with "max_new_tokens" and "seed" of its
own if it has them; what else it holds is copied to the output line, which has "prompt_ids" too. Lines that the output
file already holds are not decoded again, so an interrupted run resumes, with the same results. OUTPUT.settings.json
says what made them: another model or other settings are refused. Speeds go to stderr; they do not count compilation.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from sdar_jax import Completion, Engine, generate
from sdar_jax.cli.decoding import INTERRUPTED, DecodingFlags, flags_of, load_model, run_command
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.tokenizer import Encoder, load_tokenizer
from sdar_jax.decoding import Event
from sdar_jax.decoding.jsonl import answered, as_record, numbered_records
from sdar_jax.decoding.output_settings import check_settings, write_settings
from sdar_jax.decoding.prompts import Prompt, check_prompts, check_seed, checked_stops, to_ids
from sdar_jax.decoding.speed import timed
from sdar_jax.decoding.terminal import BlockText, watching
from sdar_jax.devices.chips import check_backend
from sdar_jax.errors import DataError, DecodingError, is_int
from sdar_jax.hf.model_files import fingerprint
from sdar_jax.hf.released import model_directory
from sdar_jax.model import Model

LEAST_LENGTH = 256  # An engine's requests may have this many tokens, at least; in a chat, more.
CHAT_LENGTH = 2048
AHEAD = 4  # Batches of a file under way: what an interruption can lose.


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Decode with a block-diffusion or autoregressive model.

    Attributes:
        model: a Hugging Face directory, or a hub id.
        adapter: a directory of low-rank matrices (LoRA) in PEFT's files, such as a run's adapter/, for that model.
        prompt: a text to continue, as it is.
        prompt_ids: a prompt as comma-separated token ids; needs no tokenizer.
        chat: talk, one line a turn, through the model's chat template; ends with the input. Turns that no longer fit
            the model's context are left out, the oldest first.
        system: the system message that opens a --chat.
        chat_template_kwargs: variables of the chat template, as a JSON object such as '{"enable_thinking": false}', for
            --chat and for {"messages"} of --input, whose own "chat_template_kwargs" come first.
        input: a JSONL file of prompts; needs --output.
        output: the JSONL file that completions are added to.
        batch_size: prompts of --input decoded at once.
        max_new_tokens: at most this many tokens a completion.
        stop_token_ids: comma-separated ids that end a completion; by default the model's own, "" for none.
        stop_strings: a text that ends a completion, which then ends before it; may be given several times. As it is
            written: a line break is $'\\n' in a shell.
        seed: for sampling; prompt i uses seed + i.
        watch: show every denoising step: in place on a terminal, colours from red to green by probability (NO_COLOR
            leaves them out), else a line a step.
        json: print one JSON object a completion.
        dtype: of the weights: auto (bfloat16 on GPU and TPU, float32 on CPU), int8, or a name.
        mask_token_id: where the model's config.json has none.
        tensor: devices that share heads, feed-forward width and vocabulary; -1 is all that are here.
        window_slots: K, blocks that one forward may read; with an add_threshold below 1, so many are filled at once.
        decoding: how to decode.
    """

    model: str
    adapter: Path | None = None
    prompt: str | None = None
    prompt_ids: str | None = None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: str | None = None
    input: Path | None = None
    output: Path | None = None
    batch_size: int = 8
    max_new_tokens: int = 256
    stop_token_ids: str | None = None
    stop_strings: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seed: int = 0
    watch: bool = False
    json: bool = False
    dtype: str = "auto"
    mask_token_id: int | None = None
    tensor: int = 1
    window_slots: int = 2
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = DecodingFlags()


_FLAGS = flags_of(SampleConfig, DecodingFlags)


class Request(NamedTuple):
    """One prompt, checked."""

    ids: list[int]
    max_new_tokens: int
    seed: int

    @property
    def length(self) -> int:
        return len(self.ids) + self.max_new_tokens


class Sampler:
    """A loaded model, and the engine that serves its requests. `texts`: whether a tokenizer is needed."""

    def __init__(self, config: SampleConfig, *, texts: bool):
        self.config = config
        stops = None if config.stop_token_ids is None else parse_ids(config.stop_token_ids)
        self.variables = parse_variables(config.chat_template_kwargs)
        self.directory = model_directory(config.model)
        self.tokenizer: Any = (
            load_tokenizer(self.directory) if texts or config.stop_strings else None
        )
        if self.variables and self.tokenizer is not None and self.tokenizer.chat_template:
            ChatRenderer(self.tokenizer).check_variables(self.variables)
        self.model: Model = load_model(
            self.directory,
            dtype=config.dtype,
            block_size=config.decoding.block_size,
            mask_token_id=config.mask_token_id,
            tensor=config.tensor,
            adapter=config.adapter,
        )
        config.decoding.resolve_block_size(self.model.config)
        if config.watch and self.canvas:
            raise DecodingError(
                "--watch follows the engine, and this model reads its whole canvas; leave it out"
            )
        self.stop_token_ids = None if stops is None else checked_stops(stops, self.model.config)
        self.engine: Engine | None = None

    @property
    def canvas(self) -> bool:
        """Whether there is no cache to keep in pages, and so no use for an engine."""
        return not self.config.decoding.paradigm(self.model.config).cached

    def render(self, conversation: dict[str, Any]) -> list[int]:
        """Ids of {"messages": [...]}, up to where the assistant answers. Raises DataError or DecodingError."""
        if not self.tokenizer.chat_template:
            fix = "set one in a file chat_template.jinja there, or give a --prompt"
            raise DecodingError(f"{self.directory}: the tokenizer has no chat template; {fix}")
        return Encoder(self.tokenizer)(
            ChatRenderer(self.tokenizer).prompt(conversation, self.variables)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """As text, or as comma-separated ids where there is no tokenizer."""
        return (
            ",".join(map(str, tokens))
            if self.tokenizer is None
            else self.tokenizer.decode(list(tokens))
        )

    @property
    def known_token(self) -> int:
        """A token that may stand in a prompt."""
        return 1 if self.model.config.mask_token_id == 0 else 0

    def request(self, prompt: Prompt, seed: int, max_new_tokens: int | None = None) -> Request:
        """Raises DecodingError for one that cannot be served."""
        new = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        ids = to_ids(prompt, 0, self.tokenizer)
        check_prompts([ids], [self.config.decoding], self.model.config, new)
        check_seed(seed, 1)
        return Request(ids.tolist(), new, seed)

    def prepare(self, slots: int, length: int) -> None:
        """Makes and compiles an engine for so many requests of up to `length` tokens; none where none is of use."""
        if self.canvas:
            return
        self.engine = None  # Its pages make room.
        length = min(max(length, LEAST_LENGTH), self.model.config.max_position_embeddings)
        started = time.perf_counter()
        self.engine = Engine(
            self.model,
            tokenizer=self.tokenizer,
            batch_slots=slots,
            window_slots=self.config.window_slots,
            max_length=length,
            max_queue=AHEAD * slots,
            steps_per_call=1 if self.config.watch else 8,
            top_logprobs=self.config.decoding.top_logprobs,
        )
        # What no request may ask for is refused before anything is compiled.
        least = max(1, self.config.decoding.min_new_tokens)
        self.engine.cancel(self.submit(Request([self.known_token], least, 0)))
        self.engine.warm_up(self.config.decoding)
        print(f"compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    def submit(self, request: Request) -> int:
        assert self.engine is not None
        return self.engine.submit(
            request.ids,
            self.config.decoding,
            max_new_tokens=request.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            stop_strings=self.config.stop_strings,
            seed=request.seed,
        )

    def answer(
        self, request: Request, show: Callable[[Event], None] = lambda event: None
    ) -> Completion:
        """Shows each event. Ctrl-C ends the request with what it has."""
        if self.engine is None:
            return next(self._generate([request]))
        request_id = self.submit(request)
        try:
            for event in self.engine.stream(request_id, changes=self.config.watch):
                show(event)
            return self.engine.result(request_id)
        except KeyboardInterrupt:
            return self.engine.cancel(request_id)

    def answers(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Of each request, in order; a bounded number of those behind it may be done and wait."""
        if self.engine is None:
            yield from self._generate(requests)
            return
        waiting: deque[int] = deque()
        for request in requests:
            if len(waiting) == AHEAD * self.config.batch_size:
                yield self.engine.result(waiting.popleft())
            waiting.append(self.submit(request))
        for request_id in waiting:
            yield self.engine.result(request_id)

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Batches of neighbours that `generate` takes together: of one length, with seeds that follow each other."""
        together = itertools.groupby(
            enumerate(requests), lambda each: (each[1].max_new_tokens, each[1].seed - each[0])
        )
        for (new, _), group in together:
            for batch in itertools.batched(
                (request for _, request in group), self.config.batch_size
            ):
                yield from generate(
                    self.model,
                    [request.ids for request in batch],
                    self.config.decoding,
                    max_new_tokens=new,
                    stop_token_ids=self.stop_token_ids,
                    stop_strings=self.config.stop_strings,
                    tokenizer=self.tokenizer,
                    seed=batch[0].seed,
                )


def parse_ids(text: str) -> list[int]:
    """Comma-separated token ids. Raises DecodingError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DecodingError(f"{text!r} is not a list of token ids; write them as 5,9,12") from None


def parse_variables(text: str | None) -> dict[str, Any]:
    """Variables of a chat template, from a JSON object. Raises DecodingError for anything else."""
    try:
        variables = json.loads(text or "{}")
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        message = f"--chat-template-kwargs {text!r} is not a JSON object"
        raise DecodingError(f"""{message}; write it as '{{"enable_thinking": false}}'""")
    return variables


def show_answer(sampler: Sampler, request: Request) -> Completion:
    """Prints one answer and its speed: as text while it comes, as changes, or as one line of JSON."""
    with timed(sampler.engine, 1) as done:
        if sampler.config.json:
            completion = sampler.answer(request)
            print(json.dumps(as_record(completion), ensure_ascii=False), flush=True)
        else:
            view = (watching if sampler.config.watch else BlockText)(sampler.decode, sys.stdout)
            completion = sampler.answer(request, view.show)
            # The tokens hold a stop string that the text ends before.
            view.end(
                sampler.decode(completion.tokens) if completion.text is None else completion.text
            )
        done.append(completion)
    return completion


def sample_once(config: SampleConfig) -> int:
    prompt = config.prompt if config.prompt_ids is None else parse_ids(config.prompt_ids)
    assert prompt is not None
    sampler = Sampler(config, texts=config.prompt_ids is None)
    request = sampler.request(prompt, config.seed)
    sampler.prepare(1, request.length)
    completion = show_answer(sampler, request)
    return INTERRUPTED if completion.finish_reason == "cancelled" else 0


def chat(config: SampleConfig) -> None:
    sampler = Sampler(config, texts=True)
    if config.max_new_tokens >= _context(sampler):
        room = f"--max-new-tokens is {config.max_new_tokens} and the context {_context(sampler)}"
        raise DecodingError(f"{room}; give less, as a chat needs room for its messages")
    opening = [] if config.system is None else [{"role": "system", "content": config.system}]
    messages: list[dict[str, Any]] = []
    first = 0  # Turns before this message have left the context.
    while (line := _read_turn()) is not None:
        messages.append({"role": "user", "content": line})
        ids, start = _fitted(sampler, opening, messages, first)
        if ids is None:
            _say_unanswered(sampler, len(sampler.render({"messages": [*opening, messages.pop()]})))
            continue
        if start > first:
            left_out = (
                f"the context of {_context(sampler)} tokens is full: the oldest turns are left out"
            )
            print(f"{left_out}, {start // 2} of {len(messages) // 2} so far", file=sys.stderr)
            first = start
        request = sampler.request(ids, config.seed + len(messages))
        # A conversation that has outgrown its engine gets a larger one, which has to read all of it again.
        if sampler.engine is None or sampler.engine.max_length < request.length:
            sampler.prepare(1, max(CHAT_LENGTH, 2 * request.length))
        answer = show_answer(sampler, request).text
        # A turn that says nothing belongs in no conversation, and neither does its question.
        messages = (
            [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]
        )


def _fitted(
    sampler: Sampler, opening: list[dict[str, Any]], messages: list[dict[str, Any]], first: int
) -> tuple[list[int] | None, int]:
    """The prompt's ids and the message that it starts with, the first from which all fit; None if the last does not."""
    for start in range(first, len(messages), 2):
        ids = sampler.render({"messages": [*opening, *messages[start:]]})
        if len(ids) + sampler.config.max_new_tokens <= _context(sampler):
            return ids, start
    return None, first


def _context(sampler: Sampler) -> int:
    return sampler.model.config.max_position_embeddings


def _say_unanswered(sampler: Sampler, tokens: int) -> None:
    """On stdout too for a program, which waits for a line."""
    room = f"it has {tokens} tokens, --max-new-tokens is {sampler.config.max_new_tokens}"
    reply = f"this message is not answered: {room} and the context {_context(sampler)}; shorten it"
    print(reply, file=sys.stderr)
    if sampler.config.json:
        print(json.dumps({"error": reply}), flush=True)


def _read_turn() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def sample_file(config: SampleConfig) -> None:
    assert config.input is not None
    if config.output is None:
        raise DecodingError("--input needs --output; name the file for the completions")
    lines, records = [], []
    for line, record in numbered_records(config.input):
        lines.append(line)
        records.append(record)
    if config.chat_template_kwargs is not None and not any(
        "messages" in record for record in records
    ):
        raise DecodingError(
            f"--chat-template-kwargs is given, and {config.input} has no messages; leave it out"
        )
    first = answered(config.output, records)
    made_by = (config.model, fingerprint(model_directory(config.model)), _settings(config))
    check_settings(config.output, first, *made_by)
    sampler = Sampler(
        config, texts=not all(isinstance(record.get("prompt_ids"), list) for record in records)
    )
    places = [f"{config.input}:{line}" for line in lines]
    requests = [_as_request(record, places[i], i, sampler) for i, record in enumerate(records)]
    records, requests = records[first:], requests[first:]
    slots = min(config.batch_size, len(requests))
    write_settings(config.output, *made_by)
    if requests:
        sampler.prepare(slots, max(request.length for request in requests))
    with config.output.open("a", encoding="utf-8") as file, timed(sampler.engine, slots) as done:
        answers = zip(records, requests, sampler.answers(requests), strict=True)
        for record, request, completion in answers:
            line = {"prompt_ids": request.ids, **record, **as_record(completion)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done.append(completion)
            print(f"{first + len(done)}/{first + len(records)}", file=sys.stderr)


def _settings(config: SampleConfig) -> dict[str, Any]:
    """What the answers of a file depend on, where it is not at its default."""
    fields = (
        "max_new_tokens",
        "stop_token_ids",
        "stop_strings",
        "seed",
        "dtype",
        "mask_token_id",
        "chat_template_kwargs",
    )
    values = lambda of: {
        **{name: getattr(of, name) for name in fields},
        **dataclasses.asdict(of.decoding),
        "adapter": of.adapter and fingerprint(of.adapter),
    }
    default = values(SampleConfig(model=""))
    changed = {name: value for name, value in values(config).items() if value != default[name]}
    return json.loads(json.dumps(changed))


def _as_request(record: dict[str, Any], place: str, index: int, sampler: Sampler) -> Request:
    try:
        own = {name: record[name] for name in ("seed", "max_new_tokens") if name in record}
        if wrong := [f'"{name}" is {value!r}' for name, value in own.items() if not is_int(value)]:
            raise DataError(f"{wrong[0]}; give an integer")
        return sampler.request(
            _as_prompt(record, sampler), **{"seed": sampler.config.seed + index, **own}
        )
    except (DataError, DecodingError) as error:
        raise DataError(f"{place}: {str(error).replace('prompt 0 ', 'the prompt ')}") from None


def _as_prompt(record: dict[str, Any], sampler: Sampler) -> Prompt:
    if isinstance(record.get("prompt_ids"), list):
        return record["prompt_ids"]
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    if "messages" not in record:
        raise DataError('no prompt; give "prompt", "prompt_ids" or "messages"')
    return sampler.render(record)


def main(arguments: Sequence[str], program: str = "sdar-jax sample") -> int:
    """Decodes; returns the exit status."""
    return run_command(
        SampleConfig,
        run,
        arguments,
        program,
        description=(__doc__ or "").replace("sdar-jax sample", program),
        flags=_FLAGS,
    )


def run(config: SampleConfig) -> int:
    """Decodes; returns the exit status. Raises SdarError for what cannot be done."""
    ways = {
        "--prompt": config.prompt is not None,
        "--prompt-ids": config.prompt_ids is not None,
        "--chat": config.chat,
        "--input": config.input is not None,
    }
    given = [name for name, used in ways.items() if used]
    if len(given) != 1:
        raise DecodingError(
            f"{' and '.join(given) or 'no prompt'} given; give one of {', '.join(ways)}"
        )
    if config.system is not None and not config.chat:
        raise DecodingError(
            "--system opens a --chat; put the system message into the records or the text"
        )
    if config.chat_template_kwargs is not None and not (config.chat or config.input):
        raise DecodingError(
            "--chat-template-kwargs is for --chat and --input, as a prompt has no template; leave it out"
        )
    if not all(config.stop_strings):
        raise DecodingError(
            "--stop-strings has an empty text, which would end every answer; leave it out"
        )
    if config.batch_size < 1:
        raise DecodingError(f"--batch-size is {config.batch_size}; give a positive integer")
    if config.watch and (config.json or config.input is not None):
        raise DecodingError(
            "--watch shows one answer at a time, as text; leave out --json and --input"
        )
    check_backend()
    if config.prompt is not None or config.prompt_ids is not None:
        return sample_once(config)
    chat(config) if config.chat else sample_file(config)
    return 0
