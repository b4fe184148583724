"""Writes one HTML file of runs and evaluations, to read or to send: it opens offline.

    sdar-jax report runs/mine results --output report.html

A directory is a run's (its metrics.jsonl, also while it runs: curves of all that it logs) or the output of an
evaluation (its results.json: tables with intervals, scores against tokens a forward, answers with what was committed
when as colour). Several are compared.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sdar_jax.errors import DataError, SdarError
from sdar_jax.evaluation.report import report


def main(arguments: Sequence[str] | None = None, program: str = "sdar-jax report") -> int:
    """Writes the report; returns the exit status."""
    options = _parser(program).parse_args(arguments)
    try:
        if options.answers < 0:
            raise DataError(f"--answers is {options.answers}; give 0 or more")
        _write(options.output, report(options.directories, answers=options.answers))
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output} is written")
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); choose another --output"
        ) from None


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("directories", type=Path, nargs="+", help="of runs and evaluations")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the file (%(default)s)"
    )
    parser.add_argument(
        "--answers", type=int, default=20, help="of each task, how many (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
