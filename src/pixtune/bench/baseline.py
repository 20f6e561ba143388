"""Compares a result with a stored one: by how much slower or larger it is, and whether the two can be compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pixtune.bench.result import Result
from pixtune.errors import BaselineError

MOST_SLOWER, MOST_LARGER = 1.05, 1.02
"""Ratios up to which a difference is taken for noise: steps vary by some percent, allocations hardly."""
COMPARED_PARTS = ("case", "machine")
"""Parts of a result that must be equal, value by value."""


@dataclass(frozen=True)
class Comparison:
    """Ratios of a result to a stored one."""

    time_ratio: float
    memory_ratio: float | None
    """Ratio of allocated memory; None without a GPU: a host's memory is not counted exactly enough."""
    other_versions: tuple[str, ...]
    """Packages whose version has changed, with both versions."""

    @property
    def is_worse(self) -> bool:
        return self.time_ratio > MOST_SLOWER or (self.memory_ratio or 0) > MOST_LARGER

    def in_words(self) -> str:
        verdict = "worse than the baseline" if self.is_worse else "as good as the baseline"
        memory = "" if self.memory_ratio is None else f", {self.memory_ratio:.3f} times its memory"
        changed = f" (changed since: {', '.join(self.other_versions)})" if self.other_versions else ""
        return f"{verdict}: {self.time_ratio:.3f} times its s/step{memory}{changed}"


def load_baseline(path: Path) -> Result:
    """Reads a stored result.

    Raises:
        BaselineError: there is none, or it is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaselineError(f"the baseline {path}", ["there is no such file; write one with --json FILE"]) from error
    except OSError as error:
        raise BaselineError(f"the baseline {path}", [f"cannot be read: {error.strerror or error}"]) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or depths beyond all use
        raise BaselineError(f"the baseline {path}", [f"is no JSON: {error}"]) from error
    kind = result.get("benchmark") if isinstance(result, dict) else type(result).__name__
    if kind != "training_steps":
        raise BaselineError(
            f"the baseline {path}", [f"holds {kind!r}, not a result of pixtune bench; write one with --json FILE"]
        )
    return result


def refuse_other(now: Result, before: Result, path: Path) -> None:
    """Refuses a baseline that was not measured on the same case and machine.

    Raises:
        BaselineError: names each value that differs.
    """
    faults = []
    for part in COMPARED_PARTS:
        here, there = now[part], before.get(part, {})
        for key in sorted({*here, *there}):
            if here.get(key) != there.get(key):
                faults.append(f"{part}.{key} is {here.get(key)!r} now and {there.get(key)!r} there")
    if faults:
        raise BaselineError(f"the baseline {path} is of something else and cannot be compared with", faults)


def compare(now: Result, before: Result, path: Path) -> Comparison:
    """Compares a result with a baseline.

    Raises:
        BaselineError: the baseline is of another case or machine.
    """
    refuse_other(now, before, path)
    versions: dict[str, str] = before.get("versions", {})
    allocated = now["memory"]["peak_allocated_gib"], before["memory"]["peak_allocated_gib"]
    return Comparison(
        time_ratio=now["seconds_per_step"]["median"] / before["seconds_per_step"]["median"],
        memory_ratio=None if None in allocated else allocated[0] / allocated[1],
        other_versions=tuple(
            f"{name} {versions.get(name)} to {version}"
            for name, version in sorted(now.get("versions", {}).items())
            if versions.get(name) != version
        ),
    )
