"""sample.py from its command line to its output, on a tiny saved model."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sdar_jax import (
    DecodingConfig,
    Engine,
    adapters,
    generate,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from sdar_jax.cli import sample
from sdar_jax.decoding.terminal import MASKED, BlockText
from sdar_jax.model.hf_fields import warn_once
from tests.adapters.test_peft_files import with_random_b
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.released import write_released
from tests.tiny import tiny_model

SCRIPT = str(Path(__file__).parents[1] / "sample.py")
TOKENIZER_SIZE = 260
END = 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = directory / "tokenizer"
    make_byte_tokenizer().save_pretrained(tokenizer)
    fields = {
        "vocab_size": TOKENIZER_SIZE + 4,
        "mask_token_id": TOKENIZER_SIZE,
        "max_position_embeddings": 300,
    }
    model = tiny_model(jnp.float32, **fields, stop_token_ids=(END,))
    save_pretrained(model, directory / "model", tokenizer_from=tokenizer)
    return directory / "model"


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err
        self.records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def run(monkeypatch, *arguments, stdin: str = "") -> Result:
    """The script as a process would run it, in this one."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a process of its own, which finds what this one has compiled."""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    cache |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | cache


@pytest.fixture
def cli(monkeypatch, model_dir):
    return lambda *arguments, **options: run(
        monkeypatch, "--model", model_dir, *arguments, **options
    )


def expected(model_dir, prompts, max_new_tokens=6, seed=0, **fields):
    """What the library gives for the same, with the tokenizer."""
    model, config, tokenizer = (
        load_pretrained(model_dir),
        DecodingConfig(**fields),
        make_byte_tokenizer(),
    )
    return generate(
        model, prompts, config, max_new_tokens=max_new_tokens, seed=seed, tokenizer=tokenizer
    )


def test_prompt_ids_to_json(cli, model_dir):
    result = cli("--prompt-ids", "5,9,12", "--json", "--max-new-tokens", 6)
    (wanted,) = expected(model_dir, [[5, 9, 12]])
    assert result.code == 0 and result.out.count("\n") == 1
    (record,) = result.records
    assert record["tokens"] == wanted.tokens and record["finish_reason"] == wanted.finish_reason
    assert record["logprobs"] == pytest.approx(wanted.logprobs, rel=1e-5)
    assert "text" not in record and set(record) == {*wanted._fields, "tokens_per_forward"} - {
        "text"
    }


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_adapter_is_laid_over_the_model(cli, model_dir, tmp_path, dtype):
    base = load_pretrained(model_dir, dtype=dtype)
    model = with_random_b(adapters.add(base, adapters.LoraConfig(r=2)))
    adapters.save(model, tmp_path / "adapter")
    flags = ("--prompt-ids", "5,9,12", "--json", "--max-new-tokens", 6, "--dtype", dtype)
    with_it = cli(*flags, "--adapter", tmp_path / "adapter")
    (wanted,) = generate(model, [[5, 9, 12]], max_new_tokens=6)
    assert with_it.records[0]["tokens"] == wanted.tokens
    assert with_it.records[0]["logprobs"] == pytest.approx(wanted.logprobs, rel=1e-3)
    assert with_it.records != cli(*flags).records
    assert_one_line(cli(*flags, "--adapter", tmp_path / "none"), "none", "adapter_config.json")


def test_prompt_ids_in_words(cli, model_dir):
    result = cli("--prompt-ids", "5,9,12", "--max-new-tokens", 6)
    assert result.out == ",".join(map(str, expected(model_dir, [[5, 9, 12]])[0].tokens)) + "\n"
    for part in (
        "compiled in",
        "prefill: 0 tokens",
        "at batch 1",
        "TGS",
        "TPF",
        "denoising",
        "commit forwards",
    ):
        assert part in result.err


@pytest.mark.slow
@pytest.mark.ci
def test_prompt_and_decoding_options(cli, model_dir):
    options = (
        "--confidence-threshold",
        0.2,
        "--denoising-steps",
        2,
        "--temperature",
        1.0,
        "--top-k",
        50,
    )
    result = cli(
        "--prompt",
        "one two",
        "--max-new-tokens",
        6,
        "--seed",
        3,
        "--stop-token-ids",
        "",
        "--json",
        *options,
    )
    fields = dict(confidence_threshold=0.2, denoising_steps=2, temperature=1.0, top_k=50)
    (wanted,) = expected(model_dir, ["one two"], seed=3, **fields)
    assert result.records[0]["tokens"] == wanted.tokens and result.records[0]["text"] == wanted.text


@pytest.mark.slow
@pytest.mark.ci
def test_options_of_decoding_are_flags(cli, model_dir):
    """More new tokens at least than the small requests have that compile; likeliest tokens, as many as asked for."""
    flags = ("--min-new-tokens", 5, "--suppress-token-ids", 7, 8, "--eos-last", "--top-logprobs", 2)
    result = cli("--prompt-ids", "5,9,12", "--max-new-tokens", 6, "--json", *flags)
    fields = dict(min_new_tokens=5, suppress_token_ids=(7, 8), eos_last=True, top_logprobs=2)
    (wanted,) = expected(model_dir, [[5, 9, 12]], **fields)
    assert result.records[0]["tokens"] == wanted.tokens and len(wanted.tokens) >= 5
    assert [[id_ for id_, _ in each] for each in result.records[0]["top_logprobs"]] == [
        [id_ for id_, _ in each] for each in wanted.top_logprobs
    ]


