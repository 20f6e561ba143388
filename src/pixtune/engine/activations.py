"""Recomputed blocks, which keep only their inputs for the backward pass, on the device or in host memory.

Even if each block keeps its inputs alone, a 60-block transformer at 1024x1024 holds 1.6 GB of them in bf16. A PCIe link
could carry them many times over in the time that a block computes, so they can wait in page-locked host memory: each
leaves while its block runs forward and is back one block before the backward pass needs it.

torch's checkpoint gets no tensors as arguments here but a function that knows where they are. It saves positional
arguments only (through an autograd node up to 2.12, `SavedTensor` objects since), and the blocks are called with named
ones.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixtune.engine.forwards import Forward, wrap_forward
from pixtune.engine.transfer import CopyLane, Mark, host_buffer, span

MIN_OFFLOADED_BYTES = 2**20
"""Size below which inputs stay on the device: 60 of these are less than three of the image's."""


def recompute_blocks(blocks: Sequence[nn.Module], offload: bool) -> None:
    """Has each block keep only its inputs and run again in the backward pass. Without gradients nothing changes.

    Blocks must not draw random numbers: the generators' states are not restored.

    Args:
        blocks: in the order in which they run.
        offload: inputs of `MIN_OFFLOADED_BYTES` and more wait in host memory, except those of the last block, which
            are needed again at once.
    """
    offloading = InputOffload() if offload else None
    for block in blocks:
        if offloading is None:
            wrap_forward(block, recompute, recomputes=True)
        else:
            around = partial(offloading.recompute, stays=block is blocks[-1])
            wrap_forward(block, around, recomputes=True)


def recompute_projections(blocks: Sequence[nn.Module]) -> None:
    """Has each block recompute queries, keys and values in the backward pass.

    They are a third of what a compiled block with selective recomputation keeps, and a quarter of its products in
    the forward pass.

    Raises:
        ValueError: a block's attention has no such switch.
    """
    for block in blocks:
        processors = [m.processor for m in block.modules() if hasattr(m, "processor")]
        switched = [processor for processor in processors if hasattr(processor, "recomputes_projections")]
        if not switched:
            raise ValueError(f"the attention of {type(block).__name__} cannot recompute its projections")
        for processor in switched:
            processor.recomputes_projections = True


def recompute(inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs `inner` such that its backward pass runs it again."""
    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class InputOffload:
    """Host memory for the inputs of blocks, shared by all blocks of a transformer."""

    def __init__(self) -> None:
        self._lane: CopyLane | None = None
        self._pool: BufferPool | None = None
        self._latest: Callable[[], KeptInputs | None] = lambda: None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory taken so far."""
        return 0 if self._pool is None else self._pool.num_bytes

    def recompute(self, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], *, stays: bool) -> Any:
        """Runs `inner` like the function `recompute`, with the inputs in host memory.

        Args:
            stays: whether these inputs remain on the device.
        """
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        kept = KeptInputs(args, kwargs, self._latest)
        self._latest = weakref.ref(kept)
        if not stays:
            kept.start_leaving(self._send)

        def run() -> Any:
            arguments, named = kept.on_device()
            return inner(*arguments, **named)

        outputs = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        kept.leave()
        return outputs

    def _send(self, tensor: Tensor) -> HostCopy:
        if self._lane is None or self._pool is None:
            self._lane, self._pool = CopyLane(tensor.device), BufferPool(tensor.device)
        buffer = self._pool.take(span(tensor.shape, tensor.stride()) * tensor.element_size())
        return HostCopy(tensor, buffer, self._lane, self._pool)


