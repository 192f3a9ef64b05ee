"""Line charts as inline SVG, without scripts or outside files."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 34
MAX_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    """What the legend calls it."""
    points: Sequence[Point]
    """(x, y) pairs in rising x; non-finite y values are left out."""
    style: str = "line-1"
    """CSS class: `line-1`, `line-2`, `line-3`, or `faint` for raw values under a smoothed line."""


def line_chart(
    title: str, series: Sequence[Series], *, unit: str = "", logarithmic: bool = False
) -> str:
    """Draw a chart.

    Args:
        title: Shown above; also its accessible name.
        series: Lines to draw, first one at the bottom.
        unit: Shown beside the title.
        logarithmic: Use a logarithmic y axis; values of 0 and below are then left out.

    Returns:
        A `figure` element; one that says so where there is nothing to draw.
    """
    drawn = [Series(each.name, _usable(each.points, logarithmic), each.style) for each in series]
    drawn = [each for each in drawn if each.points]
    caption = f"<figcaption>{html.escape(title)}{_unit(unit)}{_legend(drawn)}</figcaption>"
    if not drawn:
        return f'<figure>{caption}<p class="none">nothing recorded</p></figure>'
    x_axis = _Axis.over([x for each in drawn for x, _ in each.points], LEFT, WIDTH - RIGHT)
    values = [math.log10(y) if logarithmic else y for each in drawn for _, y in each.points]
    y_axis = _Axis.over(values, HEIGHT - BOTTOM, TOP, padded=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts += _grid(x_axis, y_axis, logarithmic=logarithmic)
    for each in drawn:
        parts += _line(each, x_axis, y_axis, logarithmic=logarithmic)
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def smooth(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """Give the exponential moving average of y, corrected for its start."""
    smoothed: list[Point] = []
    total = mass = 0.0
    for x, y in points:
        if math.isfinite(y):
            total = weight * total + (1 - weight) * y
            mass = weight * mass + (1 - weight)
            smoothed.append((x, total / mass))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Give about `count` round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short(number: float) -> str:
    """Write a number in at most about six characters, e.g. `1.5k`, `2M`, `3e-4`."""
    size = abs(number)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{number:.2g}".replace("e-0", "e-")
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{number / limit:.4g}{suffix}"
    return f"{number:.4g}"


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, *, padded: bool = False
    ) -> "_Axis":
        low, high = min(values), max(values)
        margin = (high - low) * 0.05 if padded else 0.0
        if high - low < 1e-12 * max(1.0, abs(high)):
            margin = max(abs(high) * 0.1, 1e-12)
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _usable(points: Sequence[Point], logarithmic: bool) -> list[Point]:
    kept = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
    if len(kept) <= MAX_POINTS:
        return kept
    size = math.ceil(len(kept) / MAX_POINTS)
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _grid(x_axis: _Axis, y_axis: _Axis, *, logarithmic: bool) -> list[str]:
    parts = []
    for value in ticks(y_axis.low, y_axis.high):
        y = y_axis.at(value)
        label = short(10**value if logarithmic else value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{label}</text>')  # fmt: skip
    for value in ticks(x_axis.low, x_axis.high, 6):
        x = x_axis.at(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" '
                     f'text-anchor="middle">{short(value)}</text>')  # fmt: skip
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
                 f'y2="{HEIGHT - BOTTOM}"/>')  # fmt: skip
    return parts


def _line(series: Series, x_axis: _Axis, y_axis: _Axis, *, logarithmic: bool) -> list[str]:
    placed = [
        (x_axis.at(x), y_axis.at(math.log10(y) if logarithmic else y)) for x, y in series.points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="{series.style}" points="{path}"/>']
    if series.style != "faint":
        for (x, y), (step, value) in zip(placed, series.points, strict=True):
            dot = " dot" if len(placed) <= 30 else ""
            tip = html.escape(f"{series.name}, step {step:g}: {value:.6g}")
            parts.append(f'<circle class="{series.style}{dot}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                         f"<title>{tip}</title></circle>")  # fmt: skip
    return parts


def _legend(series: Sequence[Series]) -> str:
    named = [each for each in series if each.style != "faint"]
    if len(named) < 2:
        return ""
    spans = [f'<span class="key {each.style}">{html.escape(each.name)}</span>' for each in named]
    return f'<span class="legend">{"".join(spans)}</span>'


def _unit(unit: str) -> str:
    return f' <span class="unit">{html.escape(unit)}</span>' if unit else ""
