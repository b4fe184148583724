"""Reads the text of an optimised XLA program into computations of instructions."""

import math
import re
from typing import NamedTuple

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "s4": 4,
    "u4": 4,
    "s2": 2,
    "u2": 2,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
    """One array of a shape; `on_chip` if it is in a TPU's own memory, not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * _bits(self.dtype) / 8


class Instruction(NamedTuple):
    """One instruction: `arrays` are those of its result, `constant` the value of a scalar integer constant."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool
    constant: int | None = None

    @property
    def bytes(self) -> float:
        return sum((array.bytes for array in self.arrays), 0.0)

    @property
    def scope(self) -> str:
        """Its place in the traced function, as JAX names it; "" where XLA made it."""
        found = _SCOPE.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """Reads the value of name=..., in braces or to the next comma."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """Reads the integers of an attribute such as dimensions={0,1}; () if it is not there."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name) or "")))

    def called(self, kind: str) -> str | None:
        """Reads the computation named by calls=, body=, condition= or to_apply=."""
        found = re.search(rf"\b{kind}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """Reads the computations of a conditional."""
        names = []
        for listed, single in _BRANCHES.findall(self.attributes):
            names += re.findall(r"[\w.\-]+", listed) if listed else [single]
        return names


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Computations by name, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Parses `jax.stages.Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], bool(found[1]), found[3])
    return Program(computations, entry)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """Finds how often a while loop runs: as XLA says, or its condition's constant; None if neither is there."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.called("condition") or ""]
    root = next(instruction for instruction in condition.values() if instruction.root)
    if root.opcode == "fusion":
        return _fused_bound(program, condition, root)
    return _bound(condition, root)


def _bound(condition: Computation, root: Instruction) -> int | None:
    if root.opcode != "compare" or root.attribute("direction") not in ("LT", "LE"):
        return None
    limit = condition.get(root.operands[1])
    if limit is None or limit.constant is None:
        return None
    return limit.constant + (root.attribute("direction") == "LE")


def _fused_bound(program: Program, condition: Computation, root: Instruction) -> int | None:
    """Finds the bound of a condition whose comparison is alone in a fusion that is given the constant."""
    fused = program.computations[root.called("calls") or ""]
    inner = next(instruction for instruction in fused.values() if instruction.root)
    given = dict(zip(parameters(fused), root.operands, strict=True))
    constants = {name: condition[outer] for name, outer in given.items() if outer in condition}
    return _bound({**fused, **constants}, inner)


def parameters(computation: Computation) -> list[str]:
    """Lists the names of a computation's parameters, in order."""
    found = [x for x in computation.values() if x.opcode == "parameter"]
    return [x.name for x in sorted(found, key=lambda x: x.constant or 0)]


def _instruction(name: str, root: bool, text: str) -> Instruction:
    shape, rest = _split_shape(text)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _balanced(rest)
    arrays = []
    for dtype, listed, layout in _ARRAY.findall(shape):
        dims = tuple(int(dim.removeprefix("<=")) for dim in listed.split(",") if dim)
        arrays.append(Array(dtype, dims, on_chip="S(1)" in layout))
    scalar = opcode in ("constant", "parameter") and inside.isdigit()
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        arrays=tuple(arrays),
        operands=tuple(_NAMES.findall(inside)),
        attributes=attributes,
        root=root,
        constant=int(inside) if scalar else None,
    )


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = _balanced(text[1:])
    return inside, rest.strip()


def _balanced(text: str) -> tuple[str, str]:
    """Splits a text at the parenthesis that closes one already open."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8
