"""Bad model directories, and bad requests for them: each is one typed error of one line, with the value and the fix."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdar_jax.errors import CheckpointError, ConfigError, SdarError
from sdar_jax.hf import pretrained, released
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.conversion import to_diffusion

CONFIG = ModelConfig(40, 16, 24, 2, 4, 2, 8)
DIFFUSION = ModelConfig(40, 16, 24, 2, 4, 2, 8, objective="block_diffusion", block_size=4)


def make(config: ModelConfig = CONFIG) -> Model:
    shapes = jax.eval_shape(lambda: Model(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_pretrained(make(), root / "single")
    save_pretrained(make(), root / "sharded", max_shard_bytes=8000)
    return root


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def refused(
    kind: type[SdarError],
    match: str,
    call: Callable[..., object],
    *arguments: object,
    **options: object,
) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def edit_tensors(directory: Path, **changes: np.ndarray | None) -> None:
    file = directory / "model.safetensors"
    tensors = {
        **load_file(file),
        **{name.replace("__", "."): tensor for name, tensor in changes.items()},
    }
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def edit_index(directory: Path, change: Callable[[dict], None]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_no_such_directory(tmp_path: Path) -> None:
    refused(
        CheckpointError, "nowhere: no such directory; give", load_pretrained, tmp_path / "nowhere"
    )


def test_a_file_for_a_directory(single: Path) -> None:
    refused(
        CheckpointError,
        "config.json: is a file; give the directory",
        load_pretrained,
        single / "config.json",
    )


def test_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("Name or service not known\nand a second line")

    monkeypatch.setattr(released, "snapshot_download", offline)
    match = (
        r"org/model: no such directory, and .*hub.*\(Name or service not known\); check the name"
    )
    refused(CheckpointError, match, load_pretrained, "org/model")


def test_hub_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, told to stay offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(
        CheckpointError,
        "org/model: no such directory, and .*hub did not",
        load_pretrained,
        "org/model",
    )


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    match = "single: holds neither model.safetensors nor model.safetensors.index.json; give"
    refused(CheckpointError, match, load_pretrained, single)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "consolidated.00.pth"]
)
def test_weights_that_are_not_read(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    match = f"neither model.safetensors nor model.safetensors.index.json, only {name}; "
    match += "give a directory with safetensors"
    refused(CheckpointError, match, load_pretrained, single)


def test_a_head_that_is_missing_may_be_tied(single: Path) -> None:
    """The advice works."""
    edit_tensors(single, lm_head__weight=None)
    match = (
        "1 missing: lm_head.weight; .*, or set tie_word_embeddings to true if it has no such head"
    )
    refused(CheckpointError, match, load_pretrained, single)
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert load_pretrained(single).head is None


def test_a_tied_head_of_another_shape(single: Path) -> None:
    """It is the model's, so it must fit."""
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    edit_tensors(single, lm_head__weight=np.zeros((44, 16), np.float32))
    match = r"1 of a wrong shape: lm_head.weight is \[44, 16\] and should be \[40, 16\]; use"
    refused(CheckpointError, match, load_pretrained, single)


