"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

Tensors are called base_model.model.MODULE.lora_A.weight [r, in] and .lora_B.weight [out, r], and those that are trained
whole base_model.model.MODULE.weight; the base is not among them. Experts are modules of their own, as in transformers
before 5: model.layers.0.mlp.experts.7.gate_proj.
"""

import collections
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from sdar_jax.adapters.config import SAVED_WHOLE
from sdar_jax.adapters.lora import Pair, Place, Shapes, path_names, places, with_pairs
from sdar_jax.devices import processes
from sdar_jax.devices.sharding import mesh_of
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.hf.model_files import replacing
from sdar_jax.hf.released import read_json
from sdar_jax.hf.tensor_files import listed
from sdar_jax.hf.tensor_names import joined_rows, layout_of
from sdar_jax.model import Model, unstack_layers
from sdar_jax.model.adapted import Adapted, Projection, is_adapted
from sdar_jax.model.axes import shardings
from sdar_jax.model.config import ModelConfig

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])(\.default)?\.weight")
# What else a file may ask for, and the values with which it asks for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
}


class _Module(NamedTuple):
    """A projection of a layer, with its matrices as PEFT's files hold them: A [r, in] and B [out, r]."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float


def save(
    model: Model,
    path: str | Path,
    *,
    base: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Writes a model's low-rank matrices, float32, as a directory that PEFT and `load` read.

    The directory is complete or absent, and what `path` held of an adapter is replaced only then. The processes of a
    job all call this; the first one writes.

    Args:
        base: the directory or hub id of the model that they belong to, for whoever loads them with PEFT.
        modules_to_save: what was trained whole: embed_tokens, lm_head.

    Raises:
        ConfigError: the model has no low-rank matrices.
        CheckpointError: `path` holds something else, or cannot be written.
    """
    modules = list(_modules(model))
    if not modules:
        raise ConfigError(
            "the model has no low-rank matrices to save; give one that adapters.add made"
        )
    tensors = {}
    for module in modules:
        tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = module.a
        tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = module.b
    for name, (tensor, field) in _whole(model.config, modules_to_save).items():
        if getattr(model, field) is None:
            raise ConfigError(f"modules_to_save has {name}, which the model ties to its embedding")
        tensors[_PREFIX + tensor] = processes.on_host(jnp.copy(getattr(model, field)[...]))
    if not processes.is_main_process():
        return
    path = Path(path).resolve()
    _check_replaceable(path)
    config = _settings(model.config, modules, base, modules_to_save)
    try:
        with replacing(path) as building:
            save_file(
                {name: jnp.asarray(each) for name, each in tensors.items()}, building / TENSOR_FILE
            )
            (building / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or choose another path, nothing was replaced"
        ) from None


def load(model: Model, path: str | Path) -> Model:
    """Puts the adapter of a directory that PEFT or `save` wrote beside the weights of a model, which are shared.

    Layers come back one by one, on the model's mesh, if it is on one. What was trained whole replaces the model's own.

    Raises:
        CheckpointError: no adapter, or one that is of another model, or that is more than LoRA; nothing is changed.
    """
    path = Path(path)
    settings = read_json(path / CONFIG_FILE)
    _check_settings(path, settings)
    tensors = _read(path / TENSOR_FILE)
    matrices: dict[str, dict[str, Array]] = collections.defaultdict(dict)
    for name in [name for name in tensors if _TENSOR.fullmatch(name)]:
        module, which = _TENSOR.fullmatch(name).group(1, 2)  # pyright: ignore[reportOptionalMemberAccess]
        matrices[module][which] = tensors.pop(name)
    prefix = layout_of(model.config).layer

    def pair(layer: int, place: Place, shapes: Shapes) -> Pair | None:
        names = [prefix.format(layer) + module for module in place.modules(model.config)]
        joined, of_experts = _joined(model, place), bool(shapes.stack)
        one = shapes._replace(stack=())
        pairs = [_pair(path, name, matrices.pop(name, {}), one, settings, joined) for name in names]
        return _of_all_experts(path, names, pairs) if of_experts else pairs[0]

    adapted = with_pairs(unstack_layers(model), places(model.config), pair)
    for tensor, field in _whole(model.config, SAVED_WHOLE).values():
        if (array := tensors.pop(_PREFIX + tensor, None)) is not None:
            _replace(path, adapted, field, tensor, array)
    unknown = sorted(matrices) + sorted(name.removeprefix(_PREFIX) for name in tensors)
    if unknown or not any(map(is_adapted, jax.tree.leaves(adapted, is_leaf=is_adapted))):
        kind = model.config.model_type or model.config.architecture
        raise CheckpointError(
            f"{path}: holds {listed(unknown) or 'no low-rank matrices'}, which this {kind} of "
            f"{model.config.num_layers} layers has no place for; give an adapter of this model"
        )
    mesh = mesh_of(model.embedding)
    return adapted if mesh is None else jax.device_put(adapted, shardings(adapted, mesh))


def _read(file: Path) -> dict[str, Array]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); give a directory with {CONFIG_FILE} and {TENSOR_FILE}"
        ) from None


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if not settings:
        raise CheckpointError(
            f"{path}: has no {CONFIG_FILE}; give a directory that PEFT or adapters.save wrote"
        )
    if (kind := settings.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; give an adapter of type LORA")
    for name, plain in _PLAIN.items():
        if (value := settings.get(name)) not in plain and name in settings:
            raise CheckpointError(
                f"{path}: {name} is {value!r}, which is not supported; merge it with PEFT and load the model"
            )


def _pair(
    path: Path,
    name: str,
    found: Mapping[str, Array],
    shapes: Shapes,
    settings: Mapping[str, Any],
    joined: bool,
) -> Pair | None:
    """Makes a pair of the matrices that a file has of a module; None where it has none."""
    if not found:
        return None
    if missing := {"A", "B"} - set(found):
        raise CheckpointError(f"{path}: {name}.lora_{missing.pop()} is missing; restore the file")
    a, b = found["A"], found["B"]
    rank = len(a)
    wanted = (rank, math.prod(shapes.inputs)), (math.prod(shapes.outputs), rank)
    if (a.shape, b.shape) != wanted:
        raise CheckpointError(
            f"{path}: {name} has matrices {list(a.shape)} and {list(b.shape)}, and this model's would be "
            f"{list(wanted[0])} and {list(wanted[1])}; give an adapter of this model"
        )
    if joined:
        b = b[joined_rows((*shapes.outputs, rank))]
    a, b = a.reshape(shapes.a(rank)), b.reshape(shapes.b(rank))
    return Pair(a.astype(jnp.float32), b.astype(jnp.float32), _scale(settings, name, rank))


def _of_all_experts(path: Path, names: list[str], pairs: list[Pair | None]) -> Pair | None:
    """Stacks the pairs of a layer's experts; None where there are none."""
    found = [pair for pair in pairs if pair is not None]
    if not found:
        return None
    missing = [name for name, pair in zip(names, pairs, strict=True) if pair is None]
    if missing:
        raise CheckpointError(
            f"{path}: {listed(missing)} have no matrices, and other experts of the layer do; merge it with PEFT and "
            "load the model"
        )
    kinds = {(len(pair.a), pair.scale) for pair in found}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path}: {names[0]} and the other experts of its layer have ranks and scales {sorted(kinds)}, which must "
            "be one; merge it with PEFT and load the model"
        )
    a, b = (
        jnp.stack(matrices) for matrices in zip(*((each.a, each.b) for each in found), strict=True)
    )
    return Pair(a, b, found[0].scale)


