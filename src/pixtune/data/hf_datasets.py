"""A data set of the package `datasets`: its own folders, Parquet files, WebDataset shards, or from the hub by name.

The package reads it; it is imported only here, and only where a config asks for it. Pictures that are stored within it
are copied into a folder as files named by their content, so that everything else treats them like any others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixtune.config.folders import DatasetColumns
from pixtune.data.captions import LARGEST_CAPTION_BYTES, MOST_CAPTIONS, tidy_caption
from pixtune.data.metadata import MOST_CONTROLS, MOST_FAULTS, MOST_ROWS
from pixtune.data.pairs import Pair, Pairs, shorten
from pixtune.errors import DataError
from pixtune.storage.files import replacing

SHARD = ".tar"
"""Ending of WebDataset's files. A row is the members of one name: 0001.jpg and 0001.txt, in columns jpg and txt."""
INSTALL = "pip install 'pixtune[datasets]'"


def read_dataset(columns: DatasetColumns, pictures: Path) -> Pairs:
    """Reads a data set, in its order, with everything that is wrong with its rows. Its examples are "row 0" and so on.

    Args:
        pictures: folder to copy pictures to that are no files of their own; what is there already is not written again.

    Raises:
        DataError: it cannot be read at all: the package is missing, there is no such data set, split or column.
        WriteError: a picture cannot be written.
    """
    table = without_decoding(_load(columns), columns)
    faults: list[str] = []
    pairs: list[Pair] = []
    if not len(table):
        faults.append(f"The data set {columns.name} has no rows in its split {columns.split!r}.")
    if len(table) > MOST_ROWS:
        faults.append(f"The data set {columns.name} has more than {MOST_ROWS:,} rows, the most that are read.")
        return Pairs(pictures, (), (), tuple(faults), ())
    for number, row in enumerate(table):
        read = pair_of(row, columns, pictures, f"row {number}")
        if isinstance(read, Pair):
            pairs.append(read)
            continue
        faults += [f"{columns.name}, row {number}: {problem}." for problem in read]
        if len(faults) >= MOST_FAULTS:
            faults.append(f"{columns.name} has more problems than these {len(faults):,}.")
            break
    return Pairs(pictures, tuple(pairs), (), tuple(faults), ())


def pair_of(row: Mapping[str, Any], columns: DatasetColumns, pictures: Path, name: str) -> Pair | list[str]:
    """Returns a row as files that belong together, and copies pictures to files as `read_dataset` does.

    Returns:
        Problems of the row, as sentences without a full stop, where it cannot be used.
    """
    problems: list[str] = []
    targets = _picture_files(row[columns.image], columns.image, pictures, problems)
    controls = _picture_files(row[columns.control], columns.control, pictures, problems) if columns.control else []
    captions = _captions(row[columns.caption], columns.caption, problems)
    if len(targets) != 1 and not problems:
        problems.append(f"{columns.image!r} holds {len(targets)} pictures, and one is needed")
    if len(controls) > MOST_CONTROLS:
        problems.append(f"{columns.control!r} holds {len(controls):,} pictures, more than any model takes")
    if problems:
        return problems
    caption, *others = captions
    return Pair(targets[0], name, caption=caption, other_captions=tuple(others), control_paths=tuple(controls))


