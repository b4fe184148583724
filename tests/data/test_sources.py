import bz2
import errno
import gc
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.data import SourceConfig
from sdar_jax.data.sources import Source, source_names
from sdar_jax.decoding.jsonl import numbered_records, read_records
from sdar_jax.errors import DataError


def records(source):
    return [source.read(k) for k in range(len(source))]


@given(
    st.lists(st.sampled_from(["", " ", "\t", "a", "éß", "x" * 300, "\r"]), max_size=30),
    st.booleans(),
)
def test_jsonl_lines_are_numbered_as_an_editor_does(tmp_path_factory, texts, ends_with_newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [
        text if not text.strip() else json.dumps({"text": text}, ensure_ascii=False)
        for text in texts
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n" * ends_with_newline)
    source = Source(SourceConfig(str(path), "jsonl"))
    expected = [
        (f"{path}:{n}", {"text": text}) for n, text in enumerate(texts, start=1) if text.strip()
    ]
    assert [(source.where(k), source.read(k)) for k in range(len(source))] == expected


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/web.jsonl.gz", "hf://org/code@main", "maths/"], ["web", "code@main", "maths"]),
        (["web/train.jsonl", "code/train.jsonl"], ["web/train", "code/train"]),
        (["a/x/t.txt", "b/x/t.txt", "c/y/t.txt"], ["a/x/t", "b/x/t", "y/t"]),
        (["data/web/*.parquet", "data/c4.en/part-*.jsonl"], ["web", "part-*"]),
        (["c4.en.jsonl", "c4.de.jsonl", "t.txt", "x/t.txt"], ["c4.en", "c4.de", "t", "x/t"]),
        (["one.jsonl", "one.jsonl"], ["one.1", "one.2"]),
        (["*", "/"], ["*", "/"]),
    ],
)
def test_sources_have_short_names_that_differ(paths, names):
    assert source_names(paths) == names


def test_files_of_a_directory_and_a_glob_are_read_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in [("b.jsonl", "1"), ("a.jsonl", "0"), ("deep/c.ndjson", "2"), ("d.txt", "no")]:
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    assert [r["text"] for r in records(Source(SourceConfig(str(tmp_path), "jsonl")))] == [
        "0",
        "1",
        "2",
    ]
    assert [r["text"] for r in records(Source(SourceConfig(f"{tmp_path}/*.jsonl", "jsonl")))] == [
        "0",
        "1",
    ]
    assert [r["text"] for r in records(Source(SourceConfig(f"{tmp_path}/**/c.*", "jsonl")))] == [
        "2"
    ]


