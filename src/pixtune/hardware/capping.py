"""A hard limit on what this process takes of a GPU, so that a smaller card can be tried on a larger one.

torch can cap its allocator only (`set_per_process_memory_fraction`), and a process holds more than that: the CUDA
context, the code of kernels and libraries, NCCL's buffers. A card of 24 GB has to hold all of it, so the limit here
covers the whole process, and the allocator gets what is left of it:

    limit = outside the allocator, measured after CUDA has started + room for what is loaded later + allocator

`used_before_cuda` reads from nvidia-smi what others hold before this process has a context; after the context is
there, cudaMemGetInfo counts both, and the difference is the context. Without nvidia-smi the context is assumed. The
memory that runs use outside is best checked at their end with `outside_allocator_bytes`: whoever reports a capped run
reports that figure beside the limit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.hardware.nvidia_smi import query

ASSUMED_OUTSIDE_BYTES = GIB // 2
"""Context of an H100 with torch's libraries loaded; smaller chips have a smaller one."""
LOADED_LATER_BYTES = round(0.35 * GIB)
"""Room for kernels that are loaded when they first run (cuBLAS's, cuDNN's, compiled ones), and for CUDA graphs."""


def own_gpu(environ: Mapping[str, str]) -> str:
    """Returns the number or UUID of this process's GPU for nvidia-smi, which ignores CUDA_VISIBLE_DEVICES.

    Args:
        environ: environment with LOCAL_RANK where there are several processes.
    """
    rank = int(environ.get("LOCAL_RANK", "0"))
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[rank % len(visible)] if visible else str(rank)  # as processes are spread over GPUs


def used_before_cuda(gpu: str) -> int | None:
    """Reads how many bytes others hold on a GPU; call it before CUDA starts in this process.

    Args:
        gpu: as `own_gpu` returns it.

    Returns:
        None if nvidia-smi is missing or does not report it, as on an integrated GPU.
    """
    values = query(gpu, "memory.used")
    return int(values[0]) * 2**20 if values and values[0].isdigit() else None


def outside_allocator_bytes(used_before_bytes: int, device: torch.device | None = None) -> int:
    """Counts the bytes that this process holds on the GPU beside torch's allocator.

    What others hold must not have grown since the reading.

    Args:
        used_before_bytes: as `used_before_cuda` returned it.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, total_bytes - free_bytes - used_before_bytes - torch.cuda.memory_reserved(device))


def cap_device_memory(
    limit_gib: float, used_before_bytes: int | None = None, device: torch.device | None = None
) -> int:
    """Caps what this process can take of a GPU, its CUDA context included. Starts CUDA.

    Args:
        limit_gib: limit of the whole process, GiB.
        used_before_bytes: as `used_before_cuda` returned it before CUDA started; None assumes the size of the context.

    Returns:
        Bytes that torch may reserve; beyond them it raises out-of-memory.

    Raises:
        PlanError: the limit leaves nothing to the allocator, or the GPU is smaller than it.
    """
    if device is not None and device.index is None:  # torch takes a device with its number, or none for the current one
        device = None
    torch.cuda.synchronize(device)  # the context is there from here on
    outside = ASSUMED_OUTSIDE_BYTES if used_before_bytes is None else outside_allocator_bytes(used_before_bytes, device)
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
