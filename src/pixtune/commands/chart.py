"""Line charts of characters, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from pixtune.report.record import Point

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the eight dots of a braille character, by row and column."""
LINE_STYLE, MARK_STYLE = "cyan", "bold yellow"
LEAST_WIDTH, LEAST_HEIGHT = 24, 4


def draw_chart(
    line: Sequence[Point], marks: Sequence[Point], width: int, height: int, last_step: int, ascii_only: bool = False
) -> list[Text]:
    """Draws a curve with marks over it, as rows of `width` characters: `height` of the chart, and one of steps.

    Args:
        line: points by step; drawn as a line.
        marks: drawn one by one, as "o".
        last_step: step at the right edge.
        ascii_only: whether to draw by letters that every terminal has.

    Returns:
        No rows where there is nothing to draw, or too little room.
    """
    values = [value for _, value in (*line, *marks) if math.isfinite(value)]
    if not values or width < LEAST_WIDTH or height < LEAST_HEIGHT:
        return []
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    labels = {0: f"{high:.4g}", height // 2: f"{(low + high) / 2:.4g}", height - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values())) + 1
    columns = width - margin - 1
    rows_of_dots, columns_of_dots = (height, columns) if ascii_only else (4 * height, 2 * columns)

    def place(point: Point, across: int, down: int) -> tuple[int, int]:
        x = (point[0] / max(last_step, 1)) * (across - 1)
        y = (high - point[1]) / (high - low) * (down - 1)
        return min(max(round(x), 0), across - 1), min(max(round(y), 0), down - 1)

    dots = set[tuple[int, int]]()
    before: tuple[int, int] | None = None
    for point in line:
        if not math.isfinite(point[1]):
            continue
        x, y = place(point, columns_of_dots, rows_of_dots)
        dots |= _joined(before, (x, y))
        before = (x, y)
    marked = {place(point, columns, height) for point in marks if math.isfinite(point[1])}
    rows = []
    for row in range(height):
        text = Text.assemble((labels.get(row, "").rjust(margin - 1) + (" |" if ascii_only else " │"), "dim"))
        cells = ["o" if (column, row) in marked else _cell(dots, column, row, ascii_only) for column in range(columns)]
        for is_mark, alike in groupby(cells, "o".__eq__):
            text.append("".join(alike), MARK_STYLE if is_mark else LINE_STYLE)
        rows.append(text)
    right = f"{last_step:,}"
    rows.append(Text(" " * (margin + 1) + "0" + right.rjust(columns - 1), style="dim"))
    return rows


def _cell(dots: set[tuple[int, int]], column: int, row: int, ascii_only: bool) -> str:
    """Returns the character for the dots at a place."""
    if ascii_only:
        return "*" if (column, row) in dots else " "
    bits = sum(DOTS[y][x] for y in range(4) for x in range(2) if (2 * column + x, 4 * row + y) in dots)
    return chr(BRAILLE + bits) if bits else " "


def _joined(before: tuple[int, int] | None, now: tuple[int, int]) -> set[tuple[int, int]]:
    """Returns the dots of a straight line from one to the next."""
    if before is None:
        return {now}
    (x0, y0), (x1, y1) = before, now
    length = max(abs(x1 - x0), abs(y1 - y0), 1)
    return {(round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length)) for i in range(length + 1)}
