"""Makes things ahead of their use, in threads: reading and decoding release the interpreter's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(
    make: Callable[[Item], Made], items: Iterable[Item], most: int, num_threads: int
) -> Iterator[tuple[Item, Made]]:
    """Yields each item with what `make` returns for it, in order. Items are asked for in the caller's thread.

    Args:
        most: number of items that are made meanwhile, at most: memory is finite.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ahead") as pool:
        pending: deque[tuple[Item, Future[Made]]] = deque()
        for item in items:
            pending.append((item, pool.submit(make, item)))
            if len(pending) > most:
                first, made = pending.popleft()
                yield first, made.result()
        while pending:
            first, made = pending.popleft()
            yield first, made.result()
