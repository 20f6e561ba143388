"""Folders of pictures of a config in our terms: one in `data_config`, or several in `data_config.folders`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixtune.config.sections import DataConfig, FolderConfig
from pixtune.data.pairs import find_pairs
from pixtune.migration.models import Model
from pixtune.migration.peer import Part, Peer
from pixtune.migration.rules import Look, Rule, defaults_of
from pixtune.migration.tables import Leftover, Line, apply

PLACEHOLDER = "./dataset"
"""Folder of pictures where a config names none."""


def translate(
    peer: Peer, part: Part, rules: Sequence[Rule], model: Model, faults: list[str]
) -> tuple[dict[str, Line], list[Leftover]]:
    return apply(peer, part, rules, Look(part.written, defaults_of(rules), model), faults)


def turns_of(folders: Sequence[Mapping[str, Line]]) -> float | None:
    """Counts the turns of an epoch; None: a folder is not on this machine, or there is none."""
    turns = 0.0
    for lines in folders:
        place = lines.get("img_dir")
        folder = None if place is None else Path(str(place.value)).expanduser()
        count = len(find_pairs(folder, caption_for=lambda path: "").pairs) if folder and folder.is_dir() else 0
        if not count:
            return None
        turns += count * float(lines["repeats"].value if "repeats" in lines else 1)
    return turns or None


def from_folders(translated: Sequence[tuple[Mapping[str, Line], Any]]) -> dict[str, Any]:
    """Returns what folders say of the whole run, as `folder.KEY`: a batch size stands with the data set in places."""
    return {
        f"folder.{key}": line.value
        for lines, _ in reversed(translated)
        for key, line in lines.items()
        if key not in FolderConfig.model_fields
    }


def without_top(top: dict[str, Line], found: Mapping[str, Line], leftovers: list[Leftover]) -> dict[str, Line]:
    """Moves what a folder says of the whole run to the top; folders that disagree are reported."""
    rest = {}
    for key, line in found.items():
        if key in FolderConfig.model_fields:
            rest[key] = line
        elif key in top and top[key].value != line.value and not top[key].by_default:
            if not line.by_default:
                why = f"all folders share {key} here, and {top[key].value} is taken"
                leftovers.append(Leftover("changes the result", line.origin, why))
        elif key not in top or not line.by_default or top[key].by_default:
            top[key] = line
    return rest


OF_REGULARIZATION = {"img_dir": "folder", "repeats": "repeats", "loss_weight": "loss_weight"}
"""Keys of a folder with their names in `prior_preservation`."""


def merged(folders: Iterable[dict[str, Line]]) -> list[dict[str, Line]]:
    """Joins folders of the same pictures at several sizes: here it is one, of whose sizes each turn draws one."""
    found: list[dict[str, Line]] = []
    for lines in folders:
        twin = next((each for each in found if _same_pictures(each, lines)), None)
        if twin is None:
            found.append(dict(lines))
            continue
        sizes = [*_as_list(twin["img_size"].value), *_as_list(lines["img_size"].value)]
        shares = [float(each["repeats"].value) if "repeats" in each else 1.0 for each in (twin, lines)]
        old = twin["img_size"]
        twin["img_size"] = replace(old, value=sizes, origin=f"{old.origin}, {lines['img_size'].origin}")
        origins = [each["repeats"].origin for each in (twin, lines) if "repeats" in each]
        why = ", ".join(["the same folder at several sizes", *dict.fromkeys(origins)])
        twin["repeats"] = Line("repeats", sum(shares), why)
    return found


def _same_pictures(one: Mapping[str, Line], other: Mapping[str, Line]) -> bool:
    several = {"img_size", "repeats", "name"}
    if "img_size" not in one or "img_size" not in other or "img_dir" not in one:
        return False
    keys = (set(one) | set(other)) - several
    values = [[each[key].value if key in each else None for key in keys] for each in (one, other)]
    return values[0] == values[1] and one["img_size"].value != other["img_size"].value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def place(
    lines: dict[str, Line], folders: list[dict[str, Line]], leftovers: list[Leftover]
) -> tuple[tuple[Line, ...], ...]:
    """Puts one folder into `data_config`, and several into `data_config.folders`, with what they share above them."""
    if not folders:
        why = "no folder of pictures is named: write yours"
        leftovers.append(Leftover("to fill in", "data_config.img_dir", why))
        lines["data_config.img_dir"] = Line("data_config.img_dir", PLACEHOLDER, "to fill in")
        return ()
    own = [_without_defaults(each, leftovers) for each in folders]
    shared = {
        key: replace(line, origin=", ".join(dict.fromkeys(each[key].origin for each in own if key in each)))
        for key, line in own[0].items()
        if key in DataConfig.model_fields
        and key not in ("control_dir", "metadata_file", "mask_dir", "img_dir", "allow_missing_controls")
        and all(key in each and each[key].value == line.value for each in own)
    }
    alone = len(own) == 1 and set(own[0]) <= set(DataConfig.model_fields)
    for key, line in (own[0] if alone else shared).items():
        lines[f"data_config.{key}"] = replace(line, key=f"data_config.{key}")
    return () if alone else tuple(tuple(line for key, line in each.items() if key not in shared) for each in own)


def _without_defaults(lines: Mapping[str, Line], leftovers: list[Leftover]) -> dict[str, Line]:
    """Returns a folder's lines without those that say what holds without them."""
    idle = [line for key, line in lines.items() if key in ("repeats", "loss_weight") and line.value == 1]
    leftovers += [Leftover("no effect", line.origin, "1, as here") for line in idle if not line.by_default]
    return {key: line for key, line in lines.items() if line not in idle}


def take_regularization(
    lines: dict[str, Line], reserved: Sequence[tuple[Mapping[str, Line], list[Leftover]]]
) -> list[Leftover]:
    """Turns the first folder of regularization pictures into `prior_preservation`, and reports the others."""
    leftovers = []
    for number, (found, left) in enumerate(reserved):
        leftovers += left
        for key, line in found.items():
            ours = OF_REGULARIZATION.get(key)
            if number == 0 and ours and (key == "img_dir" or line.value != 1):
                lines.setdefault(f"prior_preservation.{ours}", replace(line, key=f"prior_preservation.{ours}"))
            elif number and key == "img_dir":
                why = "one folder of regularization pictures is possible: put these into it"
                leftovers.append(Leftover("changes the result", line.origin, why))
            elif not line.by_default:
                why = "regularization pictures are read as the others are: see data_config"
                leftovers.append(Leftover("no effect", line.origin, "1, as here" if ours else why))
    return leftovers


def also_held_out(folder: str) -> Leftover:
    return Leftover("no effect", folder, "one folder of held-out pictures is possible: put these into it")
