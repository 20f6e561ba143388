"""Line charts as inline SVG: axes with round numbers, a legend, hover texts. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pixtune.report.record import MOST_POINTS, Point, thin

WIDTH, HEIGHT = 520, 250
TOP, RIGHT, BOTTOM = 12, 24, 40
"""Margins; the left one depends on the labels."""
LABEL_WIDTH = 9.0
"""Width of one digit at the charts' larger font size, 15."""
LOG_FROM_RATIO = 50
"""Ratio of the highest to the lowest value from which a logarithmic axis shows more."""
MOST_MARKERS = 60
SHAPES = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of points."""

    label: str
    points: Sequence[Point]
    color: int
    """Number of its colour in the CSS."""
    kind: str = "line"
    """"line"; "marked": a line with a mark at each point; "raw": a pale cloud behind the others."""


@dataclass(frozen=True)
class Chart:
    """A chart's contents. All charts of a page share `last_step`, so that they line up."""

    title: str
    subtitle: str
    series: Sequence[Series]
    last_step: int
    from_zero: bool = False
    """Whether the y axis starts at 0."""
    suffix: str = ""
    """Text behind the y axis' numbers."""


@dataclass(frozen=True)
class Axis:
    """A mapping from values to places."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Returns a value's place: 0 at the axis' low end, 1 at its high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def render_chart(chart: Chart) -> str:
    """Renders a `<figure>`; empty text if there is nothing to plot."""
    series = [one for one in chart.series if one.points]
    if not series:
        return ""
    x_axis = step_axis(chart.last_step)
    y_axis = value_axis([value for one in series for _, value in one.points], chart.from_zero)
    labels = tick_labels(y_axis.ticks, chart.suffix)
    left = max(map(len, labels)) * LABEL_WIDTH + 12

    def place(point: Point) -> tuple[float, float]:
        x = left + x_axis.share(point[0]) * (WIDTH - RIGHT - left)
        return round(x, 1), round(HEIGHT - BOTTOM - y_axis.share(point[1]) * (HEIGHT - BOTTOM - TOP), 1)

    lines = render_grid(x_axis, y_axis, labels, left, place)
    lines += [render_series(one, place, chart.suffix) for one in series]
    subtitle = chart.subtitle + (", logarithmic" if y_axis.log else "")
    return "\n".join(
        [
            '<figure class="chart">',
            f"<figcaption><b>{escape(chart.title)}</b> <span>{escape(subtitle)}</span></figcaption>",
            render_legend(series) if len(series) > 1 else "",
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(describe(chart, series))}">',
            *lines,
            "</svg></figure>",
        ]
    )


def render_grid(
    x_axis: Axis, y_axis: Axis, labels: Sequence[str], left: float, place: Callable[[Point], tuple[float, float]]
) -> list[str]:
    """Renders grid lines, ticks and their labels."""
    lines, floor = [], HEIGHT - BOTTOM
    for value, label in zip(y_axis.ticks, labels, strict=True):
        y = place((0, value))[1]
        kind = "zero" if value == 0 else "grid"
        lines.append(f'<path class="{kind}" d="M{left:.1f} {y}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="y" x="{left - 7:.1f}" y="{y + 4.5:.1f}">{label}</text>')
    for value, label in zip(x_axis.ticks, tick_labels(x_axis.ticks), strict=True):
        x = place((round(value), y_axis.low))[0]
        lines.append(f'<path class="axis" d="M{x} {floor}v5"/><text class="x" x="{x}" y="{floor + 19}">{label}</text>')
    lines.append(f'<path class="axis" d="M{left:.1f} {floor}H{WIDTH - RIGHT}"/>')
    lines.append(f'<text class="x" x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 3}">step</text>')
    return lines


def render_series(series: Series, place: Callable[[Point], tuple[float, float]], suffix: str) -> str:
    """Renders a series as one path, with marks that show their value on hover where they are few."""
    places = [place(point) for point in thin(series.points)]
    style = path_style(series)
    if style in ("dot", "dots"):
        path = "".join(f"M{x} {y}h0" for x, y in places)
    else:
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
    drawn = f'<path class="{style} c{series.color}" d="{path}"/>'
    if series.kind == "marked" and len(series.points) <= MOST_MARKERS:
        for step, value in series.points:
            hover = escape(f"{series.label}, step {step:,}: {format_value(value)}{suffix}")
            drawn += render_mark(series.color, *place((step, value)), f"<title>{hover}</title>")
    return drawn


def path_style(series: Series) -> str:
    """Returns the CSS class of a series' path. A cloud of more points than can be told apart becomes a pale line."""
    if len(series.points) == 1:
        return "dot"
    if series.kind == "raw":
        return "dots" if len(series.points) <= MOST_POINTS else "pale"
    return "line"


