"""Hugging Face directories in and out."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdar_jax.data import load_tokenizer
from sdar_jax.errors import CheckpointError
from sdar_jax.hf import pretrained, released, tensor_files
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from tests.data.conftest import make_byte_tokenizer

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SHAPE = ModelConfig(40, 16, 24, 3, 4, 2, 8, bos_token_id=1, eos_token_id=2, stop_token_ids=(7, 2))
CONFIGS = {
    "qwen3": dataclasses.replace(SHAPE, qkv_bias=True, output_bias=True),
    "qwen2": dataclasses.replace(
        SHAPE, architecture="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=True
    ),
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
    return jax.tree.unflatten(
        structure, [jnp.asarray(draw(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


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
        single = [
            [tensors.pop(f"{prefix}.{e}.{x}_proj.weight") for e in range(3)]
            for x in ("gate", "up", "down")
        ]
        gate, up, down = map(np.stack, single)
        assert gate.shape == (3, 10, 16) and down.shape == (3, 16, 10)
        tensors |= {
            f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1),
            f"{prefix}.down_proj": down,
        }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert_same(load_pretrained(tmp_path / "model"), model)
    tensors[f"{prefix}.down_proj"] = down[:2]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"layers.2.mlp.experts.down_proj is \[2, 16, 10\] and should be \[3, 16",
    ):
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
    theirs = {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
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
    np.testing.assert_array_equal(tensors["lm_head.weight"], model.head[...].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_export_reads_back_as_the_cast(stacked: bool, dtype: DTypeLike, tmp_path: Path) -> None:
    """In the config's words too, so that transformers loads it in that type; a save of its own type is the same."""
    model = make("qwen3_moe")
    save_pretrained(
        stack_layers(make("qwen3_moe")) if stacked else model, tmp_path / "model", dtype=dtype
    )
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    assert_same(load_pretrained(tmp_path / "model", dtype=dtype), cast)
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"]
        == jnp.dtype(dtype).name
    )
    save_pretrained(stack_layers(cast) if stacked else cast, tmp_path / "cast")
    assert bytes_of(tmp_path / "model") == bytes_of(tmp_path / "cast")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Going out and coming in; the types that are advised hold it, and infinite values are nobody's overflow."""
    model = make("llama")
    model.final_norm = nnx.Param(model.final_norm.at[3].set(1e5))
    match = "model.norm.weight holds values past 65504, where float16 ends; use bfloat16 or float32"
    with pytest.raises(CheckpointError, match=match):
        save_pretrained(model, tmp_path / "model", dtype="float16")
    assert not list(tmp_path.iterdir())
    for dtype in ("bfloat16", "float32"):
        save_pretrained(model, tmp_path / "model", dtype=dtype)
        assert load_pretrained(tmp_path / "model", dtype=dtype).final_norm[3] > 99000
        with pytest.raises(CheckpointError, match=f"{tmp_path}/model: {match}"):
            load_pretrained(tmp_path / "model", dtype="float16")
    model.final_norm = nnx.Param(model.final_norm.at[3].set(jnp.inf))
    save_pretrained(model, tmp_path / "model", dtype="float16")
    assert jnp.isinf(load_pretrained(tmp_path / "model", dtype="float16").final_norm[3])


