"""Work is divided without a gap or an overlap, ends for all together, and fails for all together."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pixtune.errors import DataError, TrainingError
from pixtune.launch import crew as crew_module
from pixtune.launch.crew import ALONE, Crew, crew_of_folder
from tests.crews import in_crew


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 50])
def test_each_item_is_taken_once_and_the_end_is_common(num_items: int) -> None:
    ended: list[int] = []

    def work(crew: Crew) -> tuple[list[int], int]:
        taken = []
        with crew.sharing("encoding", num_items) as share:
            for item in share.take(range(num_items)):
                time.sleep(0.002)
                taken.append(item)
                share.made()
                ended.append(item)
        return taken, len(ended)

    outcomes = in_crew(3, work)
    assert sorted(item for taken, _ in outcomes for item in taken) == list(range(num_items))
    assert [num_ended for _, num_ended in outcomes] == [num_items] * 3, "nobody goes on before all is done"


def test_a_slow_process_gets_less_and_nobody_waits_long_for_it() -> None:
    def work(crew: Crew) -> tuple[int, float]:
        seconds = 0.02 if crew.rank == 0 else 0.002
        with crew.sharing("encoding", 60) as share:
            taken = [time.sleep(seconds) for _ in share.take(range(60))]  # type: ignore[func-returns-value]
            ended = time.monotonic()
        return len(taken), ended

    slow, fast = in_crew(2, work)
    assert slow[0] + fast[0] == 60 and fast[0] > 4 * slow[0]
    assert abs(slow[1] - fast[1]) < 0.1, "the last item of the slow one, not half of all"


def test_progress_counts_what_all_have_made() -> None:
    reached: list[int] = []

    def work(crew: Crew) -> None:
        with crew.sharing("encoding", 30, reached.append if crew.is_first else lambda made: None) as share:
            for _ in share.take(range(30)):
                time.sleep(0.001)
                share.made()

    in_crew(3, work)
    assert reached == sorted(reached) and reached[-1] == 30


def test_values_come_to_all_in_order_and_are_tidied_away() -> None:
    calls: list[int] = []

    def do(part: Sequence[int]) -> list[list[int]]:
        calls.append(len(part))
        return [[item, item**2] for item in part]

    def work(crew: Crew) -> tuple[list[Any], list[Any], str]:
        found = crew.map("squares", range(500), do)
        return found, crew.gather("ranks", crew.rank), crew.from_first("a name", lambda: f"by {crew.rank}")

    store = HashStore()
    for found, ranks, name in in_crew(3, work, store):
        assert found == [[item, item**2] for item in range(500)]
        assert ranks == [0, 1, 2] and name == "by 0"
    assert sum(calls) == 500 and len(calls) > 3
    assert store.num_keys() < 30, "the values themselves are gone"


def test_alone_all_is_as_without_a_crew(tmp_path: Path) -> None:
    with ALONE.sharing("encoding", 3) as share:
        assert [*share.take("abc")] == ["a", "b", "c"] and share.ahead(8) == 8
    assert ALONE.map("x", [1, 2], lambda part: [2 * item for item in part]) == [2, 4]
    assert ALONE.gather("x", 5) == [5] and ALONE.from_first("x", lambda: 6) == 6
    assert crew_of_folder(ALONE, tmp_path / "cache") is ALONE and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("at_fault", [0, 2])
def test_a_failure_ends_all_at_once_and_names_its_process(at_fault: int) -> None:
    began = time.monotonic()

    def work(crew: Crew) -> str:
        try:
            with crew.sharing("encoding pictures", 1000) as share:
                for item in share.take(range(1000)):
                    time.sleep(0.01)
                    if crew.rank == at_fault and item > 5:
                        raise DataError("a picture changed", ["a.png is gone.", "and more"])
        except DataError:
            return "own"
        except TrainingError as error:
            return str(error)
        return "no error"

    outcomes = in_crew(3, work)
    assert outcomes.pop(at_fault) == "own"
    assert set(outcomes) == {
        f"process {at_fault} of 3 failed while encoding pictures: a picture changed:   - a.png is gone."
    }
    assert time.monotonic() - began < 3


def test_a_run_that_is_started_again_does_not_find_the_old_counters() -> None:
    store = HashStore()
    for attempt in ("a/", "b/"):
        taken = in_crew(2, lambda crew: crew.map("x", [1, 2, 3], list), crew_module._Prefixed(store, attempt))
        assert taken == [[1, 2, 3]] * 2


def test_those_that_see_one_folder_are_a_crew_of_their_own(tmp_path: Path) -> None:
    """As two machines with a disk each, and a third that may not write to the first one's."""
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "two", tmp_path / "two", tmp_path / "two"]
    crews = in_crew(5, lambda crew: crew_of_folder(crew, folders[crew.rank] / "cache"))
    assert [(crew.rank, crew.size) for crew in crews] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert not [*tmp_path.rglob("*.tmp")]
    with ThreadPoolExecutor(5) as pool:  # each part divides by itself
        found = [pool.submit(crew.map, "x", range(40), list) for crew in crews]
        assert all(each.result(timeout=20) == list(range(40)) for each in found)
    assert [crew.local_rank for crew in crews] == [0, 1, 2, 3, 4]


def test_waiting_has_no_limit_but_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the store itself would wait for a key."""
    monkeypatch.setattr(crew_module, "MOST_LOOK_SECONDS", 0.05)
    late = threading.Event()

    def work(crew: Crew) -> float:
        if crew.rank:
            late.wait(5)
        began = time.monotonic()
        crew.wait("reading")
        return time.monotonic() - began

    threading.Timer(0.5, late.set).start()
    first, second = in_crew(2, work)
    assert first > 0.4 > second
