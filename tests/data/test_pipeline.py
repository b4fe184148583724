"""From files to batches: what is in them, their order, and their position saved and restored."""

import dataclasses
import itertools
import json
import logging
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_jax.data import DataConfig, SourceConfig, join_states, make_dataset, pipeline
from sdar_jax.data.documents import DocumentMaker
from sdar_jax.errors import DataError
from tests.data.conftest import EOS, make_byte_tokenizer
from tests.data.test_packing import noisy_by_hand

TOKENIZER = make_byte_tokenizer()
EOS_ID = TOKENIZER.convert_tokens_to_ids(EOS)
RANDOM = np.random.default_rng(0)
PROMPTS = ["p" * n for n in RANDOM.integers(0, 25, 60)]
TEXTS = [f"{n}:" + "x" * length for n, length in enumerate(RANDOM.integers(1, 40, 60))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"q": q, "text": a}) + "\n" for q, a in zip(PROMPTS, TEXTS, strict=True))
    )
    return SourceConfig(str(path), "jsonl", prompt_field="q")


def make(config, *, block_size=4, tokenizer=TOKENIZER, **processes):
    return make_dataset(config, tokenizer, block_size=block_size, eos_token_id=EOS_ID, **processes)


def once(source, **options):
    defaults = {"sequence_length": 32, "batch_size": 4, "epochs": 1, "num_threads": 0}
    return DataConfig(sources=(source,), **(defaults | options))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def by_record(batches, name="tokens"):
    """What each record contributed, in the order of the stream; eos padding inside documents included."""
    found = {}
    for batch in batches:
        for record, value in zip(batch["record_ids"].flat, batch[name].flat, strict=True):
            if record >= 0:
                found.setdefault(int(record), []).append(value.item())
    return found


def expected_document(n, *, loss="all", pad_to_block=None, pad_loss=True):
    prompt, answer = TOKENIZER.encode(PROMPTS[n]), TOKENIZER.encode(TEXTS[n])
    tokens = [*prompt, *answer, EOS_ID]
    loss_mask = [loss == "all"] * len(prompt) + [True] * (len(answer) + 1)
    while pad_to_block and len(tokens) % pad_to_block:
        tokens, loss_mask = [*tokens, EOS_ID], [*loss_mask, pad_loss]
    return tokens, loss_mask


@st.composite
def layouts(draw):
    """Options of a DataConfig, and a block size."""
    block_size = draw(st.sampled_from([1, 3, 4]))
    length = draw(st.sampled_from([72, 84, 96]))
    packing = draw(st.sampled_from(["split", "fit"]))
    pad_to_block = draw(st.booleans())
    budgets = [None, length]
    segments = draw(st.sampled_from(["document", "row"]))
    if packing == "fit" and (pad_to_block or segments == "document"):
        budgets.append(46)
    options = {
        "sequence_length": length,
        "packing": packing,
        "pad_to_block": pad_to_block,
        "segments": segments,
        "pad_loss": draw(st.booleans()),
        "loss": draw(st.sampled_from(["all", "response"])),
        "noisy_length": draw(st.sampled_from(budgets)),
        "too_long": draw(st.sampled_from(["drop", "cut"])),
        "seed": draw(st.integers(0, 1000)),
        "shuffle": draw(st.booleans()),
    }
    return options, block_size


@given(layout=layouts())
def test_an_epoch_holds_every_document_once(pairs, layout):
    config, block_size = once(pairs, **layout[0]), layout[1]
    dataset = make(config, block_size=block_size)
    batches = list(dataset)
    pad = block_size if config.pad_to_block else None
    tokens, loss_mask = by_record(batches), by_record(batches, "loss_mask")
    lost = 0
    for n in range(len(TEXTS)):
        expected, can = expected_document(
            n, loss=config.loss, pad_to_block=pad, pad_loss=config.pad_loss
        )
        kept = len(tokens.get(n, []))
        assert (tokens.get(n, []), loss_mask.get(n, [])) == (expected[:kept], can[:kept])
        lost += kept < len(expected)
    assert lost == dataset.dropped + dataset.cut
    assert lost == 0 or config.noisy_length == 46
    assert dataset.skipped == 0


