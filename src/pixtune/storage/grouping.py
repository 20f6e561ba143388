"""Groups neighbours of a sequence up to a total size: shards of a model, gradients that are exchanged together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def group_neighbours(items: Iterable[T], size_of: Callable[[T], int], max_size: int) -> list[list[T]]:
    """Groups items in their order, each group of at most `max_size` in all or of one larger item alone."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        size = size_of(item)
        if not groups or size > room:
            groups.append([])
            room = max_size
        groups[-1].append(item)
        room -= size
    return groups
