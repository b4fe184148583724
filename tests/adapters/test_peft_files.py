"""Adapters that PEFT wrote: logits and gradients are PEFT's, and what is written back is what PEFT wrote."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdar_jax import adapters, load_pretrained
from sdar_jax.adapters import LoraConfig
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.model import Model, logits, stack_layers
from tests.bad_input import refused
from tests.parity.test_parity import FIXTURES, assert_close, loss
from tests.tiny import tiny_llada2, tiny_model

ADAPTERS = FIXTURES.with_name("adapters")
BASES = {
    "lora-qwen3": "qwen3", "lora-patterns": "qwen3", "lora-moe": "qwen3-moe", "lora-experts": "qwen3-moe",
}  # fmt: skip
WHOLE = {"lora-patterns": ("embed_tokens", "lm_head")}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def loaded(name: str) -> Model:
    return adapters.load(load_pretrained(FIXTURES / BASES[name], dtype="float32"), ADAPTERS / name)


@pytest.mark.parity
@pytest.mark.parametrize("name", BASES)
def test_logits_and_gradients(name, tmp_path):
    expected = dict(np.load(ADAPTERS / name / "outputs.npz"))
    tokens, scores = jnp.asarray(expected.pop("tokens")), expected.pop("logits")
    model = loaded(name)
    if model.config.num_experts:
        # The stored gradients have no balance loss.
        model.config = model.config.__class__(**{**vars(model.config), "router_aux_loss_coef": 0.0})
    gradient, (ours, _) = jax.grad(loss, has_aux=True)(model, tokens, model.config.vocab_size)
    assert_close(np.asarray(ours), scores)
    assert_close(np.asarray(logits(adapters.merge(model), tokens, block_size=1)), scores, "merged")
    # A gradient has the shape of a model, so saving it gives it the names of PEFT.
    adapters.save(gradient, tmp_path / "gradient", modules_to_save=WHOLE.get(name, ()))
    found = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for weight, theirs in expected.items():
        assert_close(found[weight], theirs, weight)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["lora-qwen3", "lora-moe", "lora-experts"])
def test_what_peft_wrote_is_written_back(name, stacked, tmp_path):
    model = loaded(name)
    base = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    adapters.save(
        stack_layers(model) if stacked else model, tmp_path, base=base["base_model_name_or_path"]
    )
    theirs, ours = (
        load_file(each / "adapter_model.safetensors") for each in (ADAPTERS / name, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        np.testing.assert_array_equal(ours[tensor], expected)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "peft_type", "task_type", "bias", "base_model_name_or_path"):
        assert settings[field] == base[field], field
    modules = {key.rsplit(".", 2)[0].rpartition(".")[2] for key in theirs}
    assert {target.rpartition(".")[2] for target in settings["target_modules"]} == modules


def test_ranks_and_scales_that_differ_come_back(tmp_path):
    model = loaded("lora-patterns")
    adapters.save(model, tmp_path, modules_to_save=("embed_tokens", "lm_head"))
    again = adapters.load(load_pretrained(FIXTURES / "qwen3", dtype="float32"), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, model, again)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["rank_pattern"] and settings["alpha_pattern"]


def test_names_that_the_head_has_too_are_written_in_full(tmp_path):
    """LLaDA's last projection of a layer and its head are both called ff_out."""
    model = tiny_model(
        jnp.float32, model_type="llada", objective="masked_diffusion", block_size=None
    )
    config = LoraConfig(r=2, target_modules=("ff_out",))
    adapters.save(adapters.add(model, config), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == [
        f"model.transformer.blocks.{i}.ff_out" for i in range(model.config.num_layers)
    ]


def test_queries_keys_and_values_in_one_tensor_come_back(tmp_path):
    """LLaDA2's files have one projection for the three."""
    model = tiny_llada2(jnp.float32)
    added = with_random_b(adapters.add(model, LoraConfig(r=2)))
    adapters.save(added, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.attention.query_key_value.lora_B.weight" in names
    assert "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.2.mlp.shared_experts.down_proj.lora_A.weight" in names
    jax.tree.map(np.testing.assert_array_equal, added, adapters.load(model, tmp_path))


def test_experts_beside_shared_and_dense_ones_come_back(tmp_path):
    """One name of target_modules is of the dense layers, of the experts and of the shared ones."""
    model = tiny_llada2(jnp.float32)
    added = with_random_b(adapters.add(model, LoraConfig(r=2, target_modules=("up_proj",))))
    adapters.save(added, tmp_path)
    layers = "base_model.model.model.layers"
    modules = [f"{layers}.0.mlp.up_proj"]
    modules += [f"{layers}.{i}.mlp.shared_experts.up_proj" for i in (1, 2)]
    modules += [f"{layers}.{i}.mlp.experts.{e}.up_proj" for i in (1, 2) for e in range(8)]
    names = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["up_proj"]
    jax.tree.map(np.testing.assert_array_equal, added, adapters.load(model, tmp_path))


EXPERT = "base_model.model.model.layers.1.mlp.experts.4.up_proj"


def drop_expert(tensors):
    for part in "AB":
        tensors.pop(f"{EXPERT}.lora_{part}.weight")


def cut_rank(tensors):
    a, b = (f"{EXPERT}.lora_{part}.weight" for part in "AB")
    tensors[a], tensors[b] = tensors[a][:2].copy(), tensors[b][:, :2].copy()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (drop_expert, ("layers.1.mlp.experts.4.up_proj have no matrices", "merge it with PEFT")),
        (cut_rank, ("layers.1.mlp.experts.0.up_proj", "ranks and scales [(2, ", "(3, ")),
    ],
)
def test_experts_that_differ_are_refused(change, names, tmp_path):
    copied = Path(shutil.copytree(ADAPTERS / "lora-experts", tmp_path / "adapter"))
    change_tensors(copied, change)
    with refused(CheckpointError, *names):
        adapters.load(load_pretrained(FIXTURES / "qwen3-moe", dtype="float32"), copied)


