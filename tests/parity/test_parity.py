"""Logits and gradients of tiny Hugging Face models against those that transformers computed (make_fixtures.py)."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from safetensors.numpy import load_file

from sdar_jax.experts import balance_loss
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.model import Model, logits, stack_layers
from sdar_jax.model.config import ModelConfig, RopeConfig
from sdar_jax.model.rope import rope_frequencies
from sdar_jax.visibility import causal

pytestmark = pytest.mark.parity
FIXTURES = Path(__file__).parent / "fixtures"
MIXTURES = ["qwen3-moe", "qwen3-moe-tied-bf16"]
NAMES = [
    "qwen3",
    "qwen3-tied-yarn-bf16",
    "qwen2-tied-linear-f16",
    "llama-llama3-sharded",
    *MIXTURES,
]


@partial(jax.jit, static_argnames="vocab_size")
def loss(model: Model, tokens: Array, vocab_size: int) -> tuple[Array, tuple[Array, Array]]:
    """Mean next-token cross-entropy, written out, with an MoE's balance loss; the logits and that loss."""
    scores = logits(model, tokens, block_size=1)
    log_probs = jax.nn.log_softmax(scores[:, :-1])
    entropy = -(jax.nn.one_hot(tokens[:, 1:], vocab_size) * log_probs).sum(axis=-1).mean()
    balance = jnp.zeros(())
    if model.config.num_experts:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        _, sums = model.hidden_and_routing(tokens, positions, causal(jnp.ones_like(tokens)))
        assert sums is not None
        balance = balance_loss(sums)
    return entropy + model.config.router_aux_loss_coef * balance, (scores, balance)


def assert_close(ours: np.ndarray, theirs: np.ndarray, name: str = "logits") -> None:
    assert ours.shape == theirs.shape, name
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.xla_defaults), True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str, stacked: bool, tmp_path: Path) -> None:
    expected = dict(np.load(FIXTURES / name / "outputs.npz"))
    tokens = jnp.asarray(expected.pop("tokens"))
    model = load_pretrained(FIXTURES / name, dtype="float32")
    model = stack_layers(model) if stacked else model
    gradient, (scores, balance) = jax.grad(loss, has_aux=True)(
        model, tokens, model.config.vocab_size
    )
    assert_close(np.asarray(scores), expected.pop("logits"))
    if name in MIXTURES:
        assert_close(np.asarray(balance), expected.pop("aux_loss"), "balance loss")
    # A gradient has the shape of a model, so saving it gives it the names of Hugging Face.
    save_pretrained(gradient, tmp_path / "gradient")
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    assert ours.keys() == expected.keys()
    for weight, theirs in expected.items():
        assert_close(ours[weight], theirs, weight)


@pytest.mark.parametrize(
    "name", ["qwen3-tied-yarn-bf16", "qwen2-tied-linear-f16", "qwen3-moe-tied-bf16"]
)
def test_half_precision_weights_arrive_exactly(name: str) -> None:
    wide, own = (
        load_pretrained(FIXTURES / name, dtype=dtype)
        for dtype in ("float32", name.split("-")[-1].replace("f", "float"))
    )
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(own), strict=True):
        assert a.dtype == jnp.float32 and b.dtype != jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


CHANGES = [
    ("qwen3", {"rms_norm_eps": 1e-2}),
    ("qwen3", {"rope_theta": 1400.0}),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 1.1}}),
    ("qwen3", {"rope_scaling": {"type": "linear", "factor": 1.1}}),
    ("qwen2-tied-linear-f16", {"rope_scaling": None}),
    ("qwen2-tied-linear-f16", {"rope_scaling": {"rope_type": "linear", "factor": 2.6}}),
    ("llama-llama3-sharded", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    ("llama-llama3-sharded", {"rope_scaling.factor": 9.0}),
    ("llama-llama3-sharded", {"rope_scaling.low_freq_factor": 1.0}),
    ("llama-llama3-sharded", {"rope_scaling.high_freq_factor": 4.0}),
    ("llama-llama3-sharded", {"rope_scaling.original_max_position_embeddings": 64}),
    ("qwen3-moe", {"norm_topk_prob": False}),
    ("qwen3-moe", {"num_experts_per_tok": 2}),
    ("qwen3-moe-tied-bf16", {"norm_topk_prob": True}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.factor": 5.0}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.beta_fast": 32.0}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.beta_slow": 1.0}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.original_max_position_embeddings": 64}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.original_max_position_embeddings": None}),
    ("qwen3-tied-yarn-bf16", {"rope_scaling.attention_factor": 1.0}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_every_field_that_leaves_the_shapes_alone_changes_the_logits(
    name: str, change: dict, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / name, directory)
    config = json.loads((directory / "config.json").read_text())
    for key, value in change.items():
        outer, _, inner = key.partition(".")
        config[outer] = {**config[outer], inner: value} if inner else value
    (directory / "config.json").write_text(json.dumps(config))
    expected = np.load(FIXTURES / name / "outputs.npz")
    scores = logits(load_pretrained(directory), jnp.asarray(expected["tokens"]), block_size=1)
    assert np.abs(scores - expected["logits"]).max() > 1e-3 * np.abs(expected["logits"]).max()


LLAMA3 = RopeConfig(5000.0, "llama3", 8.0, 1.5, 3.0, original_max_position_embeddings=32)
YARN = RopeConfig(
    5000.0, "yarn", 4.0, beta_fast=1.0, beta_slow=0.2, original_max_position_embeddings=16
)


@pytest.mark.parametrize(
    ("name", "rope", "longest"),
    [
        ("default", RopeConfig(5000.0), 64),
        ("linear", RopeConfig(5000.0, "linear", 3.0), 192),
        ("llama3", LLAMA3, 256),
        ("yarn", YARN, 64),
        (
            "yarn-defaults",
            RopeConfig(5000.0, "yarn", 4.0, original_max_position_embeddings=64),
            256,
        ),
        ("yarn-attention-factor", RopeConfig(**{**YARN.__dict__, "attention_factor": 0.7}), 64),
    ],
)
def test_rope_frequencies(name: str, rope: RopeConfig, longest: int) -> None:
    expected = np.load(FIXTURES / "rope.npz")[name]
    inverse, factor = rope_frequencies(rope, 32, longest)
    np.testing.assert_allclose(inverse, expected[:-1], rtol=1e-6)
    assert factor == pytest.approx(expected[-1], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_our_config_and_we_read_its(name: str) -> None:
    """Config files of transformers 4 (the fixtures) and 5 (installed) say the same."""
    transformers = pytest.importorskip("transformers")
    ours = ModelConfig.from_hf(FIXTURES / name)
    values = ours.to_hf()
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(values))).to_dict()
    assert ModelConfig.from_hf(theirs) == ours
    shared = (
        "hidden_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    assert {key: theirs[key] for key in shared} == {key: values[key] for key in shared}