@pytest.mark.slow
@pytest.mark.ci
def test_block_size_and_mask_may_come_from_the_command_line(cli, model_dir):
    result = cli(
        "--prompt-ids",
        "5,9",
        "--block-size",
        8,
        "--mask-token-id",
        262,
        "--max-new-tokens",
        6,
        "--json",
    )
    assert result.code == 0 and len(result.records[0]["tokens"]) <= 6


def test_watching_prints_a_line_a_forward(cli, model_dir):
    """Of which the last has no mask, and together commit all there is; then the text."""
    options = (
        "--max-new-tokens",
        13,
        "--stop-token-ids",
        "",
        "--strategy",
        "low_confidence_static",
    )
    result = cli("--prompt", "one two", "--watch", *options)
    whole = json.loads(cli("--prompt", "one two", "--json", *options).out)
    lines = [line.split("\t") for line in result.out.splitlines()[: whole["denoising_forwards"]]]
    assert [int(forward) for forward, *_ in lines] == list(range(whole["denoising_forwards"]))
    # The prompt ends one token before a block does, so the output's blocks have 1, 4, 4 and 4 tokens.
    opened = [odds.split(" ") for *_, odds in lines]
    assert [len(odds) for odds in opened] == [1] + [4] * 12
    assert [odds.count(MASKED) for odds in opened] == [0] + [3, 2, 1, 0] * 3
    last = [f"{math.exp(p):.2f}" for p in whole["logprobs"][-4:]]
    assert opened[-1] == last
    assert result.out.endswith(f"\n{whole['text']}\n") and "\x1b" not in result.out


def test_watching_ids(cli, model_dir):
    result = cli("--prompt-ids", "5,9,12", "--watch", "--max-new-tokens", 6)
    (wanted,) = expected(model_dir, [[5, 9, 12]])
    assert result.out.splitlines()[-1] == ",".join(map(str, wanted.tokens))
    assert len(result.out.splitlines()) == wanted.denoising_forwards + 1


@pytest.fixture
def interrupt_at(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Ctrl-C while the event with a given number is shown."""
    seen, show, wanted = itertools.count(), BlockText.show, []

    def interrupted(self, shown):
        show(self, shown)
        if next(seen) in wanted:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BlockText, "show", interrupted)
    # Python leaves Ctrl-C ignored where it was when it started, as in a shell's background jobs.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda event: wanted.append(next(seen) + event + 1)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_what_there_is(cli, interrupt_at):
    options = ("--prompt", "one two", "--max-new-tokens", 40, "--stop-token-ids", "")
    whole = cli(*options)
    interrupt_at(1)
    cut = cli(*options)
    assert (whole.code, cut.code) == (0, 130) and "1 cancelled" in cut.err
    assert 1 < len(cut.out) < len(whole.out) and whole.out.startswith(cut.out.removesuffix("\n"))


def test_ctrl_c_ends_a_turn_and_not_the_chat(cli, interrupt_at):
    interrupt_at(1)
    result = cli("--chat", "--max-new-tokens", 40, "--stop-token-ids", "", stdin="hi\nand?\n")
    assert result.code == 0 and "1 cancelled" in result.err and "1 length" in result.err


@pytest.mark.parametrize(
    "options", [("--prompt", "one two"), ("--input", "in.jsonl", "--output", "out.jsonl")]
)
def test_what_has_no_cache_is_decoded_without_an_engine(
    cli, model_dir, tmp_path, monkeypatch, options
):
    monkeypatch.chdir(tmp_path)
    texts = ["one two", "a", "b"]
    write_lines(
        tmp_path / "in.jsonl",
        [{"prompt": texts[0]}, {"prompt": "a", "max_new_tokens": 3}, {"prompt": "b"}],
    )
    result = cli(*options, "--strategy", "semi_autoregressive", "--max-new-tokens", 6)
    assert result.code == 0 and "compilation included" in result.err and "prefill" not in result.err
    if "--input" in options:
        counts = (6, 3, 6)
        for i, answer in enumerate(read_lines(tmp_path / "out.jsonl")):
            (wanted,) = expected(
                model_dir, texts[i : i + 1], counts[i], i, strategy="semi_autoregressive"
            )
            assert answer["tokens"] == wanted.tokens
    else:
        assert (
            result.out
            == expected(model_dir, texts[:1], strategy="semi_autoregressive")[0].text + "\n"
        )


def test_autoregressive_models(monkeypatch, tmp_path):
    model = tiny_model(jnp.float32, objective="autoregressive", block_size=None, mask_token_id=None)
    save_pretrained(model, tmp_path / "ar")
    options = (
        "--model",
        tmp_path / "ar",
        "--prompt-ids",
        "5,9,12",
        "--max-new-tokens",
        6,
        "--json",
    )
    result = run(monkeypatch, *options, "--strategy", "autoregressive")
    (wanted,) = generate(
        model, [[5, 9, 12]], DecodingConfig(strategy="autoregressive"), max_new_tokens=6
    )
    assert result.records[0]["tokens"] == wanted.tokens and "prefill: 2 tokens" in result.err
    assert run(monkeypatch, *options).records == result.records
    assert_one_line(
        run(monkeypatch, *options, "--strategy", "sequential"),
        "--block-size",
        "use --strategy autoregressive",
    )


def test_a_released_directory_answers(monkeypatch, tmp_path):
    """README's first example: no flag for what its config.json leaves out, which is said once."""
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    warn_once.cache_clear()
    options = ("--prompt", "The capital", "--max-new-tokens", 6)
    result = run(monkeypatch, "--model", directory, *options)
    tokenizer = load_tokenizer(directory)
    (wanted,) = generate(
        load_pretrained(directory), ["The capital"], max_new_tokens=6, tokenizer=tokenizer
    )
    assert result.code == 0 and result.out == wanted.text + "\n"
    said = [line for line in result.err.splitlines() if line.startswith("SDAR-1.7B-Chat: ")]
    assert len(said) == 1 and said[0].endswith("give --block-size, --mask-token-id")


def test_a_diffusion_model_without_a_mask_anywhere(monkeypatch, tmp_path):
    directory = write_released(tmp_path, "SDAR-1.7B-Chat")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / file).unlink()
    result = run(monkeypatch, "--model", directory, "--prompt-ids", "5", "--block-size", 4)
    assert_one_line(result, "needs --mask-token-id and the model has none", "with --mask-token-id")


