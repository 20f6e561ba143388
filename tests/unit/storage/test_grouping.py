"""Groups keep the order and the limit; what is larger than the limit is alone."""

from __future__ import annotations

import pytest

from pixtune.storage.grouping import group_neighbours


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([1, 5, 6, 30, 2], [[1, 5], [6], [30], [2]]),
        ([10, 1], [[10], [1]]),
        ([4, 6, 0], [[4, 6, 0]]),
        ([11, 0], [[11], [0]]),
    ],
)
def test_groups_are_full_but_not_larger(sizes: list[int], groups: list[list[int]]) -> None:
    assert group_neighbours(sizes, int, 10) == groups