def with_random_b(model: Model) -> Model:
    def draw(path, leaf):
        wanted = "lora_b" in jax.tree_util.keystr(path)
        key = jax.random.key(len(jax.tree_util.keystr(path)))
        return 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) if wanted else leaf

    return jax.tree.map_with_path(draw, model)


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(ADAPTERS / "lora-qwen3", tmp_path / "adapter"))


def change_settings(directory: Path, **changes) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(directory: Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"peft_type": "IA3"}, ("peft_type", "'IA3'", "LORA")),
        ({"peft_type": None}, ("peft_type", "None")),
        ({"use_dora": True}, ("use_dora", "True", "merge it with PEFT")),
        ({"bias": "lora_only"}, ("bias", "'lora_only'")),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
    ],
)
def test_more_than_lora_is_refused(changes, names, copied):
    change_settings(copied, **changes)
    with refused(CheckpointError, *names):
        adapters.load(load_pretrained(FIXTURES / "qwen3", dtype="float32"), copied)


def rename(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def cut(tensors):
    tensors[f"{PREFIX}.lora_A.weight"] = tensors[f"{PREFIX}.lora_A.weight"][:, :-1].copy()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda tensors: tensors.pop(f"{PREFIX}.lora_B.weight"), ("q_proj.lora_B is missing",)),
        (cut, ("q_proj has matrices [4, 23]", "[4, 24]")),
        (
            rename(
                f"{PREFIX}.lora_A.weight", PREFIX.replace("layers.0", "layers.9") + ".lora_A.weight"
            ),
            ("q_proj.lora_A is missing",),
        ),
        (lambda tensors: tensors.update(extra=np.zeros(2, np.float32)), ("extra", "no place for")),
        (lambda tensors: tensors.clear() or tensors.update(x=np.zeros(1, np.float32)), ("x,",)),
        (
            lambda tensors: tensors.update(
                {"base_model.model.lm_head.weight": np.zeros((3, 24), np.float32)}
            ),
            ("lm_head.weight is [3, 24]", "[61, 24]"),
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(change, names, copied):
    change_tensors(copied, change)
    with refused(CheckpointError, *names):
        adapters.load(load_pretrained(FIXTURES / "qwen3", dtype="float32"), copied)


def test_files_that_are_missing_or_cut_are_refused(copied, tmp_path):
    model = load_pretrained(FIXTURES / "qwen3", dtype="float32")
    with refused(CheckpointError, "adapter_config.json", str(tmp_path / "none")):
        adapters.load(model, tmp_path / "none")
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with refused(CheckpointError, "adapter_model.safetensors", "cannot be read"):
        adapters.load(model, copied)
    file.unlink()
    with refused(CheckpointError, "adapter_model.safetensors", "cannot be read"):
        adapters.load(model, copied)


def test_a_save_replaces_adapters_alone(copied):
    model = loaded("lora-qwen3")
    adapters.save(model, copied.with_name("new"))
    adapters.save(model, copied.with_name("new"))
    (copied / "notes.txt").write_text("mine")
    with refused(CheckpointError, "notes.txt"):
        adapters.save(model, copied)
    assert (copied / "notes.txt").read_text() == "mine"
    with refused(ConfigError, "no low-rank matrices"):
        adapters.save(adapters.merge(model), copied)
