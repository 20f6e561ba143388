"""The content-addressed cache of encoded pictures and captions.

An entry's key is a hash of everything that decides its content: picture bytes or caption, size and crop, the encoder's
weights, the prompt template, number format and this code's version. Nothing stale can be read, and one changed caption
re-encodes one caption. A ledger remembers which parts each item had last time, so that every miss can say why.
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
"""Raise it whenever the same input would be encoded differently."""

Entry = dict[str, Tensor]


@dataclass(frozen=True)
class CacheKey:
    """The named parts that decide an entry's content.

    Args:
        item: what a person calls it, for example "cat.png at 1024x1024": names it in messages, not in the hash.
        parts: for example {"picture": its SHA-256, "encoder": ...}.
    """

    item: str
    parts: dict[str, str] = field(hash=False)

    @property
    def all_parts(self) -> dict[str, str]:
        return {**self.parts, "code": CODE_VERSION}

    @property
    def digest(self) -> str:
        text = json.dumps(self.all_parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Store(Protocol):
    """Where entries live."""

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
    """One safetensors file an entry, written atomically, in folders by the first two digits of the digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def has(self, digest: str) -> bool:
        """Whether a readable entry is there. A damaged file counts as absent and is said to be damaged."""
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
    """Remembers each item's key parts between runs, to say why an entry is missing. Never decides what is used."""

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
        """Why this key is not in the store: "new", or the names of the parts that changed."""
        before = self._parts.get(key.item)
        if before is None:
            return "new"
        changed = [name for name, value in key.all_parts.items() if before.get(name) != value]
        return f"changed: {', '.join(changed)}" if changed else "deleted or damaged"

    def remember(self, keys: Iterable[CacheKey]) -> None:
        self._parts.update({key.item: key.all_parts for key in keys})
        if self.path is not None:
            write_atomically(self.path, json.dumps(self._parts, indent=0, sort_keys=True).encode())


@dataclass(frozen=True)
class FillReport:
    """What filling the cache did."""

    hits: int
    misses: dict[str, int]
    """Count by reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(self.misses.items()))
        return f"{self.hits} from the cache, {sum(self.misses.values())} encoded" + (f" ({reasons})" if reasons else "")


def missing_keys(store: Store, keys: Sequence[CacheKey]) -> list[CacheKey]:
    """The keys without an entry, each digest once, in order."""
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
        encode: given the missing keys, yields each with its entry as soon as it is made; called only when something
            is missing, so that encoders need not be loaded for nothing.
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
