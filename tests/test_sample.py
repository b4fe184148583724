"""sample.py from its command line to its output, on a tiny saved model."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import sample
from sdar_jax import DecodingConfig, generate, load_pretrained, save_pretrained
from tests.data.conftest import make_byte_tokenizer
from tests.tiny import tiny_model

SCRIPT = str(Path(sample.__file__))
TOKENIZER_SIZE = 260
END = 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = directory / "tokenizer"
    make_byte_tokenizer().save_pretrained(tokenizer)
    fields = {"vocab_size": TOKENIZER_SIZE + 4, "mask_token_id": TOKENIZER_SIZE, "max_position_embeddings": 300}
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


@pytest.fixture
def cli(monkeypatch, model_dir):
    return lambda *arguments, **options: run(monkeypatch, "--model", model_dir, *arguments, **options)


def expected(model_dir, prompts, max_new_tokens=6, seed=0, **fields):
    """What the library gives for the same, with the tokenizer."""
    model, config, tokenizer = load_pretrained(model_dir), DecodingConfig(**fields), make_byte_tokenizer()
    return generate(model, prompts, config, max_new_tokens=max_new_tokens, seed=seed, tokenizer=tokenizer)


def test_prompt_ids_to_json(cli, model_dir):
    result = cli("--prompt-ids", "5,9,12", "--json", "--max-new-tokens", 6)
    (wanted,) = expected(model_dir, [[5, 9, 12]])
    assert result.code == 0 and result.out.count("\n") == 1
    (record,) = result.records
    assert record["tokens"] == wanted.tokens and record["finish_reason"] == wanted.finish_reason
    assert record["logprobs"] == pytest.approx(wanted.logprobs, rel=1e-5)
    assert "text" not in record and set(record) == {*wanted._fields, "tokens_per_forward"} - {"text"}


def test_prompt_ids_in_words(cli, model_dir):
    result = cli("--prompt-ids", "5,9,12", "--max-new-tokens", 6)
    assert result.out == ",".join(map(str, expected(model_dir, [[5, 9, 12]])[0].tokens)) + "\n"
    assert "tokens a forward" in result.err


def test_prompt_and_decoding_options(cli, model_dir):
    options = ("--strategy", "low_confidence_static", "--denoising-steps", 2, "--temperature", 1.0, "--top-k", 50)
    result = cli("--prompt", "one two", "--max-new-tokens", 6, "--seed", 3, "--stop-token-ids", "", "--json", *options)
    fields = dict(strategy="low_confidence_static", denoising_steps=2, temperature=1.0, top_k=50)
    (wanted,) = expected(model_dir, ["one two"], seed=3, **fields)
    assert result.records[0]["tokens"] == wanted.tokens and result.records[0]["text"] == wanted.text


def test_block_size_and_mask_may_come_from_the_command_line(cli, model_dir):
    result = cli("--prompt-ids", "5,9", "--block-size", 8, "--mask-token-id", 262, "--max-new-tokens", 6, "--json")
    assert result.code == 0 and len(result.records[0]["tokens"]) <= 6


CONVERSATION = {"messages": [{"role": "user", "content": "1+1"}]}
INPUT = [{"prompt": "a\u2028b", "id": 7}, {"prompt_ids": [9, 8, 7]}, CONVERSATION, {"prompt": "c"}, {"prompt": "dd"}]


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_file_is_answered_line_by_line(cli, model_dir, tmp_path):
    """With sampling: line i uses seed + i, in whichever batch it falls."""
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
        (alone,) = generate(model, [ids[i]], config, max_new_tokens=5, seed=11 + i, stop_token_ids=())
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
        assert [line["tokens"] for line in read_lines(cut)] == [line["tokens"] for line in read_lines(whole)]
    before = whole.read_bytes()
    cli("--input", source, "--output", whole, *options)
    assert whole.read_bytes() == before


def test_ids_need_no_tokenizer(monkeypatch, model_dir, tmp_path):
    bare = tmp_path / "bare"
    save_pretrained(load_pretrained(model_dir), bare)
    source, target = write_lines(tmp_path / "in.jsonl", [{"prompt_ids": [5, 9]}]), tmp_path / "out.jsonl"
    assert run(monkeypatch, "--model", bare, "--prompt-ids", "5", "--max-new-tokens", 2).code == 0
    assert run(monkeypatch, "--model", bare, "--input", source, "--output", target, "--max-new-tokens", 2).code == 0
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


def test_chat_that_is_no_text(cli):
    assert_one_line(cli("--chat", stdin="a\udcff\n"), "lone surrogate", "valid Unicode")


def test_chat_forgets_a_turn_without_an_answer(cli):
    """Every token is a stop: nothing is said, and the next turn is answered all the same."""
    every = ",".join(map(str, range(TOKENIZER_SIZE)))
    result = cli("--chat", "--json", "--max-new-tokens", 5, "--stop-token-ids", every, stdin="hi\nand?\n")
    assert result.code == 0 and [record["tokens"] for record in result.records] == [[], []]


def test_help_is_for_people(cli):
    result = cli("--help")
    assert result.code == 0
    for words in ("--prompt-ids", "--strategy", "low_confidence_dynamic", "--confidence-threshold", "seed + i"):
        assert words in result.out


BAD_FLAGS = [
    ([], "no prompt given", "--prompt"),
    (["--prompt", "a", "--chat"], "--prompt and --chat given", "give one of"),
    (["--prompt-ids", "5,x"], "'5,x'", "5,9,12"),
    (["--prompt-ids", "999"], "token id 999", "0 to 263"),
    (["--prompt-ids", "5", "--stop-token-ids", "a"], "'a'", "5,9,12"),
    (["--prompt-ids", "5", "--stop-token-ids", "999"], "[999]", "0 to 263"),
    (["--prompt-ids", "5", "--max-new-tokens", "-1"], "max_new_tokens is -1", ">= 0"),
    (["--prompt-ids", "5", "--max-new-tokens", "300"], "max_new_tokens is 300", "max_position_embeddings 300"),
    (["--prompt-ids", "5", "--batch-size", "0"], "--batch-size is 0", "positive integer"),
    (["--prompt-ids", "5", "--denoising-steps", "5"], "denoising_steps 5", "block_size 4"),
    (["--prompt-ids", "5", "--top-p", "2"], "top_p is 2.0", "(0, 1]"),
    (["--prompt-ids", "5", "--temperature", "-1"], "temperature is -1.0", "0 (greedy)"),
    (["--prompt-ids", "5", "--mask-token-id", "999"], "mask_token_id is 999", "0 to 263"),
    (["--prompt-ids", "5", "--block-size", "0"], "block_size is 0", "positive integer"),
    (["--prompt-ids", "5", "--dtype", "int4"], "'int4'", "float32"),
    (["--prompt-ids", "5", "--seed", "99999999999"], "seed is 99999999999", "31 bits"),
    (["--prompt", "a\udcff"], "lone surrogate at character 1", "valid Unicode"),
    (["--input", "in.jsonl"], "--input needs --output", "name the file"),
    (["--input", "missing.jsonl", "--output", "out.jsonl"], "missing.jsonl: cannot be read", "JSONL"),
    (["--prompt-ids", "5", "--model", "nowhere"], "nowhere: no such directory", "hub id"),
]


def assert_one_line(result: Result, *names: str) -> None:
    assert result.code == 2 and result.out == ""
    lines = [line for line in result.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for name in names:
        assert name in lines[0]


@pytest.mark.parametrize("flags, value, fix", BAD_FLAGS, ids=lambda part: str(part)[:40])
def test_bad_flags(cli, flags, value, fix, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_one_line(cli(*flags), value, fix)
    assert not list(tmp_path.iterdir())


BAD_FILES = [
    (b'{"prompt": "a"}\n{"prompt"\n', "in.jsonl:2: not JSON", "one object a line"),
    (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "in.jsonl:2: not JSON", "one object a line"),
    (b"[1]\n", "in.jsonl:1: not an object", '{"prompt": ...}'),
    (b'{"text": "a"}\n', "in.jsonl:1: no prompt", '"messages"'),
    (b'{"prompt": "\\ud800"}\n', "in.jsonl:1: not JSON", "surrogates"),
    (b"\xff\n", "in.jsonl: cannot be read", "JSONL"),
    (b'{"prompt_ids": [5]}\n{"prompt_ids": [999]}\n', "the prompts from line 1 on: prompt 1", "token id 999"),
    (b'{"messages": []}\n', 'in.jsonl:1: "messages" is missing, empty', "give"),
    (b'{"messages": [{"role": "user"}]}\n', "in.jsonl:1: messages[0] has content of type NoneType", "give a string"),
]


@pytest.mark.parametrize("content, value, fix", BAD_FILES, ids=lambda part: str(part)[:40])
def test_bad_input_files(cli, content, value, fix, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(content)
    result = cli("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    assert_one_line(result, value, fix)


@pytest.mark.parametrize(
    "content, line",
    [(b"notes that matter", 1), (b'{"prompt": "a"}\n', 1), (b'{"tokens": [1]}\n{"to', 1), (b"[1]\n", 1)],
)
def test_a_file_that_is_not_the_output_is_left_alone(cli, content, line, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", INPUT), tmp_path / "notes"
    target.write_bytes(content)
    assert_one_line(cli("--input", source, "--output", target), f"notes:{line}: not an answer", "another --output")
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


def test_outputs_that_cannot_be_written(cli, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", INPUT)
    for target in (tmp_path / "no" / "out.jsonl", tmp_path):
        assert_one_line(cli("--input", source, "--output", target), "cannot be written", "another --output")


def test_no_chat_template(monkeypatch, model_dir, tmp_path):
    tokenizer, bare = tmp_path / "tokenizer", tmp_path / "model"
    make_byte_tokenizer(chat_template=None).save_pretrained(tokenizer)
    save_pretrained(load_pretrained(model_dir), bare, tokenizer_from=tokenizer)
    assert_one_line(run(monkeypatch, "--model", bare, "--chat", stdin="hi\n"), "no chat template", "set")


def test_as_a_process(model_dir):
    """One good run and one bad one from a shell: what is asked on stdout, what went wrong on stderr, and the code."""
    command = [sys.executable, SCRIPT, "--model", str(model_dir), "--json", "--max-new-tokens", "3", "--prompt-ids"]
    run_with = lambda ids: subprocess.run([*command, ids], capture_output=True, text=True, timeout=300)
    good, bad = run_with("5,9"), run_with("x")
    assert good.returncode == 0 and len(json.loads(good.stdout)["tokens"]) <= 3
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: 'x' is not a list of token ids; write them as 5,9,12\n"
