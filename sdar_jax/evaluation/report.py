"""One HTML file of runs and evaluations that opens offline: curves, tables, pictures, answers to read."""

import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdar_jax.errors import DataError

_WIDTH, _HEIGHT, _MARGIN = 560, 260, 48
_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#475569")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } svg { background: #fafafa; margin: .3rem; }
svg text { font-size: 11px; fill: #444; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; }
.right { border-left: 4px solid #15803d; } .wrong { border-left: 4px solid #b91c1c; } summary { cursor: pointer; }
small { color: #555; } span.t { border-radius: 3px; }
"""


class Series(NamedTuple):
    """A line or a cloud of points: x, y, and of each point half the height of its error bar (0 for none)."""

    name: str
    points: list[tuple[float, float, float]]


def report(paths: Sequence[Path], *, answers: int = 20) -> str:
    """The report's HTML.

    Args:
        paths: run directories (metrics.jsonl) and outputs of evaluations (results.json), to compare.
        answers: of each task, how many are shown.

    Raises:
        DataError: a path that is neither, or a file that cannot be read.
    """
    runs = {
        _name(path): _lines(path / "metrics.jsonl")
        for path in paths
        if (path / "metrics.jsonl").exists()
    }
    scores = {
        path: _read(path / "results.json") for path in paths if (path / "results.json").exists()
    }
    for path in paths:
        if _name(path) not in runs and path not in scores:
            raise DataError(
                f"{path}: no metrics.jsonl of a run and no results.json of an evaluation; give a directory with one"
            )
    names = ", ".join(_name(path) for path in paths)
    parts = [f"<h1>{html.escape(names)}</h1>"]
    if runs:
        parts += ["<h2>Runs</h2>", *_curves(runs)]
    if scores:
        rows = [{"from": _name(path), **row} for path, found in scores.items() for row in found]
        parts += ["<h2>Scores</h2>", _table(rows), *_pictures(rows)]
        parts += ["<h2>Answers</h2>", _LEGEND]
        for path in scores:
            for file in sorted(path.rglob("*.jsonl")):
                title = f"{_name(path)}: {file.relative_to(path).with_suffix('')}"
                parts.append(_answers(title, _lines(file)[:answers]))
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(names)}</title><style>{_STYLE}</style>\n{body}\n"


_LEGEND = (
    "<p><small>Tokens that one forward committed have one colour; the number of the forward is under the pointer."
    "</small></p>"
)


def _name(path: Path) -> str:
    return path.resolve().name


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make it anew") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; one that is being written may end in half a line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip() and number < len(lines):
                found.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it") from None
    return found


def _curves(runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A picture for each number that the runs logged more than once."""
    numbers = dict.fromkeys(
        name
        for lines in runs.values()
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    )
    for number in numbers:
        series = []
        for run, lines in runs.items():
            points = [
                (line["step"], line[number]) for line in lines if number in line and "step" in line
            ]
            series.append(Series(run, [(float(x), float(y), 0.0) for x, y in points if _finite(y)]))
        if any(len(each.points) > 1 for each in series):
            yield plot(number, series, x_name="step", lines=True)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(rows: Iterable[dict[str, Any]]) -> str:
    head = (
        "",
        "task",
        "problems",
        "score",
        "95% interval",
        "TPF",
        "forwards",
        "tokens/s",
        "cut off",
        "no answer",
    )
    cells = ["".join(f"<th>{name}</th>" for name in head)]
    for row in rows:
        values = (
            " ".join([row["from"], row.get("setting", "")]),
            row["task"],
            f"{row['problems']} x {row['samples']}",
            f"{100 * row['score']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['denoising_forwards']:,}",
            f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
            row["cut"],
            row["unanswered"],
        )
        cells.append("".join(f"<td>{html.escape(str(value))}</td>" for value in values))
    return "<table>" + "".join(f"<tr>{each}</tr>" for each in cells) + "</table>"


def _pictures(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each task with several rows: score against tokens a forward."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        if len(own) > 1:
            series = {}
            for row in own:
                point = (
                    row["tokens_per_forward"],
                    100 * row["score"],
                    50 * (row["high"] - row["low"]),
                )
                series.setdefault(row["from"], []).append(point)
            found = [Series(name, sorted(points)) for name, points in series.items()]
            yield plot(f"{task}: score, %", found, x_name="tokens a forward", lines=True)


def _answers(title: str, records: Sequence[dict[str, Any]]) -> str:
    shown = []
    for record in records:
        verdict = "right" if record.get("correct") else "wrong"
        why = html.escape(record.get("reason") or "")
        facts = f"{record.get('tokens')} tokens in {record.get('denoising_forwards')} forwards"
        parts = record.get("parts") or [(record.get("text", ""), 0)]
        shown.append(
            f"<p><b>{html.escape(str(record.get('id')))}</b> {verdict} <small>{facts}; {why}</small></p>"
            f'<pre class="{verdict}">{coloured(parts)}</pre>'
        )
    return f"<details><summary>{html.escape(title)}</summary>{''.join(shown)}</details>"


def coloured(parts: Iterable[Sequence[Any]]) -> str:
    """Pieces of text as HTML, those of one forward in one colour."""
    spans = []
    for text, step in parts:
        # A third of the circle and a little: neighbours differ, and it takes long to come round.
        hue = (int(step) * 137) % 360
        style = f"background:hsl({hue} 80% 88%)"
        spans.append(
            f'<span class=t style="{style}" title="forward {int(step)}">{html.escape(text)}</span>'
        )
    return "".join(spans)


def plot(title: str, series: Sequence[Series], *, x_name: str, lines: bool) -> str:
    """A picture as SVG: axes with their ends, a colour for each series, error bars."""
    points = [point for each in series for point in each.points]
    low_x, high_x = _range([x for x, _, _ in points])
    low_y, high_y = _range([y + sign * e for _, y, e in points for sign in (-1, 1)])
    across = lambda x: _MARGIN + (x - low_x) / (high_x - low_x) * (_WIDTH - 2 * _MARGIN)
    up = lambda y: _HEIGHT - _MARGIN - (y - low_y) / (high_y - low_y) * (_HEIGHT - 2 * _MARGIN)
    drawn = [
        f'<text x="{_MARGIN}" y="18" font-weight="bold">{html.escape(title)}</text>',
        f'<path d="M{_MARGIN} {_MARGIN} V{_HEIGHT - _MARGIN} H{_WIDTH - _MARGIN}" fill="none" stroke="#888"/>',
        f'<text x="{_MARGIN}" y="{_HEIGHT - _MARGIN + 16}">{low_x:g}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - _MARGIN + 16}" text-anchor="end">{high_x:g}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x_name)}</text>',
        f'<text x="{_MARGIN - 4}" y="{_HEIGHT - _MARGIN}" text-anchor="end">{low_y:.4g}</text>',
        f'<text x="{_MARGIN - 4}" y="{_MARGIN + 8}" text-anchor="end">{high_y:.4g}</text>',
    ]
    for number, each in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        if lines and len(each.points) > 1:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in each.points)
            drawn.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
        for x, y, error in each.points:
            if error or len(each.points) < 60:
                drawn.append(
                    f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>'
                )
            if error:
                ends = f"V{up(y + error):.1f}"
                drawn.append(
                    f'<path d="M{across(x):.1f} {up(y - error):.1f} {ends}" stroke="{colour}"/>'
                )
        if len(series) > 1:
            where = f'x="{_WIDTH - _MARGIN}" y="{_MARGIN + 14 * number}" text-anchor="end"'
            drawn.append(f'<text {where} style="fill:{colour}">{html.escape(each.name)}</text>')
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(drawn)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
