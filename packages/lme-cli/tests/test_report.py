"""`report.html`: well-formed, self-contained, true to the metrics."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lme_cli.charts import Series, line_chart, short, smooth, ticks
from lme_cli.report import Sample, read_metrics, render, write_report

ROWS = [
    {
        "context": "train", "group": None, "step": step, "tokens": step * 100,
        "loss": 8.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step,
        "tokens_per_second": 1000.0, "mfu": None, "peak_memory_bytes": 2**30,
    }
    for step in range(1, 21)
] + [{"context": "val", "group": None, "step": 10, "tokens": 1000, "loss": 0.75}]  # fmt: skip


class Checker(HTMLParser):
    """Collects references to anything outside, and unclosed elements."""

    void = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.outside, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.outside += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_outside():
    page = render(ROWS, {"a": {"b": 1}}, title="<run>", facts={"device": "CPU"})
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.outside == []
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "&lt;run&gt;" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_last_values_config_and_samples_are_on_the_page():
    page = render(
        ROWS, {"model_args": {"x": 17}}, title="t", facts={}, samples=[Sample("a<b", "c&d")]
    )
    assert "<dd>0.4000</dd>" in page
    assert "<dd>0.7500</dd>" in page
    assert "&quot;x&quot;: 17" in page
    assert "<b>a&lt;b</b>c&amp;d" in page


def test_points_lie_where_their_values_are():
    chart = line_chart("t", [Series("s", [(0, 0.0), (10, 1.0), (20, 0.5)])])
    points = re.search(r'<polyline class="line-1" points="([^"]*)"', chart)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, each.split(","))) for each in points]
    assert x1 - x0 == pytest.approx(x2 - x1)
    # Up on the page is a smaller number; 0.5 is half way.
    assert y1 < y2 < y0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_chart_of_nothing_says_so():
    assert "nothing recorded" in line_chart("t", [Series("s", [(1, float("nan"))])])
    assert "nothing recorded" in line_chart("t", [Series("s", [(1, 0.0)])], logarithmic=True)


def test_a_constant_and_a_single_point_can_be_drawn():
    for points in ([(1, 2.0), (2, 2.0)], [(5, 0.0)]):
        ElementTree.fromstring(line_chart("t", [Series("s", points)]))


def test_long_series_are_drawn_by_their_means():
    series = Series("s", [(x, float(x % 2)) for x in range(10_000)])
    points = re.search(r'points="([^"]*)"', line_chart("t", [series]))[1].split()
    assert 300 <= len(points) <= 400


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([(1, 5.0), (2, 5.0)]) == [(1, 5.0), (2, pytest.approx(5.0))]
    assert smooth([(1, 4.0), (2, float("nan"))]) == [(1, 4.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.1, 0.32, [0.1, 0.15, 0.2, 0.25, 0.3]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1234, "1.234k"), (2e6, "2M"), (3e-4, "0.0003"), (3e-5, "3e-5"), (0.5, "0.5")],
)
def test_numbers_are_written_shortly(number, text):
    assert short(number) in (text, text.replace("0.0003", "3e-4"))


def test_metrics_of_a_killed_run_are_read_up_to_the_cut(tmp_path):
    text = json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:20]
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path / "metrics.jsonl") == [ROWS[0]]
    written = write_report(tmp_path, title="t", facts={})
    assert written.read_text().startswith("<!doctype html>")
    assert not (tmp_path / "report.html.partial").exists()
