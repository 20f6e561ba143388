"""Finds the linear layers that the words of a config mean: presets, patterns and endings of paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.plan.adapter import USUAL_FACTOR, Adapter

RANKS_KEY = "adapter.rank_pattern"


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


def ending_with(linears: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Returns the paths of linear layers that are among `endings`, or end with one."""
    return [name for name in linears if any(name == ending or name.endswith(f".{ending}") for ending in endings)]


def adapter_of(config: TrainConfig, layers: Sequence[str], presets: Mapping[str, Sequence[str]]) -> Adapter:
    """Returns the adapter that a config asks for, in what decides its size.

    Args:
        layers: paths of all layers that get an adapter.

    Raises:
        ConfigError: a name of `adapter.rank_pattern` matches none of them, or only those that earlier names have.
    """
    own = config.adapter
    ranks = ranks_of_layers(layers, own.rank_pattern, presets)
    return Adapter(own.kind, config.rank, ranks, own.lokr_factor or USUAL_FACTOR, own.lokr_low_rank)


def ranks_of_layers(
    layers: Sequence[str], rank_pattern: Mapping[str, int], presets: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Returns the ranks of the layers that names mean, by their paths. Of several names for a layer, the first counts.

    Args:
        rank_pattern: ranks by presets, patterns or endings of paths, as in `resolve_targets`.

    Raises:
        ConfigError: see `adapter_of`.
    """
    ranks: dict[str, int] = {}
    for name, rank in rank_pattern.items():
        meant = [layer for layer in layers if any(_means(part, layer) for part in presets.get(name, (name,)))]
        if not meant:
            resolve_targets(layers, [name], presets, RANKS_KEY)
        if meant and ranks.keys() >= set(meant):
            raise ConfigError(
                f"{RANKS_KEY} has a name without effect",
                [f"{name!r} names only layers that an earlier name has, and the first one counts: put it before that."],
            )
        ranks |= {layer: rank for layer in meant if layer not in ranks}
    return ranks


def _means(part: str, layer: str) -> bool:
    return fnmatchcase(layer, part) or layer == part or layer.endswith(f".{part}")
