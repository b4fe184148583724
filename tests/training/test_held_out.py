"""Held-out likelihood: the batches of held-out rows put together are the whole of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer
from sdar_jax.errors import DataError
from sdar_jax.evaluation import autoregressive_nll, nelbo
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.held_out import block_offsets, held_out_likelihood, position_groups
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch
from sdar_jax.paradigm import Paradigm
from sdar_jax.training.setup import open_dataset

SHAPE = ModelConfig(32, 16, 32, 1, 2, 1, 8, block_size=1, mask_token_id=20)


def held_out(inputs, model: ModelConfig, rows: int, **changes):
    """Short documents that lie in rows with padding, of answers that count."""
    source = SourceConfig(str(inputs / "held-out.jsonl"), "jsonl", prompt_field="question")
    config = DataConfig(
        (source,), 24, 2, packing="fit", loss="response", epochs=1, num_threads=0, **changes
    )
    return EvalConfig(config, rows=rows, samples=2), open_dataset(
        config, load_tokenizer(inputs / "tokenizer"), model
    )


def whole(inputs, model: ModelConfig, batches: int) -> dict[str, np.ndarray]:
    data = held_out(inputs, model, 1)[1]
    parts = [next(data) for _ in range(batches)]
    return {
        name: np.concatenate([part[name] for part in parts])
        for name in ("tokens", "segment_ids", "loss_mask")
    }


@pytest.mark.parametrize("rows", [4, 3])
def test_batches_make_up_the_whole_exact_nll(rows, inputs):
    """Rows are rounded up to batches of 2."""
    model = Model(SHAPE, jax.random.key(0))
    found = held_out_likelihood(*held_out(inputs, SHAPE, rows))(model, 0)
    rows_in_all = whole(inputs, SHAPE, 2)
    assert set(found) == {"nll"}
    assert found["nll"] == pytest.approx(
        autoregressive_nll(model, rows_in_all.pop("tokens"), **rows_in_all), rel=1e-6
    )


def test_batches_make_up_the_whole_bound(inputs):
    """At S = 1 the bound is exact, so the whole and its parts agree, with no error left."""
    config = replace(SHAPE, objective="block_diffusion")
    model = Model(config, jax.random.key(0))
    found = held_out_likelihood(*held_out(inputs, config, 4))(model, 0)
    rows_in_all = whole(inputs, config, 2)
    expected = nelbo(model, rows_in_all.pop("tokens"), block_size=1, **rows_in_all)[0]
    assert found["nelbo"] == pytest.approx(expected, rel=1e-6) and found["nelbo_se"] < 1e-6


def test_the_error_of_the_bound_shrinks_with_the_rows(inputs):
    """Independent masks for each batch: the same rows twice as often give about 1 / sqrt(2) of the error."""
    config = replace(SHAPE, objective="masked_diffusion")
    model = Model(config, jax.random.key(0))
    evaluation, data = held_out(inputs, config, 10)
    found = held_out_likelihood(replace(evaluation, samples=32), data)(model, 0)
    rows_in_all = whole(inputs, config, 5)
    mean, error = nelbo(
        model, rows_in_all.pop("tokens"), block_size=None, samples=32, seed=5, **rows_in_all
    )
    assert abs(found["nelbo"] - mean) < 5 * np.hypot(error, found["nelbo_se"])
    assert 0.5 < found["nelbo_se"] / error < 2


def two_sources(inputs, folder, **changes):
    """An evaluation by source and position, of sums and of a text, and the model's data for it."""
    (folder / "words.txt").write_text("".join(f"{i}+{i}= {i}\n\n" for i in range(40)))
    sources = (
        SourceConfig(str(inputs / "held-out.jsonl"), "jsonl", prompt_field="question"),
        SourceConfig(str(folder / "words.txt"), "text", separator="\n\n"),
    )
    data = DataConfig(sources, 24, 2, epochs=1, num_threads=0, **changes)
    return EvalConfig(data, rows=8, samples=2, by=("source", "position"))