def write(folder: Path, *names: str) -> None:
    """Files of one record each, which is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def read(path: object, **options: str) -> list[str]:
    return [
        record["text"] for record in records(Source(SourceConfig(str(path), "jsonl", **options)))
    ]


def test_a_directory_and_a_glob_read_the_same_files(tmp_path, caplog):
    """Linked directories are followed, what is hidden is not, and nothing is read twice."""
    data = tmp_path / "data"
    write(
        data,
        "b.jsonl",
        "a/c.jsonl",
        "a/.ipynb_checkpoints/c-checkpoint.jsonl",
        ".git/d.jsonl",
        "._b.jsonl",
        "no.txt",
    )
    write(tmp_path, "elsewhere/e.jsonl", "elsewhere/deep/f.jsonl")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "up").symlink_to(data)
    (data / "z.jsonl").symlink_to(data / "b.jsonl")
    expected = ["a/c.jsonl", "b.jsonl", "elsewhere/deep/f.jsonl", "elsewhere/e.jsonl"]
    for path in (data, f"{data}/**/*.jsonl", f"{tmp_path}/d*/**/*.jsonl"):
        assert sorted(read(path)) == expected, path
    assert f"1 files are links to others that are read, the first {data}/z.jsonl" in caplog.text
    assert read(f"{data}/*.jsonl") == ["b.jsonl"]
    assert read(data) == read(f"{data}/**/*.jsonl")


def test_what_is_hidden_is_read_if_it_is_named(tmp_path):
    write(tmp_path, ".cache/a.jsonl", ".cache/.b.jsonl", "c.jsonl")
    assert read(tmp_path / ".cache") == read(f"{tmp_path}/.cache/*") == [".cache/a.jsonl"]
    assert (
        read(f"{tmp_path}/.cache/.*.jsonl")
        == read(tmp_path / ".cache/.b.jsonl")
        == [".cache/.b.jsonl"]
    )


def test_links_in_circles_are_no_maze(tmp_path):
    write(tmp_path, "a.jsonl")
    for name in "bcdefgh":
        (tmp_path / name).symlink_to(tmp_path)
    assert read(tmp_path) == read(f"{tmp_path}/**/*.jsonl") == ["a.jsonl"]


def test_a_link_to_nothing_is_a_file_that_cannot_be_opened(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    source = Source(SourceConfig(str(tmp_path), "jsonl"))
    assert len(source) == 1 and re.search(r"b.jsonl:1: .*No such file", source.failures[0])


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    write(tmp_path, "x[1]/a[2].jsonl", "x[1]/deep/b.jsonl")
    assert read(tmp_path / "x[1]") == ["x[1]/a[2].jsonl", "x[1]/deep/b.jsonl"]
    assert read(tmp_path / "x[1]" / "a[2].jsonl") == ["x[1]/a[2].jsonl"]


def test_a_pipe_is_told_from_a_file_that_is_not_there(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(
        DataError, match="pipe.jsonl: a pipe or device, .* write its content to a file"
    ):
        read(tmp_path / "pipe.jsonl")
    write(tmp_path, "a.jsonl")
    assert read(tmp_path) == ["a.jsonl"]


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "b/c.jsonl")
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name == "b":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(DataError, match="b: cannot be read .*; change its mode, or move it away"):
        read(tmp_path)
    shutil.move(tmp_path / "b", tmp_path.with_name("away"))
    assert read(tmp_path) == ["a.jsonl"]


def zstandard(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def zipped(path: Path, content: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", content)
    return path.read_bytes()


COMPRESSORS = {
    ".gz": lambda path, content: gzip.compress(content),
    ".zst": lambda path, content: zstandard(content),
    ".bz2": lambda path, content: bz2.compress(content),
    ".xz": lambda path, content: lzma.compress(content),
}
CONTENT = {
    "jsonl": b'{"text": "x"}\n{"text": "y"}\n',
    "chat": b'{"messages": []}\n{"messages": [1]}\n',
    "text": b"x\ny\n",
}


def failure(config: SourceConfig) -> str:
    """Why none of the source can be read."""
    try:
        (told,) = Source(config).failures
    except DataError as error:
        told = str(error)
    assert "\n" not in told
    return told


def compressed(path: Path, suffix: str, content: bytes) -> Path:
    path = path.with_name(path.name + suffix)
    path.write_bytes(COMPRESSORS[suffix](path, content))
    return path


@pytest.mark.parametrize("whole", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("format", CONTENT)
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_give_the_records_of_plain_ones(tmp_path, suffix, format, whole):
    name = {"text": "a b.txt"}.get(format, "a b.jsonl")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / name).write_bytes(CONTENT[format])
    path = compressed(tmp_path / name, suffix, CONTENT[format])
    (tmp_path / "plain" / name).rename(tmp_path / "plain" / "x")
    options = {"separator": "\n"} if format == "text" else {}
    source = Source(SourceConfig(str(tmp_path if whole else path), format, **options))
    plain = Source(SourceConfig(str(tmp_path / "plain" / "x"), format, **options))
    assert records(source) == records(plain) and len(source) == 2
    assert source.where(1) == plain.where(1).replace("plain/x", name + suffix)


def test_what_is_decompressed_leaves_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    path = compressed(tmp_path / "a.jsonl", ".gz", CONTENT["jsonl"])
    source = Source(SourceConfig(str(path), "jsonl"))
    assert len(list((tmp_path / "scratch").glob("*/*"))) == 1
    del source
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    path = compressed(
        tmp_path / "a.jsonl", suffix, b"".join(b'{"text": "%d"}\n' % i for i in range(999))
    )
    path.write_bytes(path.read_bytes()[:-40])
    assert f"{path}:1: compressed with" in (told := failure(SourceConfig(str(path), "jsonl")))
    assert "and damaged (" in told and "fetch it anew" in told


def test_no_room_to_decompress(tmp_path, monkeypatch):
    path = compressed(tmp_path / "a.jsonl", ".gz", CONTENT["jsonl"])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "has no room for what is in it; set TMPDIR" in failure(SourceConfig(str(path), "jsonl"))


def test_zip_archives_are_decompressed_by_the_command_that_is_told(tmp_path):
    path = tmp_path / "a b.jsonl.zip"
    path.write_bytes(zipped(path, CONTENT["jsonl"]))
    for place in (path, tmp_path):
        told = failure(SourceConfig(str(place), "jsonl"))
        assert "compressed with zip" in told and "decompress it first: unzip -p" in told
    if shutil.which("unzip"):
        subprocess.run(["sh", "-c", told.partition("decompress it first: ")[2]], check=True)
        assert read(tmp_path) == ["x", "y"]


def test_a_compressed_copy_is_not_read_beside_its_original(tmp_path, caplog):
    write(tmp_path, "a.jsonl")
    compressed(tmp_path / "b.jsonl", ".gz", b'{"text": "b"}\n')
    assert read(tmp_path) == ["a.jsonl", "b"] and not caplog.text
    compressed(tmp_path / "a.jsonl", ".xz", b'{"text": "a"}\n')
    assert read(tmp_path) == ["a.jsonl", "b"]
    assert f"1 of its files not read, the first {tmp_path}/a.jsonl.xz" in caplog.text


def test_a_compressed_file_under_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(CONTENT["jsonl"]))
    (tmp_path / "shard").write_bytes(gzip.compress(CONTENT["jsonl"]))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "shard") == ["x", "y"]


def test_a_directory_of_other_names_and_the_glob_that_reads_it(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(
        DataError, match="no .jsonl or .ndjson or .json file in this directory; give another"
    ):
        read(tmp_path / "data")
    write(tmp_path, "data/a.data", "data/b.data")
    (tmp_path / "data" / "c.zip").symlink_to("gone")
    with pytest.raises(DataError, match="but a.data, b.data, c.zip; give a glob for other names"):
        read(tmp_path / "data")
    assert read(tmp_path / "data" / "*.data") == ["data/a.data", "data/b.data"]


# One JSON document.

RECORDS = [{"text": 'é, "]['}, {"text": "b\n"}, {"text": "\u2028 c", "more": [{}, [1]]}]
DOCUMENTS = {
    "list": lambda: json.dumps(RECORDS),
    "not ASCII": lambda: json.dumps(RECORDS, ensure_ascii=False, indent=2),
    "byte order mark": lambda: "\ufeff" + json.dumps(RECORDS, ensure_ascii=False),
    "object": lambda: json.dumps(
        {"version": 1, "x": {"data": [{}]}, "data": RECORDS, "y": []}, indent=1
    ),
    "lines": lambda: "\n".join(map(json.dumps, RECORDS)),
    "no record": lambda: "[ ]",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_documents(tmp_path, kind, suffix):
    content = DOCUMENTS[kind]().encode()
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    for format in ("jsonl", "chat"):
        source = Source(SourceConfig(str(tmp_path), format))
        assert records(source) == (RECORDS if kind != "no record" else [])
    if kind == "not ASCII":
        assert [source.where(k) for k in range(3)] == [f"{path}:{n}" for n in (2, 5, 8)]


VALUES = st.text() | st.none() | st.lists(st.text())


@given(
    st.lists(st.dictionaries(st.text(), VALUES), max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_any_list_of_objects(tmp_path_factory, objects, ascii, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(objects, ensure_ascii=ascii, indent=indent), errors="surrogatepass")
    assert records(Source(SourceConfig(str(path), "jsonl"))) == objects


@pytest.mark.parametrize(
    ("content", "told"),
    {
        "cut": ('[{"text": "a"}, {"te', "not valid JSON (Unterminated string"),
        "no comma": ('[{"text": "a"}\n {"text": "b"}]', "not valid JSON (no comma or end of the list, line 2)"),
        "two lists": ('{"a": [{}],\n "b": [{}]}', "neither a list of records nor an object with one list"),
        "no list": ('{"a":\n 1}', "neither a list of records nor an object with one list"),
        "a number": ("12", "neither a list of records"),
        "too deep": ("[" + "[" * 100_000, "not valid JSON (nested too deeply)"),
        "a long number": ("[" + "1" * 5000 + "]", "a number that cannot be read"),
    }.values(),
)  # fmt: skip
def test_json_documents_that_cannot_be_read(tmp_path, content, told):
    (tmp_path / "a.json").write_text(content)
    found = failure(SourceConfig(str(tmp_path), "jsonl"))
    assert found.startswith(f"{tmp_path}/a.json:1: ") and told in found


def test_what_is_no_object_in_a_list_is_a_malformed_record(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, 5]')
    source = Source(SourceConfig(str(tmp_path), "jsonl"))
    assert source.read(0) == {"text": "a"}
    with pytest.raises(DataError, match="a JSON int, not an object"):
        source.read(1)


# Data sets of the hub, as its client keeps them.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The client's cache, with one data set and no network; where its files go."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--owner--name"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


def test_data_sets_of_the_hub(hub):
    write(hub, "main/train.jsonl", "main/test.jsonl", "other/train.jsonl", "README.md")
    everything = ["main/test.jsonl", "main/train.jsonl", "other/train.jsonl"]
    assert read("hf://owner/name") == read("hf://owner/name@main") == everything
    assert read("hf://datasets/owner/name/main") == everything[:2]
    assert read("hf://owner/name/*/train.jsonl") == everything[1:]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "hf://owner/other",
            "hf://owner/other: not on this machine, and the hub cannot be reached",
        ),
        ("hf://owner", "give hf://OWNER/NAME"),
        ("hf://owner/na me", "hf://owner/na me: Repo id must"),
        ("hf://owner/name/gone/*", "no such file or directory"),
    ],
)
def test_data_sets_that_are_not_there(hub, path, told):
    write(hub, "a.jsonl")
    assert told in failure(SourceConfig(path, "jsonl"))


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
]
TOOLS = [
    {"name": "f", "parameters": {"x": {"type": "string"}}},
    {"name": "g", "parameters": {"y": {"enum": ["a"]}}},
]


def test_conversations_in_parquet_are_those_of_jsonl(tmp_path):
    """A column gives all its objects the same keys; the nulls that this makes are no part of a record."""
    rows = [
        {"messages": TALK, "tools": TOOLS, "weight": 2},
        {"messages": TALK[:1], "tools": None, "weight": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    said = [TALK[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]
    expected = [{"messages": said, "tools": TOOLS, "weight": 2}, {"messages": TALK[:1]}]
    for path in (tmp_path, tmp_path / "a.parquet"):
        source = Source(SourceConfig(str(path), "chat"))
        assert records(source) == expected and source.where(1).endswith("a.parquet:2")


def test_of_conversations_in_two_kinds_of_file_one_is_read_and_the_other_told(tmp_path, caplog):
    pq.write_table(pa.table({"messages": [TALK[:1]]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    assert records(Source(SourceConfig(str(tmp_path), "chat"))) == [{"messages": TALK}]
    assert f"1 of its files not read, the first {tmp_path}/a.parquet;" in caplog.text
    assert records(Source(SourceConfig(f"{tmp_path}/*.parquet", "chat"))) == [
        {"messages": TALK[:1]}
    ]


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_parquet_is_told_from_other_formats(tmp_path, format):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    config = SourceConfig(str(tmp_path / "a.parquet"), format)
    assert "a parquet file; a source of format parquet reads it" in failure(config)
    assert "a parquet file" in failure(replace(config, path=str(tmp_path)))
    assert records(Source(replace(config, format="parquet"))) == [{"text": "x"}]


def test_a_missing_column_is_set_as_is_told(tmp_path):
    pq.write_table(pa.table({"q": ["x"], "body": ["y"]}), tmp_path / "a.parquet")
    config = SourceConfig(str(tmp_path), "parquet", field="text", prompt_field="question")
    assert failure(config).endswith("no column 'text' among q, body; set field to one of them")
    config = replace(config, field="body")
    assert failure(config).endswith(
        "no column 'question' among q, body; set prompt_field to one of them"
    )
    assert records(Source(replace(config, prompt_field="q"))) == [{"q": "x", "body": "y"}]


LONG = b"7" * 5000


@pytest.mark.parametrize(
    ("line", "reason", "mended"),
    [
        (
            b'{"text": "a", "n": ' + LONG + b"}",
            "a number that cannot be read .*; write it as a string",
            b'"' + LONG + b'"',
        ),
        (b'{"text": "a"', "not valid JSON .*; write one object per line", b'{"text": "a"}'),
        (b"[" * 100_000, "not valid JSON .*; write one object per line", b"{}"),
        (
            b'[{"text": "a"}]',
            "a JSON list, not an object; write one object per line",
            b'{"text": "a"}',
        ),
        (
            b'{"text": "\xe9"}',
            "invalid UTF-8 at byte 10; save the file as UTF-8",
            '{"text": "\u00e9"}'.encode(),
        ),
        (
            '{"text": "a"}'.encode("utf-16"),
            "invalid UTF-8 at byte 0; save the file as UTF-8",
            b'{"text": "a"}',
        ),
    ],
    ids=["integer", "cut", "deep", "list", "latin", "utf16"],
)
def test_a_bad_line_mended_as_is_told(tmp_path, line, reason, mended):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(DataError, match=reason):
        Source(SourceConfig(str(path), "jsonl")).read(0)
    path.write_bytes(line.replace(LONG, mended) if LONG in line else mended)
    assert isinstance(Source(SourceConfig(str(path), "jsonl")).read(0), dict)


def test_a_record_that_is_not_there(tmp_path):
    write(tmp_path, "a.jsonl")
    source = Source(SourceConfig(str(tmp_path), "jsonl"))
    with pytest.raises(DataError, match="record 1 of 1; give a smaller number"):
        source.read(1)


def test_text_is_one_document_a_file_or_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n==\n\n==\nfour\nfive==six==")
    assert records(Source(SourceConfig(str(tmp_path), "text")))[0] == "one\ntwo\n"
    split = Source(SourceConfig(str(tmp_path), "text", separator="=="))
    assert records(split) == ["one\ntwo\n", "three\n", "\nfour\nfive", "six"]
    assert [split.where(k).rpartition("/")[2] for k in range(4)] == [
        "a.txt:1",
        "b.txt:1",
        "b.txt:4",
        "b.txt:6",
    ]


@given(st.text(alphabet="ab\n=", max_size=60), st.sampled_from(["=", "==", "a="]))
def test_split_text_is_what_str_split_gives(tmp_path_factory, text, separator):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    expected = [part for part in text.split(separator) if part.strip()]
    assert records(Source(SourceConfig(str(path), "text", separator=separator))) == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert records(Source(SourceConfig(str(tmp_path), "jsonl"))) == [{"text": "x"}]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf\n{"text": "x"}\n\xef\xbb\xbf{"text": "y"}\n',
        b'{"text": "x"}\r\n\r\n{"text": "y"}\r\n\r\n',
        b'\xef\xbb\xbf{"text": "x"}\n \t\n\n{"text": "y"}\n\xef\xbb\xbf',
    ],
)
def test_training_and_decoding_read_the_same_lines(tmp_path, content):
    """Marks, also where files were joined, and blank lines are no records; lines are counted as an editor does."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    source = Source(SourceConfig(str(path), "jsonl"))
    read = list(numbered_records(path))
    assert [(f"{path}:{line}", record) for line, record in read] == [
        (source.where(k), record) for k, record in enumerate(records(source))
    ]
    assert [record["text"] for record in read_records(path)] == ["x", "y"]


