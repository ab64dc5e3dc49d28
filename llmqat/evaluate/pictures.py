"""Pictures of a report as inline SVG: bars, a scatter, lines, a heat map. No script, no font, no network.

Colours are CSS variables of the page (html.py), so one picture serves light and dark. A model has one colour in all
pictures. Every mark has a <title>, which browsers show when it is pointed at.

Units are CSS pixels at full width; pictures shrink with their column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 380
LETTER = 7.2
"""Width of a letter of a label, rather too large than too small."""
COLOURS = 8
"""Colours of models that the page defines, --c1 and on; then they begin anew."""


@dataclass(frozen=True)
class Point:
    """A model in a picture."""

    name: str
    colour: int  # which of the page's colours
    x: float
    y: float = 0.0
    low: float | None = None  # interval of x in bars
    high: float | None = None


def bars(points: Sequence[Point], title: str, note: str, style: str) -> str:
    """Returns horizontal bars of each point's x, with its interval as a whisker and the figure at the end."""
    if not points:
        return ""
    largest = max(max(point.x, point.high or 0.0) for point in points)
    left, right, row = 8, 84, 38
    scale = (WIDTH - left - right) / (largest or 1.0)
    marks = []
    for index, point in enumerate(points):
        top = 4 + index * row
        length = max(point.x * scale, 1.0)
        shown = format(point.x, style)
        marks.append(
            f'<g><title>{escape(point.name)}: {shown}</title><text x="{left}" y="{top + 11}">'
            f'{escape(_short(point.name, 52))}</text><path class="bar" style="fill:var(--c{point.colour})" '
            f'd="{_rounded(left, top + 17, length, 13)}"/>'
        )
        end = length
        if point.low is not None and point.high is not None and point.high > point.low:
            a, b, y = left + point.low * scale, left + point.high * scale, top + 23.5
            marks.append(f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>')
            end = max(end, point.high * scale)
        marks.append(f'<text class="value" x="{left + end + 6:.1f}" y="{top + 28}">{shown}</text></g>')
    return _figure(title, note, WIDTH, 8 + len(points) * row, "".join(marks))


def scatter(points: Sequence[Point], title: str, note: str, x_label: str, y_label: str) -> str:
    """Returns points in a plane, each with its name beside it."""
    if len(points) < 2:
        return ""
    left, right, top, bottom, height = 46, 16, 28, 40, 284  # above the highest tick stands what is measured upwards
    x, x_ticks = _axis([point.x for point in points], left, WIDTH - right, start_at_zero=True)
    y, y_ticks = _axis([point.y for point in points], height - bottom, top, start_at_zero=min(p.y for p in points) == 0)
    marks = [_grid(x, x_ticks, y, y_ticks, left, WIDTH - right, top, height - bottom)]
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda entry: entry.y):
        px, py = x(point.x), y(point.y)
        short = _short(point.name, 26)
        leftwards = px + 9 + LETTER * len(short) > WIDTH
        label_y = _free(taken, px, min(py + 4, height - bottom - 7))
        anchor, shift = ("end", -9) if leftwards else ("start", 9)
        label = escape(short)
        marks.append(
            f"<g><title>{escape(point.name)}: {point.x:.4g}, {point.y:.4g}</title>"
            f'<circle class="dot" style="fill:var(--c{point.colour})" cx="{px:.1f}" cy="{py:.1f}" r="5.5"/>'
            f'<text text-anchor="{anchor}" x="{px + shift:.1f}" y="{label_y:.1f}">{label}</text></g>'
        )
    marks.append(_axis_labels(x_label, y_label, left, WIDTH - right, height))
    return _figure(title, note, WIDTH, height, "".join(marks))


def lines(series: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], title: str, note: str, x_label: str) -> str:
    """Returns curves (colour, points) by name, with a legend when there are several."""
    drawn = {name: (colour, points) for name, (colour, points) in series.items() if len(points) > 1}
    if not drawn:
        return ""
    legend = 18 * len(drawn) if len(drawn) > 1 else 0
    left, right, top, bottom, height = 52, 12, 10 + legend, 40, 230 + legend
    every = [point for _, points in drawn.values() for point in points]
    x, x_ticks = _axis([point[0] for point in every], left, WIDTH - right)
    y, y_ticks = _axis([point[1] for point in every], height - bottom, top, start_at_zero=True)
    marks = [_grid(x, x_ticks, y, y_ticks, left, WIDTH - right, top, height - bottom)]
    for index, (name, (colour, points)) in enumerate(drawn.items()):
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        marks.append(
            f'<g><title>{escape(name)}</title><path class="line" style="stroke:var(--c{colour})" d="{path}"/></g>'
        )
        if legend:
            at = 8 + 18 * index
            marks.append(
                f'<rect style="fill:var(--c{colour})" x="{left}" y="{at}" width="14" height="4" rx="2"/>'
                f'<text x="{left + 20}" y="{at + 6}">{escape(_short(name, 48))}</text>'
            )
    marks.append(_axis_labels(x_label, "", left, WIDTH - right, height))
    return _figure(title, note, WIDTH, height, "".join(marks))


