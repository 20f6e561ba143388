"""Frozen blocks whose weights are in page-locked host memory and come to the device each time they run.

Weights move in one direction only, host to device: frozen ones never change, so nothing is written back, which halves
the traffic of block swapping (musubi-tuner: 14 to 11 s per step). The memory is page-locked because a copy from
ordinary memory makes the host wait, and takes up to half of the step instead of a tenth. Each block is one copy, since
small ones do not saturate a link.

The device holds a ring of slots. While one block computes, the next ones are copied on a stream of their own; a slot is
filled again once the computation has passed its block. Streamed blocks are recomputed in the backward pass, so a
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

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.forwards import Forward, is_recomputed, wrap_forward
from pixtune.engine.packing import PackedTensor, copy_into, lay_out_frozen, packed_bytes
from pixtune.engine.transfer import CopyLane, Mark, host_buffer, require_host_memory

Placeholders = Callable[[torch.dtype], Tensor]

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


@dataclass(frozen=True)
class PackedBlock:
    """A block's frozen tensors as one piece of host memory."""

    host: Tensor
    tensors: tuple[PackedTensor, ...]
    placeholders: tuple[Tensor, ...]
    """Contents of each tensor while the block is away: one number on the device, in the tensor's shape."""


@dataclass
class Slot:
    """Device memory for any one block."""

    memory: Tensor
    block: int | None = None
    filled: Mark = None
    passed: Mark = None
    """Mark after which the work that needed the block is done."""


class BlockStream:
    """The ring of slots, and the copies that fill it. `stream_blocks` builds it.

    Args:
        blocks: numbered from 0 in the order in which they run.
    """

    def __init__(self, blocks: Sequence[PackedBlock], device: torch.device, num_slots: int) -> None:
        self._blocks = tuple(blocks)
        self._lane = CopyLane(device)
        self._slots = [
            Slot(torch.empty(self.slot_bytes, dtype=torch.uint8, device=device))
            for _ in range(min(num_slots, len(self._blocks)))
        ]
        for slot in self._slots:
            self._lane.keep_until_copied(slot.memory)
        self._running: Slot | None = None
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self.num_copied_bytes = 0
        """Bytes that have been moved to the device."""
        self.num_late = 0
        """Number of times that a block's copy had not begun when it was to run; the very first run is one of them."""

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each streamed block."""
        return tuple(block.host.nbytes for block in self._blocks)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, which are those of the largest block."""
        return max(self.block_bytes)

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
        self._running = self._bring(index, {index, *ahead})
        for following in ahead:
            self._bring(following, {index, *ahead})
        self._lane.wait(self._running.filled)

    def bring(self, module: nn.Module) -> None:
        """Puts the weights of the streamed block that a module is part of in place, for work that is launched next.

        Nothing is done where it is part of none.
        """
        own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        for index, block in enumerate(self._blocks):
            if any(id(packed.tensor) in own for packed in block.tensors):
                self.enter(index, backward=False)

    def _pass_running(self) -> None:
        """Notes that all work which needs the running block has been launched."""
        if self._running is not None:
            self._running.passed, self._running = self._lane.reached(), None

    def _find(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _bring(self, index: int, wanted: set[int]) -> Slot:
        """Returns the slot that holds a block, or will after its `filled`; taken from a block that is not wanted."""
        slot = self._find(index)
        if slot is not None:
            return slot
        place, slot = next((place, slot) for place, slot in enumerate(self._slots) if slot.block not in wanted)
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
        slot, block = self._slots[place], self._blocks[index]
        slot.filled = self._lane.copy(slot.memory[: block.host.nbytes], block.host, after=slot.passed)
        slot.block = index
        self.num_copied_bytes += block.host.nbytes
        if (index, place) not in self._views:
            self._views[index, place] = [packed.view(slot.memory) for packed in block.tensors]
        for packed, view in zip(block.tensors, self._views[index, place], strict=True):
            packed.tensor.data = view

    # ---- for captured steps: `capture.Moving`

    def arrangement(self) -> tuple[int | None, ...]:
        """Returns the block in each slot."""
        return tuple(slot.block for slot in self._slots)

    def restore(self, arrangement: Hashable) -> None:
        """Brings back into each slot the block that it had; one that was empty may hold any other."""
        assert isinstance(arrangement, tuple)
        self._pass_running()
        wanted = {
            place: index
            for place, (slot, index) in enumerate(zip(self._slots, arrangement, strict=True))
            if index is not None and slot.block != index
        }
        for place, slot in enumerate(self._slots):
            if place in wanted or slot.block in wanted.values():
                self._empty(slot)
        for place, index in wanted.items():
            self._fill(place, index)
        for slot in self._slots:
            self._lane.wait(slot.filled)

    def settle(self) -> None:
        """Treats slots as filled, and as free once the computation has reached this point."""
        self._pass_running()
        reached = self._lane.reached()
        for slot in self._slots:
            slot.filled, slot.passed = None, reached

    def forget(self) -> None:
        """Empties the slots: copies to them never ran, and their marks cannot be waited for."""
        self._running = None
        reached = self._lane.reached()
        for slot in self._slots:
            self._empty(slot)
            slot.filled, slot.passed = None, reached


def stream_blocks(blocks: Sequence[nn.Module], device: torch.device, num_slots: int = 3) -> BlockStream:
    """Moves all frozen tensors of the blocks to page-locked host memory, from which each run copies them to the device.

    Tensors that need a gradient stay where they are, and so do tensors that are added to the blocks later. Call
    `recompute_blocks` on the blocks before a pass with gradients.

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
    packed = [pack(layout, device, placeholders) for layout in layouts]
    stream = BlockStream(packed, device, num_slots)
    for index, block in enumerate(blocks):
        wrap_forward(block, partial(_run_streamed, stream, index, block))
    return stream


def _run_streamed(
    stream: BlockStream, index: int, block: nn.Module, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if torch.is_grad_enabled() and not is_recomputed(block):
        raise RuntimeError(
            f"streamed block {index} ran with gradients, but its weights will be gone in the backward pass: call "
            "recompute_blocks on it, or run without gradients"
        )
    return stream.run(index, inner, args, kwargs)


def placeholders_on(device: torch.device) -> Placeholders:
    """Returns a function that makes, once for each number format, a NaN on the device; a zero if there is no NaN."""

    @cache
    def placeholder(dtype: torch.dtype) -> Tensor:
        number = float("nan") if dtype.is_floating_point else 0.0
        return torch.tensor(number, device=device).to(dtype)

    return placeholder


def pack(layout: tuple[PackedTensor, ...], device: torch.device, placeholder: Placeholders) -> PackedBlock:
    """Copies a block's tensors into host memory and frees the originals."""
    host = host_buffer(packed_bytes(layout), device)
    copy_into(host, layout)
    placeholders = tuple(placeholder(packed.dtype).expand(packed.shape) for packed in layout)
    for packed, stand_in in zip(layout, placeholders, strict=True):
        packed.tensor.data = stand_in
    return PackedBlock(host, layout, placeholders)


def in_backward_pass() -> bool:
    """Returns whether autograd is running on this thread, so that a forward is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1
