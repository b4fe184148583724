"""Shows what a run would read, before any training: `sdar-jax data CONFIG.yaml [--field.path value ...]`.

    sdar-jax data CONFIG.yaml [--records 2000] [--show 2] [--json] [--color auto] [--field.path value ...]

By source: records, documents, tokens, how much of them is learned, what is left out and why. Then the lengths of
documents, how full the rows are, and some documents as text: what is learned is green, or stands in ⟦ ⟧ without colour.
Records are drawn in the run's own order; --records 0 reads an epoch. The config is a YAML file or a recipe, and its
fields are overridden as for train.py. No model is read but its config, and no weight.

Exit status: 0 no record that was read is malformed, 1 some are, 2 an error in what was given (one line on stderr).
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdar_jax.data import load_tokenizer
from sdar_jax.data.documents import Document
from sdar_jax.data.inspection import DataReport, Problem, SourceReport, inspect_data
from sdar_jax.errors import ConfigError, SdarError
from sdar_jax.training import TrainConfig, read_command_line
from sdar_jax.training.setup import data_layout, tokenizer_directory

_PROBLEMS_SHOWN = 5
_BAR = 40


def main(arguments: Sequence[str] | None = None, program: str = "sdar-jax data") -> int:
    """Prints the report; returns the exit status."""
    options, rest = _parser(program).parse_known_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    try:
        return _show(options, rest)
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _show(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.records < 0 or options.show < 0:
        raise ConfigError("--records and --show: give 0 or more")
    config = read_command_line([options.config, *overrides], program="sdar-jax train")
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one source to read")
    tokenizer = load_tokenizer(tokenizer_directory(config.model))
    block_size, eos = data_layout(config.layout_model, tokenizer)
    report = inspect_data(
        config.data,
        tokenizer,
        block_size=block_size,
        eos_token_id=eos,
        records=options.records or None,
        keep=options.show,
    )
    if options.json:
        print(json.dumps(_values(report), indent=1))
    else:
        color = options.color == "always" or (options.color == "auto" and _is_terminal())
        print("\n".join(_lines(report, config, tokenizer, color)))
    problems = [problem for source in report.sources for problem in source.problems]
    return int(any(problem.kind == "malformed" for problem in problems))


def _is_terminal() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _values(report: DataReport) -> dict[str, object]:
    """The report for other programs."""
    sources = []
    for source in report.sources:
        values = dataclasses.asdict(source)
        lengths = values.pop("lengths")
        sources.append({**values, "documents": len(lengths), "tokens": sum(lengths)})
    lengths = _lengths(report)
    return {
        "sources": sources,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "lengths": {str(low): count for low, _, count in _histogram(lengths)},
        "rows": report.rows,
        "full": report.full,
        "noisy": report.noisy,
        "learned_a_row": report.learned_a_row,
    }


def _lines(
    report: DataReport, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, color: bool
) -> Iterator[str]:
    for source in report.sources:
        yield from _source_lines(source)
    lengths = _lengths(report)
    if not len(lengths):
        return
    yield ""
    yield (
        f"lengths of {len(lengths):,} documents: mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f},"
        f" longest {lengths.max():,}"
    )
    histogram = list(_histogram(lengths))
    most = max(count for _, _, count in histogram)
    for low, high, count in histogram:
        yield f"  {low:>7,} to {high:>7,}  {'#' * round(_BAR * count / most):{_BAR}} {count:,}"
    yield ""
    data = config.data
    yield (
        f"{report.rows:,} rows of {data.sequence_length:,}, {data.batch_size} a batch: {report.full:.1%} full,"
        f" {report.learned_a_row:,.0f} tokens learned in each"
    )
    if report.noisy is not None:
        yield f"of the {data.noisy_length:,} noisy positions of a row {report.noisy:.1%} used"
    for document in report.documents:
        yield ""
        yield f"record {document.record_id}, {len(document):,} tokens:"
        yield as_text(document, tokenizer, color)


def _source_lines(source: SourceReport) -> Iterator[str]:
    tokens = sum(source.lengths)
    yield f"{source.path} ({source.format}): {source.records:,} records, {source.share:.1%} of those drawn"
    yield (
        f"  read {source.read:,}: {len(source.lengths):,} documents, {tokens:,} tokens,"
        f" {source.learned / max(tokens, 1):.1%} of them learned"
    )
    if source.cut:
        yield f"  {source.cut:,} cut to the length of a row"
    for problem in source.problems[:_PROBLEMS_SHOWN]:
        yield f"  left out {problem.count:,}, {problem.kind}: {problem.example}"
    if rest := source.problems[_PROBLEMS_SHOWN:]:
        yield f"  left out {_count(rest):,} for {len(rest)} more reasons"


def _count(problems: Sequence[Problem]) -> int:
    return sum(problem.count for problem in problems)


def _lengths(report: DataReport) -> np.ndarray:
    return np.array([n for source in report.sources for n in source.lengths], np.int64)


def _histogram(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """The first and last length of each bin, a power of two wide, and how many documents are in it."""
    if not len(lengths):
        return
    bins = np.floor(np.log2(lengths)).astype(int)
    for number in range(bins.min(), bins.max() + 1):
        yield 2**number, 2 ** (number + 1) - 1, int((bins == number).sum())


def as_text(document: Document, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The document's text, in which what is learned is green, or stands in ⟦ ⟧ without colour."""
    before, behind = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    parts = []
    for learned, run in groupby(
        zip(document.tokens, document.loss_mask, strict=True), lambda x: bool(x[1])
    ):
        text = tokenizer.decode([int(token) for token, _ in run])
        parts.append(f"{before}{text}{behind}" if learned else text)
    return "".join(parts)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a YAML file or a recipe, as for train.py")
    parser.add_argument(
        "--records", type=int, default=2000, help="to read; 0 for an epoch (%(default)s)"
    )
    parser.add_argument("--show", type=int, default=2, help="documents to print (%(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="values for other programs, without the documents"
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="of what is learned"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
