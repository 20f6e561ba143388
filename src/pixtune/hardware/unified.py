"""Machines whose CPU and GPU share one pool of memory (DGX Spark), and what follows from it.

The device says so itself (`integrated`). Capability does not: an H100 or an RTX 5090 has its own memory, and a GH200
has two coherent pools.
"""

from __future__ import annotations

import os
from typing import Any

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The newer name, and the one that older torch and most users know. torch reads both, the newer one first."""
EXPANDABLE = "expandable_segments:True"


def is_unified_memory_system() -> bool:
    """Whether the current GPU and the CPU share one pool of memory. Starts CUDA."""
    return torch.cuda.is_available() and bool(torch.cuda.get_device_properties().is_integrated)


def get_memory_config(unified_memory: bool | None = None) -> dict[str, Any]:
    """The preset of a machine.

    Args:
        unified_memory: None asks the machine.
    """
    unified = is_unified_memory_system() if unified_memory is None else unified_memory
    return {
        "pin_memory": not unified,
        "disable_cpu_offload": unified,
        "prefetch_factor": 2 if unified else 4,
        "num_workers": 4 if unified else 8,
        "memory_pool": "unified" if unified else "standard",
        "expandable_segments": unified,
    }


def setup_unified_memory_env() -> None:
    """Has torch's allocator grow its segments instead of reserving new ones. A user's own settings are kept.

    Raises:
        RuntimeError: CUDA has started: the allocator has read its settings.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("setup_unified_memory_env() must run before CUDA starts, and CUDA has started")
    variable = next((name for name in ALLOCATOR_VARIABLES if os.environ.get(name)), ALLOCATOR_VARIABLES[1])
    settings = [word for word in os.environ.get(variable, "").split(",") if word]
    if not any(word.strip().startswith("expandable_segments:") for word in settings):
        os.environ[variable] = ",".join([*settings, EXPANDABLE])
