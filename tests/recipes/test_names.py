"""Recipes by name, as in an installed package: from any folder, without the checkout's configs/."""

from pathlib import Path

import pytest

from sdar_jax import ModelConfig
from sdar_jax.cli import plan
from sdar_jax.errors import ConfigError
from sdar_jax.training import InitConfig, read_command_line, read_config
from sdar_jax.training.recipes import recipe_names
from sdar_jax.training.resolve_model import starting_shape
from tests.bad_input import refused
from tests.recipes.conftest import CONFIGS, RECIPES


@pytest.fixture(autouse=True)
def elsewhere(in_repository, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names():
    demo, lora, multiblock, multiblock_demo, quickstart = (
        [f"{folder}/{path.stem}" for path in sorted((CONFIGS / folder).glob("*.yaml"))]
        for folder in ("demo", "lora", "multiblock", "multiblock_demo", "quickstart")
    )
    own = [*demo, *lora, *multiblock, *multiblock_demo, *quickstart]
    assert list(recipe_names()) == [*own, *RECIPES]


@pytest.mark.parametrize("recipe", ["demo/pretrain", "study2/8b_cpt"])
def test_a_name_is_its_file(recipe):
    file = CONFIGS / f"{recipe}.yaml"
    assert read_config(recipe) == read_config(file)
    assert read_command_line([recipe, "--seed", "7"]) == read_command_line(
        [str(file), "--seed", "7"]
    )


def test_a_plan_takes_a_name():
    assert plan.named_topology("study2/8b_cpt") == plan.named_topology(
        CONFIGS / "study2" / "8b_cpt.yaml"
    )


def test_a_file_comes_first_and_a_folder_does_not(elsewhere):
    (elsewhere / "study2" / "8b_cpt").mkdir(parents=True)
    (elsewhere / "study2" / "8b_sft").write_bytes((CONFIGS / "demo" / "ar_cpt.yaml").read_bytes())
    assert read_config("study2/8b_cpt").run_dir == "runs/study2/8b_cpt"
    assert read_config("study2/8b_sft").run_dir == "runs/demo/ar_cpt"


def test_a_name_that_is_none_is_refused_with_one_that_works():
    for wrong, right in {
        "study2/8b_ctp": "study2/8b_cpt",
        "configs/study2/8b_cpt.yaml": "study2/8b_cpt",
    }.items():
        with refused(ConfigError, wrong, f"did you mean the recipe {right}?"):
            read_config(wrong)
        read_config(right)
    with refused(ConfigError, "nothing:", "give a YAML file, or a recipe such as study4/sci_sft"):
        read_config("nothing")
    read_config("study4/sci_sft")


def test_a_model_of_a_recipe_has_the_shape_that_it_trains():
    assert (
        starting_shape(InitConfig(init_from="runs/study2/8b_cpt/model")).objective
        == "block_diffusion"
    )
    assert starting_shape(
        InitConfig(init_from="runs/study2/8b_ar_cpt/model")
    ) == ModelConfig.preset("qwen3-8b")
    with refused(ConfigError, "'runs/mine/cpt/model'", "give a directory"):
        starting_shape(InitConfig(init_from="runs/mine/cpt/model"))


def test_compilers_lie_where_the_plan_is_told(elsewhere, monkeypatch):
    """Below the working directory unless an option says another place; what is installed anyhow is left to itself."""
    path: list[str] = []
    monkeypatch.setattr("sys.path", path)
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan.use_compilers()
    assert path == []
    for directory in (Path(".cache/compilers"), Path("other")):
        directory.mkdir(parents=True)
    plan.use_compilers()
    plan.use_compilers(Path("other"))
    assert path == [str(elsewhere / "other"), str(elsewhere / ".cache/compilers")]