CONVERSATION = {"messages": [{"role": "user", "content": "1+1"}]}
INPUT = [
    {"prompt": "a\u2028b", "id": 7},
    {"prompt_ids": [9, 8, 7]},
    CONVERSATION,
    {"prompt": "c"},
    {"prompt": "dd"},
]
INPUT[3] |= {"max_new_tokens": 2, "seed": 5}


def write_lines(path: Path, records) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_file_is_answered_line_by_line(cli, model_dir, tmp_path):
    """With sampling: line i uses seed + i, or its own, whatever is decoded beside it."""
    source, target = write_lines(tmp_path / "in.jsonl", INPUT), tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 5, "--temperature", 1.0, "--seed", 11, "--stop-token-ids", "")
    result = cli("--input", source, "--output", target, "--batch-size", 2, *options)
    assert result.code == 0 and "5/5" in result.err
    rendered = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    ids = [make_byte_tokenizer().encode(text) for text in ("a\u2028b", rendered, "c", "dd")]
    ids.insert(1, [9, 8, 7])
    answers = read_lines(target)
    model = load_pretrained(model_dir)
    for i, (record, answer) in enumerate(zip(INPUT, answers, strict=True)):
        config = DecodingConfig(temperature=1.0)
        new, seed = record.get("max_new_tokens", 5), record.get("seed", 11 + i)
        (alone,) = generate(
            model, [ids[i]], config, max_new_tokens=new, seed=seed, stop_token_ids=()
        )
        assert {key: answer[key] for key in record} == record
        assert answer["tokens"] == alone.tokens


def test_an_interrupted_file_goes_on_where_it_stopped(cli, tmp_path):
    source, whole, cut = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "cut.jsonl"))
    write_lines(source, INPUT)
    options = ("--max-new-tokens", 5, "--temperature", 1.0, "--batch-size", 2)
    cli("--input", source, "--output", whole, *options)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (b"", b"".join(lines[:3]) + lines[3][:30], b"".join(lines[:2]), b"".join(lines)):
        cut.write_bytes(kept)
        assert cli("--input", source, "--output", cut, *options).code == 0
        assert [line["tokens"] for line in read_lines(cut)] == [
            line["tokens"] for line in read_lines(whole)
        ]
    before = whole.read_bytes()
    cli("--input", source, "--output", whole, *options)
    assert whole.read_bytes() == before


@pytest.mark.slow
@pytest.mark.ci
def test_ctrl_c_in_a_file_keeps_what_is_written(cli, tmp_path, monkeypatch):
    """Long and short ones, so that later lines are done before earlier ones; at most 4 batches are under way."""
    records = [
        {"prompt_ids": [i + 1], "max_new_tokens": 40 if i % 4 == 0 else 2} for i in range(14)
    ]
    source, whole, cut = (
        write_lines(tmp_path / "in.jsonl", records),
        tmp_path / "whole.jsonl",
        tmp_path / "cut.jsonl",
    )
    options = ("--temperature", 1.0, "--batch-size", 2, "--stop-token-ids", "")
    cli("--input", source, "--output", whole, *options)
    calls, result = itertools.count(1), Engine.result
    most = []

    def interrupted(self, request_id):
        # Two of the calls warm up.
        if next(calls) == 2 + 4:
            raise KeyboardInterrupt
        most.append(len(self._core.requests))
        return result(self, request_id)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "result", interrupted)
        stopped = cli("--input", source, "--output", cut, *options)
    assert stopped.code == 130 and "3/14" in stopped.err and "Traceback" not in stopped.err
    assert whole.read_bytes().startswith(cut.read_bytes()) and cut.read_bytes().count(b"\n") == 3
    assert max(most) == 8
    assert cli("--input", source, "--output", cut, *options).code == 0
    assert [line["tokens"] for line in read_lines(cut)] == [
        line["tokens"] for line in read_lines(whole)
    ]