@given(layout=layouts())
def test_rows_keep_to_their_budgets(pairs, layout):
    config, block_size = once(pairs, **layout[0]), layout[1]
    rows = []
    for batch in make(config, block_size=block_size):
        rows += [
            {name: array[b] for name, array in batch.items()} for b in range(config.batch_size)
        ]
    rows = rows[: max(b for b, row in enumerate(rows) if row["segment_ids"].any()) + 1]
    for row in rows:
        ids, padding = row["segment_ids"], row["segment_ids"] == 0
        assert not (np.diff(padding.astype(int)) < 0).any()
        assert (row["tokens"][padding] == EOS_ID).all() and not row["loss_mask"][padding].any()
        assert ((row["record_ids"] == -1) == padding).all()
        changes = np.diff(row["record_ids"][~padding]) != 0
        by_segment = np.diff(ids[~padding]) == (1 if config.segments == "document" else 0)
        assert (by_segment == changes).all() if config.segments == "document" else by_segment.all()
        if config.pad_to_block and config.packing == "fit":
            assert not any(np.bincount(row["record_ids"][~padding]) % block_size)
        if config.noisy_length is not None:
            found = [i for i in row["noisy_index"].tolist() if i >= 0]
            assert found == noisy_by_hand(ids.tolist(), row["loss_mask"], block_size)
            assert row["noisy_index"].tolist() == found + [-1] * (config.noisy_length - len(found))
    if config.packing == "split":
        assert all(row["segment_ids"].all() for row in rows[:-1])
    else:
        for segments in (row["record_ids"][row["record_ids"] >= 0] for row in rows):
            assert (np.diff(segments) != 0).sum() + 1 == len(np.unique(segments))


def check_restored(config, block_size, before, elsewhere):
    """A dataset that has given `elsewhere` batches goes on, from the state after `before`, as the one that saved it."""
    dataset, restored = make(config, block_size=block_size), make(config, block_size=block_size)
    list(itertools.islice(dataset, before))
    state = json.loads(json.dumps(dataset.get_state()))
    list(itertools.islice(restored, elsewhere))
    restored.set_state(state)
    assert restored.get_state() == state
    rest = [list(itertools.islice(either, 4)) for either in (dataset, restored)]
    for expected, found in zip(*rest, strict=True):
        equal(expected, found)
    assert restored.get_state() == dataset.get_state()
    dataset.close()
    restored.close()


@given(
    layout=layouts(),
    epochs=st.sampled_from([None, 3]),
    before=st.integers(0, 12),
    elsewhere=st.sampled_from([0, 2]),
)
def test_a_restored_position_goes_on_bit_for_bit(pairs, layout, epochs, before, elsewhere):
    check_restored(once(pairs, **layout[0], epochs=epochs), layout[1], before, elsewhere)


@pytest.mark.parametrize("packing", ["split", "fit"])
def test_a_position_is_exact_although_threads_read_ahead(pairs, packing):
    config = once(pairs, epochs=None, num_threads=3, packing=packing, sequence_length=96)
    check_restored(config, 4, before=5, elsewhere=2)


def cuts(draw, batch_size):
    """Rows of a batch as processes may have them: parts of any sizes, some by two."""
    ends = sorted(draw(st.sets(st.integers(1, batch_size - 1), max_size=3))) + [batch_size]
    parts = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    return parts + draw(st.lists(st.sampled_from(parts), max_size=1))


