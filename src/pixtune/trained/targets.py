"""Finds the linear layers that the words of a config mean: presets, patterns and endings of paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pixtune.errors import ConfigError


def resolve_targets(
    linears: Sequence[str],
    targets: Sequence[str],
    presets: Mapping[str, Sequence[str]],
    key: str = "lora_targets",
) -> tuple[str, ...]:
    """Returns the linear layers that are meant, as endings of paths; whole paths where a pattern was used.

    Args:
        linears: paths of all linear layers of the model.
        targets: presets by name, patterns with `*`, `?` or `[...]` over whole paths, or endings of paths.
        key: the config's key that has the targets, for the error.

    Raises:
        ConfigError: a target matches nothing; names it and lists the layers that there are.
    """
    found: dict[str, None] = {}
    faults = []
    for target in targets:
        for part in presets.get(target, (target,)):
            is_pattern = any(mark in part for mark in "*?[")
            if is_pattern and (matches := [name for name in linears if fnmatchcase(name, part)]):
                found.update(dict.fromkeys(matches))
            elif any(name == part or name.endswith(f".{part}") for name in linears):
                found[part] = None
            else:
                faults.append(f"{part!r} matches no linear layer.")
    if faults:
        endings = sorted({re.sub(r"^\w+\.\d+\.", "", name) for name in linears})  # without the block and its number
        known = f"Layers end with: {', '.join(endings)}." + (f" Presets: {', '.join(presets)}." if presets else "")
        raise ConfigError(f"{key} names layers that this model does not have", [f"{fault} {known}" for fault in faults])
    return tuple(found)
