"""A line chart as inline SVG, whose lines are named where they end: no script, no library, colors of the page's stylesheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from tl_latentlens.views.text import display_width, printable, take_columns

_WIDTH, _LETTER = 400, 6.6  # Units of the drawing; of a letter of its labels, of most of them at most.
_LEFT, _TOP, _BOTTOM, _PAD = 46, 8, 36, 9
_LABEL_GAP, _MIN_PLOT_HEIGHT = 13, 190
_MAX_LABEL_LETTERS = 21
_N_TICKS = 5


@dataclass(frozen=True)
class ChartLine:
    """One line.

    Attributes:
        name: Its name, which stands at its end.
        color: Its CSS color.
        is_dashed: Whether it is no reading, but what chance gives.
        means, lows, highs: A figure for each place on the axis; NaN where there is none: the line goes on to the next.
        texts: A tip for each place.
        is_level: Whether one figure stands for all places.
    """

    name: str
    color: str
    is_dashed: bool
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    texts: Sequence[str]
    is_level: bool


@dataclass(frozen=True)
class _Axis:
    """The way from a figure to its height: with logarithms where its ticks are far apart."""

    ticks: list[float]
    is_log: bool
    top: float
    bottom: float

    def y(self, value: float) -> float:
        low, high = (self._scaled(end) for end in (self.ticks[0], self.ticks[-1]))
        share = (self._scaled(value) - low) / (high - low)
        return self.bottom + (self.top - self.bottom) * min(1.0, max(0.0, share))

    def _scaled(self, value: float) -> float:
        return math.log(max(value, self.ticks[0])) if self.is_log else value


def line_chart(lines: Sequence[ChartLine], places: Sequence[str], *, title: str, axis: str, is_log: bool = False) -> str:
    """The chart as SVG, as wide as its place in a page.

    Args:
        lines: What is drawn, the first on top.
        places: The names along the horizontal axis.
        title: What it shows, for readers that see no picture.
        axis: What the places are.
        is_log: Whether figures are drawn by their logarithms; a figure of 0 is then left out.
    """
    is_log = is_log and any(mean > 0 for line in lines for mean in line.means)
    if is_log:
        lines = [replace(line, means=[mean if mean > 0 else math.nan for mean in line.means]) for line in lines]
    names = [_shortened(line.name) for line in lines]
    right = _WIDTH - _LETTER * max(map(display_width, names), default=0) - 10
    bottom = _TOP + max(_MIN_PLOT_HEIGHT, _LABEL_GAP * len(lines))
    scale = _Axis(_ticks(lines, is_log), is_log, _TOP, bottom)
    step = (right - _LEFT - 2 * _PAD) / max(1, len(places) - 1)
    xs = [_LEFT + _PAD + step * i for i in range(len(places))] if len(places) > 1 else [(_LEFT + right) / 2]
    label_ys = _spread([scale.y(_last(line.means)) for line in lines], _TOP + 4, bottom)
    parts = [_grid(scale, right), _place_labels(places, xs, bottom, axis, (_LEFT + right) / 2)]
    drawn = zip(lines, names, label_ys, strict=True)
    parts += [_line(line, name, xs, scale, right, label_y) for line, name, label_y in reversed(list(drawn))]
    size = f'viewBox="0 0 {_WIDTH} {bottom + _BOTTOM:.0f}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _line(line: ChartLine, name: str, xs: Sequence[float], scale: _Axis, right: float, label_y: float) -> str:
    """A line with its band, its points with their tips, and its name."""
    ends = [_LEFT, right] if line.is_level else xs
    values = (
        [(line.means[0],) * 2, (line.lows[0],) * 2, (line.highs[0],) * 2]
        if line.is_level
        else [line.means, line.lows, line.highs]
    )
    points = [point for point in zip(ends, *values, strict=True) if math.isfinite(point[1])]
    parts = []
    if len(points) > 1:
        bounded = [point for point in points if math.isfinite(point[2]) and math.isfinite(point[3])]
        band = [f"{x:.1f},{scale.y(high):.1f}" for x, _, _, high in bounded]
        band += [f"{x:.1f},{scale.y(low):.1f}" for x, _, low, _ in bounded[::-1]]
        path = " ".join(f"{x:.1f},{scale.y(mean):.1f}" for x, mean, _, _ in points)
        parts += [f'<polygon points="{" ".join(band)}"/>'] * (len(bounded) > 1) + [f'<polyline points="{path}"/>']
    for x, _, low, high in points if len(points) == 1 else []:
        if math.isfinite(low) and math.isfinite(high):
            parts.append(f'<path d="M{x:.1f} {scale.y(low):.1f}V{scale.y(high):.1f}"/>')
    tips = zip(xs, line.means, line.texts, strict=True)
    dots = [(x, mean, text) for x, mean, text in tips if math.isfinite(mean)]
    parts += [
        f'<circle cx="{x:.1f}" cy="{scale.y(mean):.1f}" r="2.5"><title>{escape(text)}</title></circle>'
        for x, mean, text in dots
    ]
    if dots:
        last_x, last_mean = (right if line.is_level else dots[-1][0]), dots[-1][1]
        parts.append(f'<path class="lead" d="M{last_x:.1f} {scale.y(last_mean):.1f}L{right + 7:.1f} {label_y:.1f}"/>')
        parts.append(
            f'<text x="{right + 9:.1f}" y="{label_y + 3.8:.1f}">{escape(name)}<title>{escape(line.name)}</title></text>'
        )
    kind = "reader null" if line.is_dashed else "reader"
    return f'<g class="{kind}" style="--c: {line.color}">{"".join(parts)}</g>'


def _grid(scale: _Axis, right: float) -> str:
    parts = []
    for tick in scale.ticks:
        y = scale.y(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right:.1f}"/><text x="{_LEFT - 5}" y="{y + 3.8:.1f}">{tick:g}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _place_labels(places: Sequence[str], xs: Sequence[float], bottom: float, axis: str, middle: float) -> str:
    """The names of the places, as many as there is room for, and what they are."""
    names = [_shortened(place) for place in places]
    needed = _LETTER * max(map(display_width, names), default=1) + 8
    every = max(1, math.ceil(needed * (len(xs) - 1) / max(1.0, xs[-1] - xs[0]))) if len(xs) > 1 else 1
    ticks = [
        f'<text x="{x:.1f}" y="{bottom + 15}">{escape(name)}</text>' for x, name in list(zip(xs, names, strict=True))[::every]
    ]
    return f'<g class="places">{"".join(ticks)}<text x="{middle:.1f}" y="{bottom + 30}">{escape(axis)}</text></g>'


def _ticks(lines: Sequence[ChartLine], is_log: bool) -> list[float]:
    """Round numbers around all figures and the ends of their intervals; from 0 on, where they are no logarithms."""
    figures = [f for line in lines for part in (line.means, line.lows, line.highs) for f in part if math.isfinite(f)]
    if is_log:
        above = [figure for figure in figures if figure > 0]
        return _log_ticks(min(above), max(above))
    low, high = min([0.0, *figures]), max([0.0, *figures]) or 1.0
    step = _round_step((high - low) / (_N_TICKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with their doubles and fives where these alone are few."""
    decades = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)
    if len(decades) > 3:
        every = math.ceil(len(decades) / 8)
        return [10.0**decade for decade in decades[::every]] + [10.0 ** decades[-1]] * ((len(decades) - 1) % every > 0)
    ticks = [round(digit * 10.0**decade, 12) for decade in decades for digit in (1, 2, 5)]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : max(last, first + 1) + 1]


def _round_step(step: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= step * (1 - 1e-9))


def _spread(ys: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of labels near the ends of their lines, none over another."""
    order = sorted(range(len(ys)), key=ys.__getitem__)
    placed = [0.0] * len(ys)
    at = top - _LABEL_GAP
    for i in order:
        at = placed[i] = max(ys[i], at + _LABEL_GAP)
    limit = bottom + _LABEL_GAP
    for i in reversed(order):
        limit = placed[i] = min(placed[i], limit - _LABEL_GAP)
    return placed


def _last(means: Sequence[float]) -> float:
    return next((mean for mean in reversed(means) if math.isfinite(mean)), 0.0)


def _shortened(name: str) -> str:
    name = printable(name)
    return name if display_width(name) <= _MAX_LABEL_LETTERS else take_columns(name, _MAX_LABEL_LETTERS - 1) + "…"
