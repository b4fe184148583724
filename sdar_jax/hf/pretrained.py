"""Hugging Face model directories in and out: `load_pretrained` and `save_pretrained`.

Both go through the weights one by one with one table of names (tensor_names.py), so that host memory holds a weight and
the tensor being read into it or written from it, and never a second model.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from sdar_jax.devices import processes
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.hf.model_files import (
    GENERATION_FILE,
    carried_files,
    check_replaceable,
    replacing,
)
from sdar_jax.hf.released import model_directory, read_json, read_model_config
from sdar_jax.hf.tensor_files import (
    SUPPORTED_DTYPES,
    Tensor,
    TensorReader,
    check_range,
    listed,
    write_tensors,
)
from sdar_jax.hf.tensor_names import ALL, INPUT_AXES, Layout, joined_rows, layout_of
from sdar_jax.model import Model
from sdar_jax.model.adapted import is_adapted
from sdar_jax.model.axes import check_mesh, shardings
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.quantization import is_quantized, quantize_weight

log = logging.getLogger(__name__)
# Ours begin with their one input axis.
_TRANSPOSED = {"router", "experts_gate_up", "experts_down"}

_ROWS_AT_ONCE = 1024
# Buffers that old Llama checkpoints carry; they follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = "auto",
    mesh: Mesh | None = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
) -> Model:
    """Loads a model from a directory or the Hugging Face hub, its layers one by one.

    Of a `model_type` of docs/checkpoints.md: Qwen, Llama, SDAR, LLaDA, Dream and others. What a released config.json
    does not say of block size and mask is taken from the tokenizer's files, the model's name and its family, and a
    warning says so once (`read_model_config`). Another names what generation_config.json says and is not followed, or a
    second set of weights. A head unlike the embedding is kept where config.json ties the two, as in transformers 5, and
    a warning says so.

    Args:
        dtype: of the weights: a name or type, or "auto": bfloat16 on GPU and TPU, float32 on CPU. "int8" is for
            decoding: matmul weights as integers (quantization.py), each as it is read, and the rest as "auto".
        mesh: places every weight as `shardings` says; the default device if None.
        block_size, mask_token_id: override, or supply, what the files say.

    Raises:
        CheckpointError: a file that is missing, cut short or not what config.json describes, with all that is wrong
            named in one message, before any weight is placed. ConfigError: a config or dtype that is not supported,
            or a mesh that does not divide the model.
    """
    directory = model_directory(path_or_hub_id)
    config = read_model_config(directory, block_size=block_size, mask_token_id=mask_token_id)
    if mesh is not None:
        check_mesh(mesh, config)
    int8 = dtype in ("int8", jnp.int8)
    float_dtype = _resolved("auto" if int8 else dtype, mesh)
    with TensorReader(directory) as tensors:
        layout = layout_of(config)
        if config.tie_embeddings and _has_own_head(tensors, layout):
            wrong = f"tie_word_embeddings is true, and {layout.head} is there and differs from the embedding"
            log.warning("%s: %s; both are kept: set it to false in config.json", directory, wrong)
            config = replace(config, tie_embeddings=False)
        skeleton = jax.eval_shape(partial(Model, config, jax.random.key(0), float_dtype))
        structure = jax.tree.structure(skeleton)
        places = [None] * structure.num_leaves
        if mesh is not None:
            places = jax.tree.leaves(shardings(skeleton, mesh))
        weights = _weights(skeleton)
        _check(tensors, weights, layout)
        load = _load_int8 if int8 else _load
        arrays = [
            load(tensors, weight, place) for weight, place in zip(weights, places, strict=True)
        ]
    return jax.tree.unflatten(structure, arrays)


def save_pretrained(
    model: Model,
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `load_pretrained` and transformers read; layers stacked or not.

    An AR model becomes a qwen3, qwen3_moe, qwen2 or llama directory; a converted one has `model_type` sdar or sdar_moe
    and its block_size and mask_token_id; one of another family, such as LLaDA, keeps its own. Tensor names are the
    released ones in all, with a tensor for each matrix of an expert. The directory is complete or absent: it is written
    under another name next to `path` first, and what `path` held is replaced only then. What a killed save left there
    is removed by the next one.

    Of a model on a mesh of several processes all call this: each tensor is gathered in turn, and the first process
    writes it.

    Args:
        path: new, empty, or an earlier model directory.
        dtype: of the tensors on disk, such as "bfloat16"; the weights' own if None. Each is cast as it is written.
        tokenizer_from: a directory whose tokenizer, chat templates, preprocessor and generation config are copied; if
            None, those that `path` already holds are kept.
        max_shard_bytes: more than this in weights is split over several files with an index.

    Raises:
        CheckpointError: `path` holds something else, or cannot be written, or a weight is too large for float16; what
            it held is then as it was.
        ConfigError: a dtype that safetensors and transformers do not share, int8 weights, or low-rank matrices.
    """
    if any(is_adapted(leaf) for leaf in jax.tree.leaves(model, is_leaf=is_adapted)):
        raise ConfigError(
            "the model has adapters, which its directory does not hold; save adapters.merge(model), or "
            "adapters.save(model, path)"
        )
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(model)):
        raise ConfigError(
            "the weights are int8, which model directories do not hold; save the float model"
        )
    path = Path(path).resolve()
    cast = None if dtype is None else _supported(dtype)
    tensors = _to_write(model, cast)
    shared = not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model))
    if not shared or processes.is_main_process():
        _write_directory(path, model.config, tensors, tokenizer_from, max_shard_bytes)
    else:
        for tensor in tensors:
            tensor.read()
    if shared:
        processes.barrier(f"saved {path}")


