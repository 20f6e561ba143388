"""Describes every key for people: `pixtune keys` prints it, and `docs/config.md` is the page of it (`make schema`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixtune.config.other_names import ABSENT, OTHER_NAMES
from pixtune.config.schema import NOT_YET, OLDER_NAMES, TrainConfig, item_keys, leaf_keys, section_of
from pixtune.config.sources import nearest_keys

NUMBERS = {"integer": "a whole number", "number": "a number"}
PLAIN_TYPES = {"string": "a text", "boolean": "true or false", "null": "null", **NUMBERS}


@dataclass(frozen=True)
class KeyDescription:
    """A key as a user reads of it."""

    name: str
    """Dotted: "rank", "data_config.img_dir", "data_config.folders[].repeats"."""
    values: str
    """Values that it can have, in words."""
    default: str
    """Value where it is left out, as in YAML; "required" where it cannot be."""
    meaning: str
    """One or more sentences."""
    other_names: tuple[str, ...] = ()
    """Keys of other trainers that mean it."""

    def in_text(self) -> str:
        """Returns the description for a terminal, wrapped at its spaces by whoever prints it."""
        lines = [f"{self.name}: {self.values}; {self.default_in_words}", f"    {self.meaning}"]
        if self.other_names:
            lines.append(f"    elsewhere: {', '.join(self.other_names)}")
        return "\n".join(lines)

    @property
    def default_in_words(self) -> str:
        return self.default if self.default == "required" else f"default {self.default}"


def describe_keys() -> list[KeyDescription]:
    """Describes all keys in the schema's order."""
    schema = TrainConfig.model_json_schema()
    elsewhere: dict[str, list[str]] = {}
    for name, ours in (*OTHER_NAMES.items(), *OLDER_NAMES.items()):
        elsewhere.setdefault(ours, []).append(name)
    described = []
    for key in (*leaf_keys(), *item_keys()):
        section, _, name = key.rpartition(".")
        of_section = section_of(section)
        holder = schema["$defs"][of_section.__name__] if of_section else schema
        values = holder["properties"][name]
        required = name in holder.get("required", ())
        described.append(
            KeyDescription(
                key,
                in_words(values),
                "required" if required else json.dumps(values.get("default"), ensure_ascii=False),
                " ".join(values["description"].split()),
                tuple(elsewhere.get(key, ())),
            )
        )
    return described


def in_words(values: Mapping[str, Any]) -> str:
    """Describes the values that a part of a JSON schema allows."""
    if "anyOf" in values:
        return " or ".join(in_words(each) for each in values["anyOf"] if each.get("type") != "null")
    if "enum" in values:
        return " | ".join(json.dumps(each) for each in values["enum"])
    if "$ref" in values:
        return "a section of keys"
    if values.get("type") == "array":
        items = in_words(values["items"]).removeprefix("a ")
        return "a list of " + re.sub("^(whole number|number|path|list|section)", r"\1s", items)
    if values.get("type") == "object":
        return f"names, each with {in_words(values['additionalProperties'])}"
    if values.get("format") == "path":
        return "a path"
    words = PLAIN_TYPES[values["type"]]
    low, high = values.get("minimum"), values.get("maximum")
    if values["type"] in NUMBERS and high is not None and high < 2**31 and low is not None:
        return f"{words} from {low:,} to {high:,}"
    if values["type"] in NUMBERS and low is not None and abs(low) < 2**31:
        return f"{words} from {low:,} up"
    if "exclusiveMinimum" in values:
        return f"{words} above {values['exclusiveMinimum']:g}" + (f", up to {high:g}" if high is not None else "")
    return words


def find_keys(words: Sequence[str]) -> tuple[list[KeyDescription], list[str]]:
    """Finds the keys that words mean, by name, by other trainers' names or by their description.

    Args:
        words: parts of names or descriptions, in any letter case; none: all keys.

    Returns:
        The keys, and sentences on words that mean something pixtune does not have.
    """
    keys = describe_keys()
    if not words:
        return keys, []
    found: dict[str, KeyDescription] = {}
    sentences = []
    for word in words:
        asked = word.lower().replace("-", "_").strip("_=")
        matches = [key for key in keys if _rank(asked, key) == 0] or [key for key in keys if _rank(asked, key) == 1]
        if asked in ABSENT:
            matches = []
            sentences.append(f"{word}: {ABSENT[asked]}")
        elif not matches:
            near = [key for key in keys if key.name in nearest_keys(asked)]
            sentences.append(f"{word}: no key has this word" + ("; near it:" if near else ""))
            matches = near
        found |= {key.name: key for key in matches}
    return [found[key.name] for key in keys if key.name in found], sentences


def _rank(asked: str, key: KeyDescription) -> int:
    """Returns 0 where a word is in a key's names, 1 where it is in its description, 2 elsewhere."""
    if asked in key.name.lower() or asked in key.other_names:
        return 0
    return 1 if asked.replace("_", " ") in key.meaning.lower() else 2


# ---- the page

PAGE_HEAD = """# Every key of a config

This page is generated by `make schema` from `src/pixtune/config/schema.py`. `pixtune keys WORD` finds a key by its
name, by its name in other trainers, or by a word of its description, and editors show the same for the files in
`train_configs/`.

A config is a YAML file. Any key can also stand on the command line, as `rank=32` or `data_config.img_dir=./pictures`,
and wins over the file there. Required are `pretrained_model_name_or_path`, `output_dir`, `data_config.img_dir` or
`data_config.folders`, and one of `max_train_steps` and `num_train_epochs`. Where a key about memory is left out, the
planner chooses by the memory there is: `pixtune plan CONFIG` shows what and why.
"""


def page() -> str:
    """Returns the content of `docs/config.md`."""
    parts = [PAGE_HEAD]
    by_section: dict[str, list[KeyDescription]] = {}
    for key in describe_keys():
        by_section.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, keys in by_section.items():
        title = f"`{section}`" if section else "At the top level"
        parts.append(f"## {title}\n\n{table(('key', 'values', 'default', 'meaning'), map(_row, keys))}")
    names = sorted((other, key.name) for key in describe_keys() for other in key.other_names)
    parts.append(
        "## Names in other trainers\n\nA key that another trainer has by another name is answered with the name here, "
        "wherever it stands.\n\n" + table(("there", "here"), ((f"`{there}`", f"`{here}`") for there, here in names))
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in ABSENT.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    rows = [(", ".join(absent), reason) for reason, absent in by_reason.items()]
    rows += [(f"`{key}`", f"Only {', '.join(map(json.dumps, values))} so far.") for key, values in NOT_YET.items()]
    parts.append(
        "## What other trainers have and pixtune does not\n\nThese keys are refused with the same words.\n\n"
        + table(("keys", "instead"), rows)
    )
    return "\n".join(parts)


def _row(key: KeyDescription) -> tuple[str, ...]:
    default = key.default if key.default in ("required", "null") else f"`{key.default}`"
    return f"`{key.name.rpartition('.')[2]}`", key.values, "" if default == "null" else default, key.meaning


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