@pytest.mark.slow
def test_a_killed_process_goes_on(model_dir, tmp_path, environment):
    """SIGKILL in the middle of a file: what is written is whole lines, or one cut short, and the rest follows."""
    records = [{"prompt_ids": [i % 200 + 1], "max_new_tokens": 150 - i % 100} for i in range(200)]
    source, whole, cut = (
        write_lines(tmp_path / "in.jsonl", records),
        tmp_path / "whole.jsonl",
        tmp_path / "cut.jsonl",
    )
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        str(model_dir),
        "--input",
        str(source),
        "--batch-size",
        "2",
    ]
    command += [
        "--temperature",
        "1.0",
        "--stop-token-ids",
        "",
        "--strategy",
        "sequential",
        "--output",
    ]
    process = subprocess.Popen([*command, str(cut)], stderr=subprocess.DEVNULL, env=environment)
    while not (cut.exists() and cut.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = cut.read_bytes().count(b"\n")
    assert 5 <= kept < 200
    for target in (cut, whole):
        done = subprocess.run(
            [*command, str(target)], stderr=subprocess.DEVNULL, env=environment, timeout=500
        )
        assert done.returncode == 0
    assert [line["tokens"] for line in read_lines(cut)] == [
        line["tokens"] for line in read_lines(whole)
    ]


def test_ids_need_no_tokenizer(monkeypatch, model_dir, tmp_path):
    bare = tmp_path / "bare"
    save_pretrained(load_pretrained(model_dir), bare)
    source, target = (
        write_lines(tmp_path / "in.jsonl", [{"prompt_ids": [5, 9]}]),
        tmp_path / "out.jsonl",
    )
    assert run(monkeypatch, "--model", bare, "--prompt-ids", "5", "--max-new-tokens", 2).code == 0
    assert (
        run(
            monkeypatch,
            "--model",
            bare,
            "--input",
            source,
            "--output",
            target,
            "--max-new-tokens",
            2,
        ).code
        == 0
    )
    assert "text" not in read_lines(target)[0]
    result = run(monkeypatch, "--model", bare, "--prompt", "a")
    assert result.code == 2 and "no tokenizer" in result.err


def test_chat_remembers(cli, model_dir):
    """Each line of the input is a turn, rendered after those before it; what is said goes to stdout."""
    result = cli("--chat", "--json", "--max-new-tokens", 5, stdin="hi\nand?\n")
    assert result.code == 0 and len(result.records) == 2
    first = "<|im_start|>user\nhi<|im_end|>\n"
    second = f"{first}<|im_start|>assistant\n{result.records[0]['text']}<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
    for text, record in zip((first, second), result.records, strict=True):
        ids = make_byte_tokenizer().encode(text + "<|im_start|>assistant\n")
        assert record["tokens"] == expected(model_dir, [ids], max_new_tokens=5)[0].tokens


@pytest.mark.slow
@pytest.mark.ci
def test_a_chat_that_outgrows_its_engine_goes_on(model_dir, monkeypatch, capsys):
    """A larger engine reads all of it again."""
    lengths, prepare = [], sample.Sampler.prepare
    spy = lambda sampler, slots, length: lengths.append(length) or prepare(sampler, slots, length)
    monkeypatch.setattr(sample.Sampler, "prepare", spy)
    monkeypatch.setattr(sample, "CHAT_LENGTH", 1)
    monkeypatch.setattr(sample, "LEAST_LENGTH", 1)
    question = "and now, what of a longer question?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\n{question}\n"))
    sample.run(sample.SampleConfig(model=str(model_dir), chat=True, json=True, max_new_tokens=5))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    ids = make_byte_tokenizer().encode(turn("hi") + first["text"] + "<|im_end|>\n" + turn(question))
    assert second["tokens"] == expected(model_dir, [ids], max_new_tokens=5)[0].tokens
    assert len(lengths) == 2 and lengths[0] < len(ids) + 5 <= lengths[1]


def test_a_turn_reads_nothing_that_an_earlier_one_did(cli):
    """But for blocks of four that the earlier turn's end or this one's beginning cuts."""
    result = cli(
        "--chat", "--json", "--max-new-tokens", 40, "--stop-token-ids", "", stdin="hi\nand?\n"
    )
    first, _second = (record["text"] for record in result.records)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    encode = make_byte_tokenizer().encode
    before = [*encode(turn.format("hi")), *result.records[0]["tokens"]]
    now = encode(turn.format("hi") + first + "<|im_end|>\n" + turn.format("and?"))
    same = next(
        (i for i, (one, other) in enumerate(zip(before, now, strict=False)) if one != other),
        len(before),
    )
    read, shared = [
        int(number) for number in re.findall(r"prefill: (\d+) tokens.*; (\d+) more", result.err)[1]
    ]
    assert shared >= len(encode(turn.format("hi"))) // 4 * 4 >= 16
    # The last block of an answer ends in no page.
    assert shared == min(same, len(before) - 1) // 4 * 4 and read + shared == len(now) // 4 * 4


