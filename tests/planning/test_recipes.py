"""Every recipe compiles on the topology that it names, and fits."""

import json
from pathlib import Path

import pytest

from tests.compilers import ROOT, needs_compilers, run_python

pytestmark = [needs_compilers, pytest.mark.slow]

RECIPES = sorted(path.relative_to(ROOT) for path in Path(ROOT, "configs").glob("study*/*.yaml"))

PLAN = """
import sys
from sdar_jax.plan import main
sys.exit(main(sys.argv[1:]))
"""

# Arguments: recipe, topology. Two layers compile to the program of all of them, but for the lengths of its loops.
SHALLOW = """
import dataclasses, json, sys
from sdar_jax import plan, planning
from sdar_jax.training import read_config
from sdar_jax.training.config import InitConfig
from sdar_jax.training.stages import trained_shape

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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_fits_the_topology_that_it_names(recipe):
    child = run_python(PLAN, str(recipe), "--json", "--attempts", "0", timeout=1800)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    plan = json.loads(child.stdout)
    assert plan["fits"] and not plan["loops_of_unknown_length"]


@pytest.mark.parametrize(
    ("recipe", "topology"),
    [
        pytest.param("configs/study2/8b_cpt.yaml", "h200:8", marks=pytest.mark.ci, id="dense"),
        pytest.param("configs/study2/30b-a3b_cpt.yaml", "h200:8x8", marks=pytest.mark.ci, id="mixture"),
        pytest.param("configs/study4/sci_cpt.yaml", "h200:8x8", marks=pytest.mark.ci, id="long"),
        pytest.param("configs/study2/8b_cpt.yaml", "v5p:4x4x4", id="dense on TPU"),
        pytest.param("configs/study2/30b-a3b_cpt.yaml", "v5p:4x4x4", id="mixture on TPU"),
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


def test_two_compilers_are_counted_alike():
    """The same step on the same mesh: what NVIDIA's compiler fuses otherwise than libtpu computes no more or less."""
    gpu, tpu = (shallow("configs/study2/8b_cpt.yaml", name) for name in ("h200:8x8", "v5p:4x4x4"))
    assert gpu["flops"]["matmuls"] == pytest.approx(tpu["flops"]["matmuls"], rel=1e-3)
    assert gpu["memory"]["weights"] == tpu["memory"]["weights"]
    assert gpu["memory"]["optimizer"] == tpu["memory"]["optimizer"]