def _write_directory(
    path: Path,
    config: ModelConfig,
    tensors: list[Tensor],
    tokenizer_from: str | Path | None,
    max_shard_bytes: int,
) -> None:
    source = path if tokenizer_from is None else Path(tokenizer_from)
    carried = carried_files(source)
    if tokenizer_from is not None and not carried:
        raise CheckpointError(
            f"{source}: holds no tokenizer files; give the directory that has tokenizer.json"
        )
    check_replaceable(path)
    try:
        with replacing(path) as building:
            write_tensors(building, tensors, max_shard_bytes)
            for name in carried:
                (building / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, building / name)
            _write_configs(building, config, tensors[0].dtype)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or choose another path, nothing was replaced"
        ) from None


class _Part(NamedTuple):
    """The place of a tensor of theirs, or of an expert's row of a fused one, in a weight of ours.

    Attributes:
        name: of the tensor.
        index: in the weight, or in that expert's.
        expert: index on the weight's first axis, None where it has no experts.
        fused: whether the tensor holds all experts.
    """

    name: str
    index: Any
    expert: int | None = None
    fused: bool = False


# What a device holds of a weight: a range of each axis.
_Region = tuple[range, ...]


class _Weight(NamedTuple):
    """A weight of one layer, or of none.

    Attributes:
        prefix: of its tensors' names.
        field: its name in `Model` or `Layer`.
        array: a jax.Array, or a jax.ShapeDtypeStruct where the model is abstract.
        layout: the naming of its tensors.
        stacked_at: its layer's index in a stacked array, None where it is not stacked.
    """

    prefix: str
    field: str
    array: Any
    layout: Layout
    stacked_at: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape if self.stacked_at is None else self.array.shape[1:]

    def parts(self, found: Container[str] = ()) -> list[_Part]:
        """Lists its tensors by full name; a fused one is taken for the experts if it is among those `found`."""
        names = self.layout.parts[self.field]
        if self.field not in self.layout.fused:
            return [_Part(self.prefix + name, index) for name, index in names.items()]
        fused = self.layout.fused[self.field]
        if is_fused := all(self.prefix + name in found for name in fused):
            names = fused
        parts = []
        for expert in range(self.shape[0]):
            for name, index in names.items():
                full = (self.prefix + name).format(expert)
                parts.append(_Part(full, index, expert, is_fused))
        return parts

    @property
    def joined(self) -> bool:
        return self.field in self.layout.joined

    def our_shape(self, part: _Part) -> tuple[int, ...]:
        shape = self.shape if part.expert is None else self.shape[1:]
        return np.broadcast_to(np.empty(()), shape)[part.index].shape

    def their_shape(self, part: _Part) -> tuple[int, ...]:
        theirs = _their_shape(self.our_shape(part), self.field)
        return (self.shape[0], *theirs) if part.fused else theirs


