"""Crews of several processes that are threads of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.distributed import HashStore  # type: ignore[attr-defined]

from pixtune.launch.crew import Crew

T = TypeVar("T")


def in_crew(size: int, work: Callable[[Crew], T], store: Any = None) -> list[T]:
    """What `work` returns in each of several processes of one machine."""
    store = HashStore() if store is None else store
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(work, Crew(store, rank, size, rank)) for rank in range(size)]
        return [each.result(timeout=60) for each in ranks]
