import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.data import SourceConfig
from sdar_jax.data.sources import Source
from sdar_jax.errors import DataError


def records(source):
    return [source.read(k) for k in range(len(source))]


@given(st.lists(st.sampled_from(["", " ", "\t", "a", "éß", "x" * 300, "\r"]), max_size=30), st.booleans())
def test_jsonl_lines_are_numbered_as_an_editor_does(tmp_path_factory, texts, ends_with_newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [text if not text.strip() else json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\n".join(lines).encode() + b"\n" * ends_with_newline)
    source = Source(SourceConfig(str(path), "jsonl"))
    expected = [(f"{path}:{n}", {"text": text}) for n, text in enumerate(texts, start=1) if text.strip()]
    assert [(source.where(k), source.read(k)) for k in range(len(source))] == expected


def test_files_of_a_directory_and_a_glob_are_read_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in [("b.jsonl", "1"), ("a.jsonl", "0"), ("deep/c.ndjson", "2"), ("d.txt", "no")]:
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    assert [r["text"] for r in records(Source(SourceConfig(str(tmp_path), "jsonl")))] == ["0", "1", "2"]
    assert [r["text"] for r in records(Source(SourceConfig(f"{tmp_path}/*.jsonl", "jsonl")))] == ["0", "1"]
    assert [r["text"] for r in records(Source(SourceConfig(f"{tmp_path}/**/c.*", "jsonl")))] == ["2"]


def test_text_is_one_document_a_file_or_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n==\n\n==\nfour\nfive==six==")
    assert records(Source(SourceConfig(str(tmp_path), "text")))[0] == "one\ntwo\n"
    split = Source(SourceConfig(str(tmp_path), "text", separator="=="))
    assert records(split) == ["one\ntwo\n", "three\n", "\nfour\nfive", "six"]
    assert [split.where(k).rpartition("/")[2] for k in range(4)] == ["a.txt:1", "b.txt:1", "b.txt:4", "b.txt:6"]


@given(st.text(alphabet="ab\n=", max_size=60), st.sampled_from(["=", "==", "a="]))
def test_split_text_is_what_str_split_gives(tmp_path_factory, text, separator):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    expected = [part for part in text.split(separator) if part.strip()]
    assert records(Source(SourceConfig(str(path), "text", separator=separator))) == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert records(Source(SourceConfig(str(tmp_path), "jsonl"))) == [{"text": "x"}]


def test_parquet_rows_across_row_groups_and_files(tmp_path):
    for name, start in [("a.parquet", 0), ("b.parquet", 23)]:
        numbers = range(start, start + 23)
        table = pa.table({"q": [f"q{n}" for n in numbers], "text": [f"t{n}" for n in numbers], "n": list(numbers)})
        pq.write_table(table, tmp_path / name, row_group_size=5)
    source = Source(SourceConfig(str(tmp_path), "parquet", prompt_field="q"))
    order = [(k * 17) % 46 for k in range(46)]
    assert [source.read(k) for k in order] == [{"q": f"q{k}", "text": f"t{k}"} for k in order]
    assert source.where(0) == f"{tmp_path}/a.parquet:1"
    assert source.where(45) == f"{tmp_path}/b.parquet:23"


def test_a_shuffled_read_of_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": [str(n) for n in range(40)]}), tmp_path / "a.parquet", row_group_size=10)
    source, reads = Source(SourceConfig(str(tmp_path), "parquet")), []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or read(*a, **k))
    assert sorted(int(source.read((7 * k) % 40)["text"]) for k in range(40)) == list(range(40))
    assert sorted(reads) == [0, 1, 2, 3]


def test_parquet_files_that_cannot_be_opened_are_failures(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": ["x"] * 100}), tmp_path / "good.parquet")
    (tmp_path / "short.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
    source = Source(SourceConfig(str(tmp_path), "parquet"))
    assert len(source) == 100
    column, short = source.failures
    assert column == f"{tmp_path}/column.parquet:1: no column 'text' among body; set field to one of them"
    assert short.startswith(f"{tmp_path}/short.parquet:1: ") and "\n" not in short


def test_a_damaged_row_group_is_a_bad_record(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text {n}" for n in range(200)]}), path, row_group_size=100, use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(raw)
    source = Source(SourceConfig(str(path), "parquet"))
    assert source.read(99) == {"text": "text 99"}
    with pytest.raises(DataError, match="cannot be read"):
        source.read(100)