def test_chat_that_is_no_text(cli):
    assert_one_line(cli("--chat", stdin="a\udcff\n"), "lone surrogate", "valid Unicode")


def test_chat_forgets_a_turn_without_an_answer(cli):
    """Its first token is a stop: nothing is said, and the same question again is answered as if it were the first."""
    first = cli(
        "--chat", "--json", "--max-new-tokens", 5, "--stop-token-ids", "", stdin="hi\n"
    ).records[0]["tokens"][0]
    result = cli(
        "--chat", "--json", "--max-new-tokens", 5, "--stop-token-ids", first, stdin="hi\nhi\n"
    )
    assert result.code == 0 and [record["tokens"] for record in result.records] == [[], []]


TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_that_fills_its_context_leaves_out_its_oldest_turns(cli, model_dir):
    """And says so; what is left is answered as if it were all there had been."""
    questions = [f"question {i} of a chat that goes on and on" for i in range(4)]
    options = ("--max-new-tokens", 90, "--stop-token-ids", "", "--json", "--system", "be brief")
    result = cli("--chat", *options, stdin="".join(f"{question}\n" for question in questions))
    assert result.code == 0 and len(result.records) == 4
    said = [line for line in result.err.splitlines() if "left out" in line]
    assert (
        said[0] == "the context of 300 tokens is full: the oldest turns are left out, 1 of 1 so far"
        and len(said) == 3
    )
    ids = make_byte_tokenizer().encode(
        "<|im_start|>system\nbe brief<|im_end|>\n" + TURN.format(questions[-1])
    )
    config = DecodingConfig()
    alone = Engine(load_pretrained(model_dir), batch_slots=1, pages=5, page_size=64)
    (wanted,) = alone.generate([ids], config, max_new_tokens=90, stop_token_ids=())
    assert result.records[-1]["tokens"] == wanted.tokens


def test_a_message_that_does_not_fit_is_not_answered(cli):
    """It says so, on stdout too for a program, and the chat goes on as if it had not been said."""
    options = ("--chat", "--max-new-tokens", 9, "--json")
    result = cli(*options, stdin=f"hi\n{'a' * 300}\nand?\n")
    assert result.code == 0 and "this message is not answered: it has 3" in result.err
    first, refused, last = result.records
    assert (
        set(refused) == {"error"}
        and "--max-new-tokens is 9 and the context 300; shorten it" in refused["error"]
    )
    plain = cli(*options, stdin="hi\nand?\n").records
    assert [record["tokens"] for record in (first, last)] == [record["tokens"] for record in plain]


def test_a_chat_may_open_with_a_system_message(cli, model_dir):
    result = cli("--chat", "--system", "be brief", "--json", "--max-new-tokens", 5, stdin="hi\n")
    ids = make_byte_tokenizer().encode(
        "<|im_start|>system\nbe brief<|im_end|>\n" + TURN.format("hi")
    )
    assert result.records[0]["tokens"] == expected(model_dir, [ids], max_new_tokens=5)[0].tokens


@pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "semi_autoregressive"])
def test_stop_strings(cli, tmp_path, strategy):
    """Each ends the answer before it, in every way of asking; the flag may be given several times."""
    options = ("--max-new-tokens", 40, "--stop-token-ids", "", "--strategy", strategy)
    whole = cli("--prompt", "one two", "--json", *options).records[0]["text"]
    stop = next(
        whole[i : i + 2]
        for i in range(8, 30)
        if whole[i : i + 2].isprintable() and " " not in whole[i : i + 2]
    )
    cut = whole.partition(stop)[0]
    flags = ("--stop-strings=never said", f"--stop-strings={stop}")
    (record,) = cli("--prompt", "one two", "--json", *options, *flags).records
    assert (record["text"], record["finish_reason"], record["stop_reason"]) == (cut, "stop", stop)
    assert cli("--prompt", "one two", *options, *flags).out == cut + "\n"
    ids = ",".join(map(str, make_byte_tokenizer().encode("one two")))
    assert cli("--prompt-ids", ids, "--json", *options, *flags).records == [record]
    source, target = (
        write_lines(tmp_path / "in.jsonl", [{"prompt": "one two"}]),
        tmp_path / "out.jsonl",
    )
    assert cli("--input", source, "--output", target, *options, *flags).code == 0
    assert read_lines(target)[0]["text"] == cut


THINKING = (
    "{%- for message in messages -%}{{- message.role + ': ' + message.content + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}{%- endif -%}"
)


