"""A stream's state in a checkpoint: read back as it was, or refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pixtune.data.streamed import state as module
from pixtune.data.streamed.position import LanePosition, Position
from pixtune.data.streamed.state import Counts, StreamState, from_tensor, to_tensor
from pixtune.data.streamed.windows import RowPlace, StreamRow, Window
from pixtune.errors import CheckpointError


def row(number: int) -> StreamRow:
    digest = f"{number:064x}"
    return StreamRow(RowPlace(1, 2, number), digest, (64, 48), ("a cat, größer\u2028", ""), ((digest, (8, 9)),))


STATE = StreamState(
    position=Position(1, 4, (LanePosition(2, 7), LanePosition())),
    windows=(Window(2, 10, ((3, 4), (5, 6))), Window(3, 12, ((7, 8),))),
    rows={number: row(number) for number in range(3, 10)},
    waiting=(9,),
    next_row=10,
    end=13,
    counts=Counts(20, 1, 2),
    held_out=(row(0), row(1)),
    held_out_rows=3,
)


def test_a_state_is_read_back_as_it_was():
    assert from_tensor(to_tensor(STATE)) == STATE
    assert from_tensor(to_tensor(StreamState(Position(0, 0, (LanePosition(),))))).end == 0


def changed(change: Callable[[Any], object]) -> torch.Tensor:
    values = json.loads(zlib.decompress(to_tensor(STATE).numpy().tobytes()))
    change(values)
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(values).encode())), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(format=2),
        lambda values: values.pop("rows"),
        lambda values: values["rows"].pop("9"),
        lambda values: values["rows"]["9"].__setitem__(3, "../../etc/passwd"),
        lambda values: values["rows"]["9"].__setitem__(4, [0, 8]),
        lambda values: values["rows"]["9"].__setitem__(5, []),
        lambda values: values["rows"]["9"].__setitem__(5, [7]),
        lambda values: values["rows"]["9"].__setitem__(2, -1),
        lambda values: values["rows"]["9"].__setitem__(2, True),
        lambda values: values["windows"].reverse(),
        lambda values: values.update(end=14),
        lambda values: values.update(next_row=5),
        lambda values: values.update(position=[0, 0, []]),
        lambda values: values.update(waiting={"a": 1}),
        lambda values: values.update(counts=[1]),
        lambda values: values.update(counts=[1, 2, 3, 4]),
    ],
)
def test_a_state_that_does_not_fit_together_is_refused(change):
    with pytest.raises(CheckpointError, match="position in the stream cannot be used"):
        from_tensor(changed(change))


@pytest.mark.parametrize("data", [b"", b"x", to_tensor(STATE).numpy().tobytes()[:-9], zlib.compress(b"[" * 100_000)])
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(CheckpointError):
        from_tensor(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8))


def test_a_state_that_unpacks_to_more_than_any_is_refused(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BYTES", 1000)
    bomb = torch.frombuffer(bytearray(zlib.compress(b" " * 100_000)), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="larger than any"):
        from_tensor(bomb)
