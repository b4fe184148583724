"""The command's errors, what it tries where a step does not fit, and the work that it expects."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sdar_jax import ModelConfig
from sdar_jax.cli import plan
from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.devices.chips import CHIPS
from sdar_jax.distillation import DistillConfig
from sdar_jax.errors import ConfigError
from sdar_jax.objectives import ObjectiveConfig
from sdar_jax.paradigm import Paradigm
from sdar_jax.planning import Compiled, Memory
from sdar_jax.planning.compile import _memory, _refused
from sdar_jax.planning.count import Counts
from sdar_jax.planning.nearest import candidates, doubled
from sdar_jax.planning.network import Link
from sdar_jax.planning.report import table, values
from sdar_jax.planning.roofline import Roofline, _calls_per_layer
from sdar_jax.planning.work import TEACHER, attention_flops, expected
from sdar_jax.training import TrainConfig, read_command_line
from sdar_jax.training.config import InitConfig
from tests.bad_input import refused
from tests.compilers import ROOT

SHAPE = dataclasses.replace(
    ModelConfig.preset("sdar-1.7b"),
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    vocab_size=512,
    mask_token_id=511,
)


def config(
    *, length: int = 256, batch_size: int = 64, shape: ModelConfig = SHAPE, **changes
) -> TrainConfig:
    data = DataConfig(
        (SourceConfig("unread", "text"),), sequence_length=length, batch_size=batch_size
    )
    return TrainConfig(
        "unwritten", 100, InitConfig(shape=shape, tokenizer="unread"), data, **changes
    )


def compiled(
    settings: TrainConfig, *, weights: float = 1e9, temporaries: float = 200e9
) -> Compiled:
    mesh = SimpleNamespace(
        shape={"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}, size=8
    )
    memory = Memory(weights, 0.0, 2 * weights, 0.0, 0.0, temporaries, 0.0)
    return Compiled(settings, SHAPE, "h200:8", CHIPS["h200"], mesh, None, memory, None, 1000, 1.0)  # pyright: ignore


def options(step: Compiled) -> list[str]:
    return [change.options for change in candidates(step)]


def test_a_recipe_names_its_topology(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# What it is.\n# plan: v5e:4x4\nsteps: 1\n")
    assert plan.named_topology(recipe) == "v5e:4x4"
    recipe.write_text("steps: 1\n")
    with refused(ConfigError, str(recipe), "--topology"):
        plan.named_topology(recipe)
    with refused(ConfigError, "absent.yaml"):
        plan.named_topology(tmp_path / "absent.yaml")


def test_the_command_says_errors_in_a_line(capsys):
    assert plan.main(["absent.yaml", "--topology", "h200:8"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: absent.yaml: cannot be read (No such file or directory); give a YAML file"
    ]


@pytest.mark.parametrize(
    ("name", "twice"),
    [
        ("h200:1", "h200:2"),
        ("h200:8", "h200:2x8"),
        ("h200:4x8", "h200:8x8"),
        ("v5p:4x4x4", "v5p:4x4x8"),
        ("v5p:4x4x8", "v5p:4x8x8"),
        ("v5e:4x8", "v5e:8x8"),
    ],
)
def test_twice_the_devices(name, twice):
    assert doubled(name) == twice


def test_the_least_change_is_tried_first():
    assert options(compiled(config(remat="none"))) == [
        "--micro_batch_size 32",
        "--micro_batch_size 8",
        "--remat dots",
        "--remat full",
        "--remat full --micro_batch_size 8",
        "--topology h200:2x8 --remat full --micro_batch_size 16",
        "--topology h200:4x8 --remat full --micro_batch_size 32",
        "--topology h200:8x8 --remat full --micro_batch_size 64",
    ]
    assert options(compiled(config(remat="full", micro_batch_size=8)))[0].startswith(
        "--topology h200:2x8"
    )


def test_weights_that_do_not_fit_need_as_many_devices_as_hold_them():
    """Of 120 GB a device, with as much of gradients and twice of moments, an H200 holds the fourth part."""
    assert [option.split()[1] for option in options(compiled(config(), weights=60e9))] == [
        "h200:2x8",
        "h200:4x8",
        "h200:8x8",
    ]
    assert [option.split()[1] for option in options(compiled(config(), weights=120e9))] == [
        "h200:4x8",
        "h200:8x8",
    ]


@pytest.mark.parametrize("overrides", [[], ["--remat", "none"], ["--mesh.fsdp", "8"]])
def test_a_change_is_what_its_options_say(overrides):
    """What was compiled is what the command compiles when it is given them."""
    command = [f"{ROOT}/configs/study2/8b_cpt.yaml", *overrides]
    for change in candidates(compiled(read_command_line(command))):
        options, rest = plan._parser().parse_known_args([*command, *change.options.split()])
        assert read_command_line([options.config, *rest]) == change.config
        assert (options.topology or "h200:8") == change.topology


@pytest.mark.parametrize("objective", ["autoregressive", "masked_diffusion", "block_diffusion"])
def test_the_expected_work_is_that_of_full_rows(objective):
    """All tokens are asked in AR but the last; half of them in diffusion, to a percent of the draws' spread."""
    length, rows = 256, 64
    shape = dataclasses.replace(SHAPE, objective=objective)
    found = expected(config(length=length, batch_size=rows, shape=shape), shape).token_counts
    pairs = {"autoregressive": length * (length + 1) / 2, "masked_diffusion": length**2}
    # Each noisy block sees itself and the clean blocks before it, each clean one those and itself.
    blocks = np.arange(length // 4) * 4
    pairs["block_diffusion"] = 2 * (4 * (blocks + 4)).sum()
    assert found.pairs == rows * pairs[objective]
    assert found.outputs == rows * length
    assert found.positions == rows * length * (2 if objective == "block_diffusion" else 1)
    share = (length - 1) / length if objective == "autoregressive" else 0.5
    assert found.num_loss_tokens == pytest.approx(
        rows * length * share, rel=1e-6 if share > 0.5 else 0.3
    )


def test_a_teacher_reads_what_is_its_own():
    """A canvas beside a student of one noisy copy, in blocks."""
    length, rows = 256, 64
    objective = ObjectiveConfig(distill=DistillConfig(), noisy_context=True)
    settings = config(length=length, batch_size=rows, objective=objective)
    found = expected(settings, SHAPE, Paradigm()).token_counts
    blocks = np.arange(length // 4) * 4
    assert (found.positions, found.pairs) == (rows * length, rows * (4 * (blocks + 4)).sum())
    assert found.teacher is not None
    assert (found.teacher.positions, found.teacher.pairs) == (rows * length, rows * length**2)


def test_a_teacher_s_kernels_are_counted_apart():
    """In two layers, of one micro-batch: the student's forward twice, with remat, and the teacher's once."""
    scopes = {
        "jit(step)/jvp()/attention/range_attention_forward/pallas_call": 4.0,
        "jit(step)/transpose(jvp())/checkpoint/range_attention_dq/pallas_call": 2.0,
        "jit(step)/jvp(teacher)/while/body/attention/range_attention_forward/pallas_call": 1.0,
        "jit(step)/teacher/attention/range_attention_forward/pallas_call": 1.0,
    }
    counts = Counts()
    counts.kernels.update(scopes)
    calls = _calls_per_layer(compiled(config()), counts)
    assert calls == {"forward": 2.0, "dq": 1.0, TEACHER: 1.0}
    tiled = {"forward": (1000.0, 400.0), "dq": (1000.0, 400.0), TEACHER: (2000.0, 700.0)}
    asked = expected(config(), SHAPE)._replace(tiled=tiled)
    width = 2 * SHAPE.num_heads * SHAPE.head_dim * 64
    assert attention_flops(SHAPE, asked, calls) == width * (7 * 1400 + 2 * 2700)


def test_attention_counts_the_tiles_of_both_kinds_of_layer():
    asked = expected(config(), SHAPE)._replace(
        tiled={"forward": (1000.0, 400.0), "dq": (1000.0, 400.0)}
    )
    width = 2 * SHAPE.num_heads * SHAPE.head_dim * 64
    assert attention_flops(SHAPE, asked, {"forward": 2.0, "dq": 1.0}) == width * (2 * 2 + 3) * 1400


def test_times_and_cost():
    """A step of 1000 tokens, 2 s where all overlaps and 3.5 s where nothing does, on 8 devices."""
    links = [Link("all-gather", "fsdp", 1e9, 1e9, 0.5)]
    peak = CHIPS["h200"].bf16_flops
    roof = Roofline(
        peak, 1.5 * peak, 0.5 * peak, 4.8e12, links, compute=2.0, memory=1.0, collectives=0.5
    )
    assert roof.bound == "compute" and roof.overlapped == 2.0 and roof.serial == 3.5
    assert roof.mfu(2.0, peak) == 0.5
    step = compiled(config())._replace(counts=SimpleNamespace(unknown={}))
    told = values(step, roof, 3.6e6)
    assert told["overlapped"]["tokens_per_second"] == 500
    assert told["overlapped"]["days"] == pytest.approx(7200 / 86400)
    assert told["serial"]["device_hours"] == pytest.approx(3600 * 3.5 * 8 / 3600)
    assert math.isclose(told["memory"]["total"], 203e9) and not told["fits"]
    text = table(told)
    assert (
        "203.00 of 141: does not fit" in text
        and "bound by compute" in text
        and "all-gather over fsdp" in text
    )


def test_what_a_compiler_refuses_is_told_by_its_needs():
    said = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    held = Memory(2e9, 0.0, 4e9, 0.0, 1e6, 0.0, 0.0)
    assert math.isclose(_refused(RuntimeError(said), held).total, 20.5 * 1024**3)
    said = "E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    said += "the total memory required for HLO temporaries (151.38G) "
    said += "exceeds available HBM (15.75G). HLO module: jit_step."
    assert math.isclose(_refused(RuntimeError(said), held).temporaries, 151.38 * 1024**3)
    with pytest.raises(RuntimeError, match="something else"):
        _refused(RuntimeError("something else"), held)


def test_memory_is_what_is_held_at_once():
    """Of 20 GB of arguments and temporaries, 12 at the peak; a tenth of a GB of the arguments is padding."""
    sizes = {
        "argument_size": 1.6e9,
        "temp_size": 18.4e9,
        "peak_memory": 12e9,
        "generated_code_size": 1e8,
    }
    stats = SimpleNamespace(**{f"{name}_in_bytes": size for name, size in sizes.items()})
    memory = _memory(stats, Memory(0.5e9, 0.0, 1e9, 0.0, 0.0, 0.0, 0.0))
    assert math.isclose(memory.total, 12.1e9) and math.isclose(memory.batch, 0.1e9)
