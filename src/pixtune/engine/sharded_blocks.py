"""Frozen blocks of which each process holds a part, and which are gathered from all of them each time they run.

A block's frozen tensors, whatever their formats, are one piece of bytes (`packing.py`), and a process keeps its equal
part of that on its own GPU. The ring of slots, the order of blocks and the recomputation are those of streamed blocks
(`streaming.py`); in place of host memory, a slot is filled from all GPUs beside the computation. Nothing is written
back, since frozen weights never change, and a LoRA is whole in each process.

Where the GPUs can read each other's memory, a process copies the others' parts itself (`ReadParts`): they never change,
so nobody has to wait for anybody. A step is no faster by it (benchmarks/RESULTS.md, "Two GPUs").

Elsewhere the parts are gathered (`GatheredParts`), which needs all processes of a group, and each of them has to start
the same gathers in the same order. In a training step they do, as they run the same blocks and each block has its own
slot: a pass that one process replays from a capture, and another one launches kernel by kernel, begin and end with the
first blocks in the ring. What the first process does alone, such as held-out losses and samples, happens within
`apart`: there it announces each gather, and the others take part in it until it says that it is done.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, nn

from pixtune.engine.away_blocks import AwayBlock, Source, away, placeholders_on
from pixtune.engine.packing import copy_into, lay_out_frozen, packed_bytes
from pixtune.engine.streaming import BlockStream, run_by_stream
from pixtune.engine.transfer import CopyLane, Mark
from pixtune.errors import ExchangeError

log = logging.getLogger(__name__)

DONE = -1
"""Announcement that the first process works alone no longer."""
TRIED_BYTES = 64 * 2**20
"""Bytes that each process reads from the others' GPUs to find out whether it can."""
APART_TIMEOUT = timedelta(days=2)
"""Time that others wait for the first process's next announcement: drawing many samples takes hours. One that is gone
is noticed all the same (`launch/peers.py`)."""


@dataclass(frozen=True)
class SharedPart:
    """A block's part that the other processes read, with theirs."""

    of_all: tuple[Tensor, ...]
    """Each process's part, in their order, as this process reads it."""
    keeper: object
    """Keeper of this process's own part in memory; tensors that read it do not keep it."""


class ShardGroup:
    """The processes that hold one copy together. All processes of a run build theirs at the same point.

    Args:
        shards: number of processes in each group, which are neighbours by rank. It divides the number of processes.
        device: this process's.
    """

    def __init__(self, shards: int, device: torch.device) -> None:
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
        self._device = device
        self.can_read = device.type == "cuda" and self._can_all_read()

    def _can_all_read(self) -> bool:
        """Returns whether the GPUs of the group read each other's memory, the same in all of its processes."""
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if on_host % self.size:
            return False  # a group of several hosts
        own = self._device.index or 0
        others = [own - self.rank + rank for rank in range(self.size) if rank != self.rank]
        if not self._all(all(can_access(own, other) for other in others)):
            return False
        return self._all(self._try_to_read())

    def _try_to_read(self) -> bool:
        """Copies the others' numbers once, as later their parts, and returns whether they came."""
        try:
            part = allocate_readable(TRIED_BYTES, self._device)
            slot = torch.empty(TRIED_BYTES, dtype=torch.uint8, device=self._device)
            shared = self.share(part.fill_(self.rank + 1))
            self.wait_for_all()
            came = []
            for rank, theirs in enumerate(shared.of_all):
                came.append(bool((slot.copy_(theirs) == rank + 1).all()))
            self.wait_for_all()
        except RuntimeError as error:  # every step above is torch's or the driver's, for some machines not there
            log.info("weights are gathered, since GPUs cannot read each other's memory here: %s", error)
            return False
        return all(came)

    def _all(self, here: bool) -> bool:
        """Returns whether something holds in all processes of the group."""
        everywhere = torch.tensor(int(here), device=self._device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=self._bytes)
        return bool(everywhere)

    def allocate(self, num_bytes: int) -> Tensor:
        """Returns memory for a part, which the others can read if `can_read`."""
        if self.can_read:
            return allocate_readable(num_bytes, self._device)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def share(self, part: Tensor) -> SharedPart:
        """Lets the others read a part, and returns theirs. All processes of the group call it together."""
        handle = symmetric_memory.rendezvous(part, self._bytes.group_name)
        of_all = tuple(handle.get_buffer(rank, part.shape, part.dtype) for rank in range(self.size))
        return SharedPart(of_all, (part, handle))

    def wait_for_all(self) -> None:
        """Waits until all processes of the group have come here with their work done."""
        torch.cuda.synchronize(self._device)
        dist.barrier(group=self._bytes, device_ids=[self._device.index or 0])

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """Fills `whole` with the parts of all processes of the group, in their order; bytes, on one device."""
        dist.all_gather_into_tensor(whole, part, group=self._bytes)

    def announce(self, word: int) -> int:
        """Returns, in all processes of the run's first group, the number that the first process was given."""
        number = torch.tensor([word])
        dist.broadcast(number, 0, group=self._words)
        return int(number)


def can_access(own: int, other: int) -> bool:
    """Returns whether a GPU reads another one's memory, by their numbers in this process, which may not see both."""
    return 0 <= other < torch.cuda.device_count() and torch.cuda.can_device_access_peer(own, other)


def allocate_readable(num_bytes: int, device: torch.device) -> Tensor:
    """Returns memory that other processes can be given to read, outside of torch's allocator."""
    return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)


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
        part = self._group.allocate(num_bytes)
        part.copy_(whole[self._group.rank * num_bytes :][:num_bytes])
        self._found[number] = block, away(layout, self._placeholder, whole.nbytes), part

    def stream(self) -> BlockStream:
        """Returns the stream of all blocks that were taken, in the order in which they run."""
        taken = [self._found[number] for number in sorted(self._found)]
        lane, parts = CopyLane(self._device), [part for _, _, part in taken]
        source: Source = (
            ReadParts(self._group, lane, parts) if self._group.can_read else GatheredParts(self._group, lane, parts)
        )
        stream = BlockStream([each for _, each, _ in taken], lane, source, self._num_slots)
        if isinstance(source, GatheredParts):
            source.stream = stream
        for index, (block, _, _) in enumerate(taken):
            run_by_stream(stream, index, block)
        return stream


class ReadParts:
    """The source of a stream's blocks where each process reads the others' parts from their GPUs."""

    def __init__(self, group: ShardGroup, lane: CopyLane, parts: Sequence[Tensor]) -> None:
        self._lane, self._own = lane, group.rank
        self._parts = [group.share(part) for part in parts]
        self.outside_bytes = sum(part.nbytes for part in parts)
        group.wait_for_all()

    def fill(self, index: int, slot: Tensor, after: Mark) -> Mark:
        """Copies all parts of a block into a slot's memory once `after` is done; returns the mark of the end."""
        parts = self._parts[index].of_all
        places = slot[: sum(part.nbytes for part in parts)].chunk(len(parts))
        # Each begins with its own neighbour, so that no GPU is read by all at once.
        order = [(self._own + 1 + turn) % len(parts) for turn in range(len(parts))]
        return self._lane.copy_all([places[rank] for rank in order], [parts[rank] for rank in order], after)

    def apart(self) -> AbstractContextManager[None]:
        """Does nothing: no process needs another one's help."""
        return nullcontext()


class GatheredParts:
    """The source of a stream's blocks where the processes of a group gather them together."""

    outside_bytes = 0
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
