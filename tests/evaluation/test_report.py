"""The report: well-formed, without anything from elsewhere, with the numbers that the files hold."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sdar_jax.cli import main
from sdar_jax.errors import DataError
from sdar_jax.evaluation.report import Series, coloured, plot, report
from tests.bad_input import message_of

ROW = {
    "task": "gsm8k",
    "problems": 4,
    "samples": 1,
    "score": 0.5,
    "low": 0.25,
    "high": 0.75,
    "tokens_per_forward": 2.5,
    "denoising_forwards": 1234,
    "tokens_per_second": 56.0,
    "cut": 1,
    "unanswered": 0,
}
ANSWER = {
    "id": "<p1>",
    "correct": True,
    "reason": None,
    "tokens": 3,
    "denoising_forwards": 2,
    "text": "a<b",
    "parts": [["a", 0], ["<b", 1], ["&", 0]],
}


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def directories(tmp_path):
    run, scores = tmp_path / "my <run>", tmp_path / "results"
    run.mkdir()
    (scores / "b").mkdir(parents=True)
    lines = [{"step": i, "loss": 3.0 / i, "note": "x"} for i in range(1, 5)] + [
        {"step": 4, "eval_nelbo": 1.0}
    ]
    lines.append({"step": 5, "loss": float("nan")})
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"half'
    )
    (scores / "results.json").write_text(json.dumps([ROW, {**ROW, "setting": "b", "score": 0.6}]))
    (scores / "b" / "gsm8k.jsonl").write_text(json.dumps(ANSWER) + "\n")
    return [run, scores]


def test_a_report(directories):
    page = Page(report(directories))
    assert page.links == [] and "script" not in page.tags
    # The loss, which was logged more than once, and the score of the two settings.
    assert page.tags.count("svg") == 2
    for text in (
        "my <run>",
        "gsm8k",
        "25.0 to 75.0",
        "1,234",
        "<p1>",
        "3 tokens in 2 forwards",
        "<b",
    ):
        assert text in page.text
    assert "eval_nelbo" not in page.text, "one point is no curve"
    assert "<p1>" not in Page(report(directories, answers=0)).text


def test_pictures_put_points_where_they_belong():
    series = [Series("a", [(0.0, 0.0, 0.0), (10.0, 100.0, 0.0)]), Series("b", [(5.0, 50.0, 50.0)])]
    picture = plot("t & u", series, x_name="x", lines=True)
    root = ElementTree.fromstring(picture)
    found = {
        tag: [each for each in root if each.tag.endswith(tag)]
        for tag in ("polyline", "circle", "path")
    }
    (line,) = found["polyline"]
    start, end = (tuple(map(float, pair.split(","))) for pair in line.get("points").split())
    middle = found["circle"][-1]
    assert start[0] < end[0] and start[1] > end[1], "up is more"
    assert float(middle.get("cx")) == pytest.approx((start[0] + end[0]) / 2)
    assert float(middle.get("cy")) == pytest.approx((start[1] + end[1]) / 2)
    for points in ([], [(1.0, 1.0, 0.0)], [(1.0, 1.0, 0.0)] * 2):
        ElementTree.fromstring(plot("t", [Series("a", points)], x_name="x", lines=True))


def test_tokens_of_one_forward_have_one_colour():
    spans = ElementTree.fromstring(f"<p>{coloured(ANSWER['parts']).replace('class=t', '')}</p>")
    styles = [span.get("style") for span in spans]
    assert (
        styles[0] == styles[2] != styles[1] and "".join(span.text or "" for span in spans) == "a<b&"
    )


def test_the_command(directories, tmp_path, capsys):
    output = tmp_path / "out.html"
    assert main(["report", *map(str, directories), "--output", str(output)]) == 0
    assert output.read_text() == report(directories) and str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone"], "no metrics.jsonl of a run and no results.json of an evaluation"),
        (["results", "--answers", "-1"], "--answers is -1; give 0 or more"),
        (["results", "--output", "gone/report.html"], "choose another --output"),
    ],
)
def test_bad_input(directories, arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error


def test_files_that_are_damaged(directories):
    (directories[1] / "results.json").write_text("{")
    assert "results.json: cannot be read" in message_of(DataError, report, directories)
    (directories[0] / "metrics.jsonl").write_text("{\n{}\n")
    assert "metrics.jsonl: cannot be read" in message_of(DataError, report, directories)
