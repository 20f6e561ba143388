"""A data set described by one file: JSONL, {"image": "a.png", "caption": "...", "control": ["b.png"]} a line, or CSV.

A CSV file has these keys as the names of its columns, and several controls in one field with semicolons between them.
Both may call the first two "file_name" and "text", as the `metadata.csv` and `metadata.jsonl` of Hugging Face's
imagefolder do. As in `pairs.py`, nothing stops at the first problem. Needs neither torch nor Pillow.
"""

from __future__ import annotations

import codecs
import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixtune.data.captions import LARGEST_CAPTION_BYTES, MOST_CAPTIONS, RECODE, tidy_caption
from pixtune.data.pairs import Pair, Pairs, shorten
from pixtune.inputs.reading import MEBIBYTE, each_once, read_lines

KEYS = ("image", "caption", "control")
OTHER_KEYS = {"file_name": "image", "text": "caption"}
"""Names that Hugging Face's imagefolder has for keys."""

MOST_CONTROLS = 16
"""Number of control pictures that no model takes."""

LARGEST_FILE_BYTES = 1024 * MEBIBYTE
"""Size that no metadata file reaches: a million rows have a tenth of it."""

LONGEST_ROW_BYTES = 2 * MEBIBYTE
"""Length that no row reaches. It is read at once, and JSON takes up to thirty times its text in memory."""

MOST_ROWS = 1_000_000
"""Number of rows that may be read; each takes about half a kilobyte of memory."""

MOST_FAULTS = 1000
"""Number of problems after which no more rows are read: a file of another kind has one a line."""


def read_metadata(file: Path, folder: Path) -> Pairs:
    """Reads the rows of a metadata file, CSV if its name ends so, in its order, with everything that is wrong with it.

    A picture that stands in several rows makes several examples, named "a.png", "a.png#2" and so on.

    Args:
        folder: folder that relative paths start from.
    """
    faults: list[str] = []
    warnings: list[str] = []
    pairs: list[Pair] = []
    times_seen: Counter[str] = Counter()
    listings = Listings()
    number = 0
    try:
        rows = _csv_rows(file, warnings) if file.suffix.lower() == ".csv" else _json_rows(file)
        for number, row, problems in rows:
            if row is not None:
                times_seen[row["image"]] += 1
                count = times_seen[row["image"]]
                controls = _as_list(row.get("control"))
                paths = [listings.as_on_disk(folder / path) for path in (row["image"], *controls)]
                problems += [f"there is no file {path}" for path in paths if not _is_file(path)]
                name = row["image"] if count == 1 else f"{row['image']}#{count}"
                caption, *others = map(tidy_caption, _as_list(row["caption"]))
                if not problems:
                    pairs.append(
                        Pair(
                            paths[0],
                            name,
                            caption=caption,
                            other_captions=tuple(others),
                            control_paths=tuple(paths[1:]),
                        )
                    )
            faults += [f"{file}:{number}: {problem}." for problem in problems]
            if len(faults) >= MOST_FAULTS:
                faults.append(f"{file} has more problems than these {len(faults):,}; it was read to line {number:,}.")
                break
            if len(pairs) > MOST_ROWS:
                faults.append(f"{file} has more than {MOST_ROWS:,} rows, the most that are read. Divide it.")
                break
    except OSError as error:
        return Pairs(folder, (), (), (f"{file} cannot be read: {error.strerror or error}.",), ())
    if not pairs and not faults:
        needed = f"One JSON object a line is needed, with the keys {', '.join(KEYS)}."
        if file.suffix.lower() == ".csv":
            needed = f"A first line of column names ({', '.join(KEYS)}) and one line a picture are needed."
        faults.append(f"{file} is empty. {needed}")
    return Pairs(folder, tuple(pairs), (), tuple(faults), tuple(warnings))


_Row = tuple[int, dict[str, Any] | None, list[str]]
"""Number of a row's line, the row or None, and what is wrong with it."""


def _json_rows(file: Path) -> Iterator[_Row]:
    # JSON's text may hold U+2028 and its like, at which `splitlines` would cut.
    for number, line in enumerate(read_lines(file, LARGEST_FILE_BYTES, LONGEST_ROW_BYTES), 1):
        yield number, *_read_line(line.removeprefix(codecs.BOM_UTF8) if line and number == 1 else line)


