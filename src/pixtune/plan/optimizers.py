"""Optimizers by name, with what planning has to know of each. Imports no torch: `trained/optim.py` builds them.

A new one is a row here and a builder of the same name there; see docs/add_an_optimizer.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerNeeds:
    """Needs of one optimizer."""

    state_bytes: float
    """Bytes of states per trained weight."""
    package: str | None = None
    """Package that it is imported from, besides torch."""


OPTIMIZERS: Mapping[str, OptimizerNeeds] = {
    "adamw": OptimizerNeeds(state_bytes=8.0),  # two moments in fp32
    "adamw_8bit": OptimizerNeeds(state_bytes=2 + 2 * 4 / 256, package="bitsandbytes"),  # with a scale for each 256
}

EXACT, SMALL = "adamw", "adamw_8bit"
"""The two that the planner chooses between where the config names none: by exactness, and by memory."""
