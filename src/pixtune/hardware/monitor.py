"""How much device memory is in use, in GiB (2^30 bytes)."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

GIB = 2**30


def get_memory_stats() -> dict[str, float]:
    """`allocated_gb`, `reserved_gb` and `max_allocated_gb` of the current device; zeros without a GPU."""
    if not torch.cuda.is_available():
        return {"allocated_gb": 0.0, "reserved_gb": 0.0, "max_allocated_gb": 0.0}
    return {
        "allocated_gb": torch.cuda.memory_allocated() / GIB,
        "reserved_gb": torch.cuda.memory_reserved() / GIB,
        "max_allocated_gb": torch.cuda.max_memory_allocated() / GIB,
    }


def log_memory_usage(checkpoint_name: str) -> None:
    """One line in the log (logger "pixtune.hardware.monitor") on what is in use at a named moment."""
    stats = get_memory_stats()
    log.info(
        "%s: %.2f GiB allocated, %.2f GiB reserved, peak %.2f GiB",
        checkpoint_name, stats["allocated_gb"], stats["reserved_gb"], stats["max_allocated_gb"],
    )  # fmt: skip


def reset_peak_memory_stats() -> None:
    """Starts a new peak from what is allocated now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
