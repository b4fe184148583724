"""Records of answers with their steps: what becomes a document, a row, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from sdar_jax.data import DataConfig, SourceConfig, make_dataset
from sdar_jax.data.documents import Document, DocumentMaker, Rejection
from sdar_jax.data.sources import Source
from sdar_jax.errors import ConfigError
from tests.data.conftest import make_byte_tokenizer
from tests.data.test_pipeline import EOS_ID

STOP = 2


def record(prompt: int, answer: int, **changes) -> dict:
    """An answer of two tokens a step, each later one first: steps 0 1 2, as 2 2 1 1 0 0."""
    steps = [(answer - 1 - i) // 2 for i in range(answer)]
    made = {"prompt_ids": [*range(10, 10 + prompt)], "tokens": [*range(50, 50 + answer)]}
    stop = {"finish_reason": "stop", "stop_reason": STOP, "stop_step": 9}
    return {**made, "steps": steps, "text": "unread", **stop, **changes}


def config(path, **changes) -> DataConfig:
    source = SourceConfig(str(path), "trajectory")
    layout = {"packing": "fit", "loss": "response", "shuffle": False, "num_threads": 0, "epochs": 1}
    base = DataConfig((source,), 16, 2, **layout)
    return dataclasses.replace(base, **changes)


@pytest.fixture
def made(write_jsonl):
    """made(record, ...) -> its document, or why there is none."""

    def make(one, *, block_size=4, **changes) -> Document | Rejection:
        settings = config(write_jsonl([one]), **changes)
        sources = [Source(source) for source in settings.sources]
        options = {"block_size": block_size, "eos_token_id": EOS_ID}
        return DocumentMaker(settings, make_byte_tokenizer(), sources, **options)(0)

    return make


def columns(document):
    assert isinstance(document, Document), document
    return [x.tolist() for x in (document.tokens, document.loss_mask.astype(int), document.order)]


def test_a_document_is_prompt_answer_and_end(made):
    """The stop token has the step that committed it; the end of text behind it comes after the answer's last."""
    tokens, loss, order = columns(made(record(2, 3)))
    assert tokens == [10, 11, 50, 51, 52, STOP, EOS_ID]
    assert loss == [0, 0, 1, 1, 1, 1, 1]
    assert order == [-1, -1, 1, 0, 0, 9, 10]


def test_what_fills_a_block_comes_last(made):
    tokens, loss, order = columns(made(record(2, 3, stop_step=0), pad_to_block=True))
    assert tokens[6:] == [EOS_ID] * 2 and loss[6:] == [1, 1]
    assert order == [-1, -1, 1, 0, 0, 0, 2, 2]
    _, loss, _ = columns(made(record(2, 3), pad_to_block=True, pad_loss=False))
    assert loss == [0, 0, 1, 1, 1, 1, 1, 0]


def test_records_of_other_hands(made):
    """Without the end's fields; with an end of text of their own; stopped by a string."""
    bare = {name: record(1, 2)[name] for name in ("prompt_ids", "tokens", "steps")}
    assert columns(made(bare)) == [[10, 50, 51, EOS_ID], [0, 1, 1, 1], [-1, 0, 0, 1]]
    own_end = {**bare, "tokens": [50, EOS_ID], "steps": [1, 0]}
    assert columns(made(own_end)) == [[10, 50, EOS_ID], [0, 1, 1], [-1, 1, 0]]
    by_string = record(1, 2, stop_reason="x", stop_step=None)
    assert columns(made(by_string)) == columns(made(bare))
    unknown = record(1, 2, stop_step=None)
    assert columns(made(unknown))[2] == [-1, 0, 0, 1, 2]


def test_an_answer_that_was_cut_off_has_no_end(made):
    """Nothing stands behind it; where documents are padded to blocks, its last block is left out if it is not whole."""
    cut = record(2, 5, finish_reason="length", stop_reason=None, stop_step=None)
    assert columns(made(cut))[0] == [10, 11, 50, 51, 52, 53, 54]
    tokens, _, order = columns(made(cut, pad_to_block=True))
    assert (tokens, order) == ([10, 11, 50, 51], [-1, -1, 2, 1])
    short = made({**cut, "tokens": [50], "steps": [0]}, pad_to_block=True)
    assert isinstance(short, Rejection)
    assert "cut off within its first block; decode with more max_new_tokens" in short.reason


