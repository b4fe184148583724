"""Held-out likelihood: the batches of held-out rows put together are the whole of them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer
from sdar_jax.errors import DataError
from sdar_jax.evaluation import autoregressive_nll, nelbo
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.held_out import held_out_likelihood
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
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
