"""The content-addressed cache of encoded pictures and captions.

An entry's key is a hash of everything that decides its content: picture bytes or caption, size and crop, the encoder's
weights, the prompt template, the number format and this code's version. So nothing stale is ever read, and one changed
caption re-encodes one caption. A ledger remembers the parts of each item's last key, so that every miss has a reason.
An entry on disk carries a checksum, so that nothing damaged is ever read either: it is made anew.
Pictures are stored as the mean and deviation of the autoencoder's distribution: each turn draws its latents anew.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load
from torch import Tensor

from pixtune.errors import DataError
from pixtune.inputs.reading import MEBIBYTE, check_regular, read_bounded
from pixtune.storage.files import remove_stale, replacing, text_digest, write_if_possible
from pixtune.storage.safetensors_writer import file_pieces

log = logging.getLogger(__name__)

CODE_VERSION = "1"
"""Version of the encoding code, to be raised whenever the same input would be encoded differently."""

ABSENT, DAMAGED, UNREADABLE = "absent", "damaged", "unreadable"
OLDER = "of an earlier version, without a checksum"
"""Problems of entries; see `Store.problem`. The reason follows UNREADABLE in brackets."""

BEFORE_CHECKSUM = b'{"__metadata__":{"checksum":"'
"""Bytes of an entry's file from the header's length, the first eight, to the checksum: eight hex digits."""
CHECKSUM_START = 8 + len(BEFORE_CHECKSUM)
CHECKSUM_END = CHECKSUM_START + 8
LARGEST_ENTRY_BYTES = 512 * MEBIBYTE
"""Size that no entry reaches: latents of a picture of the most pixels have 340 MiB."""
LARGEST_LEDGER_BYTES = 256 * MEBIBYTE
"""Size up to which a ledger is read: that of half a million items."""
MOST_SOUND = 100_000
"""Number of entries that are remembered as checked; of more, each look reads them again."""
LATE_SECONDS = 90.0
"""Time after which every machine sees an entry that another one has made: NFS looks again after a minute at most."""
MOST_PAUSE_SECONDS = 2.0
"""Longest pause between two looks for it."""

Entry = dict[str, Tensor]
Found = TypeVar("Found")
Item = TypeVar("Item")


@dataclass(frozen=True)
class CacheKey:
    """The named parts that decide an entry's content."""

    item: str
    """Name for people, such as "cat.png at 1024x1024": it stands in messages, not in the hash."""
    parts: dict[str, str] = field(hash=False)
    """Parts by name, for example {"picture": its SHA-256, "encoder": ...}."""
    form: str | None = None
    """Name of a computation that differs from the usual one by rounding; see `ModelFamily.encoding_form`."""

    @property
    def all_parts(self) -> dict[str, str]:
        """The parts, the form and the code's version."""
        form = {} if self.form is None else {"form": self.form}
        return {**self.parts, **form, "code": CODE_VERSION}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all parts, as hex: the entry's name in the store."""
        return text_digest(json.dumps(self.all_parts, sort_keys=True))

    @property
    def content(self) -> str:
        """The digest without the form: a run has the same data on a CPU and on a GPU, and may go on with them."""
        return replace(self, form=None).digest


class Keys(Sequence[CacheKey]):
    """Keys of many items, each built when it is asked for: a million would take gigabytes."""

    def __init__(self, items: Sequence[Item], build: Callable[[Item], CacheKey]) -> None:
        self._items, self._build = items, build

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, number: int) -> CacheKey: ...

    @overload
    def __getitem__(self, number: slice) -> list[CacheKey]: ...

    def __getitem__(self, number: int | slice) -> CacheKey | list[CacheKey]:
        if isinstance(number, slice):
            return [*map(self._build, self._items[number])]
        return self._build(self._items[number])

    def __iter__(self) -> Iterator[CacheKey]:
        return map(self._build, self._items)


