"""The shards of a stream, whose rows come one after the other from any row on. The package `datasets` reads them.

A folder of pictures is a stream, too: its files in the order of their names, in shards of a few hundred.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pixtune.config.folders import DatasetColumns, Folder
from pixtune.data.hf_datasets import SHARD, files_in, import_package, is_saved, of_split, pair_of, without_decoding
from pixtune.data.layouts import find_examples
from pixtune.data.pairs import Pair
from pixtune.errors import DataError

PAIRS_IN_SHARD = 256
"""Pictures of a folder in a shard: a window mixes some shards, so a folder's neighbours part at once."""
MOST_SHARDS = 1_000_000
CONNECT_SECONDS, READ_SECONDS = 30.0, 60.0
"""Time in which a server must answer, and send the next bytes: one that hangs is tried again."""
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Shards(Protocol):
    """The shards of a stream."""

    @property
    def names(self) -> Sequence[str]:
        """Names by which shards are recognized and stand in messages."""

    @property
    def is_remote(self) -> bool:
        """Whether they lie behind a network, which may fail for a while."""

    def rows(self, shard: int, start: int, pictures: Path) -> Iterator[Pair | str]:
        """Yields a shard's rows from this one on: files that belong together, or a sentence on why they do not.

        Args:
            pictures: folder to copy pictures to that are no files of their own.
        """


@dataclass(frozen=True)
class FolderShards:
    """Pictures of a folder in the order of their names."""

    pairs: Sequence[Pair]
    names: Sequence[str]
    is_remote: bool = False

    def rows(self, shard: int, start: int, pictures: Path) -> Iterator[Pair | str]:
        yield from self.pairs[shard * PAIRS_IN_SHARD + start : (shard + 1) * PAIRS_IN_SHARD]


@dataclass(frozen=True)
class DatasetShards:
    """Shards of a data set that the package `datasets` reads."""

    columns: DatasetColumns
    names: Sequence[str]
    is_remote: bool
    open_shard: Callable[[int, Path], Any]
    """Function from the number of a shard, and a folder for what the library leaves, to its iterable of the shard."""

    def rows(self, shard: int, start: int, pictures: Path) -> Iterator[Pair | str]:
        table = without_decoding(self.open_shard(shard, pictures), self.columns)
        for row in table.skip(start) if start else table:
            read = pair_of(row, self.columns, pictures, "")
            yield read if isinstance(read, Pair) else "; ".join(read)


def open_shards(folder: Folder, apart: Collection[Path] = ()) -> Shards:
    """Opens the stream of a folder, or of the data set that it names, without reading a row.

    Raises:
        DataError: there is no such data set, it is empty, or the package that reads it is missing.
    """
    if folder.dataset is None:
        return _folder_shards(folder, apart)
    return _dataset_shards(folder.dataset)