@pytest.mark.parametrize("stop", ["</s>", ["</s>"], 2.5, {"id": 2}, True])
def test_stops_that_are_no_ids(single: Path, stop: object) -> None:
    (single / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    refused(
        CheckpointError,
        "generation_config.json: eos_token_id is .*; give a token id, or a",
        load_pretrained,
        single,
    )


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(CheckpointError, "config.json: no such file; give", load_pretrained, single)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(single: Path, keep: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(
        CheckpointError,
        "model.safetensors: not a whole safetensors file .*; download",
        load_pretrained,
        single,
    )


def test_a_file_of_something_else(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(
        CheckpointError, "model.safetensors: not a whole safetensors file", load_pretrained, single
    )


def test_names_shapes_and_types_in_one_error(single: Path) -> None:
    changes = {
        "lm_head__weight": None,
        "model__layers__1__mlp__up_proj__weight": None,
        "model__layers__0__self_attn__q_proj__bias": np.zeros(32, np.float32),
        "model__norm__weight": np.zeros(17, np.float32),
        "model__layers__0__self_attn__o_proj__weight": np.zeros((16, 32), ml_dtypes.float8_e4m3fn),
    }
    edit_tensors(single, **changes)
    match = (
        "single: tensors do not fit config.json; 2 missing: lm_head.weight, model.layers.1.mlp.up_proj.weight; "
        "1 unexpected: model.layers.0.self_attn.q_proj.bias; "
        r"1 of a wrong shape: model.norm.weight is \[17\] and should be \[16\]; "
        "1 of an unsupported type: model.layers.0.self_attn.o_proj.weight is F8_E4M3; "
        "use the config.json and weights of one model, in F64, F32, F16, BF16"
    )
    refused(CheckpointError, match, load_pretrained, single)


def test_long_lists_are_counted(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    refused(
        CheckpointError,
        r"22 missing: (model.layers.2\S+, ){4}\S+ and 17 more; use",
        load_pretrained,
        single,
    )


def test_nothing_is_placed_before_the_check(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(pretrained, "_load", never)
    edit_tensors(single, lm_head__weight=None)
    refused(CheckpointError, "1 missing: lm_head.weight", load_pretrained, single)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(
        CheckpointError, f"{shard.name}: this shard is missing; download", load_pretrained, sharded
    )


def test_a_shard_cut_short(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(
        CheckpointError, f"{shard.name}: not a whole safetensors file", load_pretrained, sharded
    )


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda weight_map: weight_map.update({"model.ghost.weight": first}))
    match = f"index.json: names model.ghost.weight, which {first} does not hold; download"
    refused(CheckpointError, match, load_pretrained, sharded)


def test_an_index_that_leaves_a_tensor_out(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    refused(CheckpointError, "1 missing: model.norm.weight; use", load_pretrained, sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}']
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(
        CheckpointError,
        "index.json: not a JSON object with a weight_map of file names; download",
        load_pretrained,
        sharded,
    )


@pytest.mark.parametrize(("text", "what"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_bad_generation_config(single: Path, text: str, what: str) -> None:
    (single / "generation_config.json").write_text(text)
    refused(
        CheckpointError,
        f"generation_config.json: {what}.*; restore or remove",
        load_pretrained,
        single,
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float33"}, "dtype 'float33' is unknown; use one of"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported for weights; use one of"),
        ({"dtype": "float64"}, "dtype 'float64' needs 64-bit mode; set JAX_ENABLE_X64"),
        ({"block_size": -4}, "block_size is -4; give a positive"),
        ({"mask_token_id": 40}, "mask_token_id is 40; give"),
    ],
)
def test_bad_options(single: Path, options: dict, match: str) -> None:
    refused(ConfigError, match, load_pretrained, single, **options)


def test_saving_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    match = "holds notes.txt, which a save would delete; choose a new directory"
    refused(CheckpointError, match, save_pretrained, make(), tmp_path)
    refused(
        CheckpointError,
        "notes.txt: is a file; choose",
        save_pretrained,
        make(),
        tmp_path / "notes.txt",
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.safetensors", "additional_chat_templates/a.txt"],
)
def test_saving_over_what_a_save_does_not_write(saved: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved / "sharded", path)
    save_pretrained(make(), path)
    (path / "additional_chat_templates").mkdir()
    (path / name).write_text("mine")
    refused(
        CheckpointError,
        f"holds {name}, which a save would delete; choose a new",
        save_pretrained,
        make(),
        path,
    )
    assert (path / name).read_text() == "mine"


def test_saving_where_a_directory_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    match = r"model: cannot be written \(.*\); make room or choose another path"
    refused(CheckpointError, match, save_pretrained, make(), tmp_path / "file" / "model")


def test_saving_with_a_tokenizer_from_nowhere(tmp_path: Path) -> None:
    match = f"{os.path.basename(tmp_path)}: holds no tokenizer files; give the directory that has tokenizer.json"
    refused(
        CheckpointError, match, save_pretrained, make(), tmp_path / "model", tokenizer_from=tmp_path
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (
            CONFIG,
            {"objective": "autoregressive", "block_size": 4},
            "objective 'autoregressive' is no diffusion; use",
        ),
        (
            CONFIG,
            {"tokenizer_size": 39},
            "block_size is None and the model has none; block diffusion needs one",
        ),
        (
            CONFIG,
            {"block_size": 4},
            "neither mask_token_id nor tokenizer_size is given; the mask needs",
        ),
        (
            CONFIG,
            {"block_size": 4, "tokenizer_size": 41},
            "tokenizer_size is 41 and the model has 40 rows; give",
        ),
        (
            CONFIG,
            {"block_size": 4, "mask_token_id": 41},
            "mask_token_id is 41; give a spare id below 40, or 40",
        ),
        (CONFIG, {"block_size": 4, "mask_token_id": -1}, "mask_token_id is -1; give a spare id"),
        (CONFIG, {"block_size": 0, "mask_token_id": 39}, "block_size is 0; give a positive"),
        (
            CONFIG,
            {"block_size": 4, "mask_token_id": 39, "mask_init": "median"},
            "mask_init 'median' is unknown; use",
        ),
        (
            CONFIG,
            {"block_size": 4, "mask_token_id": 39, "mask_init": "normal"},
            "'normal' needs a random key; give key",
        ),
        (
            CONFIG,
            {"block_size": 4, "mask_token_id": 40, "mask_init": "keep"},
            "'keep' has no row to keep.*; use 'mean'",
        ),
        (
            CONFIG,
            {"block_size": 4, "mask_token_id": 39, "block_origin": "end"},
            "block_origin 'end' is unknown; use",
        ),
        (
            DIFFUSION,
            {"block_size": 8},
            "mask_token_id is None and this diffusion model has none; give the one",
        ),
    ],
)
def test_bad_conversions(config: ModelConfig, options: dict, match: str) -> None:
    refused(ConfigError, match, to_diffusion, make(config), **options)


def test_a_second_mask() -> None:
    model = to_diffusion(make(), block_size=4, mask_token_id=39)
    match = "mask_token_id 38 is not the model's own, 39; leave it out"
    refused(ConfigError, match, to_diffusion, model, mask_token_id=38)
