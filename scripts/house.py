"""Figures of the code as it stands: how dense it is, how large its parts are, and which imports run up.

    python scripts/house.py [--root DIR]

Prints a table of docs/architecture.md. What counts as code, function and token is what `ast` and `tokenize` say.
"""

import argparse
import ast
import io
import statistics
import tokenize
from pathlib import Path

# From the ground floor up: a room imports from those before it, and from itself.
FLOORS = (
    "errors",
    "arithmetic",
    "lazy",
    "compatibility",
    "devices",
    "visibility",
    "paradigm",
    "groups",
    "corruption",
    "verdicts",
    "gpu_kernels",
    "attention",
    "experts",
    "losses",
    "model",
    "hf",
    "adapters",
    "data",
    "distillation",
    "loss_metrics",
    "objectives",
    "weighted_loss",
    "decoding",
    "evaluation",
    "training",
    "planning",
    "proof",
    "cli",
)
# What an objective or strategy is called: a comparison with one of these belongs in the place that defines it.
NAMES = {
    "autoregressive",
    "masked_diffusion",
    "block_diffusion",
    "semi_autoregressive",
    "sequential",
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "factor",
    "next_token",
    "canvas",
    "blocks",
}
_NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def sources(root: Path) -> list[Path]:
    return sorted((root / "sdar_jax").rglob("*.py"))


def name_comparisons(tree: ast.AST) -> list[int]:
    """Lines that compare something with the name of an objective, a strategy or a way of reading."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            flat = [
                item
                for part in parts
                for item in (part.elts if isinstance(part, ast.Tuple | ast.Set) else [part])
            ]
            if any(isinstance(item, ast.Constant) and item.value in NAMES for item in flat):
                found.append(node.lineno)
    return found


def functions(tree: ast.AST) -> list[int]:
    """The lengths of all functions, in lines."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, kinds) and node.end_lineno
    ]


def methods(tree: ast.AST) -> dict[str, int]:
    """How many methods each class has."""
    return {
        node.name: sum(isinstance(item, ast.FunctionDef) for item in node.body)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def tokens_and_lines(text: str, tree: ast.AST) -> tuple[int, int]:
    """Tokens of code, and the lines that hold any; docstrings and comments are neither."""
    skipped, tokens, lines = docstring_lines(tree), 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE and token.start[0] not in skipped:
            tokens += 1
            lines.add(token.start[0])
    return tokens, len(lines)


def room(module: str) -> str:
    """The room of a dotted name below sdar_jax; "" for the package itself."""
    return module.removeprefix("sdar_jax").lstrip(".").partition(".")[0]


def imports(tree: ast.AST) -> list[str]:
    """The rooms that a file imports, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "sdar_jax"
        ):
            names = (
                [node.module]
                if node.module != "sdar_jax"
                else [f"sdar_jax.{alias.name}" for alias in node.names]
            )
            found += [room(name) for name in names]
        elif isinstance(node, ast.Import):
            found += [
                room(alias.name) for alias in node.names if alias.name.split(".")[0] == "sdar_jax"
            ]
    return found


def imports_up(root: Path) -> list[str]:
    """Imports of a room that stands above the importing one, or that no floor names: "file: room".

    The commands stand above all rooms and may use the package's public face.
    """
    wrong = []
    for path in sources(root):
        own = path.relative_to(root / "sdar_jax").parts[0].removesuffix(".py")
        if own.startswith("__"):
            continue
        for other in imports(ast.parse(path.read_text())):
            if own == "cli" and (other == "cli" or other not in FLOORS):
                continue
            known = own in FLOORS and other in FLOORS
            if not known or FLOORS.index(other) > FLOORS.index(own):
                wrong.append(f"{path.relative_to(root)}: {other or 'sdar_jax'}")
    return wrong


def figures(root: Path) -> dict[str, str]:
    trees = {path: ast.parse(path.read_text()) for path in sources(root)}
    counted = [tokens_and_lines(path.read_text(), tree) for path, tree in trees.items()]
    tokens, lines = (sum(part) for part in zip(*counted, strict=True))
    lengths = [length for tree in trees.values() for length in functions(tree)]
    classes = {name: count for tree in trees.values() for name, count in methods(tree).items()}
    largest = max(classes, key=lambda name: classes[name])
    compared = {path: found for path, tree in trees.items() if (found := name_comparisons(tree))}
    return {
        "files, lines of code": f"{len(trees)}, {lines}",
        "tokens per line of code": f"{tokens / lines:.1f}",
        "functions, median length, over 50 lines": (
            f"{len(lengths)}, {statistics.median(lengths):.0f}, {sum(length > 50 for length in lengths)}"
        ),
        "methods of the largest class": f"{classes[largest]} ({largest})",
        "comparisons with the name of an objective or strategy": (
            f"{sum(map(len, compared.values()))} in {len(compared)} files"
        ),
        "imports that run up": str(len(imports_up(root))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    root = parser.parse_args().root
    for name, value in figures(root).items():
        print(f"| {name} | {value} |")
    for line in imports_up(root):
        print("up:", line)


if __name__ == "__main__":
    main()