def _csv_rows(file: Path, warnings: list[str]) -> Iterator[_Row]:
    """Reads a CSV file whose first line names its columns. Columns of other names are passed over with a warning."""
    lines = _text_lines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        keys = [OTHER_KEYS.get(name.strip(), name.strip()) for name in header]
        twice = [key for key, count in Counter(keys).items() if count > 1 and key in KEYS]
        missing = [key for key in ("image", "caption") if key not in keys]
        if header and (missing or twice):
            wrong = f"has no column {' and '.join(missing)}" if missing else f"has the column {twice[0]} twice"
            yield 1, None, [f"{wrong}; its columns are {shorten(f'{name[:60]!r}' for name in header)}"]
            return
        if others := [name for name, key in zip(header, keys, strict=True) if key not in KEYS]:
            warnings.append(f"{file} has columns that are not read: {shorten(f'{name[:60]!r}' for name in others)}.")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(keys):
                yield reader.line_num, None, [f"has {len(fields)} fields, and the first line names {len(keys)}"]
                continue
            row: dict[str, Any] = {key: value for key, value in zip(keys, fields, strict=True) if key in KEYS}
            row["control"] = [path for path in row.get("control", "").split(";") if path]
            problems = _problems_of(row)
            yield reader.line_num, None if problems else row, problems
    except csv.Error as error:
        yield reader.line_num, None, [f"is not CSV ({error})"]
    except UnicodeDecodeError as error:
        wrong_byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        yield reader.line_num + 1, None, [f"is not UTF-8 text ({wrong_byte}). {RECODE.removesuffix('.')}"]


def _text_lines(file: Path) -> Iterator[str]:
    """Reads the lines of a text.

    Raises:
        csv.Error: one is too long.
        UnicodeDecodeError: it is not UTF-8.
    """
    for number, line in enumerate(read_lines(file, LARGEST_FILE_BYTES, LONGEST_ROW_BYTES)):
        if line is None:
            raise csv.Error(f"a line of more than {LONGEST_ROW_BYTES // MEBIBYTE} MiB, which no row needs")
        yield line.decode("utf-8-sig" if number == 0 else "utf-8").replace("\r\n", "\n")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than any file's
        return False


class Listings:
    """The names of files in the folders that rows name, each folder read once."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, Path]] = {}

    def as_on_disk(self, path: Path) -> Path:
        """Returns the path with the name as the disk spells it, with accents composed or not."""
        if path.name.isascii() or _is_file(path):
            return path
        if path.parent not in self._names:
            inside = path.parent.iterdir() if _is_folder(path.parent) else ()
            self._names[path.parent] = {unicodedata.normalize("NFC", each.name): each for each in inside}
        return self._names[path.parent].get(unicodedata.normalize("NFC", path.name), path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _read_line(line: bytes | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Parses a line: a row of the right form, or None and what is wrong with it. Nothing is wrong with an empty one."""
    if line is None:
        return None, [f"is longer than {LONGEST_ROW_BYTES // MEBIBYTE} MiB, which no row needs"]
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 text (byte 0x{line[error.start]:02x} at position {error.start})"]
    return _read_row(text) if text.strip() else (None, [])


def _read_row(line: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Parses a row: a row of the right form, or None and what is wrong with it."""
    try:
        row = json.loads(line, object_pairs_hook=each_once)
    except ValueError as error:  # no JSON, or a number of thousands of digits
        return None, [f"not a JSON object ({error})"]
    except RecursionError:
        return None, ["not a JSON object of these keys (nested too deeply)"]
    if not isinstance(row, dict):
        return None, [f"is a {type(row).__name__}; an object with the keys {', '.join(KEYS)} is needed"]
    row = {OTHER_KEYS.get(key, key) if OTHER_KEYS.get(key) not in row else key: value for key, value in row.items()}
    problems = _problems_of(row)
    return (None if problems else row), problems


def _problems_of(row: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the keys and values of a row."""
    unknown = shorten(f"{key[:60]!r}" for key in row if key not in KEYS)
    problems = [f"unknown key {unknown}; known are {', '.join(KEYS)}"] if unknown else []
    if not isinstance(row.get("image"), str):
        problems.append("'image' must be text")
    captions = row.get("caption")
    listed = captions if isinstance(captions, list) else [captions]
    if not listed or not all(isinstance(text, str) for text in listed):
        problems.append("'caption' must be text" + (", or a list of texts" if isinstance(captions, list) else ""))
    if len(listed) > MOST_CAPTIONS:
        problems.append(f"'caption' lists {len(listed):,} captions; at most {MOST_CAPTIONS} are read")
    controls = _as_list(row.get("control"))
    if not all(isinstance(path, str) for path in controls):
        problems.append("'control' must be a path or a list of paths")
    if len(controls) > MOST_CONTROLS:
        problems.append(f"'control' lists {len(controls):,} paths, more than any model takes")
    if any(isinstance(text, str) and len(text) > LARGEST_CAPTION_BYTES for text in listed):
        problems.append(
            f"'caption' has more than {LARGEST_CAPTION_BYTES:,} letters, of which no model reads a thousandth"
        )
    texts = {
        "image": row.get("image"), "caption": "".join(map(str, listed)), "control": "".join(map(str, controls)),
    }  # fmt: skip
    for key, text in texts.items():
        if isinstance(text, str) and any("\ud800" <= mark <= "\udfff" or mark == "\0" for mark in text):
            problems.append(f"{key!r} holds half a character (a lone surrogate) or a zero byte, which no text needs")
    return problems


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
