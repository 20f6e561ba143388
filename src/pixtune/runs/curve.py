"""A loss curve that takes any number of steps and stays small."""

from __future__ import annotations

import math

from pixtune.report.record import Point

MOST_POINTS = 800
"""Largest number of points; more cannot be told apart on a chart."""


class Curve:
    """Means of stretches of equal length, which doubles whenever there are too many of them.

    Args:
        most_points: largest number of points, even.
    """

    def __init__(self, most_points: int = MOST_POINTS) -> None:
        self._most = most_points
        self._length = 1
        self._sums: list[tuple[float, float, int]] = []
        """Sum of steps, sum of values and number of each stretch; all but the last are whole."""

    def add(self, step: int, value: float) -> None:
        """Adds a point; one that is no finite number is left out."""
        if not math.isfinite(value):
            return
        if self._sums and self._sums[-1][2] < self._length:
            steps, values, number = self._sums[-1]
            self._sums[-1] = (steps + step, values + value, number + 1)
            return
        if len(self._sums) == self._most:
            halves = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in halves]
            self._length *= 2
        self._sums.append((step, value, 1))

    def points(self) -> tuple[Point, ...]:
        """Returns the mean step, rounded, and the mean value of each stretch."""
        return tuple((round(steps / number), values / number) for steps, values, number in self._sums)
