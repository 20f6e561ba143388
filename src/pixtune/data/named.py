"""Examples that the config names, to leave them out or to have their losses count more or less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import PurePath

from pixtune.data.example_table import Example, Examples, chosen_from
from pixtune.errors import DataError


def without_excluded(examples: Sequence[Example], names: Sequence[str]) -> Sequence[Example]:
    """Returns the examples that are not named; a name may lack its ending.

    Raises:
        DataError: a name is no example's, or nothing is left.
    """
    if not names:
        return examples
    excluded = _examples_of(examples, names, "data_config.exclude", "pictures that are to be left out do not exist")
    left = chosen_from(examples, lambda example: example.name not in excluded)
    if examples and not left:
        raise DataError("nothing is left to train on", [f"data_config.exclude names all {len(examples)} pictures."])
    return left


def with_loss_weights(examples: Sequence[Example], weights: Mapping[str, float]) -> Sequence[Example]:
    """Returns the examples with those that are named weighted by their own factor besides their folder's.

    Args:
        weights: factors by name; a name may lack its ending.

    Raises:
        DataError: a name is no example's, or two names are one example's.
    """
    if not weights:
        return examples
    named = _examples_of(examples, weights, "data_config.loss_weights", "pictures that are to be weighted do not exist")
    twice = [(example, names) for example, names in named.items() if len(names) > 1]
    if twice:
        raise DataError(
            "pictures have two weights",
            [
                f"data_config.loss_weights names {example} twice: {', '.join(names)}. Keep one."
                for example, names in twice
            ],
        )
    factor_of = {example: weights[names[0]] for example, names in named.items()}
    return Examples(
        replace(example, loss_weight=example.loss_weight * factor_of[example.name])
        if example.name in factor_of
        else example
        for example in examples
    )


def _examples_of(examples: Sequence[Example], names: Iterable[str], key: str, problem: str) -> dict[str, list[str]]:
    """Returns the names of examples, each with the words that a config's key has for it."""
    by_name: dict[str, dict[str, None]] = {}
    found: dict[str, list[str]] = {}
    faults = []
    for example in examples:
        for name in {example.name, str(PurePath(example.name).with_suffix(""))}:
            by_name.setdefault(name, {})[example.name] = None
    for name in dict.fromkeys(names):
        if name in by_name:
            for example_name in by_name[name]:
                found.setdefault(example_name, []).append(name)
            continue
        near = get_close_matches(name, by_name, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {len(examples)} others"
        faults.append(f"{key} names {name!r}, and no picture has that name{hint}")
    if faults:
        raise DataError(problem, faults)
    return found