def _weights(model: Model) -> list[_Weight]:
    """Lists a model's weights, in the order of `jax.tree.leaves` where layers are not stacked."""
    layout = layout_of(model.config)
    found = []
    for path, leaf in jax.tree.leaves_with_path(model):
        names = [getattr(key, "name", getattr(key, "idx", None)) for key in path]
        field = str(next(name for name in reversed(names) if name in layout.parts))
        if names[0] != "layers":
            found.append(_Weight("", field, leaf, layout))
        elif names[1] in ("first", "body"):
            start = model.config.num_dense_layers if names[1] == "body" else 0
            prefixes = [layout.layer.format(start + i) for i in range(len(leaf))]
            found += [_Weight(name, field, leaf, layout, i) for i, name in enumerate(prefixes)]
        else:
            index = model.config.num_layers - 1 if names[1] == "last" else names[1]
            found.append(_Weight(layout.layer.format(index), field, leaf, layout))
    return found


def _their_shape(shape: tuple[int, ...], field: str) -> tuple[int, ...]:
    if field in _TRANSPOSED:
        return math.prod(shape[1:]), shape[0]
    if field not in INPUT_AXES:
        return (math.prod(shape),)
    outputs = len(shape) - INPUT_AXES[field]
    return math.prod(shape[:outputs]), math.prod(shape[outputs:])


def _to_theirs(ours: np.ndarray, field: str, joined: bool) -> np.ndarray:
    shape = _their_shape(ours.shape, field)
    theirs = ours.reshape(shape[::-1]).T if field in _TRANSPOSED else ours.reshape(shape)
    return theirs[np.argsort(joined_rows(ours.shape))] if joined else theirs


def _to_ours(theirs: np.ndarray, field: str, shape: tuple[int, ...], joined: bool) -> np.ndarray:
    theirs = theirs[joined_rows(shape)] if joined else theirs
    return theirs.T.reshape(shape) if field in _TRANSPOSED else theirs.reshape(shape)


def _has_own_head(tensors: TensorReader, layout: Layout) -> bool:
    """Returns whether there is an output head that differs from the embedding. Reads a part of both at a time."""
    if not tensors.names() >= {layout.embedding, layout.head}:
        return False
    shape, dtype = tensors.describe(layout.embedding)
    head_shape, head_dtype = tensors.describe(layout.head)
    if head_shape != shape or not {dtype, head_dtype} <= set(SUPPORTED_DTYPES.values()):
        # What does not fit is named where all tensors are checked.
        return True
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, shape[0]))
        # Types may differ; float64 holds the values of all.
        embedding = tensors.read(layout.embedding, rows).astype(np.float64)
        head = tensors.read(layout.head, rows).astype(np.float64)
        if not np.array_equal(embedding, head):
            return True
    return False


def _resolved(dtype: DTypeLike, mesh: Mesh | None) -> np.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    return _supported(dtype)


def _supported(dtype: DTypeLike) -> np.dtype:
    supported = sorted(known.name for known in SUPPORTED_DTYPES)
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {supported}") from None
    if resolved not in SUPPORTED_DTYPES:
        raise ConfigError(
            f"dtype {resolved.name!r} is not supported for weights; use one of {supported}"
        )
    if resolved == np.float64 and not jax.config.jax_enable_x64:
        raise ConfigError(
            "dtype 'float64' needs 64-bit mode; set JAX_ENABLE_X64=1, or use 'float32'"
        )
    return resolved


def _check(tensors: TensorReader, weights: list[_Weight], layout: Layout) -> None:
    """Checks the tensors' names, shapes and types against what the config implies; one error names all that is
    wrong."""
    found = set(tensors.names())
    wanted = {
        part.name: weight.their_shape(part) for weight in weights for part in weight.parts(found)
    }
    # A tied model may carry its head as well.
    ignored = {name for name in found if _DERIVED.search(name)} | {layout.head}
    shapes = []
    types = []
    for name in sorted(found & set(wanted)):
        shape, dtype = tensors.describe(name)
        if shape != wanted[name]:
            shapes.append(f"{name} is {list(shape)} and should be {list(wanted[name])}")
        if dtype not in SUPPORTED_DTYPES.values():
            types.append(f"{name} is {dtype}")
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(found - set(wanted) - ignored),
        "of a wrong shape": shapes,
        "of an unsupported type": types,
    }
    wrong = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if wrong:
        # A file of a tied model without the flag lacks this one tensor.
        tied = (
            ""
            if problems["missing"] != [layout.head]
            else ", or set tie_word_embeddings to true if it has no such head"
        )
        raise CheckpointError(
            f"{tensors.directory}: tensors do not fit config.json; {'; '.join(wrong)}; use the config.json and "
            f"weights of one model, in {', '.join(SUPPORTED_DTYPES.values())}{tied}"
        )