def test_parquet_rows_across_row_groups_and_files(tmp_path):
    for name, start in [("a.parquet", 0), ("b.parquet", 23)]:
        numbers = range(start, start + 23)
        table = pa.table(
            {
                "q": [f"q{n}" for n in numbers],
                "text": [f"t{n}" for n in numbers],
                "n": list(numbers),
            }
        )
        pq.write_table(table, tmp_path / name, row_group_size=5)
    source = Source(SourceConfig(str(tmp_path), "parquet", prompt_field="q"))
    order = [(k * 17) % 46 for k in range(46)]
    assert [source.read(k) for k in order] == [{"q": f"q{k}", "text": f"t{k}"} for k in order]
    assert source.where(0) == f"{tmp_path}/a.parquet:1"
    assert source.where(45) == f"{tmp_path}/b.parquet:23"


def test_a_shuffled_read_of_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    pq.write_table(
        pa.table({"text": [str(n) for n in range(40)]}), tmp_path / "a.parquet", row_group_size=10
    )
    source, reads = Source(SourceConfig(str(tmp_path), "parquet")), []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or read(*a, **k)
    )
    assert sorted(int(source.read((7 * k) % 40)["text"]) for k in range(40)) == list(range(40))
    assert sorted(reads) == [0, 1, 2, 3]


def test_parquet_files_that_cannot_be_opened_are_failures(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": ["x"] * 100}), tmp_path / "good.parquet")
    (tmp_path / "short.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
    source = Source(SourceConfig(str(tmp_path), "parquet"))
    assert len(source) == 100
    column, short = source.failures
    assert (
        column
        == f"{tmp_path}/column.parquet:1: no column 'text' among body; set field to one of them"
    )
    assert short.startswith(f"{tmp_path}/short.parquet:1: ") and "\n" not in short


def test_a_damaged_row_group_is_a_bad_record(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text {n}" for n in range(200)]}),
        path,
        row_group_size=100,
        use_dictionary=False,
    )
    sound = path.read_bytes()
    raw = bytearray(sound)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(raw)
    source = Source(SourceConfig(str(path), "parquet"))
    assert source.read(99) == {"text": "text 99"}
    with pytest.raises(DataError, match="cannot be read .*; restore the file"):
        source.read(100)
    path.write_bytes(sound)
    assert Source(SourceConfig(str(path), "parquet")).read(100) == {"text": "text 100"}