def import_package(name: str) -> Any:
    """Returns the package `datasets`, for the data set of a name.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        problem = f"{name} is read by the package datasets, which is not installed here: {INSTALL}"
        raise DataError("a data set cannot be read", [problem]) from error
    return datasets


def _load(columns: DatasetColumns) -> Any:
    """Loads the split of a data set.

    Raises:
        DataError: it cannot be; the library's own words are in it.
    """
    datasets = import_package(columns.name)
    name, place = columns.name, Path(os.path.expanduser(columns.name))
    try:
        if place.is_file():
            found = _load_files(datasets, [place])
        elif place.is_dir():
            found = _load_folder(datasets, place)
        elif name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError("a data set cannot be read", [f"{name}: there is no such file or folder."])
        else:
            found = datasets.load_dataset(name, split=columns.split)
    except DataError:
        raise
    except Exception as error:  # the library raises anything; the cause stays attached
        words = " ".join(str(error).split())[:500] or type(error).__name__
        raise DataError("a data set cannot be read", [f"{name} by the package datasets: {words}"]) from error
    return of_split(found, columns)


def of_split(found: Any, columns: DatasetColumns) -> Any:
    """Returns the split of what was found; a single table is its only split.

    Raises:
        DataError: it has no such split.
    """
    if not isinstance(found, dict):
        return found
    if columns.split not in found:
        problem = f"{columns.name} has no split {columns.split!r}; it has {', '.join(found)}. Set dataset_split."
        raise DataError("a data set cannot be read", [problem])
    return found[columns.split]


def _load_folder(datasets: Any, place: Path) -> Any:
    if is_saved(place):
        return datasets.load_from_disk(str(place))
    return _load_files(datasets, files_in(place))


def is_saved(place: Path) -> bool:
    """Returns whether a folder is one that `save_to_disk` wrote."""
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def files_in(place: Path) -> list[Path]:
    """Returns the Parquet files or else the WebDataset shards of a folder, in the order of their names.

    Raises:
        DataError: there are none.
    """
    files = sorted(place.rglob("*.parquet")) or sorted(place.rglob(f"*{SHARD}"))
    if not files:
        problem = f"{place} is neither a folder that save_to_disk wrote nor one of Parquet files or WebDataset shards."
        raise DataError("a data set cannot be read", [problem])
    return files


def _load_files(datasets: Any, files: Sequence[Path]) -> Any:
    form = "webdataset" if files[0].suffix == SHARD else "parquet"
    return datasets.load_dataset(form, data_files=[str(path) for path in files], split="train")


def without_decoding(table: Any, columns: DatasetColumns) -> Any:
    """Returns the columns that are wanted alone, with pictures as stored bytes.

    Raises:
        DataError: one is missing.
    """
    import datasets

    wanted = [columns.image, columns.caption, *([columns.control] if columns.control else [])]
    if missing := [name for name in wanted if name not in table.column_names]:
        problem = (
            f"{columns.name} has no column {' and '.join(map(repr, missing))}; it has {shorten(table.column_names)}. "
            "Set image_column, caption_column or control_column."
        )
        raise DataError("a data set cannot be read", [problem])
    table = table.select_columns(wanted)
    plain = datasets.Image(decode=False)
    for name in wanted:
        kind = table.features[name]
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, plain)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(plain))
    return table


def _picture_files(value: object, column: str | None, folder: Path, problems: list[str]) -> list[Path]:
    """Returns the files of a row's pictures, and writes those that are stored as bytes."""
    files: list[Path] = []
    for each in value if isinstance(value, list) else [value]:
        stored = each.get("bytes") if isinstance(each, Mapping) else each
        path = each.get("path") if isinstance(each, Mapping) else each
        if isinstance(stored, bytes) and stored:
            files.append(_written(stored, folder))
        elif isinstance(path, str) and path and os.path.isfile(path):
            files.append(Path(path))
        elif isinstance(path, str) and path:
            problems.append(f"{column!r} names the file {path[:200]!r}, which does not exist")
        else:
            problems.append(f"{column!r} holds no picture")
    return files


def _written(data: bytes, folder: Path) -> Path:
    """Writes a picture under the name of its content, unless it is there."""
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest[:2] / digest
    if not path.is_file() or path.stat().st_size != len(data):
        with replacing(path, durable=False) as stream:
            stream.write(data)
    return path


def _captions(value: object, column: str, problems: list[str]) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(text, str) for text in listed):
        problems.append(f"{column!r} holds {type(value).__name__}, and a text or a list of texts is needed")
    elif len(listed) > MOST_CAPTIONS or any(len(str(text)) > LARGEST_CAPTION_BYTES for text in listed):
        problems.append(f"{column!r} holds more than {MOST_CAPTIONS} captions, or one that no model reads")
    return [tidy_caption(text) for text in listed if isinstance(text, str)]
