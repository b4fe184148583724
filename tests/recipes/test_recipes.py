"""Every recipe against the table of the studies (semantics.md, section 5), and recipes against each other."""

import functools
import math
import re

import pytest
from jax.sharding import AbstractMesh, AxisType

from sdar_jax import ModelConfig
from sdar_jax.devices.sharding import MESH_AXES
from sdar_jax.model.axes import check_mesh
from sdar_jax.training import TrainConfig, read_config
from sdar_jax.training.config_io import to_values
from sdar_jax.training.resolve_model import starting_shape, trained_shape
from tests.recipes.conftest import CONFIGS, RECIPES, ROOT, flat

SIZES = ("1.7b", "4b", "8b", "30b-a3b")
BLOCKS = (4, 8, 16, 32, 64)
ARMS = ("ar", "mdlm", "ar_to_bd", "mdlm_to_bd")
AR, MDLM, BD = "autoregressive", "masked_diffusion", "block_diffusion"
OBJECTIVES = dict(zip(ARMS, (AR, MDLM, BD, BD), strict=True))
SEEN = {"ar_pretrain": AR, "mdlm_pretrain": MDLM}

# recipe -> (tokens, context, objective, block size, start)
TABLE = {f"study1/{name}": ("1T", 4096, objective, None, None) for name, objective in SEEN.items()}
for arm, objective in OBJECTIVES.items():
    block, begin = 16 if objective == BD else None, arm.split("_")[0]
    TABLE[f"study1/{arm}_anneal"] = ("100B", 4096, objective, block, f"study1/{begin}_pretrain")
    TABLE[f"study1/{arm}_sft"] = ("4B", 4096, objective, block, f"study1/{arm}_anneal")
for ar, objective, block in (("", BD, 4), ("ar_", AR, None)):
    for size in SIZES:
        TABLE[f"study2/{size}_{ar}cpt"] = (
            "50B",
            4096,
            objective,
            block,
            f"Qwen/Qwen3-{size.upper()}-Base",
        )
        TABLE[f"study2/{size}_{ar}sft"] = ("4B", 4096, objective, block, f"study2/{size}_{ar}cpt")
    TABLE[f"study4/sci_{ar}cpt"] = ("50B", 20480, objective, block, "Qwen/Qwen3-30B-A3B-Base")
    TABLE[f"study4/sci_{ar}sft"] = ("0.5B", 20480, objective, block, f"study4/sci_{ar}cpt")
for block in BLOCKS:
    TABLE[f"study3/8b_block{block}"] = ("4B", 4096, BD, block, "study2/8b_cpt")

MANY_BLOCKS = sorted(f"multiblock/{path.stem}" for path in CONFIGS.glob("multiblock/*.yaml"))
UNITS = {"T": 10**12, "B": 10**9}
CHIPS = {"v5e": 2, "v6e": 2, "v5p": 3, "h200": 2}  # and how many numbers their topologies have


def text(recipe: str) -> str:
    return (CONFIGS / f"{recipe}.yaml").read_text()


@functools.cache
def config(recipe: str) -> TrainConfig:
    return read_config(CONFIGS / f"{recipe}.yaml")


def devices(recipe: str) -> int:
    (chip, sizes), *more = re.findall(r"^# plan: (\w+):([\dx]+)$", text(recipe), re.MULTILINE)
    numbers = [int(size) for size in sizes.split("x")]
    assert not more and CHIPS[chip] == len(numbers)
    return math.prod(numbers)


def fine_tunes(recipe: str) -> bool:
    return recipe.endswith("_sft") or recipe.startswith("study3")


