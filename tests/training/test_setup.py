"""The model a run starts with: loaded or random, converted where that is wanted, refused where it cannot be."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sdar_jax.data import DataConfig, SourceConfig, load_tokenizer
from sdar_jax.devices.sharding import MeshConfig, make_mesh
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.hf.pretrained import save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.config import PRESETS, ModelConfig
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


def start(tokenizer, /, key=KEY, **fields) -> Model:
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
    model = start(
        tokenizer, init_from=str(base), objective=objective, block_size=8, block_origin="response"
    )
    config = model.config
    assert (config.objective, config.block_size, config.block_origin) == (objective, 8, "response")
    assert config.mask_token_id == len(tokenizer) == 15 and model.head is not None
    np.testing.assert_allclose(
        model.embedding[15], model.embedding[:15].mean(axis=0), rtol=1e-5, atol=1e-7
    )


def test_the_masks_row_and_its_start_can_be_chosen(base, tokenizer):
    model = start(
        tokenizer,
        init_from=str(base),
        objective="masked_diffusion",
        mask_token_id=20,
        mask_init="zeros",
    )
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
    with pytest.raises(
        ConfigError, match="model.objective is 'autoregressive' and the weights are block_diffusion"
    ):
        start(tokenizer, init_from=str(tmp_path / "converted"), objective="autoregressive")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "block_diffusion"}, "block_size is None"),
        ({"objective": "block_diffusion", "block_size": 0}, "block_size is 0"),
        ({"objective": "masked_diffusion", "mask_token_id": 99}, "mask_token_id is 99"),
        ({"block_size": 4}, "model.block_size is 4 and the model autoregressive; leave it out"),
        ({"mask_token_id": 4}, "model.mask_token_id is 4 and the model autoregressive"),
        (
            {"shape": replace(SHAPE, vocab_size=10)},
            "the tokenizer has ids up to 14 .* vocabulary ends at 9",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        start(tokenizer, **({"shape": SHAPE} | fields))


def with_holes(directory: Path, ids: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words at ids of their own."""
    raw = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1} | ids, unk_token="<unk>"))
    raw.add_special_tokens(["<eos>", *named.values()])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", **named).save_pretrained(
        directory
    )
    return load_tokenizer(directory)


def test_the_mask_is_past_the_largest_id_of_a_tokenizer_with_gaps(tmp_path, base):
    tokenizer = with_holes(tmp_path, {"a": 2, "b": 9})
    assert len(tokenizer) == 4
    model = start(tokenizer, init_from=str(base), objective="masked_diffusion")
    assert model.config.mask_token_id == 10
    np.testing.assert_allclose(
        model.embedding[10], model.embedding[:10].mean(axis=0), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("mask", "rows"), [(5, 32), (20, 32), (32, 33)], ids=["between", "behind", "appended"]
)
def test_a_mask_token_of_the_tokenizers_own_is_the_mask(tmp_path, base, mask, rows):
    tokenizer = with_holes(tmp_path, {"a": 2, "b": 9, "<mask>": mask}, mask_token="<mask>")
    model = start(tokenizer, init_from=str(base), objective="masked_diffusion")
    assert (model.config.mask_token_id, model.config.vocab_size) == (mask, rows)
    given = start(tokenizer, init_from=str(base), objective="masked_diffusion", mask_token_id=21)
    assert given.config.mask_token_id == 21


def test_ids_past_the_vocabulary_are_refused_with_advice_that_helps(tmp_path, base, inputs):
    large, small = (
        with_holes(tmp_path / "large", {"z": 32}),
        with_holes(tmp_path / "small", {"z": 31}),
    )
    past = r"the tokenizer has ids up to 32 \('z'\), the model's vocabulary ends at 31; "
    with pytest.raises(ConfigError, match=past + "give model.shape a vocab_size of 33 or more"):
        start(large, shape=SHAPE)
    assert start(large, shape=replace(SHAPE, vocab_size=33)).config.vocab_size == 33
    with pytest.raises(
        ConfigError, match=past + "leave model.tokenizer out, which takes the model's own"
    ):
        start(large, init_from=str(base))
    own = InitConfig(init_from=str(base))
    start(load_tokenizer(tokenizer_directory(own)), init_from=str(base), tokenizer=None)
    with pytest.raises(
        ConfigError, match=past + "resize its embeddings .* or give .* as model.tokenizer"
    ):
        start(large, init_from=str(base), tokenizer=None)
    start(small, init_from=str(base), tokenizer="small")
    config = DataConfig((SourceConfig(str(inputs / "sums.jsonl"), "jsonl"),), 16, 2)
    with pytest.raises(ConfigError, match=past + "use the tokenizer it was trained with"):
        open_dataset(config, large, replace(SHAPE, eos_token_id=0))
    open_dataset(config, small, replace(SHAPE, eos_token_id=0))


def test_a_mask_that_is_in_use_is_refused_or_told(tmp_path, base, caplog):
    tokenizer = with_holes(tmp_path, {"a": 2}, mask_token="<eos>")
    options = {"init_from": str(base), "objective": "masked_diffusion"}
    with pytest.raises(
        ConfigError, match="the mask's id 0 is the end-of-text token's; set model.mask_token_id"
    ):
        start(tokenizer, **options)
    assert (
        start(tokenizer, mask_token_id=3, **options).config.mask_token_id == 3 and not caplog.text
    )
    start(tokenizer, mask_token_id=2, **options)
    assert (
        "mask_token_id 2 is the tokenizer's 'a', which texts may hold; a spare id is safe"
        in caplog.text
    )


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
    model = replace(
        SHAPE, objective="block_diffusion", block_size=8, mask_token_id=20, eos_token_id=3
    )
    batch = next(open_dataset(config, tokenizer, model))
    lengths = (batch["segment_ids"] == 1).sum(axis=1)
    assert (lengths % 8 == 0).all() and (batch["tokens"][0, lengths[0] - 1] == 3)


def test_without_an_end_of_text_token_there_is_no_data(inputs, tokenizer):
    tokenizer = load_tokenizer(inputs / "tokenizer")
    tokenizer.eos_token = None
    config = DataConfig((SourceConfig(str(inputs / "sums.jsonl"), "jsonl"),), 16, 2)
    with pytest.raises(ConfigError, match="neither model nor tokenizer has an end-of-text token"):
        open_dataset(config, tokenizer, SHAPE)
