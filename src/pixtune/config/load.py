"""Reads a YAML file and `key=value` words into a frozen TrainConfig, or raises one error that lists all problems."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pixtune.config.contradictions import contradictions
from pixtune.config.other_names import OTHER_VALUES
from pixtune.config.schema import LIST_SECTIONS, NOT_YET, TrainConfig, is_leaf, leaf_keys, section_of
from pixtune.config.sources import COMMAND_LINE, Entry, Fault, Place, overridden, read_file, read_overrides, show
from pixtune.config.yaml_tree import ConfigDumper
from pixtune.errors import ConfigError, NotYetError
from pixtune.inputs.misspelt import did_you_mean
from pixtune.inputs.printing import one_line

logger = logging.getLogger(__name__)

FOLDERS = (
    "data_config.img_dir", "data_config.control_dir", "data_config.mask_dir", "data_config.folders[].img_dir",
    "data_config.folders[].control_dir", "data_config.folders[].mask_dir", "validation.held_out_dir",
    "prior_preservation.folder",
)  # fmt: skip
"""Keys whose folders must exist before a run does anything else."""

WRITTEN = ("output_dir", "data_config.cache_dir")
"""Keys of folders that a run writes to."""


def load_config(path: Path | None, overrides: Sequence[str] = (), folders_must_exist: bool = True) -> TrainConfig:
    """Reads a config file, then overrides such as `rank=8` or `data_config.img_dir=/pictures`, which win.

    Relative paths are relative to the current folder. `disable_quantization` wins over `quantize`, with a warning in
    the log (logger "pixtune.config.load").

    Args:
        path: the YAML file; None where `overrides` hold everything.
        overrides: `key=value` words with values in YAML; of two equal keys the last one wins.
        folders_must_exist: whether a missing folder of pictures is a problem; a plan can be made without it.

    Raises:
        ConfigError: lists all problems, each with its place, key, value and what would be right.
        NotYetError: the config is right, but asks for documented things that this version cannot do.
    """
    from_command = read_overrides(overrides)
    if path is None:
        whole, entries, faults = COMMAND_LINE, from_command.entries, from_command.faults
    else:
        from_file = read_file(path)
        whole, entries = Place(0, str(path)), overridden(from_file.entries, from_command.entries)
        faults = [*from_file.faults, *from_command.faults]
        if not from_file.readable:
            raise _error(whole, faults)

    faults += _beyond_lists(entries)
    try:
        config, wrong_keys = TrainConfig.model_validate(_nested(entries)), set[str]()
    except ValidationError as error:
        config, by_key = None, _errors_by_key(error)
        wrong_keys = set(by_key)
        faults += [_field_fault(key, errors, entries.get(key), whole) for key, errors in by_key.items()]
    right = {key: entry.value for key, entry in entries.items() if key not in wrong_keys}
    faults += _contradictions(right, wrong_keys, entries, whole)
    if folders_must_exist:
        faults += _folder_faults(right, entries)
    if faults or config is None:
        raise _error(whole, faults)

    if config.disable_quantization and config.quantize:
        logger.warning("disable_quantization is true and wins over quantize: nothing is quantized")
        config = config.model_copy(update={"quantize": False})
    _refuse_what_is_missing_yet(config, entries)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns every key with its value in force, as JSON can hold it."""
    return config.model_dump(mode="json")


def resolved_yaml(config: TrainConfig) -> str:
    """Returns every key with its value in force, as the text of a config file that loads to the same config."""
    text: str = yaml.dump(to_dict(config), Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=120)
    return text


# ---- checks


