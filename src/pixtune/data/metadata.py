"""A data set described by one JSONL file: {"image": "a.png", "caption": "...", "control": ["b.png"]} a line.

As in `pairs.py`, nothing stops at the first problem. Needs neither torch nor Pillow.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from pixtune.data.pairs import Pair, Pairs, tidy_caption
from pixtune.inputs.reading import MEBIBYTE, read_bounded

KEYS = ("image", "caption", "control")

LARGEST_FILE_BYTES = 1024 * MEBIBYTE
"""Size that no metadata file reaches: a million rows have a tenth of it."""


def read_metadata(file: Path, folder: Path) -> Pairs:
    """Reads the rows of a metadata file, in its order, with everything that is wrong with it.

    A picture that stands in several rows makes several examples, named "a.png", "a.png#2" and so on.

    Args:
        folder: folder that relative paths start from.
    """
    faults: list[str] = []
    pairs: list[Pair] = []
    times_seen: dict[str, int] = {}
    try:
        text = read_bounded(file, LARGEST_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        return Pairs(folder, (), (), (f"{file} cannot be read: {error.strerror or error}.",), ())
    except UnicodeDecodeError as error:
        return Pairs(folder, (), (), (f"{file} cannot be read as UTF-8 text: {error}.",), ())
    # JSON's text may hold U+2028 and its like, at which `splitlines` would cut.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row, problems = _read_row(line)
        if row is not None:
            times_seen[row["image"]] = times_seen.get(row["image"], 0) + 1
            count = times_seen[row["image"]]
            paths = [_as_on_disk(folder / path) for path in (row["image"], *_as_list(row.get("control")))]
            problems += [f"there is no file {path}" for path in paths if not _is_file(path)]
            name = row["image"] if count == 1 else f"{row['image']}#{count}"
            if not problems:
                pairs.append(Pair(paths[0], name, caption=tidy_caption(row["caption"]), control_paths=tuple(paths[1:])))
        faults += [f"{file}:{number}: {problem}." for problem in problems]
    if not pairs and not faults:
        faults.append(f"{file} is empty. One JSON object a line is needed, with the keys {', '.join(KEYS)}.")
    return Pairs(folder, tuple(pairs), (), tuple(faults), ())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than any file's
        return False


def _as_on_disk(path: Path) -> Path:
    """Returns the path with the name as the disk spells it: accents may be composed in the one and not in the other."""
    if path.name.isascii() or _is_file(path) or not path.parent.is_dir():
        return path
    wanted = unicodedata.normalize("NFC", path.name)
    return next((each for each in path.parent.iterdir() if unicodedata.normalize("NFC", each.name) == wanted), path)


def _read_row(line: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Parses a row: a row of the right form, or None and what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or a number of thousands of digits
        return None, [f"not a JSON object ({error})"]
    except RecursionError:
        return None, ["not a JSON object of these keys (nested too deeply)"]
    if not isinstance(row, dict):
        return None, [f"is a {type(row).__name__}; an object with the keys {', '.join(KEYS)} is needed"]
    problems = [f"unknown key {key!r}; known are {', '.join(KEYS)}" for key in row if key not in KEYS]
    problems += [f"{key!r} must be text" for key in ("image", "caption") if not isinstance(row.get(key), str)]
    controls = _as_list(row.get("control"))
    if not all(isinstance(path, str) for path in controls):
        problems.append("'control' must be a path or a list of paths")
    texts = {"image": row.get("image"), "caption": row.get("caption")} | {"control": "".join(map(str, controls))}
    for key, text in texts.items():
        if isinstance(text, str) and any("\ud800" <= mark <= "\udfff" or mark == "\0" for mark in text):
            problems.append(f"{key!r} holds half a character (a lone surrogate) or a zero byte, which no text needs")
    return (None if problems else row), problems


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
