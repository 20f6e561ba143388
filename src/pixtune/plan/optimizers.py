"""Optimizers by name, with what planning has to know of each. Imports no torch: `trained/optim.py` builds them.

A new one is a row here and a builder of the same name there; see docs/add_an_optimizer.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerNeeds:
    """Needs of one optimizer."""

    state_bytes: float
    """Bytes of states per trained weight."""
    moments: tuple[str, ...]
    """States that every stepped weight has, each with a number for each of its own."""
    other_states: Mapping[str, Callable[[int], int]]
    """Sizes of the states that it may have besides, by the number of a weight's own."""
    package: str | None = None
    """Package that it is imported from, besides torch."""

    @property
    def state_sizes(self) -> dict[str, Callable[[int], int]]:
        """Sizes of all states."""
        return {**dict.fromkeys(self.moments, lambda numbers: numbers), **self.other_states}


BLOCK = 256
"""Numbers that share a scale, and levels that 8 bits have."""

OPTIMIZERS: Mapping[str, OptimizerNeeds] = {
    "adamw": OptimizerNeeds(  # two moments in fp32
        state_bytes=8.0, moments=("exp_avg", "exp_avg_sq"), other_states={"step": lambda numbers: 1}
    ),
    "adamw_8bit": OptimizerNeeds(  # with a scale for each block
        state_bytes=2 + 2 * 4 / BLOCK,
        moments=("state1", "state2"),
        other_states={
            **dict.fromkeys(("absmax1", "absmax2"), lambda numbers: -(-numbers // BLOCK)),
            **dict.fromkeys(("qmap1", "qmap2"), lambda numbers: BLOCK),
        },
        package="bitsandbytes",
    ),
}

EXACT, SMALL = "adamw", "adamw_8bit"
"""The two that the planner chooses between where the config names none: by exactness, and by memory."""
