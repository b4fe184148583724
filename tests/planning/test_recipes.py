"""Every recipe compiles on the topology that it names, and fits: each program that they share is compiled once."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import pytest

from sdar_jax.cli.plan import named_topology
from sdar_jax.training import read_config
from sdar_jax.training.resolve_model import trained_shape
from tests.compilers import ROOT, needs_compilers, run_python

RECIPES = sorted(Path(ROOT, "configs").glob("study*/*.yaml"))
# What CI plans, one of each family, as it is and for GPUs: a step compiles for these in half the time of TPUs.
CI, CI_ON_GPUS = (
    ("study2/8b_cpt",),
    ("study1/mdlm_pretrain", "study2/30b-a3b_cpt"),
)
slow = pytest.mark.slow


def compiled_as(recipe: Path) -> tuple:
    """Equal for recipes whose steps differ in numbers alone: of micro-batches, of a block's tokens, of the schedule."""
    config, shape = read_config(recipe), trained_shape(read_config(recipe).model)
    rows, batch = config.micro_batch_size or config.data.batch_size, config.data.batch_size
    numbers = {"block_size": shape.block_size and 4, "max_position_embeddings": 1}
    ids = {"bos_token_id": None, "eos_token_id": None, "stop_token_ids": ()}
    return (
        named_topology(recipe),
        dataclasses.replace(shape, **numbers, **ids),
        (config.data.sequence_length, config.data.noisy_length, rows, rows < batch),
        (config.objective, config.mesh, config.remat, config.compute_dtype, config.ema_decay),
    )


def name(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


def programs() -> list:
    """A test's parameters: the recipes of each program, by the first of them."""
    found = defaultdict(list)
    for recipe in RECIPES:
        found[compiled_as(recipe)].append(name(recipe))
    return [pytest.param(r, id=r[0], marks=[pytest.mark.ci] * (r[0] in CI)) for r in found.values()]


PLAN = """
import sys
from sdar_jax.cli.plan import main
sys.exit(main(sys.argv[1:]))
"""

# Arguments: recipe, topology. Two layers compile to the program of all of them, but for the lengths of its loops.
SHALLOW = """
import dataclasses, json, sys
from sdar_jax import planning
from sdar_jax.cli import plan
from sdar_jax.training import read_config
from sdar_jax.training.config import InitConfig
from sdar_jax.training.resolve_model import trained_shape

plan.use_compilers()
config = read_config(sys.argv[1])
shape = dataclasses.replace(trained_shape(config.model), num_layers=2)
config = dataclasses.replace(config, model=InitConfig(shape=shape, tokenizer="unread"))
step = planning.compile_step(config, sys.argv[2])
print(json.dumps(planning.values(step, planning.roofline(step, step.counts), 1e9)))
"""


def shallow(recipe: str, topology: str) -> dict:
    child = run_python(SHALLOW, recipe, topology, timeout=1800)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def check_fits(recipe: str, *options: str):
    child = run_python(
        PLAN, f"configs/{recipe}.yaml", "--json", "--attempts", "0", *options, timeout=1800
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    plan = json.loads(child.stdout)
    assert plan["fits"] and not plan["loops_of_unknown_length"]


@slow
@needs_compilers
@pytest.mark.parametrize("recipes", programs())
def test_recipes_fit_the_topology_that_they_name(recipes):
    check_fits(recipes[0])


@slow
@pytest.mark.ci
@needs_compilers
@pytest.mark.parametrize("recipe", CI_ON_GPUS)
def test_recipes_fit_gpus(recipe):
    check_fits(recipe, "--topology", "h200:8x8")


def test_every_recipe_is_among_them():
    """Blocks of any size make one program; rows that give a noisy copy to some blocks alone make another."""
    found = {program.id: program.values[0] for program in programs()}
    assert sorted(recipe for recipes in found.values() for recipe in recipes) == sorted(
        map(name, RECIPES)
    )
    assert "study3/8b_block64" in found["study2/8b_sft"] and found["study2/8b_cpt"] == [
        "study2/8b_cpt"
    ]
    assert found.keys() >= set(CI) and set(map(name, RECIPES)) >= set(CI_ON_GPUS)


@slow
@needs_compilers
@pytest.mark.parametrize(
    ("recipe", "topology"),
    [
        pytest.param("configs/study2/8b_cpt.yaml", "h200:8", id="dense"),
        pytest.param("configs/study2/30b-a3b_cpt.yaml", "h200:8x8", id="moe"),
        pytest.param("configs/study4/sci_cpt.yaml", "h200:8x8", id="long"),
        pytest.param("configs/study2/8b_cpt.yaml", "v5p:4x4x4", id="dense on TPU"),
        pytest.param("configs/study2/30b-a3b_cpt.yaml", "v5p:4x4x4", id="MoE on TPU"),
    ],
)
def test_counted_flops_are_those_that_the_maths_needs(recipe, topology):
    """Matmuls and attention as counted in the program, over those of `training_flops`.

    Remat computes each layer's forward twice, but for its last matmul: 8/6 at most, less where the head is large.
    Attention visits whole tiles, and makes the scores in two kernels. The loss rounds up to whole chunks.
    """
    plan = shallow(recipe, topology)
    flops = plan["flops"]
    assert 1.1 < (flops["matmuls"] + flops["attention"]) / flops["useful"] < 1.6
    assert not plan["loops_of_unknown_length"]
    assert plan["memory"]["total"] < plan["memory"]["available"]


@slow
@needs_compilers
def test_two_compilers_are_counted_alike():
    """The same step on the same mesh: what NVIDIA's compiler fuses otherwise than libtpu computes no more or less."""
    gpu, tpu = (shallow("configs/study2/8b_cpt.yaml", name) for name in ("h200:8x8", "v5p:4x4x4"))
    assert gpu["flops"]["matmuls"] == pytest.approx(tpu["flops"]["matmuls"], rel=1e-3)
    assert gpu["memory"]["weights"] == tpu["memory"]["weights"]
    assert gpu["memory"]["optimizer"] == tpu["memory"]["optimizer"]
