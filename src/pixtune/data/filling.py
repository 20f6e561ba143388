"""Fills the cache: finds out what it lacks and why, and has that encoded once, by the processes that share it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from pixtune.data.cache import ABSENT, DAMAGED, UNREADABLE, CacheKey, Entry, Ledger, Store
from pixtune.data.pairs import shorten
from pixtune.launch.crew import ALONE, Crew, Share
from pixtune.progress import counted

log = logging.getLogger(__name__)

CHECK_THREADS = 4
"""Number of threads that check entries: most of the time goes to waiting for a disk, or to a checksum without the
interpreter's lock."""


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


Lacking = list[tuple["CacheKey", str]]
"""Keys without an entry that can be used, each digest once, in order, with the entries' problems."""


def missing_keys(store: Store, keys: Sequence[CacheKey], crew: Crew = ALONE) -> list[CacheKey]:
    """Lists the keys without an entry that can be used, each digest once, in order."""
    return [key for key, _ in problems_of(store, keys, crew)]


def problems_of(store: Store, keys: Sequence[CacheKey], crew: Crew = ALONE) -> Lacking:
    """Lists the keys without an entry that can be used, with the entries' problems; the same in the whole crew.

    Entries that are there and cannot be read are warned of, since a disk may be about to fail, even if it can read them
    when asked again.

    Args:
        crew: the processes that share the store, and divide the reading.
    """
    unique = {key.digest: key for key in keys}
    digests = list(unique)

    def problems_among(part: Sequence[str]) -> list[str | None]:
        with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="check-cache") as pool:
            # In pieces, since a task for each small entry costs more than its check.
            pieces = [part[start::CHECK_THREADS] for start in range(CHECK_THREADS)]
            checked = [*pool.map(lambda piece: [store.problem(digest) for digest in piece], pieces)]
        return [checked[number % CHECK_THREADS][number // CHECK_THREADS] for number in range(len(part))]

    problems = crew.map("checking the cache", digests, problems_among)
    found = [
        (unique[digest], problem) for digest, problem in zip(digests, problems, strict=True) if problem is not None
    ]
    unreadable = {key.item: problem for key, problem in found if problem.startswith(UNREADABLE)}
    if unreadable:
        first = next(iter(unreadable.values()))
        log.warning("entries of the cache are %s: those of %s", first, shorten([*unreadable]))
    return found


@dataclass(frozen=True)
class Work:
    """Some filling of the cache, as a crew divides it and a person sees it."""

    what: str
    """Name of the work, for example "encoding captions"."""
    crew: Crew = ALONE
    console: Console | None = None
    """Console for a bar that counts what all have made; None: none is shown."""

    @contextmanager
    def sharing(self, total: int) -> Iterator[Share]:
        """Shares out and counts this many entries; see `Crew.sharing`."""
        if self.console is None:
            with self.crew.sharing(self.what, total) as share:
                yield share
            return
        with (
            counted(self.what, total, self.console) as counter,
            self.crew.sharing(self.what, total, counter.reach) as share,
        ):
            yield share


ENCODING = Work("encoding")


def fill(
    store: Store,
    ledger: Ledger,
    keys: Sequence[CacheKey],
    encode: Callable[[Sequence[CacheKey], Share], Iterator[tuple[CacheKey, Entry]]],
    work: Work = ENCODING,
    lacking: Lacking | None = None,
) -> FillReport:
    """Encodes what is missing, or cannot be used, and nothing else.

    Args:
        encode: yields the missing keys, or those of them that it takes from the share, each with its entry as soon as
            that is made. It is called only if something is missing, so that no encoder is loaded for nothing.
        work: how the crew that shares the store divides it.
        lacking: keys without an entry that can be used, where they are known; None: they are looked for.
    """
    missing, reason_of = [], {}
    for key, problem in problems_of(store, keys, work.crew) if lacking is None else lacking:
        missing.append(key)
        reason_of[key.digest] = ledger.reason(key) if problem == ABSENT else problem
        log.debug("cache miss: %s (%s)", key.item, reason_of[key.digest])
    if missing:
        if work.crew.is_first:
            store.tidy()
        with work.sharing(len(missing)) as share:
            for key, entry in encode(missing, share):
                store.write(key.digest, entry)
                share.made()
        if work.crew.size > 1:
            store.expect_others()
    if work.crew.is_first:
        ledger.remember(keys)
    unique = len({key.digest for key in keys})
    return FillReport(
        hits=unique - len(missing),
        misses=dict(Counter(reason_of.values())),
        damaged=tuple(key.item for key in missing if reason_of[key.digest] == DAMAGED),
    )
