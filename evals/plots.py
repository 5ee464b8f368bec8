"""Dots with their intervals, as SVG that is part of the page: no script, no font, no file beside it.

Every row of a plot is a drawing of its own, as wide as there is room: along the width, places are percentages, so that
text and marks keep their size on a screen of any width. Colours come from the page's style sheet, by series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from evals.report_format import ticks

SERIES = 8
"""Colours and shapes there are; more series begin again."""

LANE, MARGIN = 16, 5
"""Height of a series in a row, and of the room above and below, in pixels."""

# Around the origin, about ten pixels across: circle, square, diamond, triangle, then the same with a hole.
_SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M-4-4h8v8h-8z",
    "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "M0-5 5 4h-10z",
)


class Point(NamedTuple):
    """A value of a series, by number, with its interval where it has one."""

    series: int
    value: float
    low: float | None = None
    high: float | None = None


class Scale(NamedTuple):
    """Where values lie along the width. marks: round numbers, the first and last of which are its ends."""

    marks: tuple[float, ...]

    def place(self, value: float) -> float:
        """In percent of the width."""
        low, high = self.marks[0], self.marks[-1]
        return 100 * (min(max(value, low), high) - low) / (high - low)


def scale_of(
    points: Sequence[Point], references: Sequence[float] = (), ends: tuple[float, float] | None = None
) -> Scale:
    """A scale that holds all values, intervals and references.

    Args:
        ends: the lowest and highest value there can be; fractions are shown from 0 to 1 and not beyond.
    """
    known = [
        value
        for value in (*references, *(each for point in points for each in point[1:]))
        if value is not None and math.isfinite(value)
    ]
    marks = ticks(min(known), max(known)) if known else [0.0, 1.0]
    if ends:
        marks = [mark for mark in marks if ends[0] - 1e-9 <= mark <= ends[1] + 1e-9]
    return Scale(tuple(marks)) if len(marks) > 1 else Scale(ends or (0.0, 1.0))


def row(points: Sequence[Point], scale: Scale, said: str, references: Sequence[float] = ()) -> Markup:
    """One row: a lane for each point.

    Args:
        said: the same in words, for those who do not see it; browsers show it under the pointer.
        references: values of no model, drawn as dashed lines.
    """
    height = LANE * len(points) + 2 * MARGIN
    parts = [_line(scale.place(mark), "grid") for mark in scale.marks]
    parts += [_line(scale.place(value), "reference") for value in references if math.isfinite(value)]
    for lane, point in enumerate(points):
        if math.isfinite(point.value):
            parts.append(_dot(point, scale, MARGIN + LANE * lane + LANE / 2))
    return Markup('<svg class="row" role="img" width="100%" height="{}"><title>{}</title>{}</svg>').format(
        height, said, Markup("").join(parts)
    )


def axis(scale: Scale, names: Sequence[str]) -> Markup:
    """The numbers under the rows: one name for each mark."""
    parts = [
        Markup('<text x="{:.3f}%" y="14" text-anchor="middle">{}</text>').format(scale.place(mark), name)
        for mark, name in zip(scale.marks, names, strict=True)
    ]
    return Markup('<svg class="axis" aria-hidden="true" width="100%" height="20">{}</svg>').format(
        Markup("").join(parts)
    )


def key(series: int) -> Markup:
    """A series' mark, for a legend."""
    return Markup(
        '<svg class="key" aria-hidden="true" width="14" height="14"><g transform="translate(7 7)">{}</g></svg>'
    ).format(_shape(series))


def _dot(point: Point, scale: Scale, y: float) -> Markup:
    parts = Markup("")
    if point.low is not None and point.high is not None and math.isfinite(point.low) and math.isfinite(point.high):
        parts = Markup('<line class="whisker s{}" x1="{:.3f}%" x2="{:.3f}%" y1="{y}" y2="{y}"/>').format(
            point.series % SERIES, scale.place(point.low), scale.place(point.high), y=y
        )
    # A drawing in the drawing carries the mark to a percentage, which a transform cannot.
    return parts + Markup('<svg x="{:.3f}%" y="{}" overflow="visible">{}</svg>').format(
        scale.place(point.value), y, _shape(point.series)
    )


def _shape(series: int) -> Markup:
    number = series % SERIES
    hollow = " hollow" if number >= len(_SHAPES) else ""
    return Markup('<path class="mark s{}{}" d="{}"/>').format(number, hollow, _SHAPES[number % len(_SHAPES)])


def _line(place: float, name: str) -> Markup:
    return Markup('<line class="{}" x1="{place:.3f}%" x2="{place:.3f}%" y1="0" y2="100%"/>').format(name, place=place)
