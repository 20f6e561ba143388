"""Values that PEFT's configs give to layers by patterns, resolved within bounds, whoever wrote the patterns.

A regular expression can take longer than anyone waits. So the steps that a match may take at most are estimated first,
and PEFT itself is handed nothing but the layers' own paths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value", int, float)

LITERAL = re.compile(r"(?:\w|-|\\?\.)+")
"""Patterns that are the end of a path and nothing else, as those of most files are."""
PATH_LETTERS = 60
"""Number of places at which a repeat may end in the path of a layer."""
MOST_STEPS = 10**9
"""Steps that matching all patterns with all layers may take: some seconds."""
ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
"""One escaped letter, or a set of letters: each matches one letter."""
BACK_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")
QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")


def values_by_layer(patterns: Mapping[str, Value], layers: Sequence[str], default: Value) -> dict[str, Value]:
    """Returns the value of each layer: that of the first pattern that matches its path or an end of it, as in PEFT.

    Raises:
        ValueError: a pattern is none, or takes too long; shows it.
    """
    literals: dict[str, tuple[int, Value]] = {}
    expressions = []
    for place, (pattern, value) in enumerate(patterns.items()):
        if LITERAL.fullmatch(pattern):
            literals.setdefault(pattern.replace("\\.", "."), (place, value))
        else:
            expressions.append((place, value, pattern))
    allowed = MOST_STEPS // max(len(layers), 1)
    steps = 0
    for _, _, pattern in expressions:
        steps += steps_of(pattern)
        if steps > allowed:
            raise ValueError(f"the pattern {pattern[:60]!r} is too intricate")
    compiled = [(place, value, _compile(pattern)) for place, value, pattern in expressions]
    nowhere = (len(patterns), default)
    found = {}
    for layer in layers:
        names = layer.split(".")
        endings = (".".join(names[first:]) for first in range(len(names)))
        best = min(
            (literals[ending] for ending in endings if ending in literals), default=nowhere, key=lambda it: it[0]
        )
        for place, value, expression in compiled:
            if place < best[0] and expression.match(layer):
                best = (place, value)
        found[layer] = best[1]
    return found


def as_patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Returns patterns for PEFT of the layers' own paths, one for each value other than the default."""
    layers_of: dict[Value, list[str]] = {}
    for layer, value in values.items():
        if value != default:
            layers_of.setdefault(value, []).append(re.escape(layer))
    return {f"^(?:{'|'.join(layers)})": value for value, layers in layers_of.items()}


def steps_of(pattern: str) -> int:
    """Estimates from above the steps of matching a pattern with a layer's path.

    Each repeat may end at any letter, and each group may take any of its alternatives. What is repeated as a group, or
    refers back, has no such bound.
    """
    if len(pattern) > 10_000 or BACK_REFERENCE.search(pattern):
        return MOST_STEPS + 1
    plain = ESCAPED.sub("x", pattern)
    if QUANTIFIED_GROUP.search(plain):
        return MOST_STEPS + 1
    plain = re.sub(r"\(\?", "(", plain)
    alternatives, open_groups = [], [1]
    for mark in plain:
        if mark == "(":
            open_groups.append(1)
        elif mark == ")" and len(open_groups) > 1:
            alternatives.append(open_groups.pop())
        elif mark == "|":
            open_groups[-1] += 1
    exponent = sum(plain.count(mark) for mark in "*+{")
    if exponent > 4:
        return MOST_STEPS + 1
    ways = PATH_LETTERS**exponent * 2 ** min(plain.count("?"), 60)
    return ways * math.prod([*alternatives, *open_groups])


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {pattern[:60]!r} is none ({error})") from error