def _nested(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns the tree of all values. What is within a list of sections joins its items there."""
    tree: dict[str, Any] = {"data_config": {}}  # required, so that its own required keys are asked for by name
    in_order = sorted(entries.values(), key=lambda entry: "[" in entry.key)  # a list comes before what is in it
    for entry in in_order:
        section, _, name = entry.key.rpartition(".")
        listed, _, number = section.rstrip("]").partition("[")
        if number:
            items = _items(tree, listed)
            if int(number) < len(items):
                items[int(number)][name] = entry.value
        else:
            value = entry.value
            if entry.key in LIST_SECTIONS and isinstance(value, list):
                value = [{} for _ in value]
            (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _items(tree: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the items of a list of sections in a tree of values; none where it is no such list."""
    section, _, name = key.rpartition(".")
    found = tree.get(section, {}).get(name)
    return found if isinstance(found, list) else []


def _beyond_lists(entries: Mapping[str, Entry]) -> list[Fault]:
    """Returns the faults of `data_config.folders[5].repeats=2` where the list has no such item."""
    faults = []
    for key, entry in entries.items():
        listed, _, rest = key.partition("[")
        items = entries[listed].value if listed in entries else []
        if rest and isinstance(items, list) and int(rest.partition("]")[0]) >= len(items):
            sentence = f"{entry.written_as} is given, and {listed} has {len(items)} items, counted from 0"
            faults.append(Fault(entry.place, sentence))
    return faults


def _errors_by_key(error: ValidationError) -> dict[str, list[ErrorDetails]]:
    """Groups pydantic's errors by dotted key. Errors of the model as a whole are left to `_contradictions`.

    The location of each is what follows the key: an item of a list, or a kind of value.
    """
    by_key = dict[str, list[ErrorDetails]]()
    for details in error.errors():
        text, key, used = "", "", 0
        for count, word in enumerate(details["loc"], 1):
            text = f"{text}[{word}]" if isinstance(word, int) else f"{text}.{word}".lstrip(".")
            if is_leaf(text):
                key, used = text, count
        if key:
            by_key.setdefault(key, []).append({**details, "loc": details["loc"][used:]})
    return by_key


def _field_fault(key: str, errors: Sequence[ErrorDetails], entry: Entry | None, whole: Place) -> Fault:
    description = (_field(key).description or "").split("\n\n")[0].replace("\n", " ")
    if entry is None:
        return Fault(whole, f"{key} is required and missing. {description}")
    names = [str(details["loc"][0]) for details in errors if details["loc"] and isinstance(entry.value, dict)]
    of_items = [details for details in errors if details["type"] != "too_short"]  # a wrong item is not counted either
    if any(details["type"].startswith(("greater_than", "less_than")) for details in of_items):
        # A number out of range stays so in a list.
        of_items = [details for details in of_items if details["type"] != "tuple_type"]
    wanted = " or ".join(dict.fromkeys(_wanted(details) for details in of_items or errors))
    sentence = f"{entry.written_as} is {show(entry.value)}: must be {wanted}"
    if key == "samples.prompts" and str(entry.value).endswith((".txt", ".jsonl")):
        sentence += "; a file of prompts is samples.prompts_file"
    if names:
        sentence += f", and is not for {', '.join(repr(one_line(name)) for name in names[:3])}"
    near = _meant_by_others(key, entry.value) or _near_choice(errors, entry.value)
    if near:
        sentence += f"; did you mean {near}?"
    return Fault(entry.place, sentence)


_WANTED = {
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "dict_type": "names with a value each, as {{to_q: 8}}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "path_type": "a path",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}
"""Meaning of pydantic's error types, in words that follow "must be"."""


def _wanted(details: ErrorDetails) -> str:
    if details["type"] == "value_error":  # raised by a check of our own, which says "must be ..."
        return str(details["ctx"]["error"]).removeprefix("must be ")
    form = _WANTED.get(details["type"])
    if form is None:
        return details["msg"].removeprefix("Input should be ")
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in details.get("ctx", {}).items()}
    wanted = form.format(**bounds).replace("'", '"')
    if details["type"] == "string_type" and isinstance(details["input"], bool | int | float):
        wanted += " (put it in quotes)"
    of_a_name = details["loc"][-1:] == ("[key]",)  # pydantic's mark of what is wrong with a name, not with its value
    position = next((word for word in details["loc"] if isinstance(word, int) and not of_a_name), None)
    if details["type"] == "tuple_type" and position is None and isinstance(details["input"], str | int | float):
        wanted += f", as [{show(details['input'])}]"
    return wanted if position is None else f"{wanted} in item {position + 1}"


def _meant_by_others(key: str, value: object) -> str | None:
    word = re.sub("[^a-z0-9]", "", str(value).rpartition(".")[2].lower())
    return next((ours for pattern, ours in OTHER_VALUES.get(key, ()) if re.search(pattern, word)), None)


def _near_choice(errors: Sequence[ErrorDetails], value: object) -> str | None:
    choices = [word for details in errors for word in str(details.get("ctx", {}).get("expected", "")).split("'")[1::2]]
    near = get_close_matches(str(value).lower(), choices, n=1)
    return f'"{near[0]}"' if near else None


def _contradictions(
    right: Mapping[str, Any], wrong_keys: set[str], entries: Mapping[str, Entry], whole: Place
) -> list[Fault]:
    values = {key: right.get(key, _field(key).default) for key in leaf_keys() if key not in wrong_keys}
    tree = _nested({key: entry for key, entry in entries.items() if key not in wrong_keys})
    values |= {key: _items(tree, key) for key in LIST_SECTIONS if _items(tree, key)}
    return [
        Fault(max((entries[key].place for key in keys if key in entries), default=whole), sentence)
        for keys, sentence in contradictions(values)
        if not wrong_keys.intersection(keys)
    ]


def _folder_faults(right: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[Fault]:
    faults = []
    for key in (key for key in entries if re.sub(r"\[\d+\]", "[]", key) in FOLDERS):
        value = right.get(key)
        for name in [] if value is None else [value] if isinstance(value, str) else value:
            folder = os.path.expanduser(name)
            if not os.path.isdir(folder):
                problem = "is a file, not a folder" if os.path.exists(folder) else "there is no such folder"
                looked = "" if os.path.isabs(folder) else f" (looked for {os.path.abspath(folder)})"
                hint = f".{meant}" if (meant := did_you_mean(Path(folder))) else ""
                faults.append(Fault(entries[key].place, f"{key} is {show(name)}: {problem}{looked}{hint}"))
    faults += [
        Fault(entries[key].place, f"{key} is {show(right[key])}: {reason}")
        for key in WRITTEN
        if right.get(key) is not None and (reason := why_not_writable(os.path.expanduser(right[key])))
    ]
    return faults


def why_not_writable(folder: str) -> str | None:
    """Returns why a folder can neither be written to nor made, as far as that shows without writing; None: it can."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    whose = "" if place == os.path.abspath(folder) else f"{place} "
    if not os.path.isdir(place):
        kind = "is a link to nothing" if not os.path.exists(place) else "is a file, not a folder"
        return f"{whose}{kind}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{whose or 'it '}may not be written to (a read-only disk, or another user's folder)"
    return None


def _refuse_what_is_missing_yet(config: TrainConfig, entries: Mapping[str, Entry]) -> None:
    values = to_dict(config)
    lines = []
    for key, honoured in NOT_YET.items():
        section, _, name = key.rpartition(".")
        value = values[section][name] if section else values[name]
        if value not in honoured:
            possible = " or ".join("absent" if choice is None else show(choice) for choice in honoured)
            lines.append(f"  - {entries[key].place.text}: {key} is {show(value)}: must be {possible} for now")
    if lines:
        raise NotYetError("\n".join(["this version of pixtune cannot do these yet:", *lines]))


def _field(key: str) -> FieldInfo:
    section, _, name = key.rpartition(".")
    return (section_of(section) or TrainConfig).model_fields[name]


def _error(whole: Place, faults: Sequence[Fault]) -> ConfigError:
    count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    return ConfigError(f"{whole.text} has {count}", [str(fault) for fault in sorted(faults)])
