"""State of a stream that a run resumes from: its position, and the rows of its windows, as bytes of a file.

With the rows themselves no row has to be read again whose encodings are in the cache: a shard may be gone by then.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pixtune.data.streamed.position import LanePosition, Position
from pixtune.data.streamed.windows import RowPlace, StreamRow, Window
from pixtune.errors import CheckpointError
from pixtune.storage.checkpoint import Checkpoint

FILE = "stream"
"""Name, without its ending, of the checkpoint's file."""
TENSOR = "state"
FORMAT = 1
LARGEST_BYTES = 1 << 30
"""Size of a state that no stream reaches: two windows of the most rows have half of it."""


@dataclass(frozen=True)
class Counts:
    """Numbers of rows of a run so far."""

    read: int = 0
    skipped: int = 0
    """Rows that were damaged, or lacked something."""
    copies: int = 0
    """Rows whose picture is held out, byte for byte, and that are not trained on."""


@dataclass(frozen=True)
class StreamState:
    """State of a stream between two windows."""

    position: Position
    """Position after the newest window."""
    windows: tuple[Window, ...] = ()
    """Windows whose micro-batches may still be asked for."""
    rows: Mapping[int, StreamRow] = field(default_factory=dict)
    """Rows by their numbers in the run: those of the windows, and those that wait."""
    waiting: tuple[int, ...] = ()
    """Numbers of the rows that wait for others of their sizes."""
    next_row: int = 0
    """Number that the next row gets."""
    end: int = 0
    """Number of micro-batches up to the end of the newest window."""
    counts: Counts = Counts()
    held_out: tuple[StreamRow, ...] = ()
    """First rows of the first shard, which are never trained on."""
    held_out_rows: int = 0
    """Number of rows of the first shard that were read for them."""


def to_tensor(state: StreamState) -> Tensor:
    """Returns a state as the bytes of a tensor."""
    position = state.position
    values = {
        "format": FORMAT,
        "position": [position.epoch, position.window, [[lane.shard, lane.row] for lane in position.lanes]],
        "windows": [[window.number, window.first, window.batches] for window in state.windows],
        "rows": {str(number): _row_values(row) for number, row in state.rows.items()},
        "waiting": state.waiting,
        "next_row": state.next_row,
        "end": state.end,
        "counts": [state.counts.read, state.counts.skipped, state.counts.copies],
        "held_out": [_row_values(row) for row in state.held_out],
        "held_out_rows": state.held_out_rows,
    }
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(values).encode(), 1)), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> StreamState:
    """Reads a state back.

    Raises:
        CheckpointError: it is none, or of another version.
    """
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(tensor.numpy().tobytes(), LARGEST_BYTES)
        if unpacking.unconsumed_tail:
            raise ValueError("it is larger than any")
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise ValueError(f"it has the format {values['format']!r:.20}")
        state = _from_values(values)
        _check(state)
    except (zlib.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint's position in the stream cannot be used: {error or type(error).__name__}. Resume from "
            "another one."
        ) from error
    return state


def _row_values(row: StreamRow) -> list[Any]:
    place = row.place
    return [
        place.epoch, place.shard, place.row, row.digest, row.size, row.captions,
        [[digest, size] for digest, size in row.controls],
    ]  # fmt: skip


def _row(values: Sequence[Any]) -> StreamRow:
    epoch, shard, row, digest, size, captions, controls = values
    return StreamRow(
        RowPlace(_number(epoch), _number(shard), _number(row)),
        _digest(digest),
        _size(size),
        tuple(map(_text, captions)),
        tuple((_digest(each), _size(of_each)) for each, of_each in controls),
    )


def _from_values(values: Mapping[str, Any]) -> StreamState:
    epoch, window, lanes = values["position"]
    return StreamState(
        Position(
            _number(epoch), _number(window), tuple(LanePosition(_number(shard), _number(row)) for shard, row in lanes)
        ),
        tuple(
            Window(_number(number), _number(first), tuple(tuple(map(_number, batch)) for batch in batches))
            for number, first, batches in values["windows"]
        ),
        {int(number): _row(row) for number, row in values["rows"].items()},
        tuple(map(_number, values["waiting"])),
        _number(values["next_row"]),
        _number(values["end"]),
        Counts(*_three(values["counts"])),
        tuple(map(_row, values["held_out"])),
        _number(values["held_out_rows"]),
    )


def _check(state: StreamState) -> None:
    """Checks that a state fits together.

    Raises:
        ValueError: it does not.
    """
    named = {*state.waiting, *(number for window in state.windows for batch in window.batches for number in batch)}
    if not named <= state.rows.keys() or not all(row.captions for row in state.rows.values()):
        raise ValueError("rows are missing from it")
    ends = [window.end for window in state.windows]
    if [window.first for window in state.windows[1:]] != ends[:-1] or (ends and ends[-1] != state.end):
        raise ValueError("its windows do not follow one another")
    if not state.position.lanes or any(number >= state.next_row for number in state.rows):
        raise ValueError("its position is none")


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise ValueError(f"{value!r:.40} is no number of a row")
    return value


def _three(values: Sequence[object]) -> tuple[int, int, int]:
    one, two, three = map(_number, values)
    return one, two, three


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no caption")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{value!r:.40} is no digest")
    return value


def _size(value: Sequence[object]) -> tuple[int, int]:
    width, height = map(_number, value)
    if not width or not height:
        raise ValueError("a picture of it has no pixels")
    return width, height


def stored_stream(checkpoint: Checkpoint) -> Tensor:
    """Returns the state of a stream as a checkpoint holds it.

    Raises:
        CheckpointError: it holds none: its run was not streamed.
    """
    try:
        return checkpoint.tensors[FILE][TENSOR]
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.path} is of a run that was not streamed, and stream.window is given. Leave it out, or start "
            "a new run."
        ) from error