@pytest.fixture(scope="module")
def thinking_dir(model_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("thinking")
    make_byte_tokenizer(chat_template=THINKING).save_pretrained(directory / "tokenizer")
    save_pretrained(
        load_pretrained(model_dir), directory / "model", tokenizer_from=directory / "tokenizer"
    )
    return directory / "model"


def test_variables_of_the_chat_template(monkeypatch, thinking_dir, tmp_path):
    """For a chat and for records, whose own come first."""
    off = ("--chat-template-kwargs", '{"enable_thinking": false}', "--max-new-tokens", 5)
    prompts = {flag: "user: hi\nassistant: " + "<think></think>" * flag for flag in (False, True)}
    encode = make_byte_tokenizer().encode
    texts = {
        flag: expected(thinking_dir, [encode(prompt)], max_new_tokens=5)[0].text
        for flag, prompt in prompts.items()
    }
    assert texts[True] != texts[False]
    for options, flag in ((off, True), (off[2:], False)):
        result = run(monkeypatch, "--model", thinking_dir, "--chat", *options, stdin="hi\n")
        assert result.out == texts[flag] + "\n"
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    own = {**asked, "chat_template_kwargs": {"enable_thinking": True}}
    source, target = write_lines(tmp_path / "in.jsonl", [asked, own]), tmp_path / "out.jsonl"
    assert (
        run(monkeypatch, "--model", thinking_dir, "--input", source, "--output", target, *off).code
        == 0
    )
    assert [line["text"] for line in read_lines(target)] == [texts[True], texts[False]]


def test_help_is_for_people(cli):
    result = cli("--help")
    assert result.code == 0
    asked = (
        "--prompt-ids",
        "--strategy",
        "low_confidence_dynamic",
        "--confidence-threshold",
        "seed + i",
    )
    for words in (
        *asked,
        "--stop-strings",
        "--system",
        "--chat-template-kwargs",
        "enable_thinking",
    ):
        assert words in result.out


BAD_FLAGS = [
    ([], "no prompt given", "--prompt"),
    (["--prompt", "a", "--chat"], "--prompt and --chat given", "give one of"),
    (["--prompt-ids", "5,x"], "'5,x'", "5,9,12"),
    (["--prompt-ids", "999"], "token id 999", "0 to 263"),
    (["--prompt-ids", "5", "--stop-token-ids", "a"], "'a'", "5,9,12"),
    (["--prompt-ids", "5", "--stop-token-ids", "999"], "[999]", "0 to 263"),
    (["--prompt-ids", "5", "--max-new-tokens", "-1"], "--max-new-tokens is -1", ">= 0"),
    (
        ["--prompt-ids", "5", "--max-new-tokens", "300"],
        "--max-new-tokens is 300",
        "max_position_embeddings 300",
    ),
    (["--prompt-ids", "5", "--batch-size", "0"], "--batch-size is 0", "positive integer"),
    (["--prompt-ids", "5", "--denoising-steps", "5"], "--denoising-steps 5", "--block-size 4"),
    (["--prompt-ids", "5", "--top-p", "2"], "--top-p is 2.0", "(0, 1]"),
    (["--prompt-ids", "5", "--temperature", "-1"], "--temperature is -1.0", "0 (greedy)"),
    (["--prompt-ids", "5", "--mask-token-id", "999"], "--mask-token-id is 999", "0 to 263"),
    (["--prompt-ids", "5", "--block-size", "0"], "--block-size is 0", "positive integer"),
    (["--prompt-ids", "5", "--dtype", "int4"], "'int4'", "float32"),
    (["--prompt-ids", "5", "--seed", "99999999999"], "--seed is 99999999999", "31 bits"),
    (["--prompt", "a\udcff"], "lone surrogate at character 1", "valid Unicode"),
    (["--input", "in.jsonl"], "--input needs --output", "name the file"),
    (
        ["--input", "missing.jsonl", "--output", "out.jsonl"],
        "missing.jsonl: cannot be read",
        "JSONL",
    ),
    (["--prompt-ids", "5", "--watch", "--json"], "--watch shows one answer", "leave out --json"),
    (
        ["--input", "in.jsonl", "--output", "out.jsonl", "--watch"],
        "--watch shows one answer",
        "--input",
    ),
    (
        ["--prompt", "a", "--watch", "--strategy", "semi_autoregressive"],
        "--watch follows the engine",
        "leave it out",
    ),
    (["--prompt-ids", "5", "--stop-token-ids", "1,2,3,4,5,6,7,8,9"], "9 stop tokens", "at most 8"),
    (["--prompt-ids", "5", "--model", "nowhere"], "nowhere: no such directory", "hub id"),
    (["--prompt", "a", "--stop-strings="], "--stop-strings has an empty text", "leave it out"),
    (["--prompt", "a", "--system", "b"], "--system opens a --chat", "the text"),
    (
        ["--prompt", "a", "--chat-template-kwargs", "{}"],
        "--chat-template-kwargs is for --chat and --input",
        "leave it",
    ),
    (
        ["--chat", "--chat-template-kwargs", "{'a': 1}"],
        "\"{'a': 1}\" is not a JSON object",
        '{"enable_thinking": false}',
    ),
    (
        ["--chat", "--chat-template-kwargs", "[1]"],
        "'[1]' is not a JSON object",
        '{"enable_thinking": false}',
    ),
    (
        ["--chat", "--max-new-tokens", "300"],
        "--max-new-tokens is 300 and the context 300",
        "give less",
    ),
]


def assert_one_line(result: Result, *names: str) -> None:
    assert result.code == 2 and result.out == ""
    # A slow machine says besides that it compiles.
    lines = [line for line in result.err.splitlines() if line and "compiling " not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for name in names:
        assert name in lines[0]


@pytest.mark.parametrize("flags, value, fix", BAD_FLAGS, ids=lambda part: str(part)[:40])
def test_bad_flags(cli, flags, value, fix, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_one_line(cli(*flags), value, fix)
    assert not list(tmp_path.iterdir())


MENDED_FLAGS = [
    ["--prompt-ids", "5,9,12"],
    ["--prompt-ids", "263"],
    ["--prompt-ids", "5", "--stop-token-ids", "263"],
    ["--prompt-ids", "5", "--stop-token-ids", "1,2,3,4,5,6,7,8"],
    [
        "--prompt-ids",
        "5",
        "--denoising-steps",
        "4",
        "--top-p",
        "1",
        "--temperature",
        "0",
        "--mask-token-id",
        "263",
    ],
    ["--prompt-ids", "5", "--dtype", "float32", "--seed", "2147483646"],
    ["--prompt", "a", "--strategy", "semi_autoregressive"],
    ["--chat", "--system", "b", "--chat-template-kwargs", "{}"],
]


@pytest.mark.parametrize("flags", MENDED_FLAGS, ids=" ".join)
def test_what_the_errors_of_flags_advise_works(cli, flags):
    result = cli(*flags, "--max-new-tokens", 2, stdin="hi\n")
    assert result.code == 0 and result.out


BAD_FILES = [
    (b'{"prompt": "a"}\n{"prompt"\n', "in.jsonl:2: not valid JSON", "one object per line"),
    (b'{"prompt": "a"}\n\n{"prompt": \n', "in.jsonl:3: not valid JSON", "one object per line"),
    (b'{"prompt": "a"}\n\n{"text": "a"}\n', "in.jsonl:3: no prompt", '"messages"'),
    (b"[1]\n", "in.jsonl:1: a JSON list, not an object", "one object per line"),
    (b'{"text": "a"}\n', "in.jsonl:1: no prompt", '"messages"'),
    (
        b'{"prompt": "\\ud800"}\n',
        "in.jsonl:1: a lone surrogate at character 12 (U+D800",
        "valid Unicode",
    ),
    (b"\xff\n", "in.jsonl:1: invalid UTF-8 at byte 0", "save the file as UTF-8"),
    (
        b'{"prompt": "a", "n": ' + b"7" * 5000 + b"}\n",
        "in.jsonl:1: a number that cannot be read",
        "as a string",
    ),
    (b"\x1f\x8b\x08\0\n", "in.jsonl: compressed with gzip", "decompress it first: gzip -dc"),
    (
        b'{"prompt_ids": [5]}\n{"prompt_ids": [999]}\n',
        "in.jsonl:2: the prompt holds",
        "token id 999",
    ),
    (
        b'{"prompt_ids": [5]}\n{"prompt_ids": [' + b"5, " * 298 + b"5]}\n",
        "in.jsonl:2: the prompt has 299 tokens",
        "300",
    ),
    (b'{"prompt": "a", "max_new_tokens": "9"}\n', 'in.jsonl:1: "max_new_tokens" is', "integer"),
    (b'{"prompt": "a", "seed": 1.5}\n', 'in.jsonl:1: "seed" is 1.5', "integer"),
    (b'{"prompt": "a", "max_new_tokens": -1}\n', "in.jsonl:1: max_new_tokens is -1", ">= 0"),
    (b'{"messages": []}\n', 'in.jsonl:1: "messages" is missing, empty', "give"),
    (
        b'{"messages": [{"role": "user"}]}\n',
        "in.jsonl:1: messages[0] has content of type NoneType",
        "give a string",
    ),
]


@pytest.mark.parametrize("content, value, fix", BAD_FILES, ids=lambda part: str(part)[:40])
def test_bad_input_files(cli, content, value, fix, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(content)
    result = cli(
        "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 2
    )
    assert_one_line(result, value, fix)
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content, line",
    [
        (b"notes that matter", 1),
        (b'{"prompt": "a"}\n', 1),
        (b'{"tokens": [1]}\n{"to', 1),
        (b"[1]\n", 1),
    ],
)
def test_a_file_that_is_not_the_output_is_left_alone(cli, content, line, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", INPUT), tmp_path / "notes"
    target.write_bytes(content)
    assert_one_line(
        cli("--input", source, "--output", target),
        f"notes:{line}: not an answer",
        "another --output",
    )
    assert target.read_bytes() == content


def test_the_output_of_another_input_is_left_alone(cli, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", INPUT[:2]), tmp_path / "out.jsonl"
    cli("--input", source, "--output", target, "--max-new-tokens", 2)
    before = target.read_bytes()
    for other, line in ((INPUT[1::-1], 1), (INPUT[:1], 2), ([INPUT[0], {"prompt_ids": [9, 8]}], 2)):
        write_lines(source, other)
        result = cli("--input", source, "--output", target)
        assert_one_line(result, f"out.jsonl:{line}: not an answer", "another --output")
        assert target.read_bytes() == before


@pytest.fixture
def answers(cli, tmp_path):
    """A file of answers, made with a temperature; and what adds to it, with other options or as it was."""
    source, target = write_lines(tmp_path / "in.jsonl", INPUT[:2]), tmp_path / "out.jsonl"
    options = ("--input", source, "--output", target, "--max-new-tokens", 2, "--temperature", 0.5)
    assert cli(*options).code == 0
    write_lines(source, INPUT[:3])
    return target, lambda *more: cli(*options, *more)


@pytest.mark.slow
@pytest.mark.ci
def test_answers_of_other_settings_are_not_added_to(answers, cli, tmp_path):
    target, again = answers
    before = target.read_bytes()
    for more, told in {
        ("--temperature", 0.7): "temperature was 0.5 and is 0.7; give what it was",
        (
            "--temperature",
            0,
            "--top-k",
            5,
        ): "temperature was 0.5 and is the default, top_k was the default and is 5;",
        (
            "--seed",
            3,
            "--stop-strings=x",
        ): "seed was the default and is 3, stop_strings was the default and is ['x'];",
        (
            "--max-new-tokens",
            3,
        ): "max_new_tokens was 2 and is 3; give what it was, or choose another --output",
    }.items():
        assert_one_line(again(*more), f"{target}: holds answers made otherwise: ", told)
        assert target.read_bytes() == before
    # Both ways out that are named; how many are decoded at once changes nothing.
    assert again("--temperature", 0.7, "--output", tmp_path / "other.jsonl").code == 0
    assert again("--batch-size", 1).code == 0
    assert target.read_bytes().startswith(before) and len(read_lines(target)) == 3


def test_answers_of_another_model_are_not_added_to(answers, model_dir, tmp_path):
    """Whatever it is called: one that has moved is the same, one that was trained further is another."""
    target, again = answers
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    assert again("--model", moved).code == 0 and len(read_lines(target)) == 3
    before = target.read_bytes()
    trained = load_pretrained(model_dir)
    trained.final_norm = nnx.Param(trained.final_norm * 1.001)
    save_pretrained(trained, moved)
    assert_one_line(
        again("--model", moved),
        f"holds answers of the model {moved}, which has changed since",
        "another --output",
    )
    assert target.read_bytes() == before
    assert again("--model", moved, "--output", tmp_path / "other.jsonl").code == 0
    assert_one_line(
        again("--output", tmp_path / "other.jsonl"),
        f"of the model {moved}, and the model is now {model_dir};",
    )


def test_answers_that_nothing_is_known_of_are_kept_with_a_word(answers):
    target, again = answers
    settings = target.with_name("out.jsonl.settings.json")
    settings.unlink()
    result = again("--temperature", 0.7)
    assert (
        result.code == 0
        and f"{target}: nothing says what made its 2 answers; they are kept" in result.err
    )
    settings.write_text("{")
    assert_one_line(
        again(), "out.jsonl.settings.json: cannot be read", "remove it, or choose another --output"
    )
    settings.unlink()
    assert again().code == 0 and len(read_lines(target)) == 3


def test_a_new_output_owes_nothing_to_old_settings(answers):
    target, again = answers
    target.unlink()
    assert again("--temperature", 0.7).code == 0 and len(read_lines(target)) == 3
    assert_one_line(again(), "temperature was 0.7 and is 0.5")


def test_variables_that_the_template_does_not_read(monkeypatch, thinking_dir):
    options = ("--model", thinking_dir, "--chat", "--max-new-tokens", 2, "--chat-template-kwargs")
    assert_one_line(
        run(monkeypatch, *options, '{"enable_thinkin": false}', stdin="hi\n"),
        "'enable_thinkin'",
        "remove it",
    )
    assert run(monkeypatch, *options, "{}", stdin="hi\n").code == 0


def test_variables_that_no_record_uses(cli, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    options = (
        "--input",
        source,
        "--output",
        tmp_path / "out.jsonl",
        "--chat-template-kwargs",
        '{"a": 1}',
    )
    assert_one_line(cli(*options), "in.jsonl has no messages", "leave it out")
    assert cli(*options[:4], "--max-new-tokens", 2).code == 0


def test_outputs_that_cannot_be_written(cli, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", INPUT)
    for target in (tmp_path / "no" / "out.jsonl", tmp_path):
        assert_one_line(
            cli("--input", source, "--output", target), "cannot be written", "another --output"
        )


def test_no_chat_template(monkeypatch, model_dir, tmp_path):
    tokenizer, bare = tmp_path / "tokenizer", tmp_path / "model"
    make_byte_tokenizer(chat_template=None).save_pretrained(tokenizer)
    save_pretrained(load_pretrained(model_dir), bare, tokenizer_from=tokenizer)
    options = ("--model", bare, "--chat", "--max-new-tokens", 2)
    assert_one_line(
        run(monkeypatch, *options, stdin="hi\n"),
        f"{bare}: the tokenizer has no chat template",
        "set",
    )
    (bare / "chat_template.jinja").write_text(CHATML)
    assert run(monkeypatch, *options, stdin="hi\n").code == 0


def test_as_a_process(model_dir, environment):
    """One good run and one bad one from a shell: what is asked on stdout, what went wrong on stderr, and the code."""
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        str(model_dir),
        "--json",
        "--max-new-tokens",
        "3",
        "--prompt-ids",
    ]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    run_with = lambda ids: subprocess.run([*command, ids], **options)
    good, bad = run_with("5,9"), run_with("x")
    assert good.returncode == 0 and len(json.loads(good.stdout)["tokens"]) <= 3
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: 'x' is not a list of token ids; write them as 5,9,12\n"
