"""Counts what one run of an optimised program does on a device: matmul FLOPs, collectives, kernel calls, HBM bytes.

Bodies of loops count as often as they run, branches of a conditional as the one that computes most. XLA's own
`cost_analysis` counts a body once. FLOPs are those of dots and convolutions, wherever they are fused; what kernels
compute is not in the text, so their calls are counted by name for the caller to price.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from sdar_jax.planning.hlo import Computation, Instruction, Program, parameters, trip_count

_FLOATS = ("bf16", "f16", "f32")
_GROUPED = re.compile(r"(^|/)(ragged-dot-[^/]*$|grouped_(product|weight_gradient)\b)")
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move no bytes, or their bodies' instructions do.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
}
_FREE |= {
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "async-start",
    "add-dependency",
}


class Traffic(NamedTuple):
    """A collective among `groups` of devices, as the program writes them."""

    kind: str
    groups: str


@dataclass
class Counts:
    """The counts of one device.

    Attributes:
        flops: of matmuls.
        hbm: bytes read and written.
        payload: bytes that go into a collective; for an all-gather those of the gathered array.
        kernels: calls by scope.
        unknown: loops with matmuls whose length is not known, by scope, and how often they are reached; one round of
            them is counted.
    """

    flops: float = 0.0
    hbm: float = 0.0
    payload: dict[Traffic, float] = field(default_factory=lambda: defaultdict(float))
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    unknown: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Counts", times: float = 1.0) -> None:
        """Adds another's counts, so many times."""
        self.flops += times * other.flops
        self.hbm += times * other.hbm
        for name in ("payload", "kernels", "unknown"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


Rounds = Callable[[Instruction], float | None]


def count(program: Program, rounds: Rounds = lambda loop: None, *, routed: float = 1.0) -> Counts:
    """Counts what the program's entry does.

    Args:
        rounds: how often a while loop runs whose length the program does not tell; None where that is unknown.
        routed: the filled share of the buffers of an MoE's experts, which have room for the worst routing.
    """

    @cache
    def of(name: str, fused: bool) -> Counts:
        computation = program.computations[name]
        total = Counts()
        for instruction in computation.values():
            _count_called(total, instruction, fused)
            total.flops += _flops(instruction, computation) + routed * _grouped_flops(
                instruction, computation
            )
            if not fused:
                total.hbm += _hbm(instruction, computation, program) * (
                    routed if _is_grouped(instruction) else 1.0
                )
            _count_calls(total, instruction, computation, name)
        return total

    def _count_called(total: Counts, instruction: Instruction, fused: bool) -> None:
        if instruction.opcode == "while":
            known = trip_count(program, instruction)
            times = rounds(instruction) if known is None else float(known)
            if times is None and of(instruction.called("body") or "", fused).flops:
                total.unknown[instruction.scope] += 1
            for part in ("condition", "body"):
                total.add(
                    of(instruction.called(part) or "", fused), 1.0 if times is None else times
                )
        elif instruction.opcode == "conditional":
            branches = [of(branch, fused) for branch in instruction.branches()]
            taken = routed if "mlp" in re.split(r"\W+", instruction.scope) else 1.0
            total.add(max(branches, key=lambda counts: counts.flops), taken)
        elif instruction.opcode in ("fusion", "call", "async-start"):
            name = instruction.called("calls") or instruction.called("to_apply") or ""
            total.add(of(name, fused or instruction.opcode == "fusion"))

    return of(program.entry, False)


def group_list(groups: str, devices: int) -> np.ndarray:
    """Reads the groups of a collective, int [number, size], indices into the mesh.

    Reads {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), and mesh['a'=2,'b'=2] {'a'}.
    """
    if groups.startswith("mesh"):
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", groups)]
        named = re.findall(r"'(\w+)'", groups.partition("{")[2])
        order = np.arange(math.prod(size for _, size in axes)).reshape([size for _, size in axes])
        inner = [i for name in named for i, (axis, _) in enumerate(axes) if axis == name]
        outer = [i for i in range(len(axes)) if i not in inner]
        size = math.prod(axes[i][1] for i in inner)
        return order.transpose(outer + inner).reshape(-1, size)
    if "<=" in groups:
        shape, _, source = groups.partition("<=")
        dims, _, permutation = source.partition("T")
        order = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
        return order.transpose(_integers(permutation) or range(order.ndim)).reshape(
            _integers(shape)
        )
    listed = [_integers(group) for group in re.findall(r"\{([\d,]+)\}", groups)]
    return np.array(listed) if listed else np.arange(devices)[None]


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def _count_calls(
    total: Counts, instruction: Instruction, computation: Computation, name: str
) -> None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        # A TPU's reduce-scatter is a fusion of this name, around an all-reduce of which each keeps its part.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else opcode
        groups = _groups(instruction)
        operands = [
            computation[operand].bytes for operand in instruction.operands if operand in computation
        ]
        given = operands[0] if kind == "ragged-all-to-all" else sum(operands)
        if kind == "all-gather":
            given *= group_list(groups, 1).shape[1]
        total.payload[Traffic(kind, groups)] += given
    elif opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if (
            target
            and target[1].startswith(("tpu_custom_call", "mosaic_gpu"))
            and "range_" in instruction.scope
        ):
            total.kernels[instruction.scope or instruction.name] += 1


def _groups(instruction: Instruction) -> str:
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", instruction.attributes)
        return pairs[1] if pairs else ""
    found = re.search(
        r"replica_groups=(mesh\[[^\]]*\] \{[^}]*\}|\{\{.*?\}\}|\S+)", instruction.attributes
    )
    return found[1].rstrip(",") if found else ""


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode in ("dot", "ragged-dot"):
        left = computation[instruction.operands[0]].arrays[0]
        contracted = math.prod(
            left.dims[axis] for axis in instruction.numbers("lhs_contracting_dims")
        )
        return 2.0 * math.prod(instruction.arrays[0].dims) * contracted
    if instruction.opcode == "convolution":
        left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
        return _convolution_flops(instruction, left, right)
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        left = computation[instruction.operands[0]].arrays[0]
        listed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = math.prod(left.dims[axis] for axis in _integers(listed[1] if listed else ""))
        return 2.0 * math.prod(instruction.arrays[0].dims) * contracted
    return 0.0


def _grouped_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts those of libtpu's kernels for `jax.lax.ragged_dot`, or Hopper's of `experts`, if all rows were filled."""
    if not _is_grouped(instruction):
        return 0.0
    operands = (computation[name].arrays[0] for name in instruction.operands)
    rows = next(
        (array for array in operands if len(array.dims) == 2 and array.dtype in _FLOATS), None
    )
    if rows is None:
        return 0.0
    out = instruction.arrays[0].dims
    per_row = math.prod(out[1:]) if len(out) == 3 else rows.dims[1] * out[-1]
    return 2.0 * rows.dims[0] * per_row


def _is_grouped(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and _GROUPED.search(instruction.scope) is not None


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """Counts without padding. A TPU's matmuls are convolutions, whose batches are windows of mostly padding."""
    labels = instruction.attribute("dim_labels") or ""
    of_left, of_right, of_out = re.split(r"_|->", labels)
    out = instruction.arrays[0].dims
    total = 2.0 * left[of_left.index("b")] * right[of_right.index("i")] * right[of_right.index("o")]
    total /= int(instruction.attribute("batch_group_count") or 1)
    for axis in sorted(set(of_left) - {"b", "f"}):
        window = _Window.read(instruction, int(axis), right[of_right.index(axis)])
        total *= window.products(left[of_left.index(axis)], out[of_out.index(axis)])
    return total


class _Window(NamedTuple):
    """A convolution's window along one axis."""

    size: int
    stride: int
    pad: int
    dilation: int
    base_dilation: int

    @classmethod
    def read(cls, instruction: Instruction, axis: int, size: int) -> "_Window":
        inside = instruction.attribute("window") or ""

        def value(name: str, default: int) -> int:
            found = re.search(rf"\b{name}=([\d_x\-]+)", inside)
            return int(found[1].split("x")[axis].partition("_")[0]) if found else default

        return cls(
            size,
            value("stride", 1),
            value("pad", 0),
            value("rhs_dilate", 1),
            value("lhs_dilate", 1),
        )

    def products(self, length: int, outputs: int) -> int:
        """Counts pairs of an output and a place in the window that meet an element of the input and no padding."""
        if self.size == 1 and self.stride == self.base_dilation == 1 and self.pad == 0:
            return outputs
        places = np.arange(self.size)
        positions = np.arange(outputs)
        total = 0
        for start in range(0, self.size, 1024):
            at = (
                places[start : start + 1024, None] * self.dilation
                + positions * self.stride
                - self.pad
            )
            meets = (
                (at >= 0)
                & (at <= (length - 1) * self.base_dilation)
                & (at % self.base_dilation == 0)
            )
            total += int(meets.sum())
        return total


def _hbm(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Counts bytes read and written: of slices, what is sliced; of arrays in a TPU's own memory, nothing."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "fusion":
        return _fusion_hbm(
            instruction, operands, program.computations[instruction.called("calls") or ""]
        )
    if opcode in ("call-start", "call-update"):
        # A gather by a TPU's sparse cores; its result is last but for a semaphore.
        results = [array.bytes for array in instruction.arrays if array.dims]
        return 2 * results[-1] if results else 0.0
    if opcode in ("dynamic-slice", "gather"):
        return 2 * _far(instruction)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _far(operands[-1 if opcode == "scatter" else 1])
    if opcode in ("copy-start", "slice-start"):
        return _far(operands[0]) + sum(
            array.bytes for array in instruction.arrays[:1] if not array.on_chip
        )
    return _far(instruction) + sum(map(_far, operands))


def _far(instruction: Instruction) -> float:
    return sum((array.bytes for array in instruction.arrays if not array.on_chip), 0.0)


def _fusion_hbm(instruction: Instruction, operands: list[Instruction], fused: Computation) -> float:
    root = next(inner for inner in fused.values() if inner.root)
    while root.opcode == "bitcast":
        root = fused[root.operands[0]]
    updated = root.operands[0] if root.opcode == "dynamic-update-slice" else None
    total = _far(instruction) if updated is None else fused[root.operands[1]].bytes
    for name, operand in zip(parameters(fused), operands, strict=False):
        if _far(operand):
            total += _read(name, operand, fused, updated)
    return total


def _read(name: str, operand: Instruction, fused: Computation, updated: str | None) -> float:
    """Counts the bytes read of a fusion's operand: all of it, or its slices where nothing else reads it."""
    if name == updated:
        return 0.0
    users = [inner for inner in fused.values() if name in inner.operands]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return sum((user.bytes for user in users), 0.0)
    return operand.bytes
