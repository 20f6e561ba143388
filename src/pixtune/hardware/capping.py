"""A hard limit on what this process takes of a GPU, so that a smaller card can be tried on a larger one.

torch can cap its allocator only (`set_per_process_memory_fraction`), and a process holds more than that: the CUDA
context, the code of kernels and libraries, NCCL's buffers. A card of 24 GB has to hold all of it, so the limit here
covers the whole process, and the allocator gets what is left of it:

    limit = outside the allocator, measured after CUDA has started + room for what is loaded later + allocator

nvidia-smi reports the memory of each process, and what lies outside the allocator follows. Where it does not report
this one (a container that numbers its processes by itself, a MIG slice), the context is the difference between what all
hold before and after it was made, which is wrong where others allocate meanwhile, so it counts at most as
`LARGEST_CONTEXT_BYTES`. Without nvidia-smi the context is assumed. The memory that runs use outside is best checked at
their end with `outside_allocator_bytes`: whoever reports a capped run reports that figure beside the limit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.hardware.nvidia_smi import query, query_processes

ASSUMED_OUTSIDE_BYTES = GIB // 2
"""Context of an H100 with torch's libraries loaded; smaller chips have a smaller one."""
LARGEST_CONTEXT_BYTES = round(0.75 * GIB)
"""Size of a context beyond which a difference of readings is taken for other processes' allocations."""
LOADED_LATER_BYTES = round(0.35 * GIB)
"""Room for kernels that are loaded when they first run (cuBLAS's, cuDNN's, compiled ones), and for CUDA graphs."""


@dataclass(frozen=True)
class BeforeCuda:
    """A GPU before CUDA starts in this process."""

    gpu: str
    """Number or UUID, as `own_gpu` returns it."""
    used_bytes: int
    """Bytes that others hold."""
    processes: frozenset[int]
    """Numbers of the others. One that equals this process's shows that they are counted elsewhere."""


def read_before_cuda(gpu: str) -> BeforeCuda | None:
    """Reads what others hold on a GPU; call it before CUDA starts in this process.

    Args:
        gpu: as `own_gpu` returns it.

    Returns:
        None if nvidia-smi is missing or does not report it, as on an integrated GPU.
    """
    values = query(gpu, "memory.used")
    if not values or not values[0].isdigit():
        return None
    others = query_processes(gpu) or []
    return BeforeCuda(gpu, int(values[0]) * 2**20, frozenset(process for process, _ in others))


def outside_allocator_bytes(before: BeforeCuda, device: torch.device | None = None) -> int:
    """Counts the bytes that this process holds on the GPU beside torch's allocator.

    Where nvidia-smi does not report this process, what others hold must not have grown since `before`.
    """
    own = own_outside_bytes(before, device)
    return _growth_bytes(before, device) if own is None else own


def own_outside_bytes(before: BeforeCuda, device: torch.device | None = None) -> int | None:
    """Reads this process's bytes beside the allocator from nvidia-smi; None where it does not report them beyond doubt.

    A process number that was listed before CUDA started here belongs to another container's process.
    """
    listed = [num_bytes for process, num_bytes in query_processes(before.gpu) or [] if process == os.getpid()]
    if os.getpid() in before.processes or len(listed) != 1:
        return None
    beside = listed[0] - torch.cuda.memory_reserved(device)
    return beside if beside > 0 else None  # none at all is impossible: what is listed is not all


def _growth_bytes(before: BeforeCuda, device: torch.device | None) -> int:
    """Counts what all hold more than before CUDA started, without this process's allocator."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, total_bytes - free_bytes - before.used_bytes - torch.cuda.memory_reserved(device))


def cap_device_memory(limit_gib: float, before: BeforeCuda | None = None, device: torch.device | None = None) -> int:
    """Caps what this process can take of a GPU, its CUDA context included. Starts CUDA.

    Args:
        limit_gib: limit of the whole process, GiB.
        before: as `read_before_cuda` returned it; None assumes the size of the context.

    Returns:
        Bytes that torch may reserve; beyond them it raises out-of-memory.

    Raises:
        PlanError: the limit leaves nothing to the allocator, or the GPU is smaller than it.
    """
    if device is not None and device.index is None:  # torch takes a device with its number, or none for the current one
        device = None
    torch.cuda.synchronize(device)  # the context is there from here on
    outside = ASSUMED_OUTSIDE_BYTES
    if before is not None:
        own = own_outside_bytes(before, device)
        outside = min(_growth_bytes(before, device), LARGEST_CONTEXT_BYTES) if own is None else own
    total_bytes = torch.cuda.mem_get_info(device)[1]
    allocator_bytes = allocator_share(round(limit_gib * GIB), total_bytes, outside)
    torch.cuda.set_per_process_memory_fraction(allocator_bytes / total_bytes, device)
    return allocator_bytes


def allocator_share(limit_bytes: int, total_bytes: int, outside_bytes: int) -> int:
    """Returns what of a limit is left to torch's allocator.

    Args:
        total_bytes: memory of the GPU.
        outside_bytes: held outside the allocator when the cap is set.

    Raises:
        PlanError: nothing is left, or the GPU is smaller than the limit.
    """
    if limit_bytes > total_bytes:
        raise PlanError(
            f"gpu_memory_limit_gib is {limit_bytes / GIB:.1f} and this GPU has {total_bytes / GIB:.1f} GiB. "
            "Leave it out, or give less."
        )
    allocator_bytes = limit_bytes - outside_bytes - LOADED_LATER_BYTES
    if allocator_bytes <= 0:
        raise PlanError(
            f"gpu_memory_limit_gib is {limit_bytes / GIB:.2f}, and the CUDA context with its kernels alone takes "
            f"{(outside_bytes + LOADED_LATER_BYTES) / GIB:.2f} GiB. Give more."
        )
    return allocator_bytes
