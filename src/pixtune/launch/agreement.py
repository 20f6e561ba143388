"""Compares what the processes of a run are started with and find: one run has one config and one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.hardware.facts import package_versions

Facts = Mapping[str, str]
"""Findings of a process at a place, by names for people."""
MOST_NAMED = 8
"""Number of differences that a message names, at most."""


def facts_of_start(config: TrainConfig) -> dict[str, str]:
    """Returns what all processes of a run must have been started with: every key of the config, and versions."""
    keys = _flat(to_dict(config))
    versions = {f"the version of {name}": version for name, version in package_versions().items() if name != "python"}
    return {name: json.dumps(value, default=str) for name, value in keys.items()} | versions


def digest_of(facts: Facts) -> str:
    """Returns a digest by which facts are compared."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()


def refuse_differences(rank: int, differing: Sequence[int], mine: Facts, firsts: Facts) -> None:
    """Refuses to go on in a process whose facts are not those of the first one.

    Args:
        differing: all such processes.

    Raises:
        ConfigError: this is one of them; names what differs, with both values.
    """
    if rank not in differing:
        return
    names = [name for name in {**firsts, **mine} if mine.get(name) != firsts.get(name)]
    faults = [
        f"{name}: process 0 has {_shown(firsts.get(name))}, process {rank} has {_shown(mine.get(name))}"
        for name in names[:MOST_NAMED]
    ]
    if len(names) > MOST_NAMED:
        faults.append(f"and {len(names) - MOST_NAMED} more")
    who = "process" if len(differing) == 1 else "processes"
    listed = ", ".join(map(str, differing[:MOST_NAMED])) + (", ..." if len(differing) > MOST_NAMED else "")
    raise ConfigError(
        f"{who} {listed} of this run would train something else than process 0",
        faults,
    )


def _shown(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 120 else f"{value[:120]}..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