@given(layout=layouts(), shards=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_neither_batches_nor_positions_depend_on_who_has_which_rows(pairs, layout, shards, data):
    config = once(pairs, **layout[0] | {"batch_size": 8}, epochs=None, shards=shards)
    block_size = layout[1]

    def check(parts, whole):
        batch = next(whole)
        for part in parts:
            equal(next(part[1]), {name: array[part[0]] for name, array in batch.items()})

    def opened():
        return [
            (rows, make(config, block_size=block_size, rows=rows)) for rows in cuts(data.draw, 8)
        ]

    whole, parts = make(config, block_size=block_size), opened()
    for _ in range(2):
        check(parts, whole)
    state = join_states([part.get_state() for _, part in parts])
    assert state == whole.get_state() and json.loads(json.dumps(state)) == state
    parts = opened()
    for _, part in parts:
        part.set_state(state)
    check(parts, whole)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shards", [2, 4])
def test_each_shard_packs_every_nth_record_of_one_order(shards, shuffle, pairs):
    options = {"epochs": None, "shuffle": shuffle, "batch_size": 4, "packing": "split"}
    dealt = make(once(pairs, **options, shards=shards))
    order = first_records(make(once(pairs, **options)), 40 * shards)
    size = 4 // shards
    batches = [next(dealt) for _ in range(12)]
    for number in range(shards):
        mine = [batch["record_ids"][size * number : size * (number + 1)] for batch in batches]
        ids = runs_of(i for rows in mine for i in rows.flat)
        assert len(ids) > 5 and ids[:-1] == order[number::shards][: len(ids) - 1]


def runs_of(ids):
    """Without padding and repetition."""
    return [int(i) for i, _ in itertools.groupby(i for i in ids if i >= 0)]


def first_records(dataset, count):
    """The first records, in the order in which they are drawn."""
    found = []
    while len(found) <= count:
        found = runs_of([*found, *next(dataset)["record_ids"].flat])
    return found[:count]


def test_only_shards_whose_rows_are_wanted_are_read(pairs, monkeypatch):
    read, plain = [], DocumentMaker.__call__
    monkeypatch.setattr(
        DocumentMaker, "__call__", lambda maker, i: read.append(i) or plain(maker, i)
    )
    part = make(once(pairs, epochs=None, shuffle=False, batch_size=8, shards=4), rows=[2, 3])
    for _ in range(6):
        next(part)
    assert set(part.get_state()["shards"]) == {"1"} and len(read) > 5
    assert all(i % 4 == 1 for i in read)


def test_one_shard_is_saved_as_ever(pairs):
    dataset = make(once(pairs, epochs=None))
    next(dataset)
    state = dataset.get_state()
    assert set(state) == {"order", "feed", "open"} and "shards" not in state["order"]


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_shards_is_another_order(then, now, pairs):
    state = make(once(pairs, epochs=None, shards=then)).get_state()
    with pytest.raises(DataError, match=f"shards={then}, this dataset has {now}"):
        make(once(pairs, epochs=None, shards=now)).set_state(state)


def test_threads_of_a_process_are_shared_by_its_shards(pairs):
    before = threading.active_count()
    many = make(once(pairs, epochs=None, batch_size=8, shards=8, num_threads=8))
    equal(next(many), next(make(once(pairs, epochs=None, batch_size=8, shards=8))))
    assert threading.active_count() <= before + 8
    many.close()


def test_threads_change_nothing(pairs):
    config = once(pairs, epochs=3)
    alone, ahead = make(config), make(dataclasses.replace(config, num_threads=4))
    for expected, found in zip(alone, ahead, strict=True):
        equal(expected, found)
    before = threading.active_count()
    ahead.close()
    assert threading.active_count() <= before


def order_of(dataset, epochs):
    """The record ids of each epoch, in the order of the stream."""
    ids = [int(i) for batch in dataset for i in batch["record_ids"].flat if i >= 0]
    runs = [i for n, i in enumerate(ids) if n == 0 or ids[n - 1] != i]
    assert len(runs) == epochs * len(TEXTS)
    return [runs[n : n + len(TEXTS)] for n in range(0, len(runs), len(TEXTS))]


def test_each_epoch_and_each_seed_has_an_order_of_its_own(pairs):
    everything = list(range(len(TEXTS)))
    assert order_of(make(once(pairs, epochs=2, shuffle=False)), 2) == [everything] * 2
    orders = order_of(make(once(pairs, epochs=2)), 2) + order_of(
        make(once(pairs, epochs=2, seed=1)), 2
    )
    assert all(sorted(order) == everything for order in orders)
    assert len({tuple(order) for order in [*orders, everything]}) == 5
    assert order_of(make(once(pairs, epochs=2)), 2) == orders[:2]


def test_the_last_rows_are_padded_and_then_it_stops(write_jsonl):
    source = SourceConfig(write_jsonl([{"text": "abcde"}] * 3), "jsonl")
    dataset = make(once(source, sequence_length=8, batch_size=2))
    batches = [batch["segment_ids"].tolist() for batch in dataset]
    assert batches == [[[1] * 6 + [2] * 2, [1] * 4 + [2] * 4], [[1, 1] + [0] * 6, [0] * 8]]
    with pytest.raises(StopIteration):
        next(dataset)


def test_sources_are_mixed_by_weight(write_jsonl):
    many = SourceConfig(write_jsonl([{"text": "many"}] * 30, "a.jsonl"), "jsonl", weight=3.0)
    few = SourceConfig(write_jsonl([{"text": "few!"}] * 4, "b.jsonl"), "jsonl")
    dataset = make(
        DataConfig((many, few), sequence_length=40, batch_size=2, num_threads=0, shuffle=False)
    )
    ids = np.concatenate([next(dataset)["record_ids"].ravel() for _ in range(10)])
    assert (ids >= 30).mean() == 0.25
    assert set(ids) == set(range(34))


@pytest.mark.parametrize("lengths", [(30, 4), (4, 30), (1, 1), (7, 3, 20)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (0.1, 0.7, 0.2)])
def test_an_epoch_of_a_mixture_draws_every_record(write_jsonl, lengths, weights):
    paths = [write_jsonl([{"text": "x"}] * n, f"{i}.jsonl") for i, n in enumerate(lengths)]
    sources = [
        SourceConfig(path, "jsonl", weight=weight)
        for path, weight in zip(paths, weights, strict=False)
    ]
    config = DataConfig(
        tuple(sources), sequence_length=16, batch_size=2, num_threads=0, epochs=1, shuffle=False
    )
    assert sorted(by_record(make(config))) == list(range(sum(lengths)))


def test_every_format_gives_the_same_documents(tmp_path, write_jsonl):
    texts = ["one", "two\n", "thrée"]
    (tmp_path / "split.txt").write_text("#".join(texts))
    for n, text in enumerate(texts):
        (tmp_path / f"whole{n}.md").write_text(text)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    sources = [
        SourceConfig(write_jsonl([{"text": text} for text in texts]), "jsonl"),
        SourceConfig(str(tmp_path / "split.txt"), "text", separator="#"),
        SourceConfig(str(tmp_path / "*.md"), "text"),
        SourceConfig(str(tmp_path), "parquet"),
        SourceConfig(
            write_jsonl([{"messages": [{"role": "user", "content": t}]} for t in texts], "c.jsonl"),
            "chat",
        ),
    ]
    tokenizer = make_byte_tokenizer(template)
    expected = {n: [*TOKENIZER.encode(text), EOS_ID] for n, text in enumerate(texts)}
    for source in sources:
        assert by_record(make(once(source), tokenizer=tokenizer)) == expected, source


def test_a_response_ends_its_document_and_its_last_block(write_jsonl):
    """The answer, its end of turn, the line break behind it, the end of text and the filling; nothing of the prompt."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    source = SourceConfig(write_jsonl([{"messages": messages}]), "chat")
    config = once(source, loss="response", packing="fit", pad_to_block=True, batch_size=1)
    batch = next(make(config))
    loss_mask = batch["loss_mask"][0]
    assert TOKENIZER.decode(batch["tokens"][0][loss_mask]) == "ab<|im_end|>\n" + EOS * 4
    filled = next(make(dataclasses.replace(config, pad_loss=False)))
    assert TOKENIZER.decode(filled["tokens"][0][filled["loss_mask"][0]]) == "ab<|im_end|>\n" + EOS
    assert next(make(dataclasses.replace(config, loss="all")))["loss_mask"][0, :28].all()


def test_a_row_is_filled_behind_its_document(pairs):
    """All of the filling is learned, and none of the prompt; each document is a row."""
    config = once(pairs, loss="response", packing="fit", pad_to_row=True, sequence_length=72)
    rows = [
        {name: array[b] for name, array in batch.items()}
        for batch in make(config)
        for b in range(config.batch_size)
    ]
    assert len(rows) == len(TEXTS)
    for row in rows:
        n = int(row["record_ids"][0])
        document, can = expected_document(n, loss="response")
        filling = 72 - len(document)
        assert row["tokens"].tolist() == document + [EOS_ID] * filling
        assert row["loss_mask"].tolist() == can + [True] * filling
        assert (row["segment_ids"] == 1).all() and (row["record_ids"] == n).all()
    unlearned = make(dataclasses.replace(config, pad_loss=False))
    assert sum(int(batch["loss_mask"].sum()) for batch in unlearned) == sum(
        sum(expected_document(n, loss="response")[1]) for n in range(len(TEXTS))
    )


def test_a_position_in_filled_rows_is_not_one_in_others(pairs):
    config = once(pairs, packing="fit", sequence_length=72)
    filled = make(dataclasses.replace(config, pad_to_row=True))
    next(filled)
    with pytest.raises(DataError, match="pad_to_row=True, this dataset has False"):
        make(config).set_state(filled.get_state())


def test_a_prompt_at_the_end_takes_no_loss(write_jsonl):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    source = SourceConfig(write_jsonl([{"messages": messages}]), "chat")
    batch = next(
        make(once(source, loss="response", pad_to_block=True, sequence_length=64, batch_size=1))
    )
    assert TOKENIZER.decode(batch["tokens"][0][batch["loss_mask"][0]]) == "a<|im_end|>"


def test_a_text_that_ends_in_end_of_text_gets_no_second(write_jsonl):
    source = SourceConfig(write_jsonl([{"text": f"a{EOS}"}]), "jsonl")
    assert by_record(make(once(source))) == {0: [*TOKENIZER.encode("a"), EOS_ID]}


def test_a_begin_of_text_token_is_given_not_learnt(write_jsonl):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_byte_tokenizer(bos_token="<s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    source = SourceConfig(write_jsonl([{"q": "q", "text": "a"}]), "jsonl", prompt_field="q")
    batches = list(make(once(source, loss="response"), tokenizer=tokenizer))
    prompt, answer = tokenizer.encode("q"), TOKENIZER.encode("a")
    assert prompt[0] == bos
    assert by_record(batches) == {0: [*prompt, *answer, EOS_ID]}
    assert by_record(batches, "loss_mask") == {0: [False, False, True, True]}


def test_too_long_documents_are_dropped_or_cut_and_counted(write_jsonl, caplog):
    path = write_jsonl(
        [
            {"q": "", "text": "a" * 40},
            {"q": "p" * 12, "text": "b" * 4},
            {"q": "p" * 40, "text": "c"},
        ]
    )
    source = SourceConfig(path, "jsonl", prompt_field="q")
    options = {
        "packing": "fit",
        "loss": "response",
        "noisy_length": 8,
        "sequence_length": 32,
        "shuffle": False,
    }
    with caplog.at_level(logging.WARNING):
        dropping = make(once(source, **options))
        assert list(by_record(dropping)) == [1]
    assert (dropping.dropped, dropping.cut, dropping.skipped) == (2, 0, 0)
    assert (
        f"{path}:1: 41 tokens, 41 of them in blocks with loss, do not fit in a row" in caplog.text
    )
    cutting = make(once(source, too_long="cut", **options))
    assert {n: len(tokens) for n, tokens in by_record(cutting).items()} == {0: 8, 1: 17}
    assert (cutting.dropped, cutting.cut) == (1, 1)
    in_blocks = make(
        once(source, too_long="cut", pad_to_block=True, **(options | {"noisy_length": 10}))
    )
    assert {n: len(tokens) for n, tokens in by_record(in_blocks).items()} == {0: 8, 1: 20}


GOOD = {"text": "good"}
BAD_LINES = [
    ("{bad", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('"text"', "a JSON str, not an object"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    ({"txt": "x"}, "no field 'text' among 'txt'"),
    ({"text": 5}, "field 'text' is of type int"),
    ({"text": None}, "field 'text' is of type NoneType"),
    ({"text": ["x"]}, "field 'text' is of type list"),
    ({"text": " \n"}, "field 'text' is empty"),
    ('{"text": "\\ud800"}', "a lone surrogate at character 0"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_malformed_record_is_named_or_left_out(write_jsonl, caplog, line, message):
    path = write_jsonl([GOOD, "", line, GOOD])
    config = once(SourceConfig(path, "jsonl"), shuffle=False)
    with pytest.raises(DataError) as raised:
        list(make(config))
    assert str(raised.value).startswith(f"{path}:3: {message}")
    assert str(raised.value).endswith("(on_error: skip leaves such records out)")
    assert "\n" not in str(raised.value)
    dataset = make(dataclasses.replace(config, on_error="skip"))
    with caplog.at_level(logging.WARNING):
        assert sorted(by_record(dataset)) == [0, 2]
    assert dataset.skipped == 1
    assert f"skipped: {path}:3: {message}" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0] has role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no token of it can carry loss"),
        ({"talk": []}, '"messages" is missing'),
    ],
)
def test_a_malformed_conversation_is_named(write_jsonl, record, message):
    path = write_jsonl([record])
    with pytest.raises(DataError) as raised:
        next(make(once(SourceConfig(path, "chat"), loss="response")))
    assert str(raised.value).startswith(f"{path}:1: {message}")


def test_truncated_parquet_is_named_or_left_out(tmp_path):
    pq.write_table(pa.table({"text": ["x"] * 50}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    config = once(SourceConfig(str(tmp_path), "parquet"))
    with pytest.raises(DataError, match="b.parquet:1: "):
        make(config)
    dataset = make(dataclasses.replace(config, on_error="skip"))
    assert len(by_record(dataset)) == 50
    assert dataset.skipped == 1


@pytest.mark.parametrize("epochs", [None, 1, 3])
def test_nothing_usable_is_an_error_not_an_endless_loop(write_jsonl, epochs):
    path = write_jsonl(["{"] * 7)
    config = once(SourceConfig(path, "jsonl"), on_error="skip", epochs=epochs)
    with pytest.raises(
        DataError, match=r"none of 7 records can be used; the last: .*jsonl:\d: not valid JSON"
    ):
        next(make(config))
    path = write_jsonl([{"text": "x" * 100}])
    config = once(SourceConfig(path, "jsonl"), packing="fit", epochs=epochs)
    with pytest.raises(
        DataError, match="none of 1 records can be used; the last: .* do not fit in a row"
    ):
        next(make(config))


def test_only_the_first_few_bad_records_are_reported(write_jsonl, caplog):
    config = once(SourceConfig(write_jsonl([GOOD, *["{"] * 20]), "jsonl"), on_error="skip")
    with caplog.at_level(logging.WARNING):
        dataset = make(config)
        list(dataset)
        list(make(config, rows=[2, 3]))
    assert dataset.skipped == 20
    assert len(caplog.records) == 5
    assert caplog.records[-1].getMessage().endswith("further ones are only counted")


def test_counts_are_part_of_the_position(write_jsonl):
    lines = [{"text": "good " * 5}, "{"] * 20
    config = once(
        SourceConfig(write_jsonl(lines), "jsonl"), on_error="skip", batch_size=1, epochs=None
    )
    dataset, restored = make(config), make(config)
    for _ in range(9):
        next(dataset)
    restored.set_state(json.loads(json.dumps(dataset.get_state())))
    assert restored.skipped == dataset.skipped > 0
    for _ in range(9):
        equal(next(dataset), next(restored))
    assert restored.skipped == dataset.skipped


def test_describe_names_files_and_lines(write_jsonl):
    first = SourceConfig(write_jsonl([GOOD, "", GOOD], "a.jsonl"), "jsonl")
    second = SourceConfig(write_jsonl([GOOD], "b.jsonl"), "jsonl")
    config = DataConfig((first, second), sequence_length=64, batch_size=1, epochs=1, num_threads=0)
    dataset = make(config)
    batch = next(dataset)
    assert dataset.describe(batch["record_ids"]) == [
        f"{first.path}:1",
        f"{first.path}:3",
        f"{second.path}:1",
    ]
    assert dataset.describe([1, -1]) == [f"{first.path}:3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed=0, this dataset has 5"),
        ({"shuffle": False}, "shuffle=True, this dataset has False"),
        ({"packing": "fit"}, "packing=split, this dataset has fit"),
        ({"sequence_length": 16}, "sequence_length=32, this dataset has 16"),
        ({"pad_to_block": True}, "pad_to_block=False, this dataset has True"),
        ({"more": 1}, r"records=\[3\], this dataset has \[4\]"),
    ],
)
def test_a_position_in_other_data_is_refused(write_jsonl, change, message):
    config = once(SourceConfig(write_jsonl([GOOD] * 3), "jsonl"))
    state = make(config).get_state()
    write_jsonl([GOOD] * (3 + change.pop("more", 0)))
    with pytest.raises(DataError, match=f"{message}: restore what it was, or begin a new run"):
        make(dataclasses.replace(config, **change)).set_state(state)
    write_jsonl([GOOD] * 3)
    make(config).set_state(state)


def test_a_record_gone_bad_since_the_position_was_saved_is_named(write_jsonl):
    path = write_jsonl([{"text": "x" * 40}] * 2)
    config = once(SourceConfig(path, "jsonl"), batch_size=1, on_error="skip")
    dataset = make(config)
    next(dataset)
    state = dataset.get_state()
    write_jsonl(["{", "{"])
    with pytest.raises(
        DataError, match="record 0 of the stream was usable when the .* was saved: restore its file"
    ):
        make(config).set_state(state)
    write_jsonl([{"text": "x" * 40}] * 2)
    make(config).set_state(state)


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_iterator_that_ends_while_a_record_is_read_does_not_end_the_data(
    write_jsonl, monkeypatch, epochs, num_threads
):
    def ended(self, record_id):
        raise StopIteration

    monkeypatch.setattr(DocumentMaker, "__call__", ended)
    source = SourceConfig(write_jsonl([GOOD] * 3), "jsonl")
    dataset = make(once(source, epochs=epochs, num_threads=num_threads))
    with pytest.raises(
        RuntimeError, match="reading stopped at record 0 of the stream, not at its end"
    ):
        next(dataset)


def test_more_records_than_can_be_numbered(write_jsonl, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGEST_RECORD_COUNT", 3)
    first, second = (SourceConfig(write_jsonl([GOOD] * n, f"{n}.jsonl"), "jsonl") for n in (3, 1))
    with pytest.raises(
        DataError, match=r"4 records are more than record_ids can number \(3\); give fewer files"
    ):
        make(dataclasses.replace(once(first), sources=(first, second)))
    make(once(first))
