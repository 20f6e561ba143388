"""Position in a stream: which rows come next, as a pure function of a seed and of what was read before.

The shards of an epoch come in random order, and some at once: lane n reads the shards n, n + L, n + 2L, ... of that
order, L lanes side by side. A window takes as many rows of each lane as of the others; where some lanes have ended, the
others give more. So a row comes once an epoch, whoever reads which lane, and a position is an epoch with two numbers
for each lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pixtune import randomness


@dataclass(frozen=True)
class LanePosition:
    """Place of one lane in an epoch."""

    shard: int = 0
    """Number of the shard among the lane's own, the lane's number of shards at its end."""
    row: int = 0
    """Number of rows of that shard that have been read."""


@dataclass(frozen=True)
class Position:
    """Place in a stream between two windows."""

    epoch: int
    window: int
    """Number of windows before it, of all epochs."""
    lanes: tuple[LanePosition, ...]


def first_position(num_shards: int, shards_at_once: int) -> Position:
    """Returns the beginning of a stream."""
    return Position(0, 0, (LanePosition(),) * min(num_shards, shards_at_once))


def lanes_of(seed: int, epoch: int, num_shards: int, num_lanes: int) -> list[list[int]]:
    """Returns the numbers of the shards that each lane reads in an epoch, in order."""
    order = randomness.shuffled(num_shards, seed, "order", epoch, "shards")
    return [order[lane::num_lanes] for lane in range(num_lanes)]


def has_ended(position: Position, num_shards: int) -> bool:
    """Returns whether all rows of the position's epoch have been read."""
    num_lanes = len(position.lanes)
    return all(
        at.shard >= len(range(lane, num_shards, num_lanes)) for lane, at in enumerate(position.lanes)
    )  # fmt: skip


def next_epoch(position: Position) -> Position:
    """Returns the beginning of the epoch after a position's."""
    return Position(position.epoch + 1, position.window, (LanePosition(),) * len(position.lanes))


def shares_of(wanted: int, alive: Sequence[bool]) -> list[int]:
    """Divides a number of rows among the lanes that have not ended, as evenly as it goes; the first ones give more."""
    num_alive, shares, rank = sum(alive), [], 0
    for is_alive in alive:
        shares.append(len(range(rank, wanted, num_alive)) if is_alive else 0)
        rank += is_alive
    return shares
