"""The model a run starts with: loaded or random, converted where that is wanted, refused where it cannot be."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.config import PRESETS, ModelConfig
from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.model import Model
from sdar_jax.pretrained import save_pretrained
from sdar_jax.sharding import MeshConfig, make_mesh
from sdar_jax.training.config import InitConfig
from sdar_jax.training.setup import initial_model, open_dataset, tokenizer_directory

KEY = jax.random.key(3)
SHAPE = ModelConfig(32, 16, 32, 2, 2, 1, 8, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return load_tokenizer(inputs / "tokenizer")


@pytest.fixture(scope="module")
def base(inputs, tmp_path_factory) -> Path:
    """A bfloat16 autoregressive model on disk, with its tokenizer."""
    path = tmp_path_factory.mktemp("base") / "model"
    model = Model(replace(SHAPE, eos_token_id=0), jax.random.key(0), jnp.bfloat16)
    save_pretrained(model, path, tokenizer_from=inputs / "tokenizer")
    return path


def start(tokenizer, key=KEY, **fields) -> Model:
    fields = {"tokenizer": "given"} | fields
    return initial_model(InitConfig(**fields), tokenizer, key, make_mesh(MeshConfig()))


def test_random_weights_follow_the_key_and_know_the_end_of_text(tokenizer):
    one, same = (start(tokenizer, shape=SHAPE) for _ in range(2))
    other = start(tokenizer, jax.random.key(4), shape=SHAPE)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.embedding[...] != other.embedding[...]).any()
    assert one.config == replace(SHAPE, eos_token_id=0)


def test_a_preset_is_a_shape(tokenizer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)
    assert start(tokenizer, preset="tiny").config.hidden_size == 16
    with pytest.raises(ConfigError, match="preset 'huge' is unknown"):
        start(tokenizer, preset="huge")


def test_loaded_weights_are_float32_and_stay_autoregressive(base, tokenizer):
    model = start(tokenizer, init_from=str(base))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    assert model.config.objective == "autoregressive" and model.head is None


@pytest.mark.parametrize("objective", ["block_diffusion", "masked_diffusion"])
def test_an_autoregressive_model_is_converted(objective, base, tokenizer):
    """Untied, its mask in the first row that the tokenizer leaves free, started at the mean of the others."""
    model = start(tokenizer, init_from=str(base), objective=objective, block_size=8, block_origin="response")
    config = model.config
    assert (config.objective, config.block_size, config.block_origin) == (objective, 8, "response")
    assert config.mask_token_id == len(tokenizer) == 15 and model.head is not None
    np.testing.assert_allclose(model.embedding[15], model.embedding[:15].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_the_masks_row_and_its_start_can_be_chosen(base, tokenizer):
    model = start(tokenizer, init_from=str(base), objective="masked_diffusion", mask_token_id=20, mask_init="zeros")
    assert model.config.mask_token_id == 20 and not model.embedding[20].any()
    drawn = start(tokenizer, init_from=str(base), objective="masked_diffusion", mask_init="normal")
    assert drawn.embedding[15].std() > 0


def test_a_diffusion_model_may_take_another_block_size(base, tokenizer, tmp_path):
    """Study III: the same weights, larger blocks."""
    first = start(tokenizer, init_from=str(base), objective="block_diffusion", block_size=4)
    save_pretrained(first, tmp_path / "converted")
    second = start(tokenizer, init_from=str(tmp_path / "converted"), block_size=16)
    assert second.config == replace(first.config, block_size=16)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(first), jax.tree.leaves(second))
    with pytest.raises(ConfigError, match="model.objective is 'autoregressive' and the weights are block_diffusion"):
        start(tokenizer, init_from=str(tmp_path / "converted"), objective="autoregressive")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "block_diffusion"}, "block_size is None"),
        ({"objective": "block_diffusion", "block_size": 0}, "block_size is 0"),
        ({"objective": "masked_diffusion", "mask_token_id": 99}, "mask_token_id is 99"),
        ({"block_size": 4}, "model.block_size is 4 and the model autoregressive; leave it out"),
        ({"mask_token_id": 4}, "model.mask_token_id is 4 and the model autoregressive"),
        ({"shape": replace(SHAPE, vocab_size=10)}, "the tokenizer has 15 tokens, the model's vocabulary 10"),
    ],
)
def test_what_cannot_be_is_refused(fields, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        start(tokenizer, **({"shape": SHAPE} | fields))


def test_a_directory_that_is_none_is_refused(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        start(tokenizer, init_from=str(tmp_path / "nowhere"))


def test_the_tokenizer_is_the_models_own_unless_another_is_named(base, tmp_path):
    assert tokenizer_directory(InitConfig(init_from=str(base))) == base
    assert tokenizer_directory(InitConfig(init_from=str(base), tokenizer=str(tmp_path))) == tmp_path


def test_rows_are_laid_out_for_the_models_blocks(inputs, tokenizer):
    """Padded to blocks with the model's end-of-text token, which wins over the tokenizer's."""
    sums = SourceConfig(str(inputs / "sums.jsonl"), "jsonl", prompt_field="question")
    config = DataConfig((sums,), 16, 2, packing="fit", pad_to_block=True, num_threads=0)
    model = replace(SHAPE, objective="block_diffusion", block_size=8, mask_token_id=20, eos_token_id=3)
    batch = next(open_dataset(config, tokenizer, model))
    lengths = (batch["segment_ids"] == 1).sum(axis=1)
    assert (lengths % 8 == 0).all() and (batch["tokens"][0, lengths[0] - 1] == 3)


def test_without_an_end_of_text_token_there_is_no_data(inputs, tokenizer):
    tokenizer = load_tokenizer(inputs / "tokenizer")
    tokenizer.eos_token = None
    config = DataConfig((SourceConfig(str(inputs / "sums.jsonl"), "jsonl"),), 16, 2)
    with pytest.raises(ConfigError, match="neither model nor tokenizer has an end-of-text token"):
        open_dataset(config, tokenizer, SHAPE)
