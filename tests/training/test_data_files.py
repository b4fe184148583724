"""A fingerprint sees other names, sizes and contents, and not where files lie."""

import shutil
from pathlib import Path

import pytest

from sdar_jax.data import SourceConfig
from sdar_jax.training.data_files import fingerprint, report_changes


def of(directory: Path) -> dict:
    return fingerprint([SourceConfig(str(directory), "text")], directory.parent / "tokenizer")


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "data" / "a.txt").write_bytes(b"small")
    (tmp_path / "data" / "b.txt").write_bytes(bytes(i % 251 for i in range(300_000)))
    return tmp_path / "data"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


CHANGES = {
    "content": lambda data: (data / "a.txt").write_bytes(b"smell"),
    "name": lambda data: (data / "a.txt").rename(data / "c.txt"),
    "another": lambda data: (data / "c.txt").write_bytes(b""),
    "longer": lambda data: (data / "b.txt").write_bytes((data / "b.txt").read_bytes() + b"x"),
    "first": lambda data: flip(data / "b.txt", 0),
    "last": lambda data: flip(data / "b.txt", 299_999),
    "middle": lambda data: flip(data / "b.txt", (300_000 - 8192) * 3 // 7 + 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_seen(change, files, caplog):
    before = of(files)
    assert of(files) == before
    report_changes(before, of(files))
    assert not caplog.text
    CHANGES[change](files)
    assert of(files) != before
    report_changes(before, of(files))
    assert caplog.text.count("is not what it was when the checkpoint was saved") == 1


def test_a_tokenizer_that_changed_is_seen(files, caplog):
    before = of(files)
    (files.parent / "tokenizer" / "tokenizer.json").write_text("[]")
    report_changes(before, of(files))
    assert "the tokenizer is not what it was" in caplog.text


def test_files_may_be_moved(files, tmp_path):
    before = list(of(files).values())
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    assert list(of(tmp_path / "elsewhere" / "data").values()) == before
