"""A trainer as the engine sees it: how its configs are recognized and taken apart, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtune.migration.models import Model
from pixtune.migration.reading import Source
from pixtune.migration.rules import Lost, Rule

WHICH_MODEL = "it says which model is trained"
"""Text on keys that decide the model."""
NOT_HERE = Lost(
    "the file of the data set is not here: write the folder, its size and repeats, or give the file as --dataset FILE",
    to_fill_in=True,
)
"""Stands for a file of a data set that a config names, and that is elsewhere."""


@dataclass(frozen=True)
class Part:
    """One part of a config that a table applies to: its settings, or one folder of pictures."""

    written: Mapping[str, Any]
    """Values by dotted keys."""
    label: str = ""
    """Text before its keys in comments, such as "dataset.toml: "."""


@dataclass(frozen=True)
class Parts:
    """A config, taken apart."""

    settings: Part
    folders: tuple[Part, ...] = ()
    """Folders of pictures to be trained on."""
    regularization: tuple[Part, ...] = ()
    """Folders of regularization pictures."""
    held_out: tuple[str, ...] = ()
    """Folders of pictures that only measure."""
    lost: tuple[tuple[str, Lost], ...] = ()
    """Things that have no counterpart, each with its key there."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Values of ours that follow from the whole, with what they follow from: key -> (value, origin)."""


@dataclass(frozen=True)
class Options:
    """Words of the command that help to take a config apart."""

    dataset: Path | None = None
    """File of the data set in place of the one that the config names."""


@dataclass(frozen=True)
class Peer:
    """Another trainer."""

    name: str
    recognizes: Callable[[Source], bool]
    take_apart: Callable[[Source, Options], Parts]
    """Raises MigrationError where a config is incomplete."""
    model: Callable[[Parts], tuple[Model, str, str]]
    """The model, the value of `pretrained_model_name_or_path`, and the key and value there that say so."""
    length: Callable[[Mapping[str, Any]], tuple[int | None, float | None]]
    """From settings, with defaults filled in, to the number of steps, or the number of epochs."""
    examples_per_step: Callable[[Mapping[str, Any]], int]
    settings: tuple[Rule, ...]
    folders: tuple[Rule, ...]
    describes_data: Callable[[Any], str | None] = lambda tree: None
    """From a file's values to which file is to be given instead, where it is the description of a data set."""
    files: str = ""
    """Sentence of the page on which file to give."""
    misses: Sequence[str] = ()
    """Sentences on what people who come from it will miss."""
    remarks: Sequence[str] = ()
    """Sentences on what reads alike and is different."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by dotted keys. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """Returns the mappings of a list of them, or of one alone; others are left out."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]
