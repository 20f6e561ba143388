"""The content-addressed cache of encoded pictures and captions.

An entry's key is a hash of everything that decides its content: picture bytes or caption, size and crop, the encoder's
weights, the prompt template, the number format and this code's version. So nothing stale is ever read, and one changed
caption re-encodes one caption. A ledger remembers the parts of each item's last key, so that every miss has a reason.
An entry on disk carries a checksum, so that nothing damaged is ever read either: it is made anew.
Pictures are stored as the mean and deviation of the autoencoder's distribution: each turn draws its latents anew.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load
from torch import Tensor

from pixtune.data.pairs import shorten
from pixtune.errors import DataError
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.storage.files import replacing, text_digest, write_if_possible
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
CHECK_THREADS = 4
"""Number of threads that check entries: most of the time goes to waiting for a disk, or to a checksum without the
interpreter's lock."""

Entry = dict[str, Tensor]


@dataclass(frozen=True)
class CacheKey:
    """The named parts that decide an entry's content."""

    item: str
    """Name for people, such as "cat.png at 1024x1024": it stands in messages, not in the hash."""
    parts: dict[str, str] = field(hash=False)
    """Parts by name, for example {"picture": its SHA-256, "encoder": ...}."""

    @property
    def all_parts(self) -> dict[str, str]:
        """The parts and the code's version."""
        return {**self.parts, "code": CODE_VERSION}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all parts, as hex: the entry's name in the store."""
        return text_digest(json.dumps(self.all_parts, sort_keys=True))


class Store(Protocol):
    """A place for entries, by the digests of their keys."""

    def problem(self, digest: str) -> str | None:
        """Returns why an entry cannot be used: `ABSENT`, `DAMAGED`, `OLDER` or an error; None: it can."""

    def read(self, digest: str) -> Entry: ...

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        """Reads the shapes of an entry's tensors without the tensors."""

    def write(self, digest: str, entry: Entry) -> None: ...


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
        if problem is None:
            self._sound[digest] = version
        return problem

    def read(self, digest: str) -> Entry:
        """Reads an entry and checks it: a disk may fail during a run that began with sound entries.

        Raises:
            DataError: the entry is damaged, deleted or out of reach by now.
        """
        path = self._path(digest)
        try:
            data = read_bounded(path, LARGEST_ENTRY_BYTES)
        except OSError as error:
            raise _unusable(path, f"cannot be read: {error.strerror or error}") from error
        if problem := _problem_of(digest, data):
            raise _unusable(path, f"is {problem}")
        try:
            return load(data)
        except (SafetensorError, ValueError) as error:
            raise _unusable(path, f"is no safetensors file ({error})") from error

    def read_shapes(self, digest: str) -> Mapping[str, Sequence[int]]:
        """Reads the shapes from the header, which is not checked again.

        Raises:
            DataError: as `read`.
        """
        path = self._path(digest)
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unusable(path, f"cannot be read: {error}") from error

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


@dataclass(frozen=True)
class FillReport:
    """Result of filling the cache."""

    hits: int
    """Number of entries that were there."""
    misses: dict[str, int]
    """Number of entries that were made, by reason."""
    damaged: tuple[str, ...] = ()
    """Names of the items whose entries were damaged."""

    def __str__(self) -> str:
        names = {DAMAGED: f": {shorten(self.damaged)}"}
        reasons = "; ".join(f"{count} {reason}{names.get(reason, '')}" for reason, count in sorted(self.misses.items()))
        return f"{self.hits} from the cache, {sum(self.misses.values())} encoded" + (f" ({reasons})" if reasons else "")


def missing_keys(store: Store, keys: Sequence[CacheKey]) -> list[CacheKey]:
    """Lists the keys without an entry that can be used, each digest once, in order."""
    return [key for key, _ in problems_of(store, keys)]


def problems_of(store: Store, keys: Sequence[CacheKey]) -> list[tuple[CacheKey, str]]:
    """Lists the keys without an entry that can be used, each digest once, in order, with the entries' problems.

    Entries that are there and cannot be read are warned of, since a disk may be about to fail, even if it can read them
    when asked again.
    """
    unique = {key.digest: key for key in keys}
    digests = list(unique)

    def problems_among(share: Sequence[str]) -> list[tuple[str, str | None]]:
        return [(digest, store.problem(digest)) for digest in share]

    with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="check-cache") as pool:
        # Shares, since a task for each small entry costs more than its check.
        shares = pool.map(problems_among, [digests[start::CHECK_THREADS] for start in range(CHECK_THREADS)])
        problems = dict(chain.from_iterable(shares))
    found = [(key, problem) for digest, key in unique.items() if (problem := problems[digest]) is not None]
    unreadable = {key.item: problem for key, problem in found if problem.startswith(UNREADABLE)}
    if unreadable:
        first = next(iter(unreadable.values()))
        log.warning("entries of the cache are %s: those of %s", first, shorten([*unreadable]))
    return found


def fill(
    store: Store,
    ledger: Ledger,
    keys: Sequence[CacheKey],
    encode: Callable[[Sequence[CacheKey]], Iterator[tuple[CacheKey, Entry]]],
) -> FillReport:
    """Encodes what is missing, or cannot be used, and nothing else.

    Args:
        encode: yields each of the missing keys with its entry as soon as that is made. It is called only if something
            is missing, so that no encoder is loaded for nothing.
    """
    missing, reason_of = [], {}
    for key, problem in problems_of(store, keys):
        missing.append(key)
        reason_of[key.digest] = ledger.reason(key) if problem == ABSENT else problem
        log.debug("cache miss: %s (%s)", key.item, reason_of[key.digest])
    if missing:
        for key, entry in encode(missing):
            store.write(key.digest, entry)
    ledger.remember(keys)
    unique = len({key.digest for key in keys})
    return FillReport(
        hits=unique - len(missing),
        misses=dict(Counter(reason_of.values())),
        damaged=tuple(key.item for key in missing if reason_of[key.digest] == DAMAGED),
    )
