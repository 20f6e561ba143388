"""Writes and reads all weights that processes hold together: checkpoints in pieces, and a model tensor by tensor.

Each process writes its own rows of weights and optimizer states, in files of its own (`storage/slices.py`), so that
saving moves nothing between processes; on resuming, each takes its rows out of whatever files have them, however many
processes wrote these. The exported model has whole tensors: they are gathered one at a time on the devices, and of its
files each process writes some.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixtune.engine.sharding import Rows, whole_of
from pixtune.engine.together import Together
from pixtune.errors import TrainingError, WriteError
from pixtune.plan.optimizers import BLOCK
from pixtune.storage.checkpoint import SHARD_BYTES, CheckpointFiles
from pixtune.storage.grouping import group_neighbours
from pixtune.storage.safetensors_writer import TensorFile, in_file_order, save_one_by_one
from pixtune.storage.slices import StoredTensor, rows_in, slice_metadata, whole

SEEN_SECONDS = 20.0
"""Time in which a new file shows on all machines that share a disk."""
SCALES = ("absmax1", "absmax2")
"""States of which one number belongs to `BLOCK` numbers of the weight."""
SHARED = ("step", "qmap1", "qmap2")
"""States that are the same whatever rows of a weight a process holds."""
CODES = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
"""States in 8 bits, with the names of their scales and levels."""


def check_folder_is_shared(folder: Path, together: Together) -> None:
    """Checks that all processes see one output folder, since each writes its part there. All must call it.

    Raises:
        TrainingError: some see another one.
    """
    if together.is_alone:
        return
    mark = folder / f".seen-{secrets.token_hex(8)}.tmp"
    if together.leads:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    (name,) = together.union([mark.name] if together.leads else [])
    end_by = time.monotonic() + SEEN_SECONDS
    while not (is_seen := (folder / name).exists()) and time.monotonic() < end_by:
        time.sleep(0.1)
    blind = together.union([] if is_seen else [f"{together.rank} (on {socket.gethostname()})"])
    if together.leads:
        mark.unlink()
    if blind:
        raise TrainingError(
            f"processes {', '.join(blind)} do not see the output_dir of the first one, {folder}: each holds a part of "
            "all weights and writes it there. Put output_dir on a disk that all machines share; distributed.shards=1 "
            "lets the first process write alone, where each GPU has room for all weights"
        )


# ---- checkpoints


def files_of_part(
    stem: str, tensors: Mapping[str, Tensor], first_rows: Mapping[str, int], together: Together,
    max_bytes: int = SHARD_BYTES,
) -> CheckpointFiles:  # fmt: skip
    """Returns the files that this process writes of tensors in pieces. All that hold them together must call it.

    Args:
        first_rows: number of the first row of each piece in the whole tensor.
    """
    groups = [dict(group) for group in group_neighbours(tensors.items(), lambda item: item[1].nbytes, max_bytes)]
    counts = together.of_parts(len(groups))
    if not together.writes:
        return {}
    number, total = sum(counts[: together.part]), sum(counts)
    return {
        f"{stem}-{number + i:05d}-of-{total:05d}": TensorFile(group, slice_metadata(first_rows, group))
        for i, group in enumerate(groups, start=1)
    }


def weights_of_part(
    truest: Callable[[str], Tensor], rows: Mapping[str, Rows]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns this process's rows of weights as its files have them, and where each begins."""
    tensors = {name: truest(name) for name in rows}
    written = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    return written, {name: rows[name].start for name in written}


