"""Blocks whose weights are in page-locked host memory and come to the device each time they run.

Frozen weights move in one direction only, host to device: they never change, so nothing is written back, which halves
the traffic of block swapping (musubi-tuner: 14 to 11 s per step). Where all weights are trained, each is stepped in its
slot within the backward pass (`trained/fused_step.py`), and a block that was changed there goes back to host memory, on
a lane of its own, before its slot is filled again. The memory is page-locked because a copy from
ordinary memory makes the host wait, and takes up to half of the step instead of a tenth. Each block is one copy, since
small ones do not saturate a link.

The device holds a ring of slots. While one block computes, the next ones are copied on a stream of their own; a slot is
filled again once the computation has passed its block, and each block has one slot that it always comes to, so that
where blocks are depends on the last pass alone. Streamed blocks are recomputed in the backward pass, so a
block's weights are needed twice per step and never in between. A block's slot is released when the recomputation of the
next block begins: autograd runs the newest nodes first, so all of the block's have been launched by then. A pass
without gradients moves all blocks, or none if they all fit the ring; a forward and a backward pass together move each
block twice, apart from those that the ring holds when the direction changes. So a step takes, for each of its two
passes, the larger of computing and copying: spare time of the link in the long backward pass does not help the forward
pass.

Autograd sees none of it. A tensor's `.data` is pointed at a slot, which leaves its version unchanged, and slots are
written through another tensor. While a block is away its tensors hold NaN, in a single number on the device: code that
reads them by mistake never gets another block's weights, and a LoRA attached meanwhile finds the right device, shape
and format.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.away_blocks import AwayBlock, HostBlocks, Source, away, placeholders_on
from pixtune.engine.forwards import Forward, is_recomputed, wrap_forward
from pixtune.engine.packing import copy_into, lay_out_frozen, packed_bytes
from pixtune.engine.transfer import CopyLane, Mark, host_buffer, require_host_memory

MIN_SLOTS = 2
"""Slots that a ring needs: one whose block computes, and one that is filled."""


def choose_streamed(num_blocks: int, num_streamed: int) -> tuple[int, ...]:
    """Chooses evenly spread blocks, so that each copy has the time of the resident blocks around it.

    Raises:
        ValueError: there are fewer blocks than are to be streamed.
    """
    if not 0 <= num_streamed <= num_blocks:
        raise ValueError(f"cannot stream {num_streamed} of {num_blocks} blocks")
    return tuple((2 * i + 1) * num_blocks // (2 * num_streamed) for i in range(num_streamed))


def upcoming(position: int, num_blocks: int, num_ahead: int, backward: bool, gradients: bool) -> tuple[int, ...]:
    """Returns the streamed blocks that run next, `num_ahead` different ones or all others, the nearest first.

    Args:
        position: the block that runs now.
        backward: the pass goes down, and the next forward pass follows; otherwise it goes up.
        gradients: a pass that goes up comes back down from the last block; otherwise the next one begins at the first.
    """
    above, below = range(position + 1, num_blocks), range(position - 1, -1, -1)
    if backward:
        order = [*below, *above]
    elif gradients:
        order = [*above, *below]
    else:
        order = [*above, *range(position)]
    return tuple(order[:num_ahead])


@dataclass
class Slot:
    """Device memory for any one block."""

    memory: Tensor
    block: int | None = None
    filled: Mark = None
    passed: Mark = None
    """Mark after which the work that needed the block is done."""
    changed: bool = False
    """Whether the running block has other numbers than where it comes from."""


class BlockStream:
    """The ring of slots, and what fills it. `stream_blocks` and `sharded_blocks.ShardedBlocks` build it.

    Args:
        blocks: numbered from 0 in the order in which they run.
        home: where blocks go back to that are changed in their slots; None: they are frozen.
    """

    def __init__(
        self,
        blocks: Sequence[AwayBlock],
        lane: CopyLane,
        source: Source,
        num_slots: int,
        home: HostBlocks | None = None,
    ) -> None:
        self._blocks = tuple(blocks)
        self._lane, self._source, self._home = lane, source, home
        self._places = {id(packed.tensor): (n, packed) for n, block in enumerate(blocks) for packed in block.tensors}
        self._slots = [
            Slot(torch.empty(self.slot_bytes, dtype=torch.uint8, device=lane.device))
            for _ in range(min(num_slots, len(self._blocks)))
        ]
        for slot in self._slots:
            self._lane.keep_until_copied(slot.memory)
        self._running: Slot | None = None
        self._settled: tuple[int | None, ...] = self.arrangement()
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self.num_copied_bytes = 0
        """Bytes that have been moved to the device."""
        self.num_late = 0
        """Number of times that a block's copy had not begun when it was to run; the very first run is one of them."""

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each streamed block."""
        return tuple(block.num_bytes for block in self._blocks)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, which are those of the largest block."""
        return max(self.block_bytes)

    @property
    def outside_bytes(self) -> int:
        """Device memory, outside of torch's allocator, of what blocks come from."""
        return self._source.outside_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the whole ring."""
        return self.slot_bytes * len(self._slots)

    def run(self, index: int, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block's forward with its weights in place; in a backward pass, this is its recomputation."""
        backward = in_backward_pass()
        self.enter(index, backward)
        outputs = inner(*args, **kwargs)
        if not backward:
            self._pass_running()
        return outputs

    def enter(self, index: int, backward: bool) -> None:
        """Puts a block's weights in place for work that is launched next, and begins to copy the next blocks."""
        self._pass_running()
        ahead = upcoming(index, len(self._blocks), len(self._slots) - 1, backward, torch.is_grad_enabled())
        self.num_late += self._find(index) is None
        self._running = self._bring(index)
        taken = {self._place_of(index)}
        for following in ahead:  # two whose slot is the same one meet only where a pass begins anew
            if (place := self._place_of(following)) not in taken:
                taken.add(place)
                self._bring(following)
        self._lane.wait(self._running.filled)

    def take_part(self, index: int) -> None:
        """Brings a block that another process needs, and that comes from this one as well."""
        self._pass_running()
        self._bring(index)

    def apart(self) -> AbstractContextManager[None]:
        """Lets the first process of a run work with the blocks alone; see `Source`."""
        return self._source.apart()

    def bring(self, module: nn.Module) -> None:
        """Puts the weights of the streamed block that a module is part of in place, for work that is launched next.

        Nothing is done where it is part of none.
        """
        own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        for index, block in enumerate(self._blocks):
            if any(id(packed.tensor) in own for packed in block.tensors):
                self.enter(index, backward=False)

    def _pass_running(self) -> None:
        """Notes that all work which needs the running block has been launched, and sends it home if it was changed."""
        if (slot := self._running) is None:
            return
        slot.passed, self._running = self._lane.reached(), None
        if slot.changed:
            assert self._home is not None and slot.block is not None, "it was running"
            slot.passed = self._home.take_back(slot.block, slot.memory, slot.passed)
            slot.changed = False

    def _find(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _place_of(self, index: int) -> int:
        return index % len(self._slots)

    def _bring(self, index: int) -> Slot:
        """Returns the slot that holds a block, or will after its `filled`."""
        if (slot := self._find(index)) is None:
            place = self._place_of(index)
            slot = self._slots[place]
            self._empty(slot)
            self._fill(place, index)
        return slot

    def _empty(self, slot: Slot) -> None:
        """Detaches the block in a slot from its memory, which stays unchanged until it is filled again."""
        if slot.block is not None:
            away = self._blocks[slot.block]
            for packed, placeholder in zip(away.tensors, away.placeholders, strict=True):
                packed.tensor.data = placeholder
            slot.block = None

    def _fill(self, place: int, index: int) -> None:
        slot = self._slots[place]
        slot.filled = self._source.fill(index, slot.memory, slot.passed)
        self.num_copied_bytes += self._blocks[index].num_bytes
        self._point_to(place, index)

    def _point_to(self, place: int, index: int) -> None:
        """Has a block's tensors read the slot that holds its bytes."""
        slot, block = self._slots[place], self._blocks[index]
        slot.block = index
        if (index, place) not in self._views:
            self._views[index, place] = [packed.view(slot.memory) for packed in block.tensors]
        for packed, view in zip(block.tensors, self._views[index, place], strict=True):
            packed.tensor.data = view

    # ---- for trained weights: `trained.weight_update.WeightUpdate`

    def changed(self, tensor: Tensor) -> None:
        """Notes that a tensor of the running block was changed in its slot; one that is not streamed is passed over."""
        if id(tensor) in self._places:
            slot = self._running
            assert slot is not None and slot.block == self._places[id(tensor)][0], "a block is changed while it runs"
            slot.changed = True

    def settle_changes(self) -> None:
        """Sends the last block home, and makes work that is launched from now on run after all are there."""
        self._pass_running()
        if self._home is not None:
            self._home.settle()

    def at_home(self, tensor: Tensor) -> Tensor | None:
        """Returns a tensor as host memory holds it, None if it is not streamed; `settle_changes` comes before.

        The caller has the host wait for the device before it reads there.
        """
        if self._home is None or id(tensor) not in self._places:
            return None
        index, packed = self._places[id(tensor)]
        return packed.view(self._home.blocks[index])

    def replace(self, tensor: Tensor, value: Tensor) -> None:
        """Gives a streamed tensor other numbers; its block is fetched anew when it runs. The host waits for the device.

        Raises:
            ValueError: the tensor is not streamed from host memory.
        """
        self.settle_changes()
        if (own := self.at_home(tensor)) is None:
            raise ValueError("only tensors of streamed blocks are kept in host memory")
        if self._lane.device.type == "cuda":
            torch.cuda.synchronize(self._lane.device)
        own.copy_(value)
        if (slot := self._find(self._places[id(tensor)][0])) is not None:
            self._empty(slot)

    # ---- for captured steps: `capture.Moving`

    def arrangement(self) -> tuple[int | None, ...]:
        """Returns the block in each slot."""
        return tuple(slot.block for slot in self._slots)

    def rewind(self) -> None:
        """Brings the first blocks back, with which each pass begins; work that is launched from now on runs after."""
        for index in range(len(self._slots)):
            self.take_part(index)
        for slot in self._slots:
            self._lane.wait(slot.filled)

    def settle(self) -> None:
        """Treats slots as filled, and as free once the computation has reached this point."""
        self._pass_running()
        self._settled, reached = self.arrangement(), self._lane.reached()
        for slot in self._slots:
            slot.filled, slot.passed = None, reached

    def forget(self) -> None:
        """Puts back what was where when all was settled: copies since then never ran, so the slots still hold that.

        Marks of these copies cannot be waited for.
        """
        self._running = None
        reached = self._lane.reached()
        for slot in self._slots:
            self._empty(slot)
            slot.filled, slot.passed = None, reached
        for place, index in enumerate(self._settled):
            if index is not None:
                self._point_to(place, index)


def stream_blocks(blocks: Sequence[nn.Module], device: torch.device, num_slots: int = 3) -> BlockStream:
    """Moves all frozen tensors of the blocks to page-locked host memory, from which each run copies them to the device.

    Tensors that need a gradient stay where they are, and so do tensors that are added to the blocks later. Those that
    were moved may be trained afterwards, if each is stepped while its block runs backward. Call `recompute_blocks` on
    the blocks before a pass with gradients.

    Args:
        blocks: blocks of any kinds and sizes, in the order in which they run.
        num_slots: number of blocks that the device holds at a time. Two suffice for blocks of equal cost; a third evens
            out differences.

    Raises:
        PlanError: the host has too little memory, or cannot lock enough of it.
        ValueError: no blocks, too few slots, or a block without frozen tensors.
    """
    if not blocks or num_slots < MIN_SLOTS:
        raise ValueError(f"streaming needs blocks and {MIN_SLOTS} slots; got {len(blocks)} and {num_slots}")
    placeholders = placeholders_on(device)
    layouts = [lay_out_frozen(block) for block in blocks]
    sizes = [packed_bytes(layout) for layout in layouts]
    # Blocks that are already on the host are freed one by one as they are packed.
    freed = sum(p.num_bytes for layout in layouts for p in layout if p.tensor.device.type == "cpu")
    require_host_memory(max(sum(sizes) - freed, 0) + max(sizes), f"streaming {len(blocks)} blocks")
    lane = CopyLane(device)
    hosts, packed = [], []
    for layout in layouts:
        hosts.append(host_buffer(packed_bytes(layout), device))
        copy_into(hosts[-1], layout)
        packed.append(away(layout, placeholders, hosts[-1].nbytes))
    home = HostBlocks(lane, CopyLane(device), hosts)
    stream = BlockStream(packed, lane, home, num_slots, home)
    for index, block in enumerate(blocks):
        run_by_stream(stream, index, block)
    return stream


def run_by_stream(stream: BlockStream, index: int, block: nn.Module) -> None:
    """Has a block run with the weights that the stream brings."""
    wrap_forward(block, partial(_run_streamed, stream, index, block))


def _run_streamed(
    stream: BlockStream, index: int, block: nn.Module, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if torch.is_grad_enabled() and not is_recomputed(block):
        raise RuntimeError(
            f"streamed block {index} ran with gradients, but its weights will be gone in the backward pass: call "
            "recompute_blocks on it, or run without gradients"
        )
    return stream.run(index, inner, args, kwargs)


def in_backward_pass() -> bool:
    """Returns whether autograd is running on this thread, so that a forward is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1
