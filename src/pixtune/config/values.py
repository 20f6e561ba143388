"""Kinds of values that config keys have, with what makes one wrong: bounds, names that cannot be printed, rules."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from pixtune.config.yaml_tree import ABOUT_BACKSLASHES
from pixtune.inputs.printing import is_unfit


def _not_empty(value: object) -> object:
    if value == "":  # Path("") is the current folder, which nobody means
        raise ValueError("must be a path, which empty text is not")
    return value


def _home_expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))


_Name = TypeVar("_Name", str, Path)
_CONTROL_NAMES = {"\n": "a line feed", "\t": "a tabulator", "\b": "a backspace", "\f": "a form feed", "\r": "a return"}
_LOST_BACKSLASH = re.compile(r"[A-Za-z]:[^/\\]")


def _printable(name: _Name) -> _Name:
    """Refuses names that a file can have and nobody gives it; most come of a Windows path in double quotes."""
    text = str(name)
    unfit = [_CONTROL_NAMES.get(mark, f"U+{ord(mark):04X}") for mark in dict.fromkeys(text) if is_unfit(mark)]
    if unfit:
        raise ValueError(
            f"must be a name that can be printed, and this holds {' and '.join(unfit)}. {ABOUT_BACKSLASHES}"
        )
    if _LOST_BACKSLASH.match(text):
        raise ValueError(f"must be a path with a slash behind the drive's letter. {ABOUT_BACKSLASHES}")
    return name


def _whole_characters(text: str) -> str:
    if any("\ud800" <= mark <= "\udfff" for mark in text):
        raise ValueError("must be text of whole characters, and this holds half of one (a lone surrogate)")
    return text


def _each_once(values: tuple[float, ...]) -> tuple[float, ...]:
    if len({f"{value + 0:g}" for value in values}) < len(values):  # as file names have them; -0 is 0
        raise ValueError("must be values of which none is given twice, to 6 digits")
    return values


def _piecewise(rules: str) -> str:
    """Refuses rules that diffusers' `get_scheduler` could not read, or would read in another order."""
    *stretches, last = rules.split(",")
    try:
        pairs = [(float(factor), int(step)) for factor, step in (stretch.split(":") for stretch in stretches)]
        factors, steps = [factor for factor, _ in pairs] + [float(last)], [step for _, step in pairs]
    except ValueError:
        factors, steps = [math.nan], []
    if not all(0 <= factor < math.inf for factor in factors) or steps != sorted({step for step in steps if step > 0}):
        raise ValueError(
            'must be FACTOR:UNTIL_STEP and a last factor, with steps that rise, for example "1:10,0.1:20,0.01"'
        )
    return rules


# YAML has no path type, so text is taken; `~` is the home folder, as in a shell.
FilePath = Annotated[
    Path, Field(strict=False), BeforeValidator(_not_empty), AfterValidator(_printable), AfterValidator(_home_expanded)
]
Name = Annotated[str, AfterValidator(_printable)]
Words = Annotated[tuple[Annotated[str, AfterValidator(_whole_characters)], ...], Field(strict=False)]
FilePaths = Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)]
PathLists = Annotated[tuple[FilePaths, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Repeats = Annotated[float, Field(ge=0, le=10_000)]
LossWeight = Annotated[float, Field(ge=0, le=1000)]
LossWeights = Mapping[str, Annotated[float, Field(gt=0, le=1000)]]
StepRules = Annotated[str, AfterValidator(_piecewise)]

# Upper limits beyond all use: a slip of the keyboard is an error at once, not a table or a queue that fills all memory.
FewThousand = Annotated[int, Field(ge=1, le=65_536)]
Ranks = Annotated[dict[Annotated[str, Field(min_length=1), AfterValidator(_whole_characters)], FewThousand], Field()]
Side = Annotated[int, Field(ge=16, le=16_384)]
Sides = Annotated[tuple[Side, ...], Field(strict=False, min_length=1, max_length=16)]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1_000_000)], ...], Field(strict=False, min_length=1)]
_Pair = Annotated[tuple[Side, ...], Field(strict=False, min_length=2, max_length=2)]
Sizes = Annotated[tuple[_Pair, ...], Field(strict=False)]
Strengths = Annotated[
    tuple[Annotated[float, Field(ge=-10, le=10)], ...], Field(strict=False, min_length=1), AfterValidator(_each_once)
]
Text = Annotated[str, AfterValidator(_whole_characters)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=-(2**63), le=2**64 - 1)], ...], Field(strict=False, min_length=1)]
