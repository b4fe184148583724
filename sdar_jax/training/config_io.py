"""Reads configs from YAML files and the command line. Whatever is wrong with either is one ConfigError."""

import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import tyro
import yaml

from sdar_jax.adapters.config import LoraConfig
from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.model.config import ModelConfig
from sdar_jax.training.config import InitConfig, TrainConfig
from sdar_jax.training.recipes import config_text

_EXAMPLE = TrainConfig(
    run_dir="runs/example",
    steps=1000,
    model=InitConfig(init_from="path/to/model"),
    data=DataConfig(
        (SourceConfig("path/to/*.jsonl", "jsonl"),), sequence_length=1024, batch_size=8
    ),
)
_EVAL = EvalConfig(_EXAMPLE.data)
# What it evaluates is left to the options, which are checked when all of them are read.
object.__setattr__(_EVAL, "data", None)
# Sections that a config may be without, by their place, and what their options are listed with then.
_OPTIONAL_SECTIONS = {
    "eval": _EVAL,
    "eval.data": _EXAMPLE.data,
    "lora": LoraConfig(),
    "model.shape": ModelConfig(151936, 1024, 3072, 28, 16, 8, 128),
}


def read_command_line(
    arguments: Sequence[str],
    *,
    change: Callable[[TrainConfig], TrainConfig] = lambda config: config,
    program: str = "train.py",
) -> TrainConfig:
    """Reads `CONFIG.yaml [--field.path value ...]`. `--help` prints every field, with its value in the file, and exits.

    A section that may be None is left out by `--eval None`. One that the file does not have can be given by all
    of its fields that have no default; `--help` lists them with an example's values.

    Args:
        change: applied to the file's config before the options are.
        program: the command, as help and errors name it.

    Raises:
        ConfigError: as `read_config`, an unknown option, or a value that does not fit.
    """
    if arguments and not arguments[0].startswith("-"):
        return _override(change(read_config(arguments[0])), arguments[1:], program)
    if {"-h", "--help"} & set(arguments):
        return _override(_EXAMPLE, ["--help"], program)
    raise ConfigError(
        f"no config file is given; write: {program} CONFIG.yaml [--field.path value ...]"
    )


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TrainConfig from a YAML file whose keys are its fields, or from the recipe of that name.

    Paths in it are relative to the working directory.

    Raises:
        ConfigError: no such file or recipe, not YAML, an unknown or missing key, one that is given twice, a wrong type,
            or a value out of range.
    """
    try:
        # The C loader has no composer to ask; configs are short.
        values = yaml.load(config_text(path), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({reason}); correct the file") from None
    return from_values(TrainConfig, values)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, of which YAML's own loader keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"{name} is given in line {lines[name]} and again in line {line}; join the two"
                )
            lines[name] = line
        return node


def to_values(config: Any) -> dict[str, Any]:
    """Turns a config (any dataclass) into what JSON and YAML hold; `from_values` is its inverse."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Converts `value` to the annotated type `kind`, or raises a ConfigError that names `where`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in parts:
            return None
        return _convert(next(part for part in parts if part is not types.NoneType), value, where)
    if dataclasses.is_dataclass(kind):
        return from_values(cast(type, kind), value, where)
    if origin is tuple:
        return _tuple(parts, value, where)
    if origin is dict:
        names = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return _checked(value, names, where, "a mapping of names to values")
    if origin is Literal:
        return _checked(value, value in parts, where, f"one of {', '.join(map(str, parts))}")
    if kind is float:
        return _number(value, where)
    wanted = {int: "a whole number", bool: "true or false", str: "text"}[kind]
    return _checked(value, type(value) is kind, where, wanted)


