"""Chart: lines over rounds as an SVG drawing that needs nothing from outside the page it is in.

Colours come from the page (``--line-1`` and so on), so that a drawing suits light and dark; lines also differ in their
dashes, for print and for those who do not see the colours apart. A point says its value when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtower.recsys.markup import Markup, tag

Point = tuple[float, float]

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 40
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 2")

# More points than this are thinned to their means: a phone shows no more.
MOST_POINTS = 200
_MOST_DOTS = 40


@dataclass(frozen=True)
class Line:
    """One line of a chart: what it is called, and its points from left to right."""

    label: str
    points: Sequence[Point]


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    x_name: str,
    y_format: Callable[[float], str],
    x_format: Callable[[float], str] | None = None,
) -> Markup:
    """A drawing of ``lines``, the first in the page's first colour.

    ``name`` is what is drawn; with ``x_name`` it is said to those who cannot see the drawing, and to whom points at it.
    With ``x_format`` the axis is logarithmic, with a tick at every power of ten.

    Raises:
        ValueError: no line has a point.
    """
    thinned = [Line(line.label, thin(line.points, MOST_POINTS)) for line in lines]
    points = [point for line in thinned for point in line.points]
    if not points:
        raise ValueError(f"there is nothing to draw of {name}")
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 5)
    low_x, high_x = min(0.0, *(x for x, _ in points)), max(x for x, _ in points)
    x_ticks = ticks(low_x, high_x, 6)
    if x_format is not None:
        low_x, high_x = (
            f(math.log10(max(x, 1.0))) for f, x in ((math.floor, min(points)[0]), (math.ceil, max(points)[0]))
        )
        high_x = max(high_x, low_x + 1)
        x_ticks = [float(power) for power in range(int(low_x), int(high_x) + 1)]
    low_y, high_y = min(y_ticks[0], min(y for _, y in points)), max(y_ticks[-1], max(y for _, y in points))

    def across(x: float) -> str:
        x = x if x_format is None else math.log10(max(x, 1.0))
        share = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return _number(_LEFT + share * (WIDTH - _LEFT - _RIGHT))

    def x_words(x: float) -> str:
        return f"{x:,.4g}" if x_format is None else x_format(x)

    def down(y: float) -> str:
        share = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return _number(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM))

    drawn: list[Markup] = []
    for y in y_ticks:
        drawn.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=down(y), y2=down(y)))
        drawn.append(tag("text", f"{y:,.10g}", x=_LEFT - 7, y=down(y), text_anchor="end", dominant_baseline="middle"))
    for x in (x for x in x_ticks if x <= high_x and x == int(x)):
        x = x if x_format is None else 10.0**x
        at = across(x)
        drawn.append(tag("line", class_="tick", x1=at, x2=at, y1=HEIGHT - _BOTTOM, y2=HEIGHT - _BOTTOM + 4))
        drawn.append(tag("text", x_words(x), x=at, y=HEIGHT - _BOTTOM + 16, text_anchor="middle"))
    drawn.append(tag("text", x_name, x=(_LEFT + WIDTH - _RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    for position, line in enumerate(thinned):
        said = f"{line.label}, " if len(lines) > 1 else ""
        path = " ".join(f"{'L' if i else 'M'}{across(x)} {down(y)}" for i, (x, y) in enumerate(line.points))
        dots = [
            tag(
                "circle",
                tag("title", f"{said}{x_name} {x_words(x)}: {name} {y_format(y)}"),
                class_="dot" if len(line.points) <= _MOST_DOTS else "dot faint",
                cx=across(x),
                cy=down(y),
                r=3 if len(line.points) <= _MOST_DOTS else 5,
            )
            for x, y in line.points
        ]
        drawn.append(tag("g", tag("path", d=path, stroke_dasharray=_dashes(position)), dots, class_=_colour(position)))
    return tag(
        "svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=_in_words(lines, name, x_name, y_format)
    )


def key(position: int) -> Markup:
    """A short piece of the line at ``position``, for a legend."""
    line = tag("path", d="M1 5 L27 5", stroke_dasharray=_dashes(position))
    return tag("svg", tag("g", line, class_=_colour(position)), class_="key", viewBox="0 0 28 10", aria_hidden="true")


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points, each the mean of as many neighbours as it takes.

    >>> thin([(1, 4.0), (2, 6.0), (3, 1.0)], most=2)
    [(1.5, 5.0), (3.0, 1.0)]
    """
    width = math.ceil(len(points) / most)
    groups = [points[start : start + width] for start in range(0, len(points), width)] if points else []
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 round numbers, 1, 2 or 5 times a power of ten apart, that hold ``low`` and ``high`` between
    them.

    >>> ticks(0.32, 0.71, 5), ticks(1, 450, 6), ticks(3, 3, 5)
    ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 100, 200, 300, 400, 500], [1, 2, 3, 4, 5])
    """
    if high <= low:
        low, high = low - (abs(low) / 2 or 1), low + (abs(low) / 2 or 1)
    power = math.floor(math.log10((high - low) / most))
    for step in (m * 10.0**p for p in range(power, power + 3) for m in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            digits = max(0, -math.floor(math.log10(step)))
            return [_whole(round(i * step, digits)) for i in range(first, last + 1)]
    raise AssertionError("some step is large enough")


def _in_words(lines: Sequence[Line], name: str, x_name: str, y_format: Callable[[float], str]) -> str:
    ends = (
        f"{line.label} from {y_format(line.points[0][1])} to {y_format(line.points[-1][1])}"
        for line in lines
        if line.points
    )
    return f"{name} by {x_name}: {'; '.join(ends)}"


def _colour(position: int) -> str:
    return f"line-{position % len(_DASHES) + 1}"


def _dashes(position: int) -> str | None:
    return _DASHES[position % len(_DASHES)]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
