"""The order of a stream's turns: the same whoever asks when, resumed from any checkpoint, kept as long as needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from pixtune.data.buckets import Framing
from pixtune.data.example_table import Example
from pixtune.data.order import Use
from pixtune.data.streamed.order import StreamOrder
from pixtune.data.streamed.position import LanePosition, Position, first_position, has_ended, next_epoch
from pixtune.data.streamed.reading import ReadRows
from pixtune.data.streamed.state import Counts, StreamState, from_tensor
from pixtune.data.streamed.windows import RowPlace, StreamRow
from pixtune.errors import DataError

SIZES = ((64, 64), (96, 48), (48, 96))


class Rows:
    """One shard of rows in three sizes, read without files."""

    num_shards = 1

    def __init__(self, length: int, window: int) -> None:
        self.length, self.window = length, window
        self.encoded: list[int] = []
        """Number of examples whose encodings each call asked for."""

    def read(self, state: StreamState) -> ReadRows:
        position = state.position
        if has_ended(position, 1):
            position = next_epoch(position)
        first = position.lanes[0].row
        rows = [
            StreamRow(RowPlace(position.epoch, 0, row), f"{row:064x}", SIZES[row % 3], (f"{row}",))
            for row in range(first, min(first + self.window, self.length))
        ]
        # As a reader has it: the end of a shard is known only when one more row is asked for.
        at = LanePosition(0, first + len(rows)) if len(rows) == self.window else LanePosition(1)
        return ReadRows(rows, Position(position.epoch, position.window + 1, (at,)), len(rows), [], 0)

    def example_of(self, row: StreamRow) -> Example:
        framing = Framing(*row.size, 1.0, (0.0, 0.0, 1.0, 1.0), 0.0)
        return Example(f"{row.place.epoch} {row.place.row}", None, row.captions[0], (framing,))  # type: ignore[arg-type]

    def count(self, counts: Counts, problems: Sequence[str]) -> None:
        pass

    def encode(self, rows: Sequence[tuple[StreamRow, Example]]) -> None:
        self.encoded.append(len(rows))


def order_of(rows: Rows, state: StreamState | None = None, batch: int = 2) -> StreamOrder:
    return StreamOrder(5, batch, rows, state or StreamState(first_position(1, 1)), Use())


def names(order: StreamOrder, indices: range) -> list[list[str]]:
    return [[order.names[turn.example] for turn in order.micro_batch(index)] for index in indices]


@pytest.mark.parametrize(("length", "window"), [(12, 12), (12, 4), (13, 5), (12, 100), (7, 3)])
def test_rows_come_once_an_epoch_in_batches_of_one_size(length, window):
    order = order_of(Rows(length, window))
    turns = Counter(name for batch in names(order, range(3 * length)) for name in batch)
    assert {*turns.values()} == {1}
    complete = [f"{epoch} {row}" for epoch in range(4) for row in range(length)]
    assert {*complete} <= {*turns}, "rows wait for others of their size, but not for ever"


@pytest.mark.parametrize("at", [0, 4, 8, 12, 20, 28])
def test_a_checkpoint_holds_all_that_the_turns_after_it_depend_on(at):
    whole = names(order_of(Rows(13, 5)), range(40))
    order = order_of(Rows(13, 5))
    config = SimpleNamespace(gradient_accumulation_steps=4, data_config=SimpleNamespace(num_workers=2))
    order.keep_for(config, SimpleNamespace(modulation_rows=0), lambda: None)  # type: ignore[arg-type]
    names(order, range(at + 3 + 4))  # in the middle of a step, and as far as threads have read ahead
    state = from_tensor(order.files(at)["stream"].tensors["state"])
    assert names(order_of(Rows(13, 5), state), range(at, 40)) == whole[at:]


def test_windows_are_kept_as_long_as_they_may_be_asked_for_again():
    order = order_of(Rows(1000, 10))
    plan = SimpleNamespace(modulation_rows=0)
    config = SimpleNamespace(gradient_accumulation_steps=1, data_config=SimpleNamespace(num_workers=3))
    order.keep_for(config, plan, lambda: None)  # type: ignore[arg-type]
    before = [names(order, range(index, index + 1)) for index in range(200)][190:]
    assert len(order.examples) < 50 and max(order.supply.encoded) < 50  # type: ignore[attr-defined]
    assert [names(order, range(index, index + 1)) for index in range(192, 200)] == before[2:]
    assert order.an_example in order.examples


def test_a_window_that_cannot_be_read_changes_nothing():
    rows = Rows(100, 6)
    order = order_of(rows)
    names(order, range(2))
    state, read = order.state, rows.read
    rows.read = lambda state: (_ for _ in ()).throw(DataError("gone", ["x"]))  # type: ignore[method-assign]
    with pytest.raises(DataError):
        names(order, range(50))
    assert order.state is state
    rows.read = read  # type: ignore[method-assign]
    assert names(order, range(2, 10)) == names(order_of(Rows(100, 6)), range(10))[2:]


def test_a_stream_without_a_row_is_an_error():
    with pytest.raises(DataError, match="No row of the stream can be used"):
        order_of(Rows(0, 5)).micro_batch(0)


def test_a_batch_may_be_larger_than_an_epoch():
    order = order_of(Rows(3, 5), batch=8)
    assert len(order.micro_batch(0)) == 8