class Digests:
    """A set of digests that may be large: eight bytes each, so that one in 10^13 would be taken for another's."""

    def __init__(self) -> None:
        self._known: NDArray[np.uint64] = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, digest: str) -> bool:
        place = int(np.searchsorted(self._known, np.uint64(int(digest[:16], 16))))
        return place < len(self._known) and int(self._known[place]) == int(digest[:16], 16)

    def update(self, digests: Iterable[str]) -> None:
        new = np.fromiter((int(digest[:16], 16) for digest in digests), np.uint64)
        self._known = np.union1d(self._known, new)


class Store(Protocol):
    """A place for entries, by the digests of their keys."""

    def problem(self, digest: str) -> str | None:
        """Returns why an entry cannot be used: `ABSENT`, `DAMAGED`, `OLDER` or an error; None: it can."""

    def read(self, digest: str) -> Entry: ...

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        """Reads the shapes of an entry's tensors without the tensors."""

    def write(self, digest: str, entry: Entry) -> None: ...

    def tidy(self) -> None:
        """Removes what writers that were killed have left."""

    def expect_others(self) -> None:
        """Takes entries that are absent as on their way from other machines, which have just made them."""


class MemoryStore:
    """Entries in host memory, gone with the process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def problem(self, digest: str) -> str | None:
        return None if digest in self._entries else ABSENT

    def read(self, digest: str) -> Entry:
        return self._entries[digest]

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        return {name: tensor.shape for name, tensor in self._entries[digest].items()}

    def write(self, digest: str, entry: Entry) -> None:
        self._entries[digest] = {name: tensor.detach().cpu() for name, tensor in entry.items()}

    def tidy(self) -> None:
        pass

    def expect_others(self) -> None:
        pass  # memory is a process's own


class DiskStore:
    """Entries as one safetensors file each, written atomically, in folders by the first two digits of the digest.

    A file's header begins with a checksum over the digest and all other bytes, so that neither flipped bits nor zeros
    nor another entry's file pass. That also covers a power failure, so the disk need not be waited for: syncing file by
    file takes longer than most encoders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: dict[str, tuple[int, ...]] = {}
        """Entries whose bytes were checked, each with what a later change of its file would alter."""
        self._is_tidy = False
        self._patient_until = -math.inf
        """Time until which an entry that is absent may be one that another machine has made."""

    def _path(self, digest: str) -> Path:
        return Path(f"{self.folder}/{digest[:2]}/{digest}.safetensors")

    def problem(self, digest: str) -> str | None:
        """Reads an entry whole, unless its file is still the one that was checked before; see `Store.problem`."""
        path = self._path(digest)
        try:
            if not path.is_file():
                return ABSENT
            stat = path.stat()
            version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._sound.get(digest) == version:
                return None
            if stat.st_size > LARGEST_ENTRY_BYTES:
                return DAMAGED
            problem = _problem_of(digest, read_bounded(path, LARGEST_ENTRY_BYTES))
        except OSError as error:
            return f"{UNREADABLE} ({error.strerror or error})"
        if problem is None and len(self._sound) < MOST_SOUND:
            self._sound[digest] = version
        return problem

    def read(self, digest: str) -> Entry:
        """Reads an entry and checks it: a disk may fail during a run that began with sound entries.

        Raises:
            DataError: the entry is damaged, deleted or out of reach by now.
        """
        path = self._path(digest)
        try:
            data = self._patiently(path, lambda: read_bounded(path, LARGEST_ENTRY_BYTES))
        except OSError as error:
            raise _unusable(path, f"cannot be read: {error.strerror or error}") from error
        if problem := _problem_of(digest, data):
            raise _unusable(path, f"is {problem}")
        try:
            return load(data)
        except (SafetensorError, ValueError) as error:
            raise _unusable(path, f"is no safetensors file ({error})") from error

    def tidy(self) -> None:
        if not self._is_tidy:
            self._is_tidy = True
            remove_stale(self.folder)

    def expect_others(self) -> None:
        self._patient_until = time.monotonic() + LATE_SECONDS

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        """Reads the shapes from the header, which is not checked again.

        Raises:
            DataError: as `read`.
        """
        path = self._path(digest)
        try:
            self._patiently(path, lambda: check_regular(path))
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unusable(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def _patiently(self, path: Path, read: Callable[[], Found]) -> Found:
        """Returns what `read` finds out about a file that another machine may have made a moment ago.

        Network file systems remember for up to a minute that a name was absent, and lose a file that is being read
        where another machine puts the same one in its place.

        Raises:
            OSError: it cannot be read, or is absent for longer than that.
        """
        pause = 0.1
        while True:
            try:
                return read()
            except OSError as error:
                may_come = error.errno == errno.ENOENT and time.monotonic() < self._patient_until
                if not may_come and (error.errno != errno.ESTALE or pause > MOST_PAUSE_SECONDS):
                    raise
            with suppress(OSError):
                os.close(os.open(path.parent, os.O_RDONLY))  # has its attributes, and so its names, asked for anew
            time.sleep(min(pause, MOST_PAUSE_SECONDS))
            pause *= 2

    def write(self, digest: str, entry: Entry) -> None:
        on_host = {name: tensor.detach().cpu() for name, tensor in entry.items()}
        first, *rest = file_pieces(on_host, {"checksum": "0" * (CHECKSUM_END - CHECKSUM_START)})
        header = bytearray(first)
        header[CHECKSUM_START:CHECKSUM_END] = _checksum(digest, header[:CHECKSUM_START], header[CHECKSUM_END:], *rest)
        with replacing(self._path(digest), durable=False) as stream:
            stream.write(header)
            for piece in rest:
                stream.write(piece)


def _problem_of(digest: str, data: bytes) -> str | None:
    """Returns what is wrong with the bytes of an entry's file: `DAMAGED`, `OLDER` or nothing."""
    view = memoryview(data)
    if view[8:CHECKSUM_START] == BEFORE_CHECKSUM:
        checksum = _checksum(digest, view[:CHECKSUM_START], view[CHECKSUM_END:])
        return None if view[CHECKSUM_START:CHECKSUM_END] == checksum else DAMAGED
    try:
        deserialize(data)
    except SafetensorError:
        return DAMAGED
    return OLDER


def _checksum(digest: str, *pieces: bytes | bytearray | memoryview) -> bytes:
    """Computes the CRC-32 of a digest and of the bytes of its entry's file around the checksum, as hex digits.

    It is the fastest that Python brings along: twice as fast as SHA-256 where processors have that, and four times as
    fast as BLAKE2 (`benchmarks/cache_entries.py`).
    """
    crc = zlib.crc32(digest.encode())
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}".encode()


