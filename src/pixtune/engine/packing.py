"""A block's frozen tensors as one piece of memory, which is copied at once and leaves no gaps between blocks.

Weights that are read, cast and quantized one after the other leave gaps where their original forms were: 0.1 GiB for
bf16 weights, 0.3 to 0.4 for quantized ones, measured on an H100. A step that is launched kernel by kernel uses these
gaps; a captured one has memory of its own and cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixtune.engine.transfer import span

ALIGNMENT_BYTES = 256
"""Alignment of every tensor in a piece, which is that of the device's allocator: kernels then use wider loads."""


@dataclass(frozen=True)
class PackedTensor:
    """A frozen tensor of a block and its place among the block's bytes."""

    tensor: Tensor
    """The module's own parameter or buffer."""
    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return span(self.shape, self.stride) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Returns the tensor in a buffer that holds the block's bytes."""
        own = memory[self.offset_bytes : self.offset_bytes + self.num_bytes]
        return own.view(self.dtype).as_strided(self.shape, self.stride)


def lay_out_frozen(block: nn.Module) -> tuple[PackedTensor, ...]:
    """Assigns every parameter and buffer of a block that needs no gradient a place in the block's bytes, each once.

    Raises:
        ValueError: there are none.
    """
    tensors = {id(t): t for t in [*block.parameters(), *block.buffers()] if not t.requires_grad and t.numel()}
    if not tensors:
        raise ValueError(f"nothing to pack: {type(block).__name__} has no frozen weights")
    layout: list[PackedTensor] = []
    for tensor in tensors.values():
        shape, stride = tuple(tensor.shape), tensor.stride()
        if span(shape, stride) != tensor.numel():  # a slice of a tensor, whose other elements are not packed
            stride = torch.empty(shape, device="meta").stride()
        layout.append(PackedTensor(tensor, packed_bytes(layout), shape, stride, tensor.dtype))
    return tuple(layout)


def packed_bytes(layout: Sequence[PackedTensor]) -> int:
    """Counts the bytes of all tensors together, with their alignment."""
    if not layout:
        return 0
    end = layout[-1].offset_bytes + layout[-1].num_bytes
    return -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def copy_into(memory: Tensor, layout: Iterable[PackedTensor]) -> None:
    """Writes the tensors' values to their places."""
    for packed in layout:
        packed.view(memory).copy_(packed.tensor)


def close_gaps(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Moves each block's frozen tensors into one piece of device memory, and gives back the memory that this frees."""
    for block in blocks:
        layout = lay_out_frozen(block)
        memory = torch.empty(packed_bytes(layout), dtype=torch.uint8, device=device)
        copy_into(memory, layout)
        for packed in layout:
            packed.tensor.data = packed.view(memory)
    if device.type == "cuda":
        torch.cuda.empty_cache()
