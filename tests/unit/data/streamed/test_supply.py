"""What the steps get of a stream: a window of rows with a note on those left out, the same on all machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixtune.data.streamed.position import Position, first_position
from pixtune.data.streamed.reading import ReadRows
from pixtune.data.streamed.state import Counts, StreamState
from pixtune.data.streamed.supply import Supply
from pixtune.data.streamed.windows import RowPlace, StreamRow
from pixtune.errors import DataError, MemoryShortage, TrainingError
from pixtune.launch.crew import ALONE, Crew
from tests.crews import in_crew

ROWS = [
    StreamRow(RowPlace(0, shard, row), f"{shard}{row:063x}", (8, 6), (f"{row}",)) for shard, row in ((1, 0), (0, 4))
]
PROBLEMS = ["000.tar:2: no picture", "001.tar:1: no caption"]


def supply_of(
    rows: Sequence[StreamRow] | TrainingError, problems: Sequence[str] = (), crew: Crew = ALONE, shared: bool = False
) -> tuple[Supply, list[str]]:
    """A supply whose reader finds these rows, and what it shows.

    Args:
        shared: whether all processes share one cache, and so what they read.
    """

    def read(position: Position, window: int) -> ReadRows:
        if isinstance(rows, TrainingError):
            raise rows
        assert (position, window) == (first_position(2, 2), 14)
        return ReadRows([*rows], position, len(rows) + len(problems), [*problems], 0)

    reader: Any = SimpleNamespace(read=read, crew=crew if shared else ALONE)
    config: Any = SimpleNamespace(stream=SimpleNamespace(window=14, skipped_share=0.1))
    shown: list[str] = []
    unused: Any = None
    return Supply(config, unused, reader, unused, unused, unused, crew, unused, (), shown.append), shown


STATE = StreamState(first_position(2, 2))


@pytest.mark.parametrize(
    ("problems", "words"), [([], None), (PROBLEMS[:1], "1 row of the stream"), (PROBLEMS, "2 rows of the stream")]
)
def test_rows_that_are_left_out_are_noted(problems: list[str], words: str | None) -> None:
    supply, shown = supply_of(ROWS, problems)
    read = supply.read(STATE)
    assert read.rows == ROWS and len(shown) == (words is not None)
    for note in shown:
        assert words and note.startswith(f"note: {words}") and all(problem in note for problem in problems)


CHANGES: dict[str, Callable[[StreamRow], StreamRow]] = {
    "another picture": lambda row: replace(row, digest="f" * 64),
    "another caption": lambda row: replace(row, captions=("else",)),
    "another row": lambda row: replace(row, place=replace(row.place, row=9)),
    "another shard": lambda row: replace(row, place=replace(row.place, shard=7)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_machines_that_read_other_rows_are_named(
    change: Callable[[StreamRow], StreamRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixtune.launch.crew.LOOK_SECONDS", 0.001)

    def work(crew: Crew) -> str:
        rows = [ROWS[0], change(ROWS[1])] if crew.rank == 2 else ROWS
        with pytest.raises(DataError) as caught:
            supply_of(rows, crew=crew)[0].read(STATE)
        return str(caught.value)

    first, *others = in_crew(3, work)
    assert others == [first] * 2, "all processes end with the same words"
    assert "machines read different streams" in first and "Process 2 has read other rows than process 0" in first


@pytest.mark.parametrize("shared", [False, True])
def test_machines_that_read_the_same_rows_go_on_in_whatever_order(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share a cache have one reading, of which nothing has to be compared."""
    monkeypatch.setattr("pixtune.launch.crew.LOOK_SECONDS", 0.001)

    def work(crew: Crew) -> set[StreamRow]:
        return {*supply_of(ROWS[:: -1 if crew.rank else 1], crew=crew, shared=shared)[0].read(STATE).rows}

    assert in_crew(2, work) == [{*ROWS}] * 2


def test_what_keeps_another_process_from_reading_ends_this_one_as_an_error_of_the_data() -> None:
    supply, _ = supply_of(TrainingError("process 1: the disk is gone"))
    with pytest.raises(DataError, match="another process cannot read the stream") as caught:
        supply.read(STATE)
    assert caught.value.faults == ["process 1: the disk is gone"]


def test_more_skipped_rows_than_the_config_allows_end_the_run() -> None:
    supply, _ = supply_of(ROWS)
    supply.count(Counts(1000, 100), PROBLEMS)
    with pytest.raises(DataError, match=r"101 of the 1,?000 rows"):
        supply.count(Counts(1000, 101), PROBLEMS)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (TrainingError("process 1: no more"), DataError, "another process cannot encode the stream"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryShortage, "encoding a window of the stream"),
        (RuntimeError("shapes do not match"), RuntimeError, "^shapes do not match$"),
        (DataError("a row has changed", ["row 1"]), DataError, "a row has changed"),
    ],
)
def test_what_keeps_a_window_from_being_encoded_is_said_as_what_it_is(
    error: Exception, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shortage of memory has a remedy of its own, and the work of another process none here."""

    def fail(rows: object) -> None:
        raise error

    supply, _ = supply_of(ROWS)
    monkeypatch.setattr(supply, "_encode", fail)
    with pytest.raises(kind, match=words) as caught:
        supply.encode([])
    assert type(caught.value) is kind
