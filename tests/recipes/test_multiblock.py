"""The recipes for many blocks at once against what the papers and their code publish."""

import pytest

from sdar_jax.training import read_config
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from tests.recipes.conftest import CONFIGS

# Table 5 of arXiv 2606.29215: block size, random layouts, rows of groups a document, steps.
MULTITF = {
    "8b_b4_math": (4, 2, 11, 1250),
    "8b_b4_code": (4, 2, 11, 200),
    "8b_b32_math": (32, 3, 12, 3125),
    "8b_b32_code": (32, 3, 12, 1670),
}
# D2F's scripts: learning rate, hidden size of the model, whether it is shifted.
D2F = {"llada_8b_d2f": (1e-5, 4096, False), "dream_7b_d2f": (5e-6, 3584, True)}


def test_the_tables_are_complete():
    found = {path.stem for path in (CONFIGS / "multiblock").glob("*.yaml")}
    assert found == {*MULTITF, *D2F, "8b_d3llm"}


@pytest.mark.parametrize("name", MULTITF)
def test_multitf(name):
    block_size, random_layouts, rows, steps = MULTITF[name]
    config = read_config(CONFIGS / "multiblock" / f"{name}.yaml")
    assert (config.steps, config.data.batch_size, config.data.sequence_length) == (steps, 32, 2048)
    assert trained_shape(config.final_model).block_size == block_size
    objective = config.objective
    assert objective.groups is not None and objective.groups.size == 4
    assert (objective.groups.random_layouts, objective.layouts) == (random_layouts, rows)
    corruption = objective.corruption
    assert (corruption.draw, corruption.mask, corruption.level) == (
        "chain_uniform",
        "floor",
        "block",
    )
    # hi - rho (hi - lo), rho = 0.01.
    assert corruption.range == pytest.approx((0.001, 1 - 0.01 * (1 - 0.001)))
    assert objective.normalizer == "weights"
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup) == (1e-5, "cosine", 0.03)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.1)
    assert config.lora is None and optimizer.clip_norm == 1


@pytest.mark.parametrize("name", D2F)
def test_d2f(name):
    learning_rate, width, shifted = D2F[name]
    config = read_config(CONFIGS / "multiblock" / f"{name}.yaml")
    start, end = starting_shape(config.model), trained_shape(config.final_model)
    assert start.hidden_size == width and not start.paradigm.cached
    paradigm = end.paradigm
    assert (paradigm.block_size, paradigm.origin, paradigm.shifted) == (16, "response", shifted)
    assert paradigm.bidirectional_prompt and config.objective.noisy_context
    assert config.objective.distill is not None
    assert config.objective.distill.loss == "soft_cross_entropy"
    corruption = config.objective.corruption
    assert (corruption.draw, corruption.mask, corruption.range) == (
        "monotone",
        "bernoulli",
        (0.2, 0.7),
    )
    assert config.objective.normalizer == "masked"
    assert (config.data.sequence_length, config.data.batch_size, config.steps) == (512, 5, 50000)
    assert config.data.pad_to_row and config.data.pad_loss
    assert config.lora is not None and (config.lora.r, config.lora.lora_alpha) == (32, 32)
    assert config.optimizer.learning_rate == learning_rate
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (0.05, "constant")
