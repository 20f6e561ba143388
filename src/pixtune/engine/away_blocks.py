"""Blocks whose weights lie elsewhere, and the place that they come from; `streaming.py` brings them to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from pixtune.engine.packing import PackedTensor
from pixtune.engine.transfer import CopyLane, Mark

Placeholders = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class AwayBlock:
    """A block's tensors, which hold placeholders unless its bytes are in a slot. `away` builds it."""

    num_bytes: int
    """Bytes that the block takes in a slot."""
    tensors: tuple[PackedTensor, ...]
    placeholders: tuple[Tensor, ...]
    """Contents of each tensor while the block is away: one number on the device, in the tensor's shape."""


class Source(Protocol):
    """The place that blocks come from."""

    @property
    def outside_bytes(self) -> int:
        """Device memory that it holds outside of torch's allocator."""

    def fill(self, index: int, slot: Tensor, after: Mark) -> Mark:
        """Fills the beginning of a slot's memory with a block once `after` is done; returns the mark of its end."""

    def apart(self) -> AbstractContextManager[None]:
        """Lets the first process of a run work with the blocks alone, until a `with` block ends; all enter it."""


class HostBlocks:
    """Whole blocks in host memory, which come to the device on a lane and, where they were changed, go back on another.

    Args:
        lane: of copies to the device.
        returning: of copies to the host.
    """

    def __init__(self, lane: CopyLane, returning: CopyLane, blocks: Sequence[Tensor]) -> None:
        self.blocks, self._lane, self._returning = blocks, lane, returning
        self._last_returned: Mark = None

    @property
    def outside_bytes(self) -> int:
        return 0

    def fill(self, index: int, slot: Tensor, after: Mark) -> Mark:
        block = self.blocks[index]
        return self._lane.copy(slot[: block.nbytes], block, after)

    def take_back(self, index: int, slot: Tensor, after: Mark) -> Mark:
        """Copies a block from a slot to the host once `after` is done; returns the mark of its end.

        The slot is filled again after that mark, and the block fetched again after the slot was filled.
        """
        block = self.blocks[index]
        self._last_returned = self._returning.copy(block, slot[: block.nbytes], after)
        return self._last_returned

    def settle(self) -> None:
        """Makes work that is launched from now on run after all blocks are back."""
        self._lane.wait(self._last_returned)
        self._last_returned = None

    def apart(self) -> AbstractContextManager[None]:
        return nullcontext()


def placeholders_on(device: torch.device) -> Placeholders:
    """Returns a function that makes, once for each number format, a NaN on the device; a zero if there is no NaN."""

    @cache
    def placeholder(dtype: torch.dtype) -> Tensor:
        number = float("nan") if dtype.is_floating_point else 0.0
        return torch.tensor(number, device=device).to(dtype)

    return placeholder


def away(layout: tuple[PackedTensor, ...], placeholder: Placeholders, num_bytes: int) -> AwayBlock:
    """Puts placeholders in the place of a block's tensors, whose bytes lie elsewhere, and frees the originals.

    Args:
        num_bytes: bytes that the block takes in a slot.
    """
    placeholders = tuple(placeholder(packed.dtype).expand(packed.shape) for packed in layout)
    for packed, stand_in in zip(layout, placeholders, strict=True):
        packed.tensor.data = stand_in
    return AwayBlock(num_bytes, layout, placeholders)
