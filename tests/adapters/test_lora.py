"""Low-rank matrices beside weights: nothing changes until they are trained, and merging them changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import DecodingConfig, adapters, generate, logits, save_pretrained
from sdar_jax.adapters import LoraConfig
from sdar_jax.decoding import Engine
from sdar_jax.errors import ConfigError
from sdar_jax.model import Model, stack_layers, unstack_layers
from sdar_jax.model.adapted import Adapted, is_adapted
from sdar_jax.model.config import ModelConfig
from tests.adapters.test_peft_files import with_random_b
from tests.bad_input import refused
from tests.tiny import tiny_llada2, tiny_moe

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) % 20
SOME = LoraConfig(r=2, target_modules=("q_proj", "v_proj", "up_proj", "down_proj"))


def fresh(**changes) -> Model:
    """Of its own: stacking frees what it is given."""
    fields = dict(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=8, initializer_range=0.5, objective="block_diffusion", block_size=4, mask_token_id=22,
    )  # fmt: skip
    return Model(ModelConfig(**(fields | changes)), jax.random.key(0))


def scores(model: Model) -> np.ndarray:
    return np.asarray(logits(model, TOKENS, block_size=4))


@pytest.mark.parametrize("config", [LoraConfig(r=3), SOME])
@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_changes_until_they_are_trained(config, stacked):
    model = stack_layers(fresh()) if stacked else fresh()
    np.testing.assert_array_equal(scores(adapters.add(model, config)), scores(model))


@pytest.mark.parametrize("config", [LoraConfig(r=3), SOME, LoraConfig(base_dtype="int8")])
@pytest.mark.parametrize("stacked", [False, True])
def test_merged_equals_beside(config, stacked):
    model = adapters.frozen_base(fresh(), config)
    before = scores(model)
    model = with_random_b(adapters.add(stack_layers(model) if stacked else model, config))
    found, merged = scores(model), adapters.merge(model)
    assert np.abs(found - before).max() > 0.1
    assert not any(map(is_adapted, jax.tree.leaves(merged, is_leaf=is_adapted)))
    np.testing.assert_allclose(scores(merged), found, rtol=1e-4, atol=1e-4)


def test_the_product_is_written_out():
    """Each projection by hand, from the matrices of a weight."""
    weight = with_random_b(adapters.add(fresh(), SOME)).layers[1].qkv[...]
    assert isinstance(weight, Adapted)
    expected = np.array(weight.base)
    scale = SOME.lora_alpha / SOME.r
    for name, at in (("q_proj", np.s_[:, :2]), ("v_proj", np.s_[:, 3:])):
        product = np.einsum("gjkr,rd->gjkd", weight.lora_b[name], weight.lora_a[name])
        expected[at] += scale * product
    np.testing.assert_allclose(weight.merged(), expected, rtol=1e-5, atol=1e-5)


def test_greedy_decoding_is_that_of_the_merged_model():
    model = with_random_b(adapters.add(fresh(), SOME))
    merged = adapters.merge(model)
    options = {"config": DecodingConfig(), "max_new_tokens": 12}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    expected = [c.tokens for c in generate(merged, prompts, **options)]
    assert [c.tokens for c in generate(model, prompts, **options)] == expected
    engine = Engine(model, batch_slots=2, max_length=32)
    assert [c.tokens for c in engine.generate(prompts, **options)] == expected


def test_rslora_scales_by_the_root():
    assert LoraConfig(r=16, lora_alpha=8.0).scale == 0.5
    assert LoraConfig(r=16, lora_alpha=8.0, use_rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("config", "stacked"),
    [
        (LoraConfig(r=3), False),
        (LoraConfig(r=2, target_modules=("gate_proj",)), True),
        (LoraConfig(r=2, target_modules=("up_proj", "down_proj"), use_rslora=True), False),
        (LoraConfig(r=2, base_dtype="int8"), True),
    ],
)
def test_experts_merged_equal_beside(config, stacked):
    """Also of a model that has a dense layer and shared experts."""
    model = adapters.frozen_base(jax.tree.map(jnp.copy, tiny_llada2(jnp.float32)), config)
    model = stack_layers(model) if stacked else model
    before = scores(model)
    model = adapters.add(model, config)
    np.testing.assert_array_equal(scores(model), before)
    model = with_random_b(model)
    found, merged = scores(model), adapters.merge(model)
    assert np.abs(found - before).max() > 0.1
    assert not any(map(is_adapted, jax.tree.leaves(merged, is_leaf=is_adapted)))
    np.testing.assert_allclose(scores(merged), found, rtol=1e-4, atol=1e-4)


def test_the_product_of_experts_is_written_out():
    """Each expert by hand: its floats stay floats where the rest is int8, and W is the other way round."""
    config = LoraConfig(r=2, lora_alpha=3.0, base_dtype="int8", target_modules=("up_proj",))
    model = adapters.frozen_base(tiny_llada2(jnp.float32), config)
    weight = with_random_b(adapters.add(model, config)).layers[1].experts_gate_up[...]
    assert isinstance(weight, Adapted) and weight.base.dtype == jnp.float32
    a, b = weight.lora_a["up_proj"], weight.lora_b["up_proj"]
    assert (a.shape, b.shape) == ((8, 2, 16), (8, 1, 12, 2))
    expected = np.array(weight.base)
    for expert in range(8):
        expected[expert, :, 1] += 1.5 * (np.asarray(b[expert, 0]) @ np.asarray(a[expert])).T
    np.testing.assert_allclose(weight.merged(), expected, rtol=1e-5, atol=1e-5)


def test_a_router_has_none():
    with refused(ConfigError, "'gate'", "did you mean gate_proj"):
        adapters.add(tiny_moe(jnp.float32), LoraConfig(target_modules=("gate",)))


def test_what_cannot_be_is_refused(tmp_path):
    model = fresh()
    with refused(ConfigError, "'qproj'", "did you mean q_proj"):
        adapters.add(model, LoraConfig(target_modules=("qproj",)))
    with refused(ConfigError, "already", "merge"):
        adapters.add(adapters.add(model, SOME), SOME)
    with refused(ConfigError, "merge", "adapters"):
        save_pretrained(adapters.add(model, SOME), tmp_path / "model")
    with refused(ConfigError, "lm_head", "embed_tokens"):
        adapters.add(fresh(tie_embeddings=True), LoraConfig(modules_to_save=("lm_head",)))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"r": 0}, ("r is 0",)),
        ({"lora_alpha": 0.0}, ("lora_alpha is 0.0",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha is nan",)),
        ({"target_modules": ()}, ("target_modules", "all-linear")),
        ({"target_modules": "q_proj"}, ("target_modules is 'q_proj'", "a list")),
        ({"modules_to_save": ("norm",)}, ("modules_to_save", "norm", "embed_tokens")),
        ({"base_dtype": "int4"}, ("base_dtype", "'int4'", "int8")),
    ],
)
def test_bad_values_are_refused(values, names):
    with refused(ConfigError, *names):
        LoraConfig(**values)


def test_layers_come_apart_and_together():
    model = with_random_b(adapters.add(fresh(), SOME))
    expected = jax.tree.map(np.asarray, model)
    again = unstack_layers(stack_layers(model))
    jax.tree.map(np.testing.assert_array_equal, again, expected)
