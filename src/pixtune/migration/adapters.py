"""Conversions of kinds of adapters: LoRA, DoRA and LoKr are here, others become a LoRA."""

from __future__ import annotations

from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration.rules import Look, Lost, Outcome, WrongValue

KEYS = "method adapter.kind adapter.lokr_factor adapter.lokr_low_rank"
"""Keys here that words for an adapter may lead to."""
WHOLE = 4096
"""Rank above which a LoKr there has whole matrices; people write 10000 or 9999999999."""
FEWEST = 65_536
"""Factor here for -1 there: the two matrices are as near to one size as they get."""


def kind(name: str) -> Outcome:
    """Returns what becomes of an adapter by its name there."""
    word = to.plain_name(name)
    if word in ("lora", "locon", "standard"):
        return Outcome({"method": "lora"})
    if word in ("lokr", "dora"):
        return Outcome({"method": "lora", "adapter.kind": word})
    return Outcome({"method": "lora"}, (Lost("a LoRA takes its place, of the same rank"),))


def rank(value: Any, look: Look) -> Any:
    """Returns a rank, of which very large ones say that a LoKr has whole matrices."""
    found = to.number(value)
    if found > WHOLE:
        return Lost("it stands for whole matrices, as adapter.lokr_low_rank: none", False)
    return to.whole(value)


def factor(value: Any, look: Look) -> Any:
    """Returns LoKr's factor; -1 stands for matrices of nearly one size."""
    found = to.whole(value)
    if found < 0:
        return FEWEST
    if found < 2:
        raise WrongValue("-1, or a number of at least 2 is needed")
    return min(found, FEWEST)


def low_rank(of: Any) -> str:
    """Returns which of LoKr's matrices are products, from its rank there."""
    return "none" if isinstance(of, int | float) and of > WHOLE else "larger"