@pytest.mark.parametrize("stacked", [False, True])
def test_shards(stacked: bool, tmp_path: Path) -> None:
    model = make("qwen3")
    save_pretrained(
        stack_layers(make("qwen3")) if stacked else model, tmp_path / "model", max_shard_bytes=5000
    )
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model/*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [
        file.name for file in files
    ]
    data = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(data) <= 5000 and sum(data) == index["metadata"]["total_size"]
    assert_same(load_pretrained(tmp_path / "model"), model)


def test_files_say_that_they_are_torchs(tmp_path: Path) -> None:
    """transformers 4 refuses a file without it."""
    save_pretrained(make("qwen3"), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tied_model_may_carry_its_head_and_old_buffers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(make("qwen2"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    head, buffer = tensors["model.embed_tokens.weight"], np.zeros(4)
    for kind in (np.float32, np.float64):
        extra = {
            "lm_head.weight": head.astype(kind),
            "model.layers.0.self_attn.rotary_emb.inv_freq": buffer,
        }
        save_file({**tensors, **extra}, file)
        model = load_pretrained(tmp_path / "model")
        assert model.head is None
        assert_same(model, make("qwen2"))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16])
def test_a_head_unlike_the_embedding_is_kept(
    dtype: type, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5 does, whatever the flag says; saved again, the flag is right."""
    monkeypatch.setattr(pretrained, "_ROWS_AT_ONCE", 7)
    save_pretrained(make("qwen2"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    head = load_file(file)["model.embed_tokens.weight"].astype(dtype)
    head[-1, -1] += 1
    save_file({**load_file(file), "lm_head.weight": head}, file)
    model = load_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(model.head[...], head.astype(np.float32))
    assert model.config == dataclasses.replace(CONFIGS["qwen2"], tie_embeddings=False)
    (said,) = caplog.messages
    assert said == (
        f"{tmp_path}/model: tie_word_embeddings is true, and lm_head.weight is there and differs from the embedding; "
        "both are kept: set it to false in config.json"
    )
    caplog.clear()
    # The advice, and what a save makes of it.
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    save_pretrained(model, tmp_path / "again")
    for directory in ("model", "again"):
        assert_same(load_pretrained(tmp_path / directory), model)
    assert not caplog.records


def test_weights_that_lie_beside_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One file comes before an index, as in transformers."""
    path = tmp_path / "model"
    save_pretrained(make("llama"), path, max_shard_bytes=5000)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    for name in (
        "pytorch_model-00001-of-00002.bin",
        "consolidated.safetensors",
        "training_args.bin",
        "optimizer.pt",
    ):
        (path / name).write_bytes(b"not read")
    (path / "original").mkdir()
    (path / "original" / "consolidated.00.pth").write_bytes(b"not read")
    assert_same(load_pretrained(path), make("llama"))
    others = (
        "consolidated.safetensors, original/consolidated.00.pth, pytorch_model-00001-of-00002.bin"
    )
    source = "the shards of model.safetensors.index.json"
    assert caplog.messages == [f"{path}: weights are read from {source}; ignored: {others}"]
    caplog.clear()
    other = jax.tree.map(lambda leaf: leaf + 1, make("llama"))
    save_pretrained(other, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", path / "model.safetensors")
    assert_same(load_pretrained(path), other)
    (said,) = caplog.messages
    assert said.startswith(
        f"{path}: weights are read from model.safetensors; ignored: consolidated.safetensors, {shards[0]}"
    )


def test_tensors_that_an_index_does_not_name_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(make("llama"), tmp_path / "model", max_shard_bytes=5000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    save_file({**load_file(shard), "stale.weight": np.zeros(3)}, shard)
    assert_same(load_pretrained(tmp_path / "model"), make("llama"))
    (said,) = caplog.messages
    assert (
        "index.json: does not name stale.weight, which its shards hold; they are not read" in said
    )


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


def test_what_generation_config_asks_for_is_followed_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model"
    save_pretrained(make("qwen3"), path)
    released = {
        "eos_token_id": [7, 2],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    released |= {
        "pad_token_id": 0,
        "transformers_version": "4.51.0",
        "repetition_penalty": 1.0,
        "num_beams": 1,
    }
    (path / "generation_config.json").write_text(json.dumps(released), encoding="utf-8-sig")
    assert_same(load_pretrained(path), make("qwen3"))
    assert not caplog.records
    more = {
        "repetition_penalty": 1.05,
        "stop_strings": ["User:"],
        "min_new_tokens": 3,
        "suppress_tokens": None,
    }
    (path / "generation_config.json").write_text(json.dumps({**released, **more}))
    load_pretrained(path)
    (said,) = caplog.messages
    assert (
        "generation_config.json: not applied: min_new_tokens, repetition_penalty, stop_strings; say"
        in said
    )


TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


@pytest.mark.parametrize("form", ["files", "list"])
def test_all_chat_templates_are_carried_along(form: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tokenizer = make_byte_tokenizer(chat_template=None)
    tokenizer.chat_template = dict(TEMPLATES)
    tokenizer.save_pretrained(source, save_jinja_files=form == "files")
    assert (source / "additional_chat_templates").is_dir() == (form == "files")
    save_pretrained(make("qwen3"), tmp_path / "model", tokenizer_from=source)
    # Saved over, they stay.
    save_pretrained(make("sdar"), tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").chat_template == TEMPLATES


def test_whatever_a_tokenizer_is_read_from_is_carried_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    names = [
        "vocab.txt",
        "vocab.json",
        "added_tokens.json",
        "tokenizer.model.v3",
        "qwen.tiktoken",
        "chat_template.json",
    ]
    names += [
        "preprocessor_config.json",
        "additional_chat_templates/tool_use.jinja",
        "special_tokens_map.json",
    ]
    others = [
        "README.md",
        "training_args.bin",
        "tokenization_qwen2.py",
        "additional_chat_templates/notes.txt",
    ]
    for name in [*names, *others]:
        (source / name).write_text(name)
    save_pretrained(make("qwen3"), tmp_path / "model", tokenizer_from=source)
    held = {
        file.relative_to(tmp_path / "model").as_posix()
        for file in (tmp_path / "model").rglob("*.*")
    }
    assert held - {"config.json", "generation_config.json", "model.safetensors"} == set(names)
    assert all((tmp_path / "model" / name).read_text() == name for name in names)


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
def test_a_failed_save_leaves_what_was_there(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(make("qwen3"), tmp_path / "model")
    before = bytes_of(tmp_path / "model")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match="No space left.*make room or") as caught,
    ):
        patch.setattr(fails, full)
        save_pretrained(make("llama"), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert bytes_of(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def leave_a_killed_save(path: Path, number: int, *held: str) -> Path:
    """What a save that was killed leaves: part of a model in "new", and what it had moved away in "old"."""
    staging = path.with_name(f".{path.name}.{number:08x}")
    for name in held:
        (staging / name).mkdir(parents=True)
        (staging / name / "model.safetensors").write_bytes(b"part")
    return staging


def test_the_next_save_removes_what_killed_ones_left(tmp_path: Path) -> None:
    """But nothing of a living process, of another name, or of a form that is not ours."""
    path = tmp_path / "model"
    killed = [leave_a_killed_save(path, 1, "new"), leave_a_killed_save(path, 2, "new", "old")]
    alive = leave_a_killed_save(path, 3, "new")
    others = [
        leave_a_killed_save(tmp_path / "model.v2", 4, "new"),
        tmp_path / ".model.backup1",
        tmp_path / ".model.1",
    ]
    for other in others[1:]:
        other.mkdir()
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    save_pretrained(make("qwen3"), path)
    assert not any(staging.exists() for staging in killed)
    assert alive.exists() and all(other.exists() for other in others)
    os.close(handle)
    save_pretrained(make("qwen3"), path)
    assert not alive.exists() and all(other.exists() for other in others)


def test_an_old_model_that_is_the_only_one_left_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save was killed between two renames, and the next one fails."""
    staging = leave_a_killed_save(tmp_path / "model", 1, "new", "old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr("os.fsync", full)
        save_pretrained(make("qwen3"), tmp_path / "model")
    assert (staging / "old" / "model.safetensors").read_bytes() == b"part"
    save_pretrained(make("qwen3"), tmp_path / "model")
    assert not staging.exists()


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_process_leaves_nothing_behind_the_next_save(tmp_path: Path) -> None:
    """SIGKILL in the middle of a file."""
    program = """
import jax, os, sys
from sdar_jax import ModelConfig, save_pretrained
from sdar_jax.model import Model
os.fsync = lambda handle: os.kill(os.getpid(), 9)
save_pretrained(Model(ModelConfig(40, 16, 24, 3, 4, 2, 8), jax.random.key(0)), sys.argv[1])
"""
    path = tmp_path / "model"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, timeout=300, check=False
    )
    (left,) = tmp_path.iterdir()
    assert done.returncode == -9 and (left / "new" / "model.safetensors").exists()
    save_pretrained(make("qwen3"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(
            (repository, "*.safetensors" in allow_patterns, "config.json" in allow_patterns)
        )
        return str(FIXTURES / "qwen3")

    monkeypatch.setattr(released, "snapshot_download", download)
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
