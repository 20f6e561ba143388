"""Leaves out the examples that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import PurePath

from pixtune.data.examples import Example
from pixtune.errors import DataError


def without_excluded(examples: list[Example], names: Sequence[str]) -> list[Example]:
    """Returns the examples that are not named; a name may lack its ending.

    Raises:
        DataError: a name is no example's, or nothing is left.
    """
    if not names:
        return examples
    by_name: dict[str, set[str]] = {}
    for example in examples:
        for name in (example.name, str(PurePath(example.name).with_suffix(""))):
            by_name.setdefault(name, set()).add(example.name)
    faults = []
    for name in names:
        if name not in by_name:
            near = get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {len(examples)} others"
            faults.append(f"data_config.exclude names {name!r}, and no picture has that name{hint}")
    if faults:
        raise DataError("pictures that are to be left out do not exist", faults)
    excluded = {found for name in names for found in by_name[name]}
    left = [example for example in examples if example.name not in excluded]
    if not left:
        raise DataError("nothing is left to train on", [f"data_config.exclude names all {len(examples)} pictures."])
    return left