def _scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Computes s as PEFT does: a pattern is the module's name, or the end of it."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _joined(model: Model, place: Place) -> bool:
    return place.field in layout_of(model.config).joined


def _whole(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns, for each of PEFT's names of modules that may be trained whole, its tensor and its field in `Model`."""
    parts = layout_of(config).parts
    return {name: (next(iter(parts[SAVED_WHOLE[name]])), SAVED_WHOLE[name]) for name in names}


def _replace(path: Path, model: Model, field: str, tensor: str, array: Array) -> None:
    own = getattr(model, field)
    if own is None or own.shape != array.shape:
        ours = "none of its own" if own is None else list(own.shape)
        raise CheckpointError(
            f"{path}: {tensor} is {list(array.shape)} and the model has {ours}; give an adapter of this model"
        )
    setattr(model, field, nnx.Param(array.astype(own.dtype)))


def _modules(model: Model) -> Iterator[_Module]:
    """Yields the projections that have low-rank matrices, layer by layer of each weight."""
    by_name = {(place.field, place.name): place for place in places(model.config)}
    for path, leaf in jax.tree.leaves_with_path(model, is_leaf=is_adapted):
        if not is_adapted(leaf):
            continue
        names = path_names(path)
        field = next(name for name in names if (name, leaf.projections[0].name) in by_name)
        for projection in leaf.projections:
            yield from _of_layers(model, leaf, projection, by_name[field, projection.name], names)


def _of_layers(
    model: Model, weight: Adapted, projection: Projection, place: Place, names: list[Any]
) -> Iterator[_Module]:
    # Copies: a JAX array keeps the host's, and frees it with itself.
    a, b = (
        processes.on_host(jnp.copy(pairs[projection.name]))
        for pairs in (weight.lora_a, weight.lora_b)
    )
    config, of_experts = model.config, weight.of_experts
    stacked = b.ndim - weight.outputs - 1 - of_experts
    start = {"first": 0, "body": config.num_dense_layers, "last": config.num_layers - 1}
    first: int = start[names[1]] if names[1] in start else names[1]
    if not stacked:
        a, b = a[None], b[None]
    for i, layer in enumerate(zip(a, b, strict=True)):
        parts = zip(*layer, strict=True) if of_experts else [layer]
        for module, (one_a, one_b) in zip(place.modules(config), parts, strict=True):
            rank = len(one_a)
            rows = one_b.reshape(-1, rank)
            if _joined(model, place):
                rows = rows[np.argsort(joined_rows(one_b.shape))]
            name = layout_of(config).layer.format(first + i) + module
            yield _Module(name, one_a.reshape(rank, -1), rows, projection.scale)


def _settings(
    config: ModelConfig, modules: Sequence[_Module], base: str | None, whole: Sequence[str]
) -> dict[str, Any]:
    """Makes PEFT's config. Ranks and scales that are not the commonest are in its patterns, by full name."""
    ranks = {module.name: len(module.a) for module in modules}
    alphas = {module.name: module.scale * len(module.a) for module in modules}
    rank, alpha = (
        collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas)
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {re.escape(n): each for n, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(n): each for n, each in alphas.items() if each != alpha},
        "target_modules": _target_modules(config, set(ranks)),
        "modules_to_save": list(whole) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _target_modules(config: ModelConfig, modules: set[str]) -> list[str]:
    """Lists projections by their last names; by their full ones, where PEFT would find others of that name too."""
    layout = layout_of(config)
    everywhere = {
        layout.layer.format(layer) + module: place.name
        for layer in range(config.num_layers)
        for place in places(config)
        if place.is_in(config, layer)
        for module in place.modules(config)
    }
    names = {everywhere[module] for module in modules}
    whole = {module for module, name in everywhere.items() if name in names}
    outside = layout.head.removesuffix(".weight").rpartition(".")[2] in names
    return sorted(modules if outside or whole != modules else names)


def _check_replaceable(path: Path) -> None:
    """Raises CheckpointError unless `path` is free, or a directory of an adapter and nothing else."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; choose a directory")
    found = {each.name for each in path.iterdir()} if path.exists() else set()
    if foreign := sorted(found - {CONFIG_FILE, TENSOR_FILE}):
        raise CheckpointError(
            f"{path}: holds {listed(foreign)}, which a save would delete; choose a new directory"
        )