def test_an_answer_longer_than_a_row(made):
    long = record(2, 20)
    dropped = made(long)
    assert isinstance(dropped, Rejection) and not dropped.malformed
    tokens, _, order = columns(made(long, too_long="cut"))
    assert tokens == [10, 11, *range(50, 64)]
    assert order == [-1, -1, *long["steps"][:14]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": [0, 1]}, '"steps" has 2 entries and "tokens" 3; give the step of each token'),
        ({"prompt_ids": None}, '"prompt_ids" is no list of numbers; give what `sample.py --input'),
        ({"steps": "012"}, '"steps" is no list of numbers'),
        ({"steps": [0, -1, 1]}, '"steps" has -1; give whole numbers from 0'),
        ({"steps": [0, 1.5, 1]}, '"steps" has 1.5'),
        ({"tokens": [50, True, 51]}, '"tokens" has True'),
        ({"tokens": [50, 260, 51]}, '"tokens" has 260; give whole numbers from 0 to 259'),
        ({"stop_reason": 260}, '"stop_reason" has 260'),
        ({"stop_step": "9"}, "\"stop_step\" has '9'"),
        ({"tokens": [], "steps": [], "stop_reason": None}, '"tokens" is empty'),
    ],
)
def test_records_that_do_not_fit_together(made, changes, reason):
    found = made(record(2, 3, **changes))
    assert isinstance(found, Rejection) and found.malformed
    assert reason in found.reason and "data.jsonl:1: " in found.reason


RECORDS = [record(i % 5 + 1, i % 7 + 1, stop_step=i % 3) for i in range(24)]


def expected_order(one: dict) -> list[int]:
    steps = [*one["steps"], one["stop_step"]]
    return [-1] * len(one["prompt_ids"]) + steps


def rows_of(batch):
    """Each document of a batch: the record, and its slice of the row."""
    for b, segments in enumerate(batch["segment_ids"]):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            yield int(batch["record_ids"][b, places[0]]), b, slice(places[0], places[-1] + 1)


@pytest.mark.parametrize("token_cache", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_hold_the_order_of_their_documents(write_jsonl, tmp_path, token_cache, shuffle):
    """Several documents a row, in full blocks; and the same after a restart."""
    changes = {"pad_to_block": True, "noisy_length": 12, "shuffle": shuffle, "epochs": None}
    cache = str(tmp_path / "cache") if token_cache else None
    settings = config(write_jsonl(RECORDS), token_cache=cache, **changes)
    open_data = lambda: make_dataset(settings, make_byte_tokenizer(), block_size=4, eos_token_id=EOS_ID)  # fmt: skip
    data, seen, most = open_data(), set(), 0
    for _ in range(20):
        state = data.get_state()
        batch = next(data)
        assert batch["order"].dtype == np.int32 and batch["order"].shape == (2, 16)
        assert ((batch["order"] >= 0) == batch["loss_mask"]).all()
        most = max(most, batch["segment_ids"].max())
        for number, b, places in rows_of(batch):
            seen.add(number)
            order = expected_order(RECORDS[number])
            found = batch["order"][b, places].tolist()
            assert found[: len(order)] == order
            assert set(found[len(order) :]) <= {max(order) + 1}
    assert len(seen) > 20 and most > 1
    again = open_data()
    again.set_state(json.loads(json.dumps(state)))
    resumed = next(again)
    assert all(np.array_equal(resumed[name], batch[name]) for name in batch)


def test_other_data_has_no_order(write_jsonl, tmp_path):
    """Beside trajectories, texts are never committed; alone, batches have no such array, and nothing changes."""
    path = write_jsonl([{"text": "abc"}] * 4)
    text = SourceConfig(path, "jsonl")
    other = SourceConfig(write_jsonl(RECORDS, "answers.jsonl"), "trajectory")
    options = {"block_size": 4, "eos_token_id": EOS_ID}
    alone = dataclasses.replace(config(path), sources=(text,))
    assert "order" not in next(make_dataset(alone, make_byte_tokenizer(), **options))
    cached = dataclasses.replace(alone, sources=(text, other), token_cache=str(tmp_path / "cache"))
    for settings in (cached, dataclasses.replace(cached, token_cache=None)):
        data = make_dataset(settings, make_byte_tokenizer(), **options)
        orders = [batch["order"][batch["record_ids"] < 4] for batch in data]
        assert np.concatenate(orders).size and (np.concatenate(orders) == -1).all()


def test_settings_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="loss='all' with format='trajectory': .* use loss='resp"):
        config(tmp_path, loss="all")
    with pytest.raises(ConfigError, match="prompt_field with format='trajectory', which has none"):
        SourceConfig("x", "trajectory", field="answer")