def render_mark(color: int, x: float, y: float, inner: str = "") -> str:
    """Renders a mark whose shape, besides its colour, identifies the series."""
    path = {
        "circle": f"M{x - 4:.1f} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "square": f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z",
        "triangle": f"M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z",
        "diamond": f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    }[SHAPES[color % len(SHAPES)]]
    return f'<path class="mark c{color}" d="{path}">{inner}</path>'


def render_legend(series: Sequence[Series]) -> str:
    """Renders the names of the series, each with a small picture of its line."""
    entries = []
    for one in series:
        style = path_style(one)
        path = {"dots": "M4 9h0M11 4h0M18 7h0", "dot": "M11 6h0"}.get(style, "M1 6H21")
        swatch = f'<path class="{style} c{one.color}" d="{path}"/>'
        swatch += render_mark(one.color, 11, 6) if one.kind == "marked" else ""
        icon = f'<svg viewBox="0 0 22 12" width="22" height="12" aria-hidden="true">{swatch}</svg>'
        entries.append(f"<li>{icon} {escape(one.label)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def describe(chart: Chart, series: Sequence[Series]) -> str:
    """Describes the chart in words, for those who do not see it."""
    parts = []
    for one in series:
        (first_step, first), (last_step, last) = one.points[0], one.points[-1]
        ends = f"{format_value(first)}{chart.suffix} at step {first_step:,}"
        if len(one.points) > 1:
            ends += f", {format_value(last)}{chart.suffix} at step {last_step:,}"
        parts.append(f"{one.label}: {ends}")
    return f"{chart.title}, {chart.subtitle}. " + "; ".join(parts)


# ---- axes


def step_axis(last_step: int) -> Axis:
    """Builds the axis from 0 to the last step, with ticks at whole steps."""
    high = max(last_step, 1)
    size = max(nice_step(high, 6), 1)
    return Axis(0, high, tuple(round(number * size) for number in range(math.floor(high / size + 1e-9) + 1)))


def value_axis(values: Sequence[float], from_zero: bool) -> Axis:
    """Builds an axis around all values; logarithmic where they span orders of magnitude."""
    low, high = min(values), max(values)
    if low > 0 and not from_zero and high / low > LOG_FROM_RATIO:
        return log_axis(low, high)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if high else (0.0, 1.0)
    size = nice_step(high - low, 5)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    ticks = tuple(float(f"{number * size:.12g}") for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Builds an axis between round numbers, with ticks at 1, 2 and 5 times powers of ten, fewer over many orders."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    rounds = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    inside = [
        value
        for index, value in enumerate(rounds)
        if rounds[min(index + 1, len(rounds) - 1)] > low and rounds[max(index - 1, 0)] < high
    ]
    powers = [value for value in inside if f"{value:e}".startswith("1.0")]
    ticks = inside if len(inside) <= 7 else powers[:: math.ceil(len(powers) / 7)]
    return Axis(inside[0], inside[-1], tuple(ticks), log=True)


def nice_step(span: float, most_steps: int) -> float:
    """Returns the smallest of 1, 2 or 5 times a power of ten that divides `span` into at most `most_steps` steps."""
    power = 10.0 ** math.floor(math.log10(span / most_steps))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * most_steps >= span * (1 - 1e-9))


def tick_labels(ticks: Sequence[float], suffix: str = "") -> list[str]:
    """Formats labels with the same number of decimals, or as powers of ten where they would be long."""
    sizes = [abs(tick) for tick in ticks if tick]
    if sizes and (max(sizes) >= 1e6 or min(sizes) < 1e-3):
        return [scientific(tick) + suffix for tick in ticks]
    steps = [abs(after - before) for before, after in pairwise(ticks)]
    even = bool(steps) and max(steps) - min(steps) < 1e-6 * max(steps)
    decimals = [len(f"{tick:.8f}".rstrip("0").partition(".")[2]) for tick in ticks]
    widest = max(decimals)
    return [
        f"{tick:,.{widest if even else own}f}".replace("-", "−") + suffix
        for tick, own in zip(ticks, decimals, strict=True)
    ]


def scientific(value: float) -> str:
    """Formats a number as people write it in a config: 5e-5."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_value(value: float) -> str:
    """Formats a value with four significant digits."""
    return scientific(value) if value and not 1e-3 <= abs(value) < 1e6 else f"{value:,.4g}".replace("-", "−")
