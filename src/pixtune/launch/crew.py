"""Divides work among the processes of a run: each takes the next part as soon as it is free.

A counter in the store where the processes have met gives the parts out, so they all end together although parts differ
and some machines are slower. Who has nothing left waits for the others without a limit, since work may take hours: a
process that is gone is noticed by `peers.py`, and one whose part fails says so here. Values travel as JSON.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pixtune.errors import PixtuneError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")

LOOK_SECONDS = 0.05
"""Interval at which a process that waits for others first looks whether they are done."""
MOST_LOOK_SECONDS = 0.5
"""Interval at which it looks in the end."""
STORE_SECONDS = 120.0
"""Time in which the store must answer: its process may be held by a library's call for some seconds."""
PARTS_EACH = 32
"""Number of parts that each process gets of many items: the last ones to end then differ by a few hundredths."""
MOST_ITEMS = 1024
"""Number of items in a part at most: the store takes no value of more than 8 MiB."""
_NO_MORE = 1 << 50
"""Number beyond the parts of any work."""


class Store(Protocol):
    """A place that all processes reach: `torch.distributed.Store` is one. No call waits for another process."""

    def add(self, key: str, amount: int, /) -> int: ...

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


class Crew:
    """The processes that divide work, as one of them sees them. All must divide the same work in the same order.

    Args:
        store: the place where they meet; None: there is one process alone.
        rank: number of this process among them.
        local_rank: number of this process among those of its machine.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._numbers = count()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, name: str, members: Sequence[int]) -> Crew:
        """Returns the crew of those members, of which this process is one, by their ranks here.

        Args:
            name: name that no other part has at the same time.
        """
        if self._store is None:
            return self
        if len(members) == 1:
            return Crew(local_rank=self.local_rank)
        store = _Prefixed(self._store, f"{name}/")
        return Crew(store, members.index(self.rank), len(members), self.local_rank)

    @contextmanager
    def sharing(self, what: str, total: int, reached: Callable[[int], object] = lambda made: None) -> Iterator[Share]:
        """Shares work out within the block, whose end waits for the others.

        Args:
            what: the work, for example "encoding captions": it stands in messages.
            total: number of items.
            reached: called in this process with the number of items that all have made together.

        Raises:
            TrainingError: another process failed; names it and its error.
        """
        if self._store is None:
            yield Share(None, 1, total, reached)
            return
        store = _Prefixed(self._store, f"{next(self._numbers)}/")
        share = Share(store, self.size, total, reached)
        try:
            yield share
        except Exception as error:
            first_lines = " ".join(f"{error}".split("\n")[:2]) or type(error).__name__
            store.set("failed", json.dumps([self.rank, first_lines]))
            store.add("taken", _NO_MORE)  # nobody begins another part
            raise
        store.add("done", 1)
        self._wait(what, store, share)

    def _wait(self, what: str, store: Store, share: Share) -> None:
        pause = LOOK_SECONDS
        while store.add("done", 0) < self.size:
            if store.check(["failed"]):
                rank, report = json.loads(store.get("failed"))
                raise TrainingError(f"process {rank} of {self.size} failed while {what}: {report}")
            share.look()
            time.sleep(pause)
            pause = min(2 * pause, MOST_LOOK_SECONDS)
        share.look()

    def wait(self, what: str) -> None:
        """Waits until all have come here. Raises as `sharing`."""
        with self.sharing(what, 0):
            pass

    def from_first(self, what: str, make: Callable[[], T]) -> T:
        """Returns in all processes what the first one makes; it must be fit for JSON. Raises as `sharing`."""
        if self._store is None:
            return make()
        results, own = self._results(), dict[int, Any]()
        with self.sharing(what, 0):
            if self.is_first:
                own[0] = make()
                results.set("0", json.dumps(own[0]))
        (made,) = self._read(results, range(1), own)
        return made

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns in all processes the values of all, by rank; they must be fit for JSON. Raises as `sharing`."""
        if self._store is None:
            return [value]
        results = self._results()
        with self.sharing(what, 0):
            results.set(str(self.rank), json.dumps(value))
        return self._read(results, range(self.size), {self.rank: value})

    def map(self, what: str, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
        """Returns in all processes what `do` makes of items, in their order. Raises as `sharing`.

        Args:
            do: makes a part's results from its items, which are neighbours; they must be fit for JSON.
        """
        if self._store is None:  # in parts as well: what `do` begins for each item at once takes memory
            starts = range(0, len(items), MOST_ITEMS)
            return [each for start in starts for each in do(items[start : start + MOST_ITEMS])]
        at_once = max(1, min(MOST_ITEMS, len(items) // (PARTS_EACH * self.size)))
        starts = range(0, len(items), at_once)
        results, own = self._results(), dict[int, Sequence[Any]]()
        with self.sharing(what, len(starts)) as share:
            for number in share.take(range(len(starts))):
                own[number] = do(items[starts[number] : starts[number] + at_once])
                results.set(str(number), json.dumps(own[number]))
        return list(chain.from_iterable(self._read(results, range(len(starts)), own)))

    def _results(self) -> Store:
        assert self._store is not None, "a process alone has nobody to exchange with"
        return _Prefixed(self._store, f"{next(self._numbers)}/results/")

    def _read(self, results: Store, numbers: range, own: Mapping[int, Any]) -> list[Any]:
        found = [own[number] if number in own else json.loads(results.get(str(number))) for number in numbers]
        results.add("read", 1)
        if self.is_first:  # it may hold the store, so it stays until all have read, and tidies up
            pause = LOOK_SECONDS / 10
            while results.add("read", 0) < self.size:
                time.sleep(pause)
                pause = min(2 * pause, MOST_LOOK_SECONDS)
            for number in numbers:
                results.delete_key(str(number))
        return found


class Share:
    """Some work that is shared out, as one process sees it."""

    def __init__(self, store: Store | None, size: int, total: int, reached: Callable[[int], object]) -> None:
        self._store, self._size, self._total, self._reached = store, size, total, reached
        self._made = 0

    def take(self, items: Sequence[T]) -> Iterator[T]:
        """Yields this process's items, each when it is asked for. All processes must give the same ones in one order.

        Those that take longest should come first: the last to end then end together.
        """
        if self._store is None:
            yield from items
            return
        while (number := self._store.add("taken", 1) - 1) < len(items):
            yield items[number]

    def ahead(self, most: int) -> int:
        """Returns how many items a process may take before it needs them, so that others get their part of a few."""
        return most if self._store is None else max(1, min(most, self._total // (4 * self._size)))

    def made(self, number: int = 1) -> None:
        """Counts items that this process has made."""
        self._made = self._made + number if self._store is None else self._store.add("made", number)
        self._reached(self._made)

    def look(self) -> None:
        """Looks how many items all have made."""
        if self._store is not None and (made := self._store.add("made", 0)) != self._made:
            self._made = made
            self._reached(made)


class _Prefixed:
    """A store within another, by the beginnings of its keys.

    Its methods raise a TrainingError where it is gone.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def add(self, key: str, amount: int, /) -> int:
        with _reaching_the_store():
            return self._store.add(self._prefix + key, amount)

    def set(self, key: str, value: str, /) -> None:
        with _reaching_the_store():
            self._store.set(self._prefix + key, value)

    def get(self, key: str, /) -> bytes:
        with _reaching_the_store():
            return self._store.get(self._prefix + key)

    def check(self, keys: list[str], /) -> bool:
        with _reaching_the_store():
            return self._store.check([self._prefix + key for key in keys])

    def delete_key(self, key: str, /) -> bool:
        with _reaching_the_store():
            return self._store.delete_key(self._prefix + key)


@contextmanager
def _reaching_the_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PixtuneError):
            raise
        raise TrainingError(
            "the store where the processes meet is gone, with process 0 or the launcher, which holds it "
            f"({str(error).splitlines()[0]}). What has been made is kept: start again."
        ) from error


ALONE = Crew()
"""The crew of one process."""


def gather_crew(accelerator: Accelerator | PartialState) -> Crew:
    """Returns the crew of all processes of a run. All of them must call it.

    They meet in the store where their process group has met, at the launcher's address, so no other port is needed.

    Raises:
        TrainingError: this process does not reach the store.
    """
    if accelerator.num_processes == 1:
        return ALONE
    # The page and `pixtune validate` import this module for `Crew` alone: torch would cost them seconds and 200 MB.
    from accelerate.utils import broadcast_object_list
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # A launcher's store outlives its processes: a run that it starts again must not find the counters of before.
    (token,) = broadcast_object_list([secrets.token_hex(8)])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, None, False, timedelta(seconds=STORE_SECONDS), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"process {accelerator.process_index} cannot reach the store of its process group at {host}:{port} "
            f"({error})."
        ) from error
    prefixed = _Prefixed(store, f"pixtune {token}/")
    return Crew(prefixed, accelerator.process_index, accelerator.num_processes, accelerator.local_process_index)


def crew_of_folder(crew: Crew, folder: Path) -> Crew:
    """Returns those of a crew that see the same folder: machines may share a disk, or have one of that name each.

    Each process leaves a file there for a moment, and looks for the first one's. Names are new, so that a network's
    file system cannot know from before that they are absent.
    """
    if crew.size == 1:
        return crew
    what = "finding out who shares the cache"
    token = crew.from_first(what, lambda: secrets.token_hex(8))

    def mark(rank: int) -> Path:
        return folder / f".{token}.{rank}.tmp"

    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark(crew.rank).touch()
    except OSError:
        pass  # whoever cannot write there may still see what others write
    crew.wait(what)
    leader = next((rank for rank in range(crew.size) if mark(rank).exists()), None)
    leaders = crew.gather(what, leader)
    with suppress(OSError):
        mark(crew.rank).unlink()
    return crew.part(f"cache {leader}", [rank for rank, of_rank in enumerate(leaders) if of_rank == leader])
