"""Charts of characters, read back dot by dot."""

from __future__ import annotations

import math

import pytest

from pixtune.commands.chart import BRAILLE, DOTS, draw_chart


def dots_of(rows: list[str], margin: int) -> set[tuple[int, int]]:
    """Places of the dots, (across, down), by the Unicode table of braille patterns."""
    return {
        (2 * column + x, 4 * row + y)
        for row, text in enumerate(rows)
        for column, mark in enumerate(text[margin:])
        for y in range(4)
        for x in range(2)
        if mark not in " o" and (ord(mark) - BRAILLE) & DOTS[y][x]
    }


def test_a_straight_line_is_drawn_from_corner_to_corner():
    rows = [str(row) for row in draw_chart([(0, 1.0), (100, 0.0)], [], 40, 6, 100)]
    assert {len(row) for row in rows} == {40} and len(rows) == 7
    margin = rows[0].index("│") + 1
    across, down = 2 * (40 - margin), 4 * 6
    dots = dots_of(rows[:-1], margin)
    assert {(0, 0), (across - 1, down - 1)} <= dots
    assert {x for x, _ in dots} == set(range(across)), "no gaps"
    assert all(abs(y - x * (down - 1) / (across - 1)) <= 0.5 + 1e-9 for x, y in dots)
    assert rows[0].strip().startswith("1 ") and rows[3].strip().startswith("0.5") and rows[5].strip().startswith("0 ")
    assert rows[-1].endswith("100") and rows[-1][margin] == "0"


def test_marks_stand_at_their_steps():
    rows = [str(row) for row in draw_chart([], [(0, 2.0), (50, 1.0), (100, 2.0)], 31, 5, 100, ascii_only=True)]
    margin = rows[0].index("|") + 1
    assert all(row.isascii() for row in rows)
    right = 31 - margin - 1
    marks = [(row, column) for row, text in enumerate(rows) for column, mark in enumerate(text[margin:]) if mark == "o"]
    assert marks == [(0, 0), (0, right), (4, round(0.5 * right))]


@pytest.mark.parametrize("points", [[], [(3, math.nan)]])
def test_nothing_is_drawn_of_nothing(points: list[tuple[int, float]]):
    assert draw_chart(points, [], 80, 10, 10) == []


@pytest.mark.parametrize("size", [(10, 10), (80, 3), (0, 0), (-5, -5)])
def test_nothing_is_drawn_where_there_is_no_room(size: tuple[int, int]):
    assert draw_chart([(1, 1.0)], [], *size, 10) == []


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.5), (2, 0.5)], [(5, 0.0)], [(1, 1e9), (2, -1e-9)], [(99, 1.0)]])
def test_odd_curves_are_drawn_within_the_chart(points: list[tuple[int, float]]):
    for ascii_only in (False, True):
        rows = draw_chart(points, points, 50, 8, 10, ascii_only)
        assert len(rows) == 9 and {len(row) for row in rows} == {50}
