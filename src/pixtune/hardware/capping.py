"""A hard limit on what this process takes of a GPU, so that a smaller card can be tried on a larger one.

torch can cap its allocator only (`set_per_process_memory_fraction`), and a process holds more than that: the CUDA
context, the code of kernels and libraries, NCCL's buffers. A card of 24 GB has to hold all of it, so the limit here is
for the whole process, and the allocator gets what is left of it:

    limit = outside the allocator, measured after CUDA has started + room for what is loaded later + allocator

`used_before_cuda` reads from nvidia-smi what others hold before this process has a context; after the context is
there, cudaMemGetInfo counts both, and the difference is the context. Without nvidia-smi the context is assumed, and
`DeviceCap.measured` says so. The memory that runs use outside is best checked at their end with
`outside_allocator_bytes`: whoever reports a capped run reports that figure beside the limit.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB

ASSUMED_OUTSIDE_BYTES = GIB // 2
"""Context of an H100 with torch's libraries loaded, and more than that of smaller chips."""
LOADED_LATER_BYTES = round(0.35 * GIB)
"""Kernels are loaded when they first run: cuBLAS's, cuDNN's, compiled ones; recorded steps are kept there, too."""
NVIDIA_SMI_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class DeviceCap:
    """How a limit was divided, in bytes."""

    limit_bytes: int
    outside_bytes: int
    """Held outside torch's allocator when the cap was set."""
    later_bytes: int
    """Set aside for what is loaded later."""
    allocator_bytes: int
    """What torch may reserve; beyond it, it raises out-of-memory."""
    measured: bool
    """False: `outside_bytes` is an assumption."""


def own_gpu(environ: Mapping[str, str]) -> str:
    """This process's GPU as nvidia-smi names it, which ignores CUDA_VISIBLE_DEVICES: a number or a UUID.

    Args:
        environ: with LOCAL_RANK where there are several processes.
    """
    rank = int(environ.get("LOCAL_RANK", "0"))
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[rank % len(visible)] if visible else str(rank)  # as processes are spread over GPUs


def used_before_cuda(gpu: str) -> int | None:
    """Bytes that others hold on a GPU; call it before CUDA starts in this process.

    Args:
        gpu: of `own_gpu`.

    Returns:
        None if nvidia-smi is missing or does not say, as on an integrated GPU.
    """
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    mebibytes = run.stdout.strip()
    return int(mebibytes) * 2**20 if run.returncode == 0 and mebibytes.isdigit() else None


def outside_allocator_bytes(used_before_bytes: int, device: torch.device | None = None) -> int:
    """What this process holds on the GPU beside torch's allocator. Others must not have grown since the reading.

    Args:
        used_before_bytes: what `used_before_cuda` said.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, total_bytes - free_bytes - used_before_bytes - torch.cuda.memory_reserved(device))


def cap_device_memory(
    limit_gib: float, used_before_bytes: int | None = None, device: torch.device | None = None
) -> DeviceCap:
    """Caps what this process can take of a GPU, its CUDA context included. Starts CUDA.

    Args:
        limit_gib: of the whole process, GiB.
        used_before_bytes: what `used_before_cuda` said, before CUDA started; None assumes the size of the context.

    Raises:
        PlanError: the limit leaves nothing to the allocator, or the GPU is smaller than it.
    """
    if device is not None and device.index is None:  # torch takes a device with its number, or none for the current one
        device = None
    torch.cuda.synchronize(device)  # the context is there from here on
    outside = ASSUMED_OUTSIDE_BYTES if used_before_bytes is None else outside_allocator_bytes(used_before_bytes, device)
    total_bytes = torch.cuda.mem_get_info(device)[1]
    cap = divide_limit(round(limit_gib * GIB), total_bytes, outside, measured=used_before_bytes is not None)
    torch.cuda.set_per_process_memory_fraction(cap.allocator_bytes / total_bytes, device)
    return cap


def divide_limit(limit_bytes: int, total_bytes: int, outside_bytes: int, measured: bool) -> DeviceCap:
    """The allocator's share of a limit.

    Raises:
        PlanError: nothing is left for it, or the GPU is smaller than the limit.
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
    return DeviceCap(limit_bytes, outside_bytes, LOADED_LATER_BYTES, allocator_bytes, measured)