def from_values[T](kind: type[T], values: Any, where: str = "") -> T:
    """Makes a dataclass tree from nested mappings, types checked; `where` names it in errors."""
    _checked(values, isinstance(values, dict), where or "the config", "a mapping of fields")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}

    def path(name: str) -> str:
        return f"{where}.{name}" if where else name

    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(fields)}"
            raise ConfigError(f"{path(name)} is unknown; {hint}")
    hints = get_type_hints(kind)
    absent = [name for name, field in fields.items() if _is_required(field) and name not in values]
    required = [name for name in absent if not _may_be_none(hints[name])]
    if required:
        raise ConfigError(f"{', '.join(map(path, required))} missing; add what is named")
    values = {**dict.fromkeys(absent), **values}
    converted = {name: _convert(hints[name], value, path(name)) for name, value in values.items()}
    try:
        return kind(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _may_be_none(kind: Any) -> bool:
    return types.NoneType in get_args(kind)


def _tuple(parts: tuple, value: Any, where: str) -> tuple:
    _checked(value, isinstance(value, list), where, "a list")
    if parts[-1] is Ellipsis:
        parts = parts[:1] * len(value)
    _checked(value, len(value) == len(parts), where, f"a list of {len(parts)}")
    items = []
    for i, (part, item) in enumerate(zip(parts, value, strict=True)):
        items.append(_convert(part, item, f"{where}.{i}"))
    return tuple(items)


def _number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3, without a dot, as text.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    _checked(
        value, isinstance(value, int | float) and not isinstance(value, bool), where, "a number"
    )
    return float(value)


def _checked(value: Any, good: bool, where: str, wanted: str) -> Any:
    if not good:
        raise ConfigError(f"{where} is {value!r}; give {wanted}")
    return value


def _json_object(text: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(text[0])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text[0]!r} is not one; give a JSON object")
    return value


_OPTION_KINDS = tyro.constructors.ConstructorRegistry()


@_OPTION_KINDS.primitive_rule
def _mapping_option(
    field: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Makes a mapping one option, in JSON; tyro would make one of each name that it already has."""
    if get_origin(field.type) is not dict:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _override(config: TrainConfig, arguments: Sequence[str], program: str) -> TrainConfig:
    usage = f"{program} CONFIG.yaml"
    for section in _OPTIONAL_SECTIONS:
        config, arguments = _with_optional_section(config, section, arguments)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _OPTION_KINDS:
            return tyro.cli(
                TrainConfig,
                prog=f"{usage} [--tiny]",
                args=arguments,
                default=config,
                config=settings,
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        reason = _one_line(printed.getvalue()) or "the options cannot be read"
        raise ConfigError(f"{reason}; see {usage} --help") from None


def _with_optional_section(
    config: TrainConfig, section: str, arguments: Sequence[str]
) -> tuple[TrainConfig, Sequence[str]]:
    """Adds or removes a section of the config, as its options want it; gives the options that are left, too.

    tyro would make a subcommand of a section that may be None, or fix it to None.
    """
    if (none := _without(section, arguments)) is not None:
        config = _replaced(config, section, None)
        arguments = none
    options = {
        argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments
    }
    given = any(option.startswith(f"{section}.") for option in options)
    listed = {"-h", "--help"} & set(arguments)
    around, _, own = section.rpartition(".")
    place = _section(config, around) if around else config
    if not (given or listed) or place is None or getattr(place, own) is not None:
        return config, arguments
    example = _OPTIONAL_SECTIONS[section]
    missing = [name for name in _required_options(type(example), section) if name not in options]
    if given and missing:
        raise ConfigError(
            f"{', '.join(missing)} missing; add what is named, as the file has no {section}"
        )
    return _replaced(config, section, example), arguments


def _without(section: str, arguments: Sequence[str]) -> Sequence[str] | None:
    """Takes `--section None` out of the arguments; None if it is not among them."""
    for i, argument in enumerate(arguments):
        if argument == f"--{section}=None":
            return [*arguments[:i], *arguments[i + 1 :]]
        if argument == f"--{section}" and arguments[i + 1 : i + 2] == ["None"]:
            return [*arguments[:i], *arguments[i + 2 :]]
    return None


def _section(config: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def _replaced(config: Any, path: str, value: Any) -> Any:
    """Copies a config with another value there. It is not checked: what the options make of it is."""
    name, _, rest = path.partition(".")
    if rest:
        value = _replaced(getattr(config, name), rest, value)
    new = copy.copy(config)
    object.__setattr__(new, name, value)
    return new


def _required_options(kind: Any, path: str) -> Iterator[str]:
    """Yields the fields without a default of a section, and of the sections in it; of a list, of its first item."""
    hints = get_type_hints(kind)
    for field in filter(_is_required, dataclasses.fields(kind)):
        part = hints[field.name]
        name = f"{path}.{field.name}"
        if get_origin(part) is tuple:
            part = get_args(part)[0]
            name = f"{name}.0"
        if dataclasses.is_dataclass(part):
            yield from _required_options(part, name)
        else:
            yield name


def _one_line(box: str) -> str:
    """Reads the text in the first part of a box that tyro draws around an error; empty if there is none."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return re.sub(r"\s+", " ", " ".join(lines[:rule])).strip().rstrip(".")
