"""A data set described by one JSONL file: {"image": "a.png", "caption": "...", "control": ["b.png"]} a line.

As in `pairs.py`, nothing stops at the first problem. Needs neither torch nor Pillow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixtune.data.pairs import Pair, Pairs, tidy_caption

KEYS = ("image", "caption", "control")


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
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Pairs(folder, (), (), (f"{file} cannot be read as UTF-8 text: {error}.",), ())
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row, problems = _read_row(line)
        if row is not None:
            times_seen[row["image"]] = times_seen.get(row["image"], 0) + 1
            count = times_seen[row["image"]]
            paths = [folder / path for path in (row["image"], *_as_list(row.get("control")))]
            problems += [f"there is no file {path}" for path in paths if not path.is_file()]
            name = row["image"] if count == 1 else f"{row['image']}#{count}"
            if not problems:
                pairs.append(Pair(paths[0], name, caption=tidy_caption(row["caption"]), control_paths=tuple(paths[1:])))
        faults += [f"{file}:{number}: {problem}." for problem in problems]
    if not pairs and not faults:
        faults.append(f"{file} is empty. One JSON object a line is needed, with the keys {', '.join(KEYS)}.")
    return Pairs(folder, tuple(pairs), (), tuple(faults), ())


def _read_row(line: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Parses a row: a row of the right form, or None and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, [f"not a JSON object ({error})"]
    if not isinstance(row, dict):
        return None, [f"is a {type(row).__name__}; an object with the keys {', '.join(KEYS)} is needed"]
    problems = [f"unknown key {key!r}; known are {', '.join(KEYS)}" for key in row if key not in KEYS]
    problems += [f"{key!r} must be text" for key in ("image", "caption") if not isinstance(row.get(key), str)]
    controls = _as_list(row.get("control"))
    if not all(isinstance(path, str) for path in controls):
        problems.append("'control' must be a path or a list of paths")
    return (None if problems else row), problems


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
