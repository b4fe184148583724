"""Every value of the paradigm that a run can be told, from its config to the exported model and on from there."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdar_jax import load_pretrained
from sdar_jax.errors import ConfigError
from sdar_jax.training import TrainConfig, read_command_line, run
from sdar_jax.training.config_io import from_values
from tests.bad_input import refused
from tests.training.conftest import data_values, merged, metrics_of

ROOT = Path(__file__).parents[2]
VALUES = {
    "shifted": {"shifted": True},
    "causal": {"causal_clean": True},
    "response": {"block_origin": "response"},
    "prompt": {"block_origin": "response", "bidirectional_prompt": True},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.ci] * (name == "response"))
        for name in VALUES
    ],
)
def test_a_run_learns_and_exports_its_paradigm(name, values, write_yaml, tmp_path):
    """And evaluates by it."""
    options = [f"--model.{field}={value}" for field, value in VALUES[name].items()]
    held_out = merged(values["data"], {"epochs": 1})
    values = merged(
        values, {"steps": 2, "data": {"loss": "response"}, "eval": {"data": held_out, "rows": 4}}
    )
    assert run(read_command_line([write_yaml(values), *options])).finished
    lines = metrics_of(tmp_path / "run")
    assert lines[-2]["nll"] > 0 and lines[-1]["eval_nelbo"] > 0
    config = load_pretrained(tmp_path / "run" / "model").config
    assert {field: getattr(config, field) for field in VALUES[name]} == VALUES[name]
    assert config.objective == "block_diffusion"


def test_a_run_keeps_the_paradigm_of_the_model_that_it_starts_from(values, tmp_path):
    values = merged(values, {"steps": 1, "model": {"causal_clean": True}})
    assert run(from_values(TrainConfig, values)).finished
    start = {"init_from": str(tmp_path / "run" / "model"), "shape": None, "causal_clean": None}
    assert run(
        from_values(
            TrainConfig, merged(values, {"run_dir": str(tmp_path / "next"), "model": start})
        )
    ).finished
    assert load_pretrained(tmp_path / "next" / "model").config.paradigm.causal_clean


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        (
            {"shifted": True},
            {"noisy_length": 12, "packing": "fit"},
            "noisy_length is set and the model is shifted",
        ),
        (
            {"objective": "masked_diffusion", "block_size": None, "causal_clean": True},
            {},
            "there are no blocks",
        ),
        ({"bidirectional_prompt": True}, {}, "set block_origin='response'"),
        (
            {"objective": "autoregressive", "block_size": None, "shifted": True},
            {},
            "model.shifted is True",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused_early(model, data, told, make_config):
    with refused(ConfigError, told):
        run(make_config(model=model, data=data))


def test_positions_are_of_blocks(inputs, make_config):
    data = data_values(inputs / "held-out.jsonl", epochs=1)
    model = {"objective": "masked_diffusion", "block_size": None}
    config = make_config(model=model, eval={"data": data, "by": ["position"]})
    with refused(ConfigError, "eval.by has position", "leave it out"):
        run(config)


def test_confidence_is_for_models_that_fill_masks(make_config):
    model = {"objective": "autoregressive", "block_size": None}
    config = make_config(model=model, objective={"confidence_beta": 0.5})
    with refused(ConfigError, "objective.confidence_beta is 0.5", "leave it out"):
        run(config)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("recipe", ["8b_cpt", "8b_sft"])
@pytest.mark.parametrize("name", VALUES)
def test_recipes_train_with_it_from_the_command_line(name, recipe, tmp_path):
    content = yaml.safe_load((ROOT / "configs" / "study2" / f"{recipe}.yaml").read_text())
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({**content, "run_dir": str(tmp_path / "run")})
    )
    options = [f"--model.{field}={value}" for field, value in VALUES[name].items()]
    command = [
        sys.executable,
        "train.py",
        str(tmp_path / "train.yaml"),
        "--tiny",
        "--data.noisy_length=None",
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = load_pretrained(tmp_path / "run-tiny" / "model").config
    assert {field: getattr(config, field) for field in VALUES[name]} == VALUES[name]
