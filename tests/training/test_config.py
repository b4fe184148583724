"""A config is read strictly: what is wrong is one line that names the key, the value and the fix."""

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.errors import ConfigError
from sdar_jax.model.config import ModelConfig
from sdar_jax.training import (
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    TrainConfig,
    read_command_line,
    read_config,
)
from sdar_jax.training.config_io import from_values, to_values
from tests.training.conftest import merged

# What is changed in a good file, and what the error must say.
BAD_VALUES = {
    "unknown key": ({"step": 3}, r"step is unknown; did you mean steps\?"),
    "unknown nested key": (
        {"optimizer": {"lr": 1}},
        r"optimizer\.lr is unknown; use one of learning_rate",
    ),
    "unknown key in a list": (
        {"data": {"sources": [{"file": "x"}]}},
        r"data\.sources\.0\.file is unknown",
    ),
    "text for a number": ({"steps": "many"}, r"steps is 'many'; give a whole number"),
    "fraction for a count": ({"steps": 1.5}, r"steps is 1\.5; give a whole number"),
    "truth for a count": ({"steps": True}, r"steps is True; give a whole number"),
    "text for a rate": (
        {"optimizer": {"learning_rate": "fast"}},
        r"optimizer\.learning_rate is 'fast'; give a number",
    ),
    "number for a truth": ({"tensorboard": 1}, r"tensorboard is 1; give true or false"),
    "number for text": ({"run_dir": 5}, r"run_dir is 5; give text"),
    "list for a section": ({"optimizer": [1]}, r"optimizer is \[1\]; give a mapping"),
    "mapping for a list": (
        {"data": {"sources": {"path": "x"}}},
        r"data\.sources is .*; give a list",
    ),
    "too short a list": (
        {"objective": {"corruption": {"beta": [1.0]}}},
        r"objective\.corruption\.beta .* list of 2",
    ),
    "unknown choice": (
        {"optimizer": {"schedule": "linear"}},
        r"optimizer\.schedule is 'linear'; give one of constant",
    ),
    "unknown remat": ({"remat": "some"}, r"remat is 'some'; give one of none, dots, full"),
    "nothing where something is needed": ({"data": None}, r"data is None; give a mapping"),
    "no warm-up": ({"optimizer": {"warmup": None}}, r"optimizer\.warmup is None; give a number"),
    "no steps": ({"steps": 0}, r"steps is 0; give at least 1"),
    "no log interval": ({"log_every": 0}, r"log_every is 0; give at least 1"),
    "no epochs": ({"steps": None, "epochs": 0}, r"epochs is 0; give at least 1"),
    "steps and epochs": ({"epochs": 2}, r"steps and epochs given; give one of steps and epochs"),
    "neither steps nor epochs": ({"steps": None}, r"neither given; give one of steps and epochs"),
    "epochs twice": (
        {"steps": None, "epochs": 2, "data": {"epochs": 2}},
        r"epochs is 2 and data\.epochs 2; leave",
    ),
    "epochs of shards": (
        {"steps": None, "epochs": 2, "data": {"shards": 2}},
        r"epochs is 2 and data\.shards 2, .* steps",
    ),
    "unknown export": (
        {"export_dtype": "int8"},
        r"export_dtype is 'int8'; give one of float32, bfloat16",
    ),
    "empty run_dir": ({"run_dir": ""}, r"run_dir is ''; give a directory"),
    "negative seed": ({"seed": -1}, r"seed is -1; give"),
    "negative rate": (
        {"optimizer": {"learning_rate": -1.0}},
        r"optimizer: learning_rate is -1\.0; give a finite",
    ),
    "rate that is no number": (
        {"optimizer": {"learning_rate": ".nan"}},
        r"optimizer\.learning_rate is '\.nan'",
    ),
    "infinite rate": (
        {"optimizer": {"learning_rate": float("inf")}},
        r"optimizer: learning_rate is inf",
    ),
    "beta of 1": (
        {"optimizer": {"beta2": 1.0}},
        r"optimizer: beta2 is 1\.0; give a number in \[0, 1\)",
    ),
    "negative decay": ({"optimizer": {"weight_decay": -0.1}}, r"optimizer: weight_decay is -0\.1"),
    "clip at nothing": (
        {"optimizer": {"clip_norm": 0.0}},
        r"optimizer: clip_norm is 0\.0; give a finite number",
    ),
    "part of a step": (
        {"optimizer": {"warmup": 2.5}},
        r"optimizer: warmup is 2\.5; give a share .* or a whole number",
    ),
    "rising cosine": ({"optimizer": {"final_fraction": 1.5}}, r"optimizer: final_fraction is 1\.5"),
    "warm-up longer than the run": (
        {"optimizer": {"warmup": 7}},
        r"warmup and optimizer\.decay take 7 of 6 steps",
    ),
    "no room for the decay": (
        {"optimizer": {"schedule": "wsd", "warmup": 3, "decay": 4}},
        r"warmup and optimizer\.decay take 7 of 6 steps",
    ),
    "no checkpoint interval": (
        {"checkpoint": {"every": 0}},
        r"checkpoint: every is 0; give at least 1",
    ),
    "no checkpoint kept": ({"checkpoint": {"keep": 0}}, r"checkpoint: keep is 0; give at least 1"),
    "average of nothing": ({"ema_decay": 1.0}, r"ema_decay is 1\.0; give a number between 0 and 1"),
    "micro-batch that does not divide": (
        {"micro_batch_size": 3},
        r"micro_batch_size is 3; give a divisor of .*, 4",
    ),
    "no peak": ({"peak_flops": 0.0}, r"peak_flops is 0\.0; give a finite number above 0"),
    "two models": (
        {"model": {"preset": "qwen3-0.6b"}},
        r"model: preset and shape given; give one of",
    ),
    "no model": (
        {"model": {"shape": None}},
        r"model: none given; give one of init_from, preset and shape",
    ),
    "no tokenizer": ({"model": {"tokenizer": None}}, r"model: tokenizer is None"),
    "shape that cannot be": (
        {"model": {"shape": {"num_heads": 3, "num_kv_heads": 2}}},
        r"model\.shape: num_heads 3",
    ),
    "likelihood of no data": (
        {"eval": {"tasks": ["gsm8k"], "by": ["source"]}},
        r"eval: by is source and there is no data to score; give data",
    ),
    "unknown part": (
        {"eval": {"tasks": ["gsm8k"], "by": ["token"]}},
        r"eval\.by\.0 is 'token'; give one of source, position",
    ),
    "eval of nothing": ({"eval": {"every": 5}}, r"eval: eval has neither data nor tasks"),
    "corruption that cannot be": (
        {"objective": {"corruption": {"t_min": 0.0}}},
        r"corruption: .*t_min is 0",
    ),
    "negative confidence": (
        {"objective": {"confidence_beta": -1.0}},
        r"objective: confidence_beta is -1\.0; give a number >= 0",
    ),
    "data section's own check": ({"data": {"batch_size": 0}}, r"data: batch_size=0"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_it(name, values, write_yaml):
    change, message = BAD_VALUES[name]
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(write_yaml(merged(values, change)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the config is None; give a mapping"),
        ("- 1", "the config is .*; give a mapping"),
        ("steps: [1", "not YAML"),
        ("steps: 5", "run_dir, model, data missing; add"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_bad_file_is_one_line(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_config(tmp_path / "nowhere.yaml")


def test_numbers_without_a_dot_are_numbers(values, write_yaml):
    """YAML 1.1 calls 1e-3 text."""
    path = write_yaml(values)
    text = Path(path).read_text().replace("learning_rate: 0.01", "learning_rate: 1e-3")
    Path(path).write_text(text)
    assert read_config(path).optimizer.learning_rate == 1e-3


def test_a_config_survives_being_written(make_config):
    config = make_config(ema_decay=0.9, objective={"corruption": {"beta": [2.0, 1.0]}})
    assert from_values(TrainConfig, to_values(config)) == config


@pytest.mark.parametrize(
    ("arguments", "read", "value"),
    [
        (["--steps", "9"], lambda c: c.steps, 9),
        (["--optimizer.learning_rate", "2e-4"], lambda c: c.optimizer.learning_rate, 2e-4),
        (["--optimizer.clip-norm", "None"], lambda c: c.optimizer.clip_norm, None),
        (
            ["--model.block_size", "None", "--block_sizes", "0", "4", "0.5", "8"],
            lambda c: c.block_sizes,
            ((0, 4), (0.5, 8)),
        ),
        (["--data.shuffle", "False"], lambda c: c.data.shuffle, False),
        (["--data.sources.0.weight", "2"], lambda c: c.data.sources[0].weight, 2.0),
        (["--model.shape.hidden_size", "24"], lambda c: c.model.shape.hidden_size, 24),
        (
            ["--objective.corruption.level", "block"],
            lambda c: c.objective.corruption.level,
            "block",
        ),
        (["--data.batch_size", "9", "--micro_batch_size", "3"], lambda c: c.micro_batch_size, 3),
    ],
)
def test_the_command_line_changes_fields(arguments, read, value, values, write_yaml):
    assert read(read_command_line([write_yaml(values), *arguments])) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizer.learning_rate", "fast"],
            "optimizer.learning_rate: could not convert string to float: 'fast'",
        ),
        (
            ["--optimizer.learning_rate", "-1"],
            "learning_rate is -1.0; give a finite number above 0",
        ),
        (["--optimizer.lr", "1"], "Unrecognized options: --optimizer.lr, 1"),
        (["--optimizer.schedule", "linear"], "'linear' .* Expected one of"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--micro_batch_size", "3"], "micro_batch_size is 3; give a divisor"),
        (["more"], "Unrecognized options: more"),
    ],
)
def test_a_bad_option_is_one_line(arguments, message, values, write_yaml, capsys):
    with pytest.raises(ConfigError, match=message) as raised:
        read_command_line([write_yaml(values), *arguments])
    assert "\n" not in str(raised.value) and "│" not in str(raised.value)
    assert capsys.readouterr().err == ""


def test_without_a_file_the_usage_is_said():
    with pytest.raises(
        ConfigError, match=re.escape("train.py CONFIG.yaml [--field.path value ...]")
    ):
        read_command_line(["--steps", "5"])


@pytest.mark.parametrize("given", [True, False])
def test_help_explains_every_field(given, values, write_yaml, capsys):
    arguments = [write_yaml(values)] if given else []
    with pytest.raises(SystemExit) as stopped:
        read_command_line([*arguments, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--optimizer.learning_rate" in said and "The highest learning rate" in said
    sections = {
        "": TrainConfig,
        "model.": InitConfig,
        "model.shape.": ModelConfig,
        "eval.": EvalConfig,
    }
    sections |= {
        "eval.data.": DataConfig,
        "eval.data.sources.0.": SourceConfig,
        "optimizer.": OptimizerConfig,
    }
    options = set(re.findall(r"--([a-z_.0-9]+)", said))
    for path, kind in sections.items():
        for name, hint in get_type_hints(kind).items():
            parts = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
            assert parts or f"{path}{name}" in options, f"{path}{name}"


HELD_OUT = {
    "sources.0.path": "held.jsonl",
    "sources.0.format": "jsonl",
    "sequence_length": "16",
    "batch_size": "4",
}
SHAPE = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def options(path: str, fields: dict) -> list[str]:
    return [f"--{path}.{name}={value}" for name, value in fields.items()]


def test_a_section_that_the_file_lacks_is_given_by_options(values, write_yaml):
    held_out = options("eval.data", HELD_OUT)
    found = read_command_line([write_yaml(values), "--eval.every", "7", *held_out])
    data = DataConfig((SourceConfig("held.jsonl", "jsonl"),), sequence_length=16, batch_size=4)
    assert found.eval == EvalConfig(data, every=7)
    started = write_yaml(merged(values, {"model": {"shape": None, "init_from": "base"}}))
    found = read_command_line(
        [started, "--model.init-from", "None", *options("model.shape", SHAPE)]
    )
    assert found.model.shape == ModelConfig(**SHAPE) and found.model.init_from is None


def test_a_section_that_is_given_in_part_names_what_it_lacks(values, write_yaml):
    fields = dict(HELD_OUT)
    del fields["sources.0.path"], fields["batch_size"]
    with pytest.raises(
        ConfigError, match=r"^eval\.data\.sources\.0\.path, eval\.data\.batch_size missing; add"
    ) as raised:
        read_command_line([write_yaml(values), *options("eval.data", fields)])
    assert "the file has no eval" in str(raised.value)
    started = write_yaml(merged(values, {"model": {"shape": None, "init_from": "base"}}))
    with pytest.raises(ConfigError, match=r"model\.shape\.vocab_size, .* missing"):
        read_command_line([started, "--model.shape.hidden_size", "24"])
    with pytest.raises(ConfigError, match=r"init_from and shape given; give one of"):
        read_command_line([started, *options("model.shape", SHAPE)])


@pytest.mark.parametrize("off", [["--eval", "None"], ["--eval=None"]])
def test_a_section_is_left_out_by_none(off, values, write_yaml):
    with_eval = write_yaml({**values, "eval": {"data": values["data"], "every": 3}})
    assert read_command_line([with_eval]).eval is not None
    assert read_command_line([with_eval, *off, "--steps", "9"]).eval is None
    given = read_command_line(
        [with_eval, "--model.shape", "None", "--model.preset", "qwen3-0.6b"]
    ).model
    assert (given.shape, given.preset) == (None, "qwen3-0.6b")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("steps: 5\nseed: 1\nsteps: 6\n", "steps is given in line 1 and again in line 3"),
        ("data:\n  a: 1\nsteps: 5\ndata:\n  b: 2\n", "data is given in line 1 and again in line 4"),
        ("data:\n  - {a: 1, b: 2, a: 3}\n", "a is given in line 2 and again in line 2"),
        ("data:\n  a: 1\n  b: {x: 1}\n  a: 3\n", "a is given in line 2 and again in line 4"),
    ],
)
def test_a_key_that_is_given_twice_is_named(content, named, tmp_path):
    (tmp_path / "twice.yaml").write_text(content)
    with pytest.raises(ConfigError, match=f"twice.yaml: .*{named}; join the two") as raised:
        read_config(tmp_path / "twice.yaml")
    assert "\n" not in str(raised.value)


def test_a_merged_mapping_may_be_changed(values, tmp_path):
    """YAML's own way to repeat a mapping with another value."""
    text = yaml.safe_dump({**values, "data": None}).replace("data: null\n", "")
    held_out = "eval:\n  data:\n    <<: *train\n    batch_size: 2\n"
    (tmp_path / "a.yaml").write_text(f"{text}data: &train {json.dumps(values['data'])}\n{held_out}")
    found = read_config(tmp_path / "a.yaml")
    assert found.eval is not None and (found.eval.data.batch_size, found.data.batch_size) == (2, 4)


def test_steps_or_epochs(values, write_yaml):
    del values["steps"]
    assert read_config(write_yaml({**values, "epochs": 3})).epochs == 3
    with pytest.raises(ConfigError, match="neither given; give one of steps and epochs"):
        read_config(write_yaml(values))
    with pytest.raises(ConfigError, match="steps and epochs given; give one of"):
        read_config(write_yaml({**values, "epochs": 3, "steps": 9}))
    both = write_yaml({**values, "epochs": 3})
    assert read_command_line([both, "--epochs", "None", "--steps", "5"]).steps == 5


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_a_run_dir_in_a_bucket_is_refused_at_once(place, make_config):
    with pytest.raises(
        ConfigError,
        match=f"run_dir is '{place}'; give a directory of this machine, where a bucket may",
    ):
        make_config(run_dir=place)


def test_home_is_expanded_wherever_a_field_is_a_path(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make_config(
        run_dir="~/run", model={"shape": None, "init_from": "~/base", "tokenizer": "~"}
    )
    assert config.run_dir == f"{tmp_path}/run"
    assert (config.model.init_from, config.model.tokenizer) == (f"{tmp_path}/base", str(tmp_path))
    assert make_config(run_dir="a~b/~").run_dir == "a~b/~"
    with pytest.raises(
        ConfigError, match="run_dir is '~nobody-of-that-name/x'; give the home directory of someone"
    ):
        make_config(run_dir="~nobody-of-that-name/x")


def test_variables_are_a_part_of_the_config(values, write_yaml):
    variables = {"enable_thinking": False, "tags": ["a", {"b": None}], "date_string": "2024-01-01"}
    values["data"]["sources"] = [{"path": "x", "format": "chat", "chat_template_kwargs": variables}]
    path = write_yaml(values)
    config = read_config(path)
    assert config.data.sources[0].chat_template_kwargs == variables
    assert from_values(type(config), json.loads(json.dumps(to_values(config)))) == config
    assert read_command_line([path, "--steps", "9"]).data == config.data
    changed = read_command_line(
        [path, "--data.sources.0.chat_template_kwargs", '{"enable_thinking": true}']
    )
    assert changed.data.sources[0].chat_template_kwargs == {"enable_thinking": True}
    for text in ("enable_thinking", "[1]"):
        with pytest.raises(ConfigError, match=r"chat_template_kwargs: .*give a JSON object"):
            read_command_line([path, "--data.sources.0.chat_template_kwargs", text])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "[enable_thinking]",
            r"chat_template_kwargs is \['enable_thinking'\]; give a mapping of names",
        ),
        ("{1: x}", r"chat_template_kwargs is \{1: 'x'\}; give a mapping of names"),
        ("{date_string: 2024-01-01}", r"date_string is datetime.*; give text \(quote a date\)"),
    ],
)
def test_variables_that_no_config_can_hold(given, message, values, write_yaml):
    values["data"]["sources"] = [
        {"path": "x", "format": "chat", "chat_template_kwargs": yaml.safe_load(given)}
    ]
    with pytest.raises(ConfigError, match=message):
        read_config(write_yaml(values))
