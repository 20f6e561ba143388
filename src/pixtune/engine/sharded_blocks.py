"""Frozen blocks of which each process holds a part, and which are gathered from all of them each time they run.

A block's frozen tensors, whatever their formats, are one piece of bytes (`packing.py`), and a process keeps its equal
part of that on its own GPU. The ring of slots, the order of blocks and the recomputation are those of streamed blocks
(`streaming.py`); in place of a copy from host memory, a slot is filled by an all-gather beside the computation. Nothing
is written back, since frozen weights never change, and a LoRA is whole in each process.

A gather needs all processes of a group, and each of them has to start the same ones in the same order. In a training
step they do, as they run the same blocks and each block has its own slot: a pass that one process replays from a
capture, and another one launches kernel by kernel, begin and end with the first blocks in the ring. What the first
process does alone, such as held-out losses and samples, happens within `apart`: there it announces each gather, and the
others take part in it until it says that it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixtune.engine.packing import copy_into, lay_out_frozen, packed_bytes
from pixtune.engine.streaming import AwayBlock, BlockStream, away, placeholders_on, run_by_stream
from pixtune.engine.transfer import CopyLane, Mark
from pixtune.errors import ExchangeError

DONE = -1
"""Announcement that the first process works alone no longer."""
APART_TIMEOUT = timedelta(days=2)
"""Time that others wait for the first process's next announcement: drawing many samples takes hours. One that is gone
is noticed all the same (`launch/peers.py`)."""


class ShardGroup:
    """The processes that hold one copy together. All processes of a run build theirs at the same point.

    Args:
        shards: number of processes in each group, which are neighbours by rank. It divides the number of processes.
    """

    def __init__(self, shards: int) -> None:
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        groups = [list(range(first, first + shards)) for first in range(0, num_processes, shards)]
        # Every process has to take part in making every group. Gathers have one of their own, so that they never wait
        # for the exchange of gradients.
        for_bytes = [dist.new_group(ranks) for ranks in groups]
        self._bytes = for_bytes[rank // shards]
        self.size, self.rank = shards, rank % shards
        self.serves_first = rank < shards
        """Whether the first process of the run is in this group."""
        self._words = dist.new_group(groups[0], timeout=APART_TIMEOUT, backend="gloo")

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """Fills `whole` with the parts of all processes of the group, in their order; bytes, on one device."""
        dist.all_gather_into_tensor(whole, part, group=self._bytes)

    def announce(self, word: int) -> int:
        """Returns, in all processes of the run's first group, the number that the first process was given."""
        number = torch.tensor([word])
        dist.broadcast(number, 0, group=self._words)
        return int(number)


class ShardedBlocks:
    """Takes blocks apart as they are loaded, and builds the stream that gathers them again.

    Args:
        num_slots: number of whole blocks that the device holds at a time.
    """

    def __init__(self, group: ShardGroup, device: torch.device, num_slots: int = 3) -> None:
        self._group, self._device, self._num_slots = group, device, num_slots
        self._placeholder = placeholders_on(device)
        self._found: dict[int, tuple[nn.Module, AwayBlock, Tensor]] = {}

    def take(self, number: int, block: nn.Module) -> None:
        """Keeps this process's part of a block that has all its weights, and frees the rest."""
        layout = lay_out_frozen(block)
        num_bytes = -(-packed_bytes(layout) // self._group.size)
        whole = torch.zeros(num_bytes * self._group.size, dtype=torch.uint8, device=self._device)
        copy_into(whole, layout)
        part = whole[self._group.rank * num_bytes :][:num_bytes].clone()
        self._found[number] = block, away(layout, self._placeholder, whole.nbytes), part

    def stream(self) -> BlockStream:
        """Returns the stream of all blocks that were taken, in the order in which they run."""
        taken = [self._found[number] for number in sorted(self._found)]
        lane = CopyLane(self._device)
        source = GatheredParts(self._group, lane, [part for _, _, part in taken])
        stream = BlockStream([each for _, each, _ in taken], lane, source, self._num_slots)
        source.stream = stream
        for index, (block, _, _) in enumerate(taken):
            run_by_stream(stream, index, block)
        return stream


class GatheredParts:
    """The source of a stream's blocks: the parts of all processes of a group."""

    stream: BlockStream
    """The stream that it fills; set once that exists."""

    def __init__(self, group: ShardGroup, lane: CopyLane, parts: Sequence[Tensor]) -> None:
        self._group, self._lane, self._parts = group, lane, parts
        self._is_apart = self._announces = False

    def fill(self, index: int, slot: Tensor, after: Mark) -> Mark:
        """Gathers a block into a slot's memory once `after` is done, and returns the mark of its end.

        Raises:
            ExchangeError: another process is gone. A GPU finds that out later, and otherwise.
        """
        part = self._parts[index]
        whole = slot[: part.nbytes * self._group.size]
        try:
            if self._announces:
                self._group.announce(index)
            return self._lane.launch(partial(self._group.gather, whole, part), after)
        except RuntimeError as error:
            if slot.device.type != "cpu":
                raise
            raise ExchangeError(f"weights could not be gathered from the other processes ({error})") from error

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Lets the first process work with the blocks alone, until a `with` block ends; all processes enter it.

        The others of its group take part in what it gathers meanwhile, and begin with their own block when it is done.
        """
        if self._is_apart or not self._group.serves_first:
            yield
            return
        self._is_apart = True
        try:
            if self._group.rank == 0:
                self._announces = True
                try:
                    yield
                finally:
                    self._announces = False
                    self._group.announce(DONE)
            else:
                while (index := self._group.announce(DONE)) != DONE:
                    self.stream.take_part(index)
                yield
        finally:
            self._is_apart = False
