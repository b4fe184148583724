"""Hugging Face directories in and out."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdar_jax import pretrained, tensor_files
from sdar_jax.config import ModelConfig
from sdar_jax.errors import CheckpointError
from sdar_jax.model import Model, stack_layers
from sdar_jax.pretrained import load_pretrained, save_pretrained

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SHAPE = ModelConfig(40, 16, 24, 3, 4, 2, 8, bos_token_id=1, eos_token_id=2, stop_token_ids=(7, 2))
CONFIGS = {
    "qwen3": dataclasses.replace(SHAPE, qkv_bias=True, output_bias=True),
    "qwen2": dataclasses.replace(SHAPE, architecture="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=True),
    "llama": dataclasses.replace(SHAPE, architecture="llama", qk_norm=False, mlp_bias=True),
    "sdar": dataclasses.replace(SHAPE, objective="block_diffusion", block_size=4, mask_token_id=39),
}
EXPERTS = {"num_experts": 3, "num_experts_per_token": 2, "moe_intermediate_size": 10}
CONFIGS["qwen3_moe"] = dataclasses.replace(SHAPE, architecture="qwen3_moe", **EXPERTS)
CONFIGS["sdar_moe"] = dataclasses.replace(CONFIGS["sdar"], architecture="qwen3_moe", **EXPERTS)


def make(name: str, dtype: jnp.dtype = jnp.float32) -> Model:
    """Every weight, norms and biases too, is random."""
    shapes = jax.eval_shape(lambda: Model(CONFIGS[name], jax.random.key(0), dtype))
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(0).normal
    return jax.tree.unflatten(structure, [jnp.asarray(draw(size=leaf.shape), leaf.dtype) for leaf in leaves])


def assert_same(a: Model, b: Model) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert a.config == b.config
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, stacked: bool, tmp_path: Path) -> None:
    model = make(name)
    save_pretrained(stack_layers(make(name)) if stacked else model, tmp_path / "model")
    assert_same(load_pretrained(tmp_path / "model"), model)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == name
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_fused_experts_are_read_as_single_ones(tmp_path: Path) -> None:
    """The layout of transformers 5's modules: [E, 2 F, D], gate above up, and [E, D, F]."""
    model = make("qwen3_moe")
    save_pretrained(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        single = [[tensors.pop(f"{prefix}.{e}.{x}_proj.weight") for e in range(3)] for x in ("gate", "up", "down")]
        gate, up, down = map(np.stack, single)
        assert gate.shape == (3, 10, 16) and down.shape == (3, 16, 10)
        tensors |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert_same(load_pretrained(tmp_path / "model"), model)
    tensors[f"{prefix}.down_proj"] = down[:2]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.down_proj is \[2, 16, 10\] and should be \[3, 16"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_round_trip_in_every_dtype(dtype: str, tmp_path: Path, x64: None) -> None:
    model = make("llama", jnp.dtype(dtype))
    save_pretrained(model, tmp_path / "model")
    assert_same(load_pretrained(tmp_path / "model", dtype=dtype), model)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
    assert load_pretrained(tmp_path / "model").embedding.dtype == jnp.float32


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/")), ids=lambda path: path.name)
def test_saves_the_tensors_that_transformers_saved(path: Path, tmp_path: Path) -> None:
    theirs = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = theirs["model.norm.weight"].dtype.name
    save_pretrained(load_pretrained(path, dtype=own), tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor)


def test_casting_on_the_way_out(tmp_path: Path) -> None:
    model = make("qwen3")
    save_pretrained(model, tmp_path / "model", dtype="bfloat16")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(bfloat16)}
    np.testing.assert_array_equal(tensors["lm_head.weight"], model.head[...].astype(jnp.bfloat16).T)


@pytest.mark.parametrize("stacked", [False, True])
def test_shards(stacked: bool, tmp_path: Path) -> None:
    model = make("qwen3")
    save_pretrained(stack_layers(make("qwen3")) if stacked else model, tmp_path / "model", max_shard_bytes=5000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model/*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    data = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(data) <= 5000 and sum(data) == index["metadata"]["total_size"]
    assert_same(load_pretrained(tmp_path / "model"), model)


def test_files_say_that_they_are_torchs(tmp_path: Path) -> None:
    """transformers 4 refuses a file without it."""
    save_pretrained(make("qwen3"), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tied_model_may_carry_its_head_and_old_buffers(tmp_path: Path) -> None:
    save_pretrained(make("qwen2"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = {"lm_head.weight": np.zeros((40, 16)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)}
    save_file({**load_file(file), **extra}, file)
    model = load_pretrained(tmp_path / "model")
    assert model.head is None
    assert_same(model, make("qwen2"))


def test_block_size_and_mask_can_be_supplied_or_overridden(tmp_path: Path) -> None:
    save_pretrained(make("sdar"), tmp_path / "model")
    model = load_pretrained(tmp_path / "model", block_size=8, mask_token_id=3)
    assert model.config == dataclasses.replace(CONFIGS["sdar"], block_size=8, mask_token_id=3)
    save_pretrained(make("qwen3"), tmp_path / "autoregressive")
    supplied = load_pretrained(tmp_path / "autoregressive", block_size=8)
    assert supplied.config == dataclasses.replace(CONFIGS["qwen3"], block_size=8)


@pytest.mark.parametrize(("stop", "expected"), [([7, 2], (7, 2)), (5, (5,)), (None, (2,))])
def test_stop_tokens_are_generation_configs(stop: object, expected: tuple, tmp_path: Path) -> None:
    save_pretrained(make("qwen3"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": stop}))
    assert load_pretrained(tmp_path / "model").config.stop_token_ids == expected
    file.unlink()
    assert load_pretrained(tmp_path / "model").config.stop_token_ids == (2,)


def test_tokenizer_files_are_carried_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    files = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "merges.txt": "a b"}
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("not carried")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    save_pretrained(make("qwen3"), tmp_path / "model", tokenizer_from=source)
    assert {name: (tmp_path / "model" / name).read_text() for name in files} == files
    assert not (tmp_path / "model" / "README.md").exists()
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [7, 2]}
    # Saved over, they stay.
    save_pretrained(make("sdar"), tmp_path / "model")
    assert {name: (tmp_path / "model" / name).read_text() for name in files} == files


def test_an_earlier_save_is_replaced_whole(tmp_path: Path) -> None:
    save_pretrained(make("qwen3"), tmp_path / "model", max_shard_bytes=5000)
    save_pretrained(make("llama"), tmp_path / "model")
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "model").iterdir()} == names
    assert_same(load_pretrained(tmp_path / "model"), make("llama"))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.write_text", "shutil.copyfile"])
def test_a_failed_save_leaves_what_was_there(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(make("qwen3"), tmp_path / "model")
    before = bytes_of(tmp_path / "model")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left.*make room or") as caught:
        patch.setattr(fails, full)
        save_pretrained(make("llama"), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert bytes_of(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(make("qwen3"), tmp_path / "model")
    before, rename = bytes_of(tmp_path / "model"), Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if (path / "config.json").exists() and "llama" in (path / "config.json").read_text():
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Permission denied"):
        patch.setattr(Path, "rename", refuse_the_new)
        save_pretrained(make("llama"), tmp_path / "model")
    assert bytes_of(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, "*.safetensors" in allow_patterns, "config.json" in allow_patterns))
        return str(FIXTURES / "qwen3")

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert_same(load_pretrained("org/a-model.v2"), load_pretrained(FIXTURES / "qwen3"))
    assert asked == [("org/a-model.v2", True, True)]
    # A directory of that name comes first.
    shutil.copytree(FIXTURES / "qwen3", tmp_path / "org" / "a-model.v2")
    load_pretrained("org/a-model.v2")
    assert len(asked) == 1


def test_one_tensor_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, no other that was read is still alive."""
    alive: list[weakref.ref] = []
    read = tensor_files.TensorReader.read

    def watched(self: tensor_files.TensorReader, name: str, row: int | None = None) -> np.ndarray:
        assert all(reference() is None for reference in alive)
        tensor = read(self, name, row)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(tensor_files.TensorReader, "read", watched)
    load_pretrained(FIXTURES / "llama-llama3-sharded", dtype="bfloat16")
    assert len(alive) == len(dict(np.load(FIXTURES / "llama-llama3-sharded" / "outputs.npz"))) - 2
