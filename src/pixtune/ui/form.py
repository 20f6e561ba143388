"""The fields of a config's form, made of the schema: each key with its values in force and its own description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pixtune.config.keys_page import KeyDescription, describe_keys
from pixtune.ui.yaml_edit import value_text

ESSENTIAL = (
    "pretrained_model_name_or_path",
    "samples.prompts",
    "max_train_steps",
    "data_config.img_size",
    "rank",
    "learning_rate",
    "train_batch_size",
)
"""Keys that are shown without asking."""
OF_CONTROLS = ("data_config.control_dir",)
"""Keys that are shown beside these for models that edit pictures."""
LABELS = {
    "data_config.control_dir": "Folder of the control pictures, with the pictures' names",
    "pretrained_model_name_or_path": "Model",
    "samples.prompts": "Prompts to draw while it learns",
    "max_train_steps": "Steps",
    "data_config.img_size": "Size of the pictures, pixels",
    "rank": "Rank",
    "learning_rate": "Learning rate",
    "train_batch_size": "Pictures at once",
}
SECTIONS = {"": "The run itself", "data_config": "Pictures and captions"}


@dataclass(frozen=True)
class Field:
    """One key of the form."""

    key: str
    label: str
    values: str
    default: str
    meaning: str
    text: str
    """Value that the config gives, as YAML; "" where it gives none."""
    choices: tuple[str, ...]
    """Values to choose from; empty: it is typed."""

    lines: str = ""
    """Value that is a list of texts, one a line."""

    @property
    def id(self) -> str:
        return "key-" + self.key.replace(".", "-")


@dataclass(frozen=True)
class Section:
    """Keys that belong together."""

    title: str
    fields: tuple[Field, ...]
    num_given: int


@cache
def _keys() -> tuple[KeyDescription, ...]:
    return tuple(key for key in describe_keys() if "[]" not in key.name)


def all_keys() -> tuple[KeyDescription, ...]:
    """Returns every key that the form shows."""
    return _keys()


def is_key(name: str) -> bool:
    """Returns whether a config has a key of this dotted name."""
    return any(key.name == name for key in _keys())


def choices_of(values: str) -> tuple[str, ...]:
    """Returns the values that a description lists; none where it describes any others."""
    words = [word for part in values.split(" | ") for word in part.split(" or ")] if '"' in values else []
    if words and all(word.startswith('"') and word.endswith('"') for word in words):
        return tuple(json.loads(word) for word in words)
    return ("true", "false") if values == "true or false" else ()


def build_field(key: KeyDescription, given: Mapping[str, Any]) -> Field:
    """Builds the field of a key."""
    value = given.get(key.name)
    choices = choices_of(key.values)
    text = "" if value is None else str(value) if isinstance(value, str) and choices else value_text(value)
    label = LABELS.get(key.name, key.name.rpartition(".")[2].replace("_", " "))
    lines = "\n".join(map(str, value)) if isinstance(value, list) else ""
    return Field(key.name, label, key.values, key.default, key.meaning, text, choices, lines)


def essential_fields(given: Mapping[str, Any], edits_pictures: bool) -> list[Field]:
    """Returns the fields that are shown without asking.

    Args:
        edits_pictures: whether the model takes control pictures.
    """
    by_name = {key.name: key for key in _keys()}
    return [build_field(by_name[name], given) for name in (*ESSENTIAL, *(OF_CONTROLS if edits_pictures else ()))]


def all_sections(given: Mapping[str, Any]) -> Sequence[Section]:
    """Returns all keys by section."""
    grouped: dict[str, list[Field]] = {}
    for key in _keys():
        grouped.setdefault(key.name.rpartition(".")[0], []).append(build_field(key, given))
    return [
        Section(SECTIONS.get(name, name.replace("_", " ")), tuple(fields), sum(bool(each.text) for each in fields))
        for name, fields in grouped.items()
    ]
