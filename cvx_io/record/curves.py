"""A curve as inline SVG, with its text alternative. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
MAX_POINTS = 320
"""Above this, a point of the line stands for several steps."""
LOG_RATIO = 50.0
"""A positive curve that spans more than this is drawn on a logarithmic axis, where it may be."""


@dataclass(frozen=True)
class Curve:
    """One quantity over steps. may_be_log: whether a wide range may be drawn on a logarithmic axis."""

    key: str
    title: str
    unit: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    may_be_log: bool = False

    @property
    def points(self) -> list[tuple[int, float]]:
        """The finite values with their steps."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if math.isfinite(value)]


@dataclass(frozen=True)
class _Group:
    """Neighbouring points drawn as one."""

    step: float
    mean: float
    low: float
    high: float


def describe(curve: Curve) -> str:
    """Return what a curve shows in words: range, first, last, lowest and highest value."""
    points = curve.points
    lost = len(curve.values) - len(points)
    skipped = f" {lost} values are not finite and left out." if lost else ""
    if not points:
        return f"{curve.title}: no finite value was logged.{skipped}"
    unit = f" {curve.unit}" if curve.unit else ""
    low, high = min(points, key=_value), max(points, key=_value)
    (first_step, first), (last_step, last) = points[0], points[-1]
    return (
        f"{curve.title}, {len(points)} values from step {first_step} to {last_step}: first {number(first)}, "
        f"last {number(last)}{unit}; lowest {number(low[1])} at step {low[0]}, highest {number(high[1])} at "
        f"step {high[0]}.{skipped}"
    )


def svg(curve: Curve) -> str:
    """Return a curve as an SVG element. It must have at least one finite value."""
    points = curve.points
    groups = _grouped(points)
    lows, highs = min(g.low for g in groups), max(g.high for g in groups)
    is_log = curve.may_be_log and lows > 0 and highs / lows > LOG_RATIO
    x = _Axis(points[0][0], points[-1][0], LEFT, WIDTH - RIGHT)
    y = _Axis(lows, highs, HEIGHT - BOTTOM, TOP, is_log=is_log, is_padded=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(describe(curve))}">',
        *(_grid_line(y.place(tick), number(tick)) for tick in y.ticks()),
        *(_step_label(x.place(tick), number(tick)) for tick in x.ticks() if tick == int(tick)),
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>',
    ]
    if len(groups) < len(points):
        parts.append(_band(groups, x, y))
    parts += [_line(groups, x, y), "</svg>"]
    return "".join(parts)


def note(curve: Curve) -> str:
    """Return what has to be known to read the drawing, "" where nothing."""
    points = curve.points
    groups = _grouped(points)
    notes = []
    if len(groups) < len(points):
        each = math.ceil(len(points) / MAX_POINTS)
        notes.append(f"Line: mean of {each} logged steps; band: their lowest and highest.")
    low, high = min(map(_value, points)), max(map(_value, points))
    if curve.may_be_log and low > 0 and high / low > LOG_RATIO:
        notes.append("Logarithmic axis.")
    return " ".join(notes)


def number(value: float) -> str:
    """Return a number for people: four significant digits, no needless zeros."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


class _Axis:
    """Maps values to places on the drawing, and picks round values to name."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        is_log: bool = False,
        is_padded: bool = False,
    ):
        self._is_log, self._start, self._end = is_log, start, end
        self._low, self._high = (math.log10(low), math.log10(high)) if is_log else (low, high)
        if self._low == self._high:  # a constant stands in the middle
            room = abs(self._low) * 0.1 or 1.0
            self._low, self._high = self._low - room, self._high + room
        elif is_padded:
            room = (self._high - self._low) * 0.05
            self._low, self._high = self._low - room, self._high + room

    def place(self, value: float) -> float:
        scaled = math.log10(value) if self._is_log else value
        share = (scaled - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        if self._is_log:
            whole = [10.0**power for power in range(math.floor(self._low), math.ceil(self._high) + 1)]
            return [tick for tick in whole if self._low <= math.log10(tick) <= self._high]
        rough = (self._high - self._low) / 5
        size = 10 ** math.floor(math.log10(rough))
        size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
        first, last = math.ceil(self._low / size), math.floor(self._high / size)
        return [float(f"{count * size:.12g}") for count in range(first, last + 1)]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _grouped(points: Sequence[tuple[int, float]]) -> list[_Group]:
    each = math.ceil(len(points) / MAX_POINTS)
    groups = []
    for first in range(0, len(points), each):
        part = points[first : first + each]
        values = [value for _, value in part]
        groups.append(_Group(fmean(step for step, _ in part), fmean(values), min(values), max(values)))
    return groups


def _line(groups: Sequence[_Group], x: _Axis, y: _Axis) -> str:
    if len(groups) == 1:
        return f'<circle class="dot" cx="{x.place(groups[0].step)}" cy="{y.place(groups[0].mean)}" r="3"/>'
    places = " ".join(f"{x.place(g.step)},{y.place(g.mean)}" for g in groups)
    return f'<polyline class="line" points="{places}"/>'


def _band(groups: Sequence[_Group], x: _Axis, y: _Axis) -> str:
    there = [f"{x.place(g.step)},{y.place(g.high)}" for g in groups]
    back = [f"{x.place(g.step)},{y.place(g.low)}" for g in reversed(groups)]
    return f'<polygon class="band" points="{" ".join([*there, *back])}"/>'


def _grid_line(place: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{place + 4}" text-anchor="end">{text}</text>'
    )


def _step_label(place: float, text: str) -> str:
    return f'<text class="axis" x="{place}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'