def heat_map(
    cells: Mapping[str, Mapping[int, float]], title: str, note: str, style: str, bounds: tuple[float, float]
) -> str:
    """Returns values by kind of layer (rows) and block (columns), on a logarithmic scale between `bounds`."""
    columns = sorted({block for row in cells.values() for block in row})
    if not columns:
        return ""
    left, size, top = 118, 15, 4
    width, height = left + max(size * len(columns), 150) + 4, top + size * len(cells) + 46
    low, high = (math.log(max(bound, 1e-12)) for bound in bounds)
    marks = []
    for line, (kind, row) in enumerate(cells.items()):
        y = top + line * size
        marks.append(f'<text text-anchor="end" x="{left - 6}" y="{y + 11}">{escape(kind)}</text>')
        for block, value in row.items():
            depth = (math.log(max(value, 1e-12)) - low) / ((high - low) or 1.0)
            marks.append(
                f'<rect class="cell" style="--d:{6 + 94 * min(max(depth, 0.0), 1.0):.0f}%" '
                f'x="{left + columns.index(block) * size}" y="{y}" width="{size - 1}" height="{size - 1}">'
                f"<title>block {block}, {escape(kind)}: {format(value, style)}</title></rect>"
            )
    step = max(1, round(len(columns) / 8))
    base = top + size * len(cells)
    marks += [
        f'<text class="tick" text-anchor="middle" x="{left + (index + 0.5) * size:.1f}" y="{base + 14}">{block}</text>'
        for index, block in enumerate(columns)
        if index % step == 0
    ]
    steps = 24
    marks += [
        f'<rect class="cell" style="--d:{6 + 94 * index / (steps - 1):.0f}%" x="{left + index * 4}" y="{base + 28}" '
        'width="4" height="8"/>'
        for index in range(steps)
    ]
    ends = (format(bounds[0], style), format(bounds[1], style))
    marks.append(f'<text class="tick" text-anchor="end" x="{left - 6}" y="{base + 36}">{ends[0]}</text>')
    marks.append(f'<text class="tick" x="{left + steps * 4 + 6}" y="{base + 36}">{ends[1]}</text>')
    return _figure(title, note, width, height, "".join(marks), natural=True)


def _figure(title: str, note: str, width: int, height: int, marks: str, natural: bool = False) -> str:
    size = f' style="max-width:{width}px"' if natural else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"{size}>{marks}</svg></figure>'
    )


def _rounded(x: float, y: float, width: float, height: float, radius: float = 4) -> str:
    """Returns the path of a bar whose far end is rounded and whose base is square."""
    radius = min(radius, width / 2)
    return (
        f"M{x} {y}h{width - radius:.1f}q{radius:.1f} 0 {radius:.1f} {radius:.1f}v{height - 2 * radius:.1f}"
        f"q0 {radius:.1f} {-radius:.1f} {radius:.1f}h{-(width - radius):.1f}z"
    )


def _axis(
    values: Sequence[float], start: float, end: float, start_at_zero: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Returns where a value lies between the pixels `start` and `end`, and the values of the ticks."""
    low, high = (0.0 if start_at_zero else min(values)), max(values)
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step) if not start_at_zero or low < 0 else 0
    last = math.ceil(high / step)
    ticks = [index * step for index in range(first, last + 1)]
    bottom, top = ticks[0], ticks[-1]
    return (lambda value: start + (value - bottom) / (top - bottom) * (end - start)), ticks


def _grid(
    x: Callable[[float], float],
    x_ticks: Sequence[float],
    y: Callable[[float], float],
    y_ticks: Sequence[float],
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> str:
    marks = [
        f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/><text class="tick" text-anchor="end" x="{left - 6}" '
        f'y="{y(tick) + 4:.1f}">{tick:.4g}</text>'
        for tick in y_ticks
    ]
    marks += [
        f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{bottom + 16}">{tick:.6g}</text>'
        for tick in x_ticks
    ]
    marks.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    return "".join(marks)


def _axis_labels(x_label: str, y_label: str, left: float, right: float, height: float) -> str:
    across = f'<text class="tick" text-anchor="end" x="{right}" y="{height - 6}">{escape(x_label)}</text>'
    return across + (f'<text class="tick" x="{left - 40}" y="8">{escape(y_label)}</text>' if y_label else "")


def _free(taken: list[tuple[float, float]], x: float, y: float) -> float:
    """Returns a height near `y` at which no other label stands, and takes it."""
    while any(abs(other_y - y) < 13 and abs(other_x - x) < 150 for other_x, other_y in taken):
        y -= 13
    taken.append((x, y))
    return y


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