class KeptInputs:
    """Inputs of one call of a block. Lives as long as the autograd graph of the call.

    Only tensors that need a gradient leave: each block gets new ones. The others (time embedding, rotary embedding,
    masks) are the same tensors for all blocks.

    Args:
        previous: returns the inputs of the call before, while they live: the backward pass needs them next.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], previous: Callable[[], KeptInputs | None]
    ) -> None:
        self._values: dict[int | str, Any] = dict(enumerate(args))
        self._values.update(kwargs)
        self._copies: dict[int | str, HostCopy] = {}
        self._previous = previous
        self._left = False

    def start_leaving(self, send: Callable[[Tensor], HostCopy]) -> None:
        """Begins to copy large inputs; they stay usable until `leave`."""
        self._copies = {
            key: send(value)
            for key, value in self._values.items()
            if isinstance(value, Tensor) and value.requires_grad and value.nbytes >= MIN_OFFLOADED_BYTES
        }

    def leave(self) -> None:
        """Gives up the device memory of the copied inputs."""
        for key, copy in self._copies.items():
            # The computation waits and not the allocator, so that the memory is free at the same moment in every step.
            # A block computes for longer than its input takes to leave.
            copy.wait_until_sent()
            del self._values[key]
        self._left = True

    def on_device(self) -> tuple[list[Any], dict[str, Any]]:
        """Returns positional and named arguments of the call, for the forward pass or, after `leave`, to rerun it."""
        values = dict(self._values)
        if self._left:
            values.update({key: copy.take() for key, copy in self._copies.items()})
            previous = self._previous()
            if previous is not None:
                previous.start_returning()
        positions = sorted(key for key in values if isinstance(key, int))
        named = {key: value for key, value in values.items() if isinstance(key, str)}
        return [values[position] for position in positions], named

    def start_returning(self) -> None:
        """Begins to copy back what `on_device` returns next."""
        for copy in self._copies.values():
            copy.start_returning()


class HostCopy:
    """Copy of a device tensor in host memory that becomes a device tensor again, with the same strides.

    With other strides a compiled block would be compiled anew for its recomputation.

    Args:
        buffer: memory of the pool, which gets it back when this object dies.
    """

    def __init__(self, tensor: Tensor, buffer: Tensor, lane: CopyLane, pool: BufferPool) -> None:
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._device, self._lane, self._pool, self._buffer = tensor.device, lane, pool, buffer
        self._coming: Tensor | None = None
        self._arrived: Mark = None
        self._num_elements = span(self._shape, self._stride)
        num_bytes = self._num_elements * tensor.element_size()
        self._bytes = buffer[:num_bytes].view(tensor.dtype)
        source = tensor.detach().as_strided((self._num_elements,), (1,))
        self._sent = lane.copy(self._bytes, source, after=lane.reached())

    def wait_until_sent(self) -> None:
        """Has the computation wait for the copy, after which it may overwrite the original."""
        self._lane.wait(self._sent)

    def start_returning(self) -> None:
        """Begins the copy back, if it has not begun."""
        if self._coming is None:
            self._coming = torch.empty(self._num_elements, dtype=self._bytes.dtype, device=self._device)
            # That memory may still be in use by work that was launched before.
            self._arrived = self._lane.copy(self._coming, self._bytes, after=self._lane.reached())

    def take(self) -> Tensor:
        """Returns the tensor, a leaf that needs a gradient. A later backward pass over the same graph may ask again."""
        self.start_returning()
        assert self._coming is not None
        self._lane.wait(self._arrived)
        flat, self._coming = self._coming, None
        return flat.as_strided(self._shape, self._stride).requires_grad_()

    def __del__(self) -> None:
        if self._coming is not None:  # never taken: what uses its memory next must come after the copy
            self._lane.wait(self._arrived)
        self._pool.give_back(self._buffer)  # only a later copy of the same lane writes to it


class BufferPool:
    """Host buffers that are reused from step to step: locking pages takes as long as copying them.

    A buffer serves any request of at least half its size, since pictures of different shapes have about equal numbers
    of tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[tuple[int, int, Tensor]] = []  # by size; the address only decides between equals
        self.num_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """Returns a buffer of at least this size."""
        place = bisect_left(self._free, num_bytes, key=lambda entry: entry[0])
        if place < len(self._free) and self._free[place][0] <= 2 * num_bytes:
            return self._free.pop(place)[2]
        size = round_up(num_bytes)
        self.num_bytes += size
        return host_buffer(size, self._device)

    def give_back(self, buffer: Tensor) -> None:
        insort(self._free, (buffer.nbytes, buffer.data_ptr(), buffer), key=lambda entry: entry[:2])


def round_up(num_bytes: int) -> int:
    """Rounds up to one of eight sizes between powers of two, so that about equal requests get equal buffers."""
    step = 1 << max(num_bytes.bit_length() - 4, 0)
    return -(-num_bytes // step) * step