def _unusable(path: Path, what: str) -> DataError:
    return DataError(
        "an encoding in the cache cannot be used any more",
        [
            f"{path} {what}. It was sound when the run started. The next start makes it anew: resume with "
            "resume_from_checkpoint=latest. If it happens again, examine the disk."
        ],
    )


class Ledger:
    """Memory of each item's last key, to give the reason why an entry is missing. It never decides what is used."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._parts: dict[str, dict[str, str]] = {}
        if path is not None and os.path.lexists(path):
            try:
                found = json.loads(read_bounded(path, LARGEST_LEDGER_BYTES).decode())
                self._parts = {item: dict(parts.items()) for item, parts in found.items()}
            except OSError as error:
                log.warning(
                    "%s cannot be read (%s); reasons for cache misses are unknown this once", path, error.strerror
                )
            except (ValueError, AttributeError, RecursionError):  # no JSON, or JSON of another shape
                log.warning("%s is damaged; reasons for cache misses are unknown this once", path)

    def reason(self, key: CacheKey) -> str:
        """Returns why this key is not in the store: "new", or the names of the parts that changed."""
        before = self._parts.get(key.item)
        if before is None:
            return "new"
        changed = [name for name, value in key.all_parts.items() if before.get(name) != value]
        return f"with another {' and '.join(changed)}" if changed else "deleted"

    def remember(self, keys: Iterable[CacheKey]) -> None:
        """Takes these keys as the last ones of their items, and writes what is new to the ledger's file, if any."""
        new = {key.item: key.all_parts for key in keys}
        if new.items() <= self._parts.items():
            return
        self._parts |= new
        if self.path is not None:
            write_if_possible(self.path, json.dumps(self._parts, sort_keys=True).encode())
