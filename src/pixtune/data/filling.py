"""Fills the cache: finds out what it lacks and why, and has that encoded once, by the processes that share it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from pixtune.data.cache import ABSENT, DAMAGED, UNREADABLE, CacheKey, Digests, Entry, Ledger, Store
from pixtune.data.pairs import shorten
from pixtune.launch.crew import ALONE, Crew, Share
from pixtune.progress import counted

log = logging.getLogger(__name__)

MOST_REMEMBERED = 200_000
"""Number of keys from which the ledger takes none: it is one file, read whole, and costs a kilobyte a key."""

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


@dataclass(frozen=True)
class Lacking:
    """Keys without an entry that can be used, each digest once, in order, with the entries' problems."""

    num_looked_for: int
    """Number of entries that were looked for."""
    problems: list[tuple[CacheKey, str]]

    def __bool__(self) -> bool:
        return bool(self.problems)


def missing_keys(store: Store, keys: Sequence[CacheKey], crew: Crew = ALONE) -> list[CacheKey]:
    """Lists the keys without an entry that can be used, each digest once, in order."""
    return [key for key, _ in look_for(store, keys, crew).problems]


def look_for(store: Store, keys: Sequence[CacheKey], crew: Crew = ALONE, known: Digests | None = None) -> Lacking:
    """Returns what a store lacks, or cannot read, of some keys' entries; the same in the whole crew.

    Entries that are there and cannot be read are warned of, since a disk may be about to fail, even if it can read them
    when asked again.

    Args:
        crew: the processes that share the store, and divide the reading.
        known: gets the digests of all the keys.
    """
    place_of: dict[str, int] = {}
    for place, key in enumerate(keys):
        place_of[key.digest] = place  # of equal ones the last names the entry
    digests = list(place_of)
    if known is not None:
        known.update(digests)

    def problems_among(part: Sequence[str]) -> list[str | None]:
        with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="check-cache") as pool:
            # In pieces, since a task for each small entry costs more than its check.
            pieces = [part[start::CHECK_THREADS] for start in range(CHECK_THREADS)]
            checked = [*pool.map(lambda piece: [store.problem(digest) for digest in piece], pieces)]
        return [checked[number % CHECK_THREADS][number // CHECK_THREADS] for number in range(len(part))]

    problems = crew.map("checking the cache", digests, problems_among)
    found = [
        (keys[place_of[digest]], problem)
        for digest, problem in zip(digests, problems, strict=True)
        if problem is not None
    ]
    unreadable = {key.item: problem for key, problem in found if problem.startswith(UNREADABLE)}
    if unreadable:
        first = next(iter(unreadable.values()))
        log.warning("entries of the cache are %s: those of %s", first, shorten([*unreadable]))
    return Lacking(len(digests), found)


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
    lacking = look_for(store, keys, work.crew) if lacking is None else lacking
    for key, problem in lacking.problems:
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
    if work.crew.is_first and len(keys) <= MOST_REMEMBERED:
        ledger.remember(keys)
    return FillReport(
        hits=lacking.num_looked_for - len(missing),
        misses=dict(Counter(reason_of.values())),
        damaged=tuple(key.item for key in missing if reason_of[key.digest] == DAMAGED),
    )
