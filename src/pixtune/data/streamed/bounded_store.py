"""The cache of a stream: entries on disk within a limit, of which those are deleted that were not used for longest.

An entry that a later window needs again is made again, which gives the same numbers. So deleting costs time alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from pixtune.data.cache import DiskStore, Entry
from pixtune.errors import DataError
from pixtune.hardware.facts import GIB
from pixtune.launch.crew import Crew


class BoundedStore:
    """Entries on disk that take no more than some bytes in all, kept by the processes that share the folder together.

    Each process sees to an equal part: it writes no more, and deletes the entries that are its own by their names.

    Args:
        limit_bytes: limit of all files together.
        check: called before each entry is written; raises where the run is asked to end.
    """

    def __init__(
        self, store: DiskStore, limit_bytes: int, crew: Crew, check: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._crew, self._check = store, crew, check
        self._limit_bytes = limit_bytes
        self._free_bytes = limit_bytes // crew.size
        """Bytes that this process may still write before it has to delete some."""
        self._old: deque[tuple[str, int]] = deque()
        """Entries that this process may delete, with their bytes, those that were not used for longest first."""

    def begin(self, needed: Collection[str]) -> None:
        """Begins a window: all entries may go but those it needs, which count as used now.

        Args:
            needed: digests of the entries that are read from now on, whether they are there or not.
        """
        kept_bytes, others = 0, list[tuple[int, str, int]]()
        for digest, path, stat in _entries(self._store.folder):
            if digest in needed:
                kept_bytes += stat.st_size
                with suppress(OSError):
                    os.utime(path)
            elif self._is_mine(digest):
                others.append((stat.st_mtime_ns, path, stat.st_size))
        self._old = deque((path, size) for _, path, size in sorted(others))
        held_bytes = kept_bytes // self._crew.size + sum(size for _, size in self._old)
        self._free_bytes = self._limit_bytes // self._crew.size - held_bytes
        self._delete_old()

    def write(self, digest: str, entry: Entry) -> None:
        """Writes an entry, and deletes old ones where it takes their place.

        Raises:
            DataError: what a window needs is more than the limit.
        """
        self._check()
        self._free_bytes -= sum(tensor.nbytes for tensor in entry.values())
        self._delete_old()
        if self._free_bytes < 0:
            raise DataError(
                "the encodings of a window do not fit into the cache",
                [
                    f"stream.cache_limit_gib is {self._limit_bytes / GIB:g}, and the rows that are read together need "
                    "more. Raise it, or lower stream.window (which makes another run of it)."
                ],
            )
        self._store.write(digest, entry)

    def _is_mine(self, digest: str) -> bool:
        """Returns whether this process sees to an entry: a question of its name, since each lists them at its time."""
        return int(digest[-8:], 16) % self._crew.size == self._crew.rank

    def _delete_old(self) -> None:
        while self._free_bytes < 0 and self._old:
            path, size = self._old.popleft()
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._free_bytes += size

    def problem(self, digest: str) -> str | None:
        return self._store.problem(digest)

    def read(self, digest: str) -> Entry:
        return self._store.read(digest)

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        return self._store.read_shapes(digest)

    def tidy(self) -> None:
        self._store.tidy()

    def expect_others(self) -> None:
        self._store.expect_others()


def _entries(folder: os.PathLike[str]) -> list[tuple[str, str, os.stat_result]]:
    """Lists the entries of a store's folder: digest, path and what the system knows of the file."""
    found = []
    with suppress(FileNotFoundError):
        for inner in os.scandir(folder):
            if not inner.is_dir():
                continue
            for each in os.scandir(inner.path):
                if each.name.endswith(".safetensors") and not each.name.startswith("."):
                    with suppress(FileNotFoundError):  # another process has just deleted it
                        found.append((each.name.removesuffix(".safetensors"), each.path, each.stat()))
    return found
