"""Documents from a cache are those without it: the same batches, positions and refusals, whoever made the cache."""

import dataclasses
import json

import numpy as np
import pytest

from sdar_jax.data import DataConfig, SourceConfig, make_dataset, token_cache
from sdar_jax.data.documents import DocumentMaker
from sdar_jax.errors import DataError
from tests.data.conftest import CHATML, make_byte_tokenizer
from tests.data.test_chat import assistant, user
from tests.data.test_pipeline import EOS_ID


@pytest.fixture
def config(tmp_path):
    """Texts and conversations, some malformed, some too long."""
    texts = [{"text": "t" * (7 * i % 50 + 1)} for i in range(40)] + [
        {"text": ""},
        {"text": "x" * 300},
    ]
    chats = [{"messages": [user("q" * i), assistant("a" * (i % 3 + 1))]} for i in range(1, 30)] + [
        {}
    ]
    for name, records in (("texts", texts), ("chats", chats)):
        content = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(content)
    sources = (
        SourceConfig(str(tmp_path / "texts.jsonl"), "jsonl"),
        SourceConfig(str(tmp_path / "chats.jsonl"), "chat", weight=2.0),
    )
    return DataConfig(
        sources, 96, 4, packing="fit", loss="response", on_error="skip", pad_to_block=True, noisy_length=64
    )  # fmt: skip


def dataset(config, template=CHATML, block_size=4):
    tokenizer = make_byte_tokenizer(template)
    return make_dataset(config, tokenizer, block_size=block_size, eos_token_id=EOS_ID)


def cached(config, tmp_path, **changes):
    return dataclasses.replace(config, token_cache=str(tmp_path / "cache"), **changes)


def folders(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("packing", ["fit", "split"])
def test_batches_and_positions_are_those_without_it(
    config, tmp_path, monkeypatch, packing, processes
):
    if packing == "split":
        config = dataclasses.replace(config, packing="split", noisy_length=None)
    if processes:
        monkeypatch.setattr(token_cache, "_RECORDS_FOR_PROCESSES", 1)
        monkeypatch.setattr(token_cache, "_CHUNK", 7)
    plain, kept = dataset(config), dataset(cached(config, tmp_path))
    for _ in range(30):
        expected, found = next(plain), next(kept)
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert plain.get_state() == kept.get_state()
    counts = lambda data: (data.skipped, data.dropped, data.cut)
    assert counts(plain) == counts(kept) and plain.skipped
    assert bool(plain.dropped) is (packing == "fit")
    # A run may go on with a cache, or without.
    resumed = dataset(config)
    resumed.set_state(json.loads(json.dumps(kept.get_state())))
    assert np.array_equal(next(resumed)["tokens"], next(kept)["tokens"])


def test_a_second_run_tokenises_nothing(config, tmp_path, monkeypatch):
    first = next(dataset(cached(config, tmp_path)))
    monkeypatch.setattr(DocumentMaker, "__call__", lambda *_: pytest.fail("it is tokenised again"))
    again = next(dataset(cached(config, tmp_path, seed=0, batch_size=4)))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    # What documents do not depend on.
    next(dataset(cached(config, tmp_path, seed=5, batch_size=2, num_threads=0, shards=2)))


def test_what_documents_depend_on_makes_another(config, tmp_path):
    dataset(cached(config, tmp_path))
    seen = 1
    for change in (
        {"loss": "all"},
        {"sequence_length": 128},
        {"too_long": "cut"},
        {"pad_loss": False},
    ):
        dataset(cached(config, tmp_path, **change))
        assert len(folders(tmp_path)) == (seen := seen + 1), change
    dataset(cached(config, tmp_path), template=CHATML.replace("im_start", "im_begin"))
    dataset(cached(config, tmp_path), block_size=8)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    dataset(cached(config, tmp_path))
    assert len(folders(tmp_path)) == seen + 3


def test_fatal_records_are_named_as_without_it(config, tmp_path):
    fatal = cached(config, tmp_path, on_error="fatal", shuffle=False)
    messages = []
    for each in (fatal, dataclasses.replace(fatal, token_cache=None)):
        with pytest.raises(DataError) as raised:
            for batch in dataset(each):
                assert batch["tokens"].shape == (4, 96)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and ".jsonl:" in messages[0]


def test_an_interruption_leaves_nothing(config, tmp_path, monkeypatch):
    made = DocumentMaker.__call__

    def interrupted(self, record):
        if record == 20:
            raise KeyboardInterrupt
        return made(self, record)

    monkeypatch.setattr(DocumentMaker, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset(cached(config, tmp_path))
    assert folders(tmp_path) == []
    monkeypatch.undo()
    assert next(dataset(cached(config, tmp_path)))["tokens"].shape == (4, 96)


def test_a_cache_that_cannot_be_used(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token_cache .*; remove it, or choose another folder"):
        dataset(dataclasses.replace(config, token_cache=str(tmp_path / "file" / "x")))
    dataset(cached(config, tmp_path))
    (folder,) = folders(tmp_path)
    (folder / "index.npy").write_bytes(b"")
    with pytest.raises(DataError, match="token_cache .*; remove it, or choose another folder"):
        dataset(cached(config, tmp_path))
