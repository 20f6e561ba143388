"""Divides a transformer's trained weights among the processes of a run, by torch's FSDP2 (`fully_shard`).

Each process holds some rows of every weight (Zhao et al. 2023, arXiv 2304.11277: full sharding). A block's weights are
gathered before it runs, forward and backward, and dropped after it; where there is memory for it, they stay between
the two (`keep_gathered`). Gradients are averaged over the processes in fp32, and each keeps those of its own rows.
What is outside of the blocks is gathered with the first of them and kept until the backward pass ends.

With several groups of processes that hold one copy each, gradients are averaged between the groups as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pixtune.engine.together import Together

AHEAD = 2
"""Blocks that are gathered ahead of the one that runs, where blocks stay: 0.73 s instead of 0.77 a step of all weights
of Qwen-Image on two H200. The host takes nearly as long to launch a block as the GPU does to compute it."""


@dataclass(frozen=True)
class Rows:
    """The part of a weight that a process holds: some of its rows, those along its first axis."""

    shape: tuple[int, ...]
    """Shape of the whole weight."""
    start: int
    """Number of the first of them."""
    end: int

    @property
    def is_whole(self) -> bool:
        """Whether these are all."""
        return (self.start, self.end) == (0, self.shape[0] if self.shape else 1)

    @property
    def row_numbers(self) -> int:
        """Numbers of one row."""
        return torch.Size(self.shape[1:]).numel()

    def of(self, whole: Tensor) -> Tensor:
        """Returns these rows of a whole tensor, as a view."""
        return whole if self.is_whole else whole[self.start : self.end]


def build_together(shards: int, num_processes: int, device: torch.device) -> Together:
    """Returns the processes of a run as `shards` of them hold one copy of the weights together; 1: each holds all."""
    if shards == 1:
        return Together()
    if shards == num_processes:
        return Together(init_device_mesh(device.type, (shards,), mesh_dim_names=("part",)))
    groups = num_processes // shards
    return Together(init_device_mesh(device.type, (groups, shards), mesh_dim_names=("copy", "part")))


def shard_transformer(transformer: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Turns a transformer's parameters into DTensors of which each process holds some rows, block by block.

    Meant for parameters on the meta device: nobody holds them whole.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    transformer.register_forward_hook(_own_memory, prepend=True)


def keep_gathered(transformer: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Lets blocks stay gathered from their forward to their backward pass; in a pass without gradients they do not.

    The next blocks are asked for earlier then, as nothing is dropped for which they would need the memory.
    """
    divided: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    for number, block in enumerate(divided):
        block.set_modules_to_forward_prefetch(divided[number + 1 : number + 1 + AHEAD])

    def decide(*_: Any) -> None:
        for block in divided:
            block.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False)

    transformer.register_forward_pre_hook(decide)


def _own_memory(transformer: nn.Module, args: Any, output: Any) -> Any:
    """Returns a forward pass's output as tensors of their own.

    FSDP2 begins the backward pass at the output, and misses it where that is a view which is changed in place.
    """
    if isinstance(output, tuple):
        return tuple(each.clone() if isinstance(each, Tensor) and each._is_view() else each for each in output)
    return output


def allocate_shards(
    transformer: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, device: torch.device, dtype: torch.dtype
) -> None:
    """Shards a transformer on the meta device, and gives each process memory for its own rows, without values."""
    kept = {name: buffer for name, buffer in transformer.named_buffers() if not buffer.is_meta}
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Converted one by one: buffers keep their format, which a rotary embedding's values need.
            module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    shard_transformer(transformer, blocks, mesh)
    transformer.to_empty(device=device)
    for name, buffer in kept.items():
        path, _, leaf = name.rpartition(".")
        transformer.get_submodule(path)._buffers[leaf] = buffer


def local_of(tensor: Tensor) -> Tensor:
    """Returns the rows of a tensor that this process holds, as the very memory; all where it holds it whole."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor, together: Together) -> Rows:
    """Returns which rows of a tensor this process holds."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Rows(shape, 0, shape[0] if shape else 1)
    each = -(-shape[0] // together.num_parts)  # as torch.chunk divides, and FSDP2 with it
    start = min(together.part * each, shape[0])
    return Rows(shape, start, start + len(local_of(tensor)))


def norms_across(norms: Sequence[Tensor], together: Together) -> list[Tensor]:
    """Returns the norms of whole tensors from those of this process's rows, one for each. All must call it."""
    if together.is_alone or not norms:
        return list(norms)
    return list(together.sum(torch.stack(list(norms)).square()).sqrt().unbind())


def whole_of(tensor: Tensor) -> Tensor:
    """Returns all rows of a tensor. All processes that hold it together must call it."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