def states_of_part(
    state: Mapping[str, Tensor], rows: Mapping[str, Rows], part: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns this process's part of optimizer states as its files have them, and where each begins.

    Args:
        state: as `optim.optimizer_state` returns it.
        part: number of this process. The first one writes what is the same in all.
    """
    written, first_rows = {}, {}
    for path, tensor in state.items():
        name, _, key = path.rpartition("/")
        if not tensor.numel() or (key in SHARED and part > 0):
            continue
        written[path] = tensor
        if key in SCALES:
            first_rows[path] = rows[name].start * rows[name].row_numbers // BLOCK
        else:
            first_rows[path] = 0 if key in SHARED else rows[name].start
    return written, first_rows


def states_in_rows(states: Mapping[str, StoredTensor], rows: Rows) -> dict[str, Tensor]:
    """Returns those optimizer states of one weight that belong to some of its rows.

    States in 8 bits have a scale for each 256 numbers. Where the rows begin or end within such a block the states are
    converted to fp32, which changes none of their values.

    Args:
        states: of the whole weight, by name.
    """
    if rows.is_whole:
        return {key: whole(tensor) for key, tensor in states.items()}
    first, last = rows.start * rows.row_numbers, rows.end * rows.row_numbers
    is_last = rows.end == rows.shape[0]
    in_blocks = "absmax1" in states and (first % BLOCK or (last % BLOCK and not is_last))
    found = {}
    for key, tensor in states.items():
        if key in SHARED:
            if not (in_blocks and key.startswith("qmap")):
                found[key] = whole(tensor)
        elif key in SCALES:
            if not in_blocks:
                found[key] = rows_in(tensor, first // BLOCK, -(-last // BLOCK))
        elif in_blocks and key in CODES:
            scale, levels = (whole(states[each]) for each in CODES[key])
            codes = whole(tensor).flatten().long()
            values = levels[codes] * scale.repeat_interleave(BLOCK)[: len(codes)]
            found[key] = values.view(tuple(tensor.shape))[rows.start : rows.end].contiguous()
        else:
            found[key] = rows_in(tensor, rows.start, rows.end)
    return found


def check_shape(name: str, tensor: StoredTensor, shape: Sequence[int]) -> None:
    """Raises KeyError where a stored weight has another shape than the model's."""
    if tuple(tensor.shape) != tuple(shape):
        raise KeyError(f"{name} has shape {list(tensor.shape)}, and the model's has {list(shape)}")


# ---- a whole model


def write_files_in_turn(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], together: Together, metadata: Mapping[str, str]
) -> None:
    """Writes files of whole tensors, of which each process writes some. All processes must call it.

    One tensor for each process is in memory at a time, gathered on its device. A process that cannot write goes on
    gathering, which takes all.

    Args:
        files: tensors by name of each file, held in rows; the same in all processes.

    Raises:
        WriteError: this process's file could not be written.
    """
    names, num, failure = list(files), together.num_parts, None
    for first in range(0, len(names), num):
        turn = _Turn([files[name] for name in names[first : first + num]], together.part)
        try:
            if together.writes and together.part < len(turn.queues) and failure is None:
                mine = files[names[first + together.part]]
                outline = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in mine.items()}
                save_one_by_one(folder / names[first + together.part], outline, turn.next_of_mine, metadata)
        except WriteError as error:
            failure = error
        turn.finish()
    if failure is not None:
        raise failure


class _Turn:
    """Tensors of as many files as there are processes, gathered in one order in all of them: one of each in turn.

    Args:
        files: each process's tensors.
        mine: number of the file that this process writes, or more than there are.
    """

    def __init__(self, files: Sequence[Mapping[str, Tensor]], mine: int) -> None:
        self.queues = [list(in_file_order(tensors).items()) for tensors in files]
        self._mine = mine
        self._rounds = iter(range(max(map(len, self.queues), default=0)))

    def next_of_mine(self, name: str) -> Tensor:
        """Returns the next whole tensor of this process's file, having helped the others to theirs."""
        found = self._gather(next(self._rounds))
        assert found is not None and found[0] == name, "tensors are asked for in the order of the file"
        return found[1]

    def finish(self) -> None:
        """Helps the others to what is left."""
        for number in self._rounds:
            self._gather(number)

    def _gather(self, number: int) -> tuple[str, Tensor] | None:
        found = None
        for owner, queue in enumerate(self.queues):
            if number < len(queue):
                name, tensor = queue[number]
                gathered = whole_of(tensor)
                if owner == self._mine:
                    found = name, gathered
                del gathered
        return found