def test_the_table_is_complete():
    assert sorted(TABLE) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens(recipe):
    tokens, context, *_ = TABLE[recipe]
    run = config(recipe)
    rows, total = run.data.batch_size, float(tokens[:-1]) * UNITS[tokens[-1]]
    assert run.data.sequence_length == context
    assert total <= run.steps * rows * context < total + rows * context
    assert f"steps: {run.steps}  # {tokens} tokens / ({rows} rows x {context})" in text(recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_objective_and_start(recipe):
    _, _, objective, block, start = TABLE[recipe]
    run = config(recipe)
    assert run.run_dir == f"runs/{recipe}"
    assert (run.model.objective, run.model.block_size) == (objective, block)
    expected = start if start is None or start.startswith("Qwen/") else f"runs/{start}/model"
    assert run.model.init_from == expected and (
        start is None or start.startswith("Qwen/") or start in RECIPES
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_and_masks(recipe):
    """CPT masks over the whole packed row; SFT within each document, answers alone, in rows of whole documents."""
    run = config(recipe)
    data, block = run.data, run.model.objective == BD
    if fine_tunes(recipe):
        expected = ("fit", "document", "response", "drop")
        source = ("chat", "jsonl")
    else:
        segments = "document" if recipe == "study1/ar_pretrain" else "row"
        expected = ("split", segments, "all", "drop")
        source = ("parquet", "parquet")
    assert (data.packing, data.segments, data.loss, data.too_long) == expected
    assert [(s.format, s.path.split(".")[-1]) for s in data.sources] == [source]
    assert data.pad_to_block == (block and fine_tunes(recipe)) and data.pad_loss
    # A smaller budget would leave rows short, or documents out, that the baseline reads.
    assert data.noisy_length == (data.sequence_length if block and fine_tunes(recipe) else None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_released_settings(recipe):
    """bfloat16; SDAR's corruption and normaliser; for fine-tuning 1e-5, constant after 3% of warm-up."""
    run = config(recipe)
    corruption = run.objective.corruption
    assert run.compute_dtype == "bfloat16" and run.objective.normalizer == "response"
    assert (corruption.level, corruption.draw, corruption.mask) == (
        "document",
        "independent",
        "bernoulli",
    )
    assert (corruption.range, corruption.weighting, corruption.complementary) == (
        (0.001, 1.0),
        "bound",
        False,
    )
    if fine_tunes(recipe):
        rate = run.optimizer
        assert (rate.learning_rate, rate.schedule, rate.warmup) == (1e-5, "constant", 0.03)


@pytest.mark.parametrize("recipe", RECIPES)
def test_comment(recipe):
    head = [line for line in text(recipe).splitlines() if line.startswith("#")]
    assert text(recipe).startswith("\n".join(head) + "\nrun_dir:") and 3 <= len(head) <= 5
    study = {"1": "I", "2": "II", "3": "III", "4": "IV"}[recipe[5]]
    assert head[0].startswith(f"# Study {study},") or head[0].startswith(f"# Study {study}:")
    assert TABLE[recipe][0] in "".join(head) and "ours" in head[-2] + head[-3]


@pytest.mark.parametrize("recipe", RECIPES)
def test_mesh_divides_the_planned_topology(recipe):
    run = config(recipe)
    sizes = run.mesh.sizes(devices(recipe))
    mesh = AbstractMesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )
    length, copies = run.data.sequence_length, 2 if run.model.objective == BD else 1
    assert run.micro_batch_size is not None
    check_mesh(
        mesh,
        starting_shape(run.model),
        batch_size=run.micro_batch_size,
        lengths=(copies * length, length),
    )


def test_documented_topologies():
    """docs/recipes.md names those that the recipes do, and every recipe's directory."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"\b(?:v5e|v5p|v6e|h200):[\dx]+", page))
    assert named == {
        match
        for recipe in [*RECIPES, *MANY_BLOCKS]
        for match in re.findall(r"^# plan: (\S+)$", text(recipe), re.MULTILINE)
    }
    assert {recipe.split("/")[0] for recipe in RECIPES} == set(re.findall(r"`(study\d)/", page))


SHAPES = {"1.7b": "1.7b", "4b": "4b", "8b": "8b", "30b": "30b-a3b", "sci": "30b-a3b"}


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if not recipe.startswith("study1")]
)
def test_shapes(recipe):
    """Started from a released Qwen3, converted models have the shape of the released SDAR."""
    _, _, objective, block, _ = TABLE[recipe]
    size = next(size for name, size in SHAPES.items() if recipe.split("/")[1].startswith(name))
    trained = flat(vars(trained_shape(config(recipe).model)))
    released = flat(
        vars(ModelConfig.preset(f"qwen3-{size}" if objective == AR else f"sdar-{size}"))
    )
    differing = {name for name in released if trained[name] != released[name]} - {"mask_token_id"}
    assert differing == ({"block_size"} if block not in (4, None) else set())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("study1")])
def test_shapes_from_scratch(recipe):
    trained, like = trained_shape(config(recipe).model), ModelConfig.preset("sdar-1.7b")
    names = (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "intermediate_size",
        "tie_embeddings",
        "vocab_size",
    )
    assert [getattr(trained, name) for name in names] == [getattr(like, name) for name in names]


def differences(one: str, other: str) -> set[str]:
    before, after = (flat(to_values(config(recipe))) for recipe in (one, other))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


PURPOSE = {"run_dir", "model.objective", "model.block_size"}
BASELINES = [(name, name.replace("cpt", "ar_cpt").replace("sft", "ar_sft")) for name in RECIPES]
BASELINES = [
    (name, baseline)
    for name, baseline in BASELINES
    if name[:6] in ("study2", "study4") and "ar_" not in name
]


@pytest.mark.parametrize("recipe, baseline", BASELINES)
def test_the_baseline_gets_the_same(recipe, baseline):
    """Data, tokens, rows, optimiser, mesh: the AR baseline differs in its objective alone."""
    expected = {*PURPOSE}
    if fine_tunes(recipe):
        expected |= {"model.init_from", "data.noisy_length", "data.pad_to_block"}
    assert differences(recipe, baseline) == expected


@pytest.mark.parametrize("stage", ["cpt", "sft", "ar_cpt", "ar_sft"])
@pytest.mark.parametrize("size", [size for size in SIZES if size != "8b"])
def test_sizes_get_the_same(size, stage):
    changed = differences(f"study2/8b_{stage}", f"study2/{size}_{stage}")
    machine = {name for name in changed if name.startswith("mesh.")} | {"micro_batch_size", "remat"}
    assert {"run_dir", "model.init_from"} <= changed <= {"run_dir", "model.init_from"} | machine


@pytest.mark.parametrize("stage", ["anneal", "sft"])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "ar"])
def test_arms_of_the_first_study_get_the_same(arm, stage):
    own = {*PURPOSE, "model.init_from"} | (
        {"data.noisy_length", "data.pad_to_block"} if stage == "sft" else set()
    )
    assert differences(f"study1/ar_{stage}", f"study1/{arm}_{stage}") <= own


def test_the_pretrainings_get_the_same():
    """But for the mask, and its row, which is random like the others where the mean of them is next to nothing."""
    own = {"run_dir", "model.objective", "model.mask_init", "data.segments"}
    assert differences("study1/ar_pretrain", "study1/mdlm_pretrain") == own


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_sweep_changes_the_block_alone(block):
    assert differences("study3/8b_block4", f"study3/8b_block{block}") == {
        "run_dir",
        "model.block_size",
    }


def test_the_sweep_begins_where_the_second_study_ends():
    assert differences("study3/8b_block4", "study2/8b_sft") == {"run_dir"}