def _load(tensors: TensorReader, weight: _Weight, place: Sharding | None) -> jax.Array:
    """Loads a weight to where it belongs. This process reads what its devices hold of it."""
    shape = weight.array.shape
    if place is None:
        (array,) = _read(tensors, weight, [tuple(map(range, shape))])
        # Copies run in the background, and would keep the buffers of many weights alive.
        return jnp.asarray(array).block_until_ready()
    indices: dict[Any, Any] = dict(place.addressable_devices_indices_map(shape))
    regions = {}
    for device, index in indices.items():
        regions[device] = tuple(range(size)[part] for size, part in zip(shape, index, strict=True))
    distinct = list(dict.fromkeys(regions.values()))
    buffers = dict(zip(distinct, _read(tensors, weight, distinct), strict=True))
    shards = [jax.device_put(buffers[region], device) for device, region in regions.items()]
    return jax.make_array_from_single_device_arrays(shape, place, shards).block_until_ready()


def _load_int8(tensors: TensorReader, weight: _Weight, place: Sharding | None) -> Any:
    array = _load(tensors, weight, place)
    if not is_quantized(weight.field):
        return array
    return jax.block_until_ready(quantize_weight(array, weight.field))


def _read(tensors: TensorReader, weight: _Weight, regions: list[_Region]) -> list[np.ndarray]:
    """Reads these regions of a weight; each tensor is read once for all of them."""
    buffers = [np.empty([len(axis) for axis in region], weight.array.dtype) for region in regions]
    for part in weight.parts(tensors.names()):
        targets = []
        for buffer, region in zip(buffers, regions, strict=True):
            if part.expert is None or part.expert in region[0]:
                targets.append(_target(part, buffer, region))
        if not targets:
            continue
        tensor = tensors.read(part.name, part.expert if part.fused else None)
        ours = _to_ours(tensor, weight.field, weight.our_shape(part), weight.joined)
        for target, index in targets:
            with np.errstate(over="ignore"):
                target[...] = ours[index]
            check_range(f"{tensors.directory}: {part.name}", ours[index], target)
        # Freed before the next one is read.
        del tensor, ours
    return buffers


def _target(
    part: _Part, buffer: np.ndarray, region: _Region
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Finds the view of a region's buffer that holds a part, and which slice of the part it is."""
    if part.expert is not None:
        buffer = buffer[part.expert - region[0].start]
        region = region[1:]
    index = [slice(axis.start, axis.stop) for axis in region]
    if part.index is not ALL:
        # The axis that parts lie along is never split.
        axis = len(part.index) - 1
        index[axis : axis + 1] = [] if isinstance(part.index[axis], int) else [slice(None)]
    return buffer[part.index], tuple(index)


def _to_write(model: Model, cast: np.dtype | None) -> list[Tensor]:
    tensors = []
    for weight in _weights(model):
        dtype = cast or _supported(weight.array.dtype)
        for part in weight.parts():
            tensors.append(
                Tensor(part.name, weight.their_shape(part), dtype, _reader(weight, part))
            )
    return tensors


def _reader(weight: _Weight, part: _Part) -> Callable[[], np.ndarray]:
    at = tuple(i for i in (weight.stacked_at, part.expert) if i is not None)

    def read() -> np.ndarray:
        array = weight.array[at] if at else weight.array
        # A JAX array keeps the host copy that is made of it: a device copy is read, and freed with it.
        ours = processes.on_host(jnp.copy(array))[part.index]
        return _to_theirs(ours, weight.field, weight.joined)

    return read


def _write_configs(directory: Path, config: ModelConfig, dtype: np.dtype) -> None:
    files = {"config.json": {**config.to_hf(), "torch_dtype": dtype.name}}
    if config.stop_token_ids:
        carried = read_json(directory / GENERATION_FILE)
        files[GENERATION_FILE] = {**carried, "eos_token_id": list(config.stop_token_ids)}
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values, indent=2) + "\n")