def _folder_shards(folder: Folder, apart: Collection[Path]) -> FolderShards:
    found = find_examples(folder, apart)
    if found.faults:
        raise DataError(f"{folder.img_dir} cannot be trained on", list(found.faults))
    num_shards = -(-len(found.pairs) // PAIRS_IN_SHARD)
    names = [f"{found.pairs[number * PAIRS_IN_SHARD].name} and after it" for number in range(num_shards)]
    return FolderShards(found.pairs, names)


def _dataset_shards(columns: DatasetColumns) -> DatasetShards:
    datasets = import_package(columns.name)
    # What the library tries 20 times, many seconds apart, nobody could interrupt; see `reading.patiently`.
    for setting in [each for each in vars(datasets.config) if each.startswith("STREAMING_") and "RETR" in each]:
        setattr(datasets.config, setting, 1 if setting.endswith("MAX_RETRIES") else 0)
    name, place = columns.name, Path(os.path.expanduser(columns.name))
    if place.is_dir() and is_saved(place):
        table = of_split(datasets.load_from_disk(str(place)), columns)
        num_shards = max(1, min(len(table), len(table.cache_files)))
        return _of_one_table(columns, table.to_iterable_dataset(num_shards), is_remote=False)
    if place.is_dir():
        files = [str(path) for path in files_in(place)]
    elif place.is_file():
        files = [str(place)]
    elif REMOTE.match(name) or _has_braces(name):
        files = expand_braces(os.path.expanduser(name))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError("a data set cannot be read", [f"{name}: there is no such file or folder."])
    else:
        try:
            found = datasets.load_dataset(name, split=columns.split, streaming=True)
        except Exception as error:  # the library raises anything; the cause stays attached
            words = " ".join(str(error).split())[:500] or type(error).__name__
            raise DataError("a data set cannot be read", [f"{name} by the package datasets: {words}"]) from error
        return _of_one_table(columns, found, is_remote=True)
    if missing := [file for file in files if not REMOTE.match(file) and not Path(file).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError("a data set cannot be read", [f"{missing[0]}{more}: there is no such file."])
    return DatasetShards(
        columns,
        [PurePosixPath(file.split("?")[0]).name for file in files],
        any(REMOTE.match(file) for file in files),
        lambda shard, place: _open_file(datasets, files[shard], columns, place),
    )


def _of_one_table(columns: DatasetColumns, table: Any, is_remote: bool) -> DatasetShards:
    num_shards = table.num_shards
    names = [f"shard {number} of {num_shards}" for number in range(num_shards)]
    return DatasetShards(columns, names, is_remote, lambda shard, place: table.shard(num_shards, shard))


def _open_file(datasets: Any, file: str, columns: DatasetColumns, place: Path) -> Any:
    """Opens one file as the library streams it, which leaves an empty file for each in a folder.

    Raises:
        DataError: its ending is none of those that are read.
    """
    bare = file.split("?")[0].lower()
    options: dict[str, Any] = {"cache_dir": str(place / ".datasets")}
    if REMOTE.match(file) and file.lower().startswith("http"):
        import aiohttp  # comes with the package datasets

        # Its own limit of five minutes for a whole file would end a shard that is read while steps are taken.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options["storage_options"] = {"client_kwargs": {"timeout": limits, "trust_env": True}}
    if bare.endswith((SHARD, ".tar.gz", ".tgz")):
        # With its columns named, the library need not read a shard's beginning to find out which there are, nor refuse
        # one whose first rows lack a caption.
        picture = datasets.Image(decode=False)
        features = {columns.image: picture, columns.caption: datasets.Value("string")}
        features |= {columns.control: picture} if columns.control else {}
        form, options["features"] = "webdataset", datasets.Features(features)
    elif bare.endswith((".parquet", ".pq")):
        form = "parquet"
    else:
        raise DataError(
            "a data set cannot be read", [f"{file}: only WebDataset shards (.tar) and Parquet files are streamed."]
        )
    # A list of its own kind is not looked up on the network before it is read, where any failure means "not found".
    files = datasets.data_files.DataFilesList([file], [("",)])
    return datasets.load_dataset(form, data_files={"train": files}, split="train", streaming=True, **options)


_GROUP = re.compile(r"\{([^{}]*)\}")


def _has_braces(name: str) -> bool:
    return _GROUP.search(name) is not None


def expand_braces(name: str) -> list[str]:
    """Returns the names that one with braces stands for: "{00..02}" numbers, "{a,b}" words, as a shell has it.

    Raises:
        DataError: they are more than any data set has.
    """
    parts = _GROUP.split(name)
    choices: list[Sequence[str]] = []
    total = 1
    for place, part in enumerate(parts):
        ends = re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", part) if place % 2 else None
        if ends:
            first, last, width = int(ends[1]), int(ends[2]), len(ends[1])
            width = width if ends[1].startswith("0") or len(ends[2]) == width else 0
            step = 1 if last >= first else -1
            total *= abs(last - first) + 1
            numbers = range(first, last + step, step) if total <= MOST_SHARDS else range(0)
            each: Sequence[str] = [f"{number:0{width}d}" for number in numbers]
        elif place % 2 and "," in part:
            each = part.split(",")
            total *= len(each)
        else:
            each = [f"{{{part}}}" if place % 2 else part]
        choices.append(each)
        if total > MOST_SHARDS:
            raise DataError("a data set cannot be read", [f"{name} stands for more than {MOST_SHARDS:,} shards."])
    return ["".join(each) for each in product(*choices)]


def first_cause(error: BaseException) -> BaseException:
    """Returns the error that an error of the library came of."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        error = cause
        seen.add(id(error))
    return error


def why_unreadable(error: Exception) -> str:
    """Returns an error of the library in one line, with the one that it came of.

    What stands behind a question mark in an address is left out: it may let whoever reads it fetch the data.
    """
    found = []
    for each in dict.fromkeys((error, first_cause(error))):
        words = re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", " ".join(str(each).split()))[:300]
        found.append(f"{type(each).__name__}: {words}" if words else type(each).__name__)
    return ", because of ".join(dict.fromkeys(found))