def test_each_source_s_bound_is_that_of_its_tokens_alone(inputs, tmp_path):
    """At S = 1, where it is exact; told apart by the files that the records are from. They add up to the whole."""
    config = replace(SHAPE, objective="block_diffusion")
    model, evaluation = Model(config, jax.random.key(0)), two_sources(inputs, tmp_path)
    tokenizer = load_tokenizer(inputs / "tokenizer")
    found = held_out_likelihood(evaluation, open_dataset(evaluation.data, tokenizer, config))(
        model, 0
    )
    data = open_dataset(evaluation.data, tokenizer, config)
    batches = [next(data) for _ in range(4)]
    names = ("tokens", "segment_ids", "loss_mask", "record_ids")
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    file_of = {
        i: data.describe(np.array([i]))[0].split(":")[0]
        for i in np.unique(rows["record_ids"])
        if i >= 0
    }
    total = 0.0
    for name, file in (("held-out", "held-out.jsonl"), ("words", "words.txt")):
        own = np.vectorize(lambda i, file=file: file_of.get(i, "").endswith(file))(
            rows["record_ids"]
        )
        own &= rows["loss_mask"]
        masks = {"segment_ids": rows["segment_ids"], "loss_mask": own}
        expected, _ = nelbo(model, rows["tokens"], block_size=1, **masks)
        assert found[f"nelbo/{name}"] == pytest.approx(expected, rel=1e-6)
        total += expected * own.sum()
    assert found["nelbo"] == pytest.approx(total / rows["loss_mask"].sum(), rel=1e-6)
    assert found["nelbo_position/0"] == pytest.approx(found["nelbo"], rel=1e-6)
    assert set(found) == {
        "nelbo",
        "nelbo_se",
        "nelbo/held-out",
        "nelbo/words",
        "nelbo_position/0",
    }


class OneABlock:
    """Rows of one document, whose blocks have one token with loss each, anywhere in them: bounds are then exact."""

    def __init__(self, block_size: int):
        draw = np.random.default_rng(0)
        shape = (8, 24)
        places = draw.permutation(np.arange(8 * 24 // block_size) % block_size).reshape(8, -1)
        mask = np.arange(24) % block_size == places.repeat(block_size, axis=1)
        arrays = draw.integers(0, 20, shape), np.ones(shape, int), mask, np.zeros(shape, int)
        names = ("tokens", "segment_ids", "loss_mask", "record_ids")
        self.rows = dict(zip(names, arrays, strict=True))

    def __iter__(self):
        return iter([self.rows])


def test_each_position_s_bound_is_that_of_its_tokens_alone(inputs, unchecked_types):
    """Of blocks of eight: each of the first four positions, and the others together."""
    config = replace(SHAPE, objective="block_diffusion", block_size=8)
    model, data = Model(config, jax.random.key(0)), OneABlock(8)
    evaluation = EvalConfig(DataConfig((), 24, 8), rows=8, samples=2, by=("position",))
    found = held_out_likelihood(evaluation, data)(model, 0)
    tokens, mask = data.rows["tokens"], data.rows["loss_mask"]
    total = 0.0
    for name in ("0", "1", "2", "3", "4-7"):
        first, last = int(name[0]), int(name[-1])
        own = mask & (first <= np.arange(24) % 8) & (np.arange(24) % 8 <= last)
        expected, _ = nelbo(model, tokens, block_size=8, loss_mask=own)
        assert found.pop(f"nelbo_position/{name}") == pytest.approx(expected, rel=1e-6)
        total += expected * own.sum()
    assert found["nelbo"] == pytest.approx(total / mask.sum(), rel=1e-6)
    assert set(found) == {"nelbo", "nelbo_se"}


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1, "0"),
        (3, "0 1 2"),
        (4, "0 1 2 3"),
        (6, "0 1 2 3 4-7"),
        (9, "0 1 2 3 4-7 8-15"),
        (64, "0 1 2 3 4-7 8-15 16-31 32-63"),
    ],
)
def test_positions_are_told_apart_in_few_groups(size, names):
    assert position_groups(Paradigm(block_size=size)) == names.split()


@pytest.mark.parametrize("origin", ["sequence", "response"])
def test_places_are_counted_from_where_blocks_start(origin):
    """Two documents of which the first has a prompt of three, and padding."""
    segments = np.array([[1] * 9 + [2] * 4 + [0] * 3])
    mask = np.array([[False] * 3 + [True] * 10 + [False] * 3])
    batch = Batch(*map(jnp.asarray, (segments, segments, mask)))
    found = block_offsets(Paradigm(block_size=4, origin=origin), batch)
    first = "012301230" if origin == "sequence" else "012012301"
    assert "".join(map(str, found[0, :13])) == first + "0123"


class Blank:
    """Rows of padding without end."""

    def __iter__(self):
        return self

    def __next__(self):
        return {"loss_mask": np.zeros((2, 24), bool)}

    def close(self):
        pass


def test_data_without_a_token_that_counts_is_refused_at_once(inputs, unchecked_types):
    with pytest.raises(DataError, match="eval.data has no token that counts in its first rows"):
        held_out_likelihood(held_out(inputs, SHAPE, 4)[0], Blank())
