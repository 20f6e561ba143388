"""The content-addressed cache of encoded pictures and captions.

An entry's key is a hash of everything that decides its content: picture bytes or caption, size and crop, the encoder's
weights, the prompt template, the number format and this code's version. So nothing stale is ever read, and one changed
caption re-encodes one caption. A ledger remembers the parts of each item's last key, so that every miss has a reason.
Pictures are stored as the mean and deviation of the autoencoder's distribution: each turn draws its latents anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixtune.storage.files import write_atomically
from pixtune.storage.safetensors_writer import save_without_digest

log = logging.getLogger(__name__)

CODE_VERSION = "1"
"""Version of the encoding code, to be raised whenever the same input would be encoded differently."""

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

    @property
    def digest(self) -> str:
        """SHA-256 of all parts, as hex: the entry's name in the store."""
        text = json.dumps(self.all_parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Store(Protocol):
    """A place for entries, by the digests of their keys."""

    def has(self, digest: str) -> bool: ...

    def read(self, digest: str) -> Entry: ...

    def write(self, digest: str, entry: Entry) -> None: ...


class MemoryStore:
    """Entries in host memory, gone with the process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def has(self, digest: str) -> bool:
        return digest in self._entries

    def read(self, digest: str) -> Entry:
        return self._entries[digest]

    def write(self, digest: str, entry: Entry) -> None:
        self._entries[digest] = {name: tensor.detach().cpu() for name, tensor in entry.items()}


class DiskStore:
    """Entries as one safetensors file each, written atomically, in folders by the first two digits of the digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def has(self, digest: str) -> bool:
        """Returns whether a readable entry is there. A damaged file counts as absent, with a warning."""
        path = self._path(digest)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError) as error:
            log.warning("cache entry %s is damaged (%s) and is made anew", path, error)
            return False

    def read(self, digest: str) -> Entry:
        return load_file(self._path(digest))

    def write(self, digest: str, entry: Entry) -> None:
        save_without_digest(self._path(digest), entry)


class Ledger:
    """Memory of each item's last key, to give the reason why an entry is missing. It never decides what is used."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._parts: dict[str, dict[str, str]] = {}
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self._parts = {item: dict(parts.items()) for item, parts in found.items()}
            except (ValueError, AttributeError):  # no JSON, or JSON of another shape
                log.warning("%s is damaged; reasons for cache misses are unknown this once", path)

    def reason(self, key: CacheKey) -> str:
        """Returns why this key is not in the store: "new", or the names of the parts that changed."""
        before = self._parts.get(key.item)
        if before is None:
            return "new"
        changed = [name for name, value in key.all_parts.items() if before.get(name) != value]
        return f"changed: {', '.join(changed)}" if changed else "deleted or damaged"

    def remember(self, keys: Iterable[CacheKey]) -> None:
        """Takes these keys as the last ones of their items, and writes the ledger's file if it has one."""
        self._parts.update({key.item: key.all_parts for key in keys})
        if self.path is not None:
            write_atomically(self.path, json.dumps(self._parts, indent=0, sort_keys=True).encode())


@dataclass(frozen=True)
class FillReport:
    """Result of filling the cache."""

    hits: int
    """Number of entries that were there."""
    misses: dict[str, int]
    """Number of entries that were made, by reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(self.misses.items()))
        return f"{self.hits} from the cache, {sum(self.misses.values())} encoded" + (f" ({reasons})" if reasons else "")


def missing_keys(store: Store, keys: Sequence[CacheKey]) -> list[CacheKey]:
    """Lists the keys without an entry, each digest once, in order."""
    unique = {key.digest: key for key in keys}
    return [key for digest, key in unique.items() if not store.has(digest)]


def fill(
    store: Store,
    ledger: Ledger,
    keys: Sequence[CacheKey],
    encode: Callable[[Sequence[CacheKey]], Iterator[tuple[CacheKey, Entry]]],
) -> FillReport:
    """Encodes what is missing and nothing else.

    Args:
        encode: yields each of the missing keys with its entry as soon as that is made. It is called only if something
            is missing, so that no encoder is loaded for nothing.
    """
    missing = missing_keys(store, keys)
    reasons = Counter(ledger.reason(key) for key in missing)
    for key in missing:
        log.debug("cache miss: %s (%s)", key.item, ledger.reason(key))
    if missing:
        for key, entry in encode(missing):
            store.write(key.digest, entry)
    ledger.remember(keys)
    unique = len({key.digest for key in keys})
    return FillReport(hits=unique - len(missing), misses=dict(reasons))
