"""Features of this machine's GPU, by its compute capability; every function answers without a GPU, too."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version

from pixtune.hardware.facts import HOPPER

NO_GPU = (0, 0)

FEATURES: dict[str, tuple[int, int]] = {
    "fp8_native": (8, 9),
    "tf32_compute": (8, 0),
    "flash_attention_2": (8, 0),
    "async_memcpy": (8, 0),
}
"""Oldest capability that has each feature. FlashAttention 3 is not among them: it runs on Hopper alone."""


def get_cuda_version() -> str:
    """Returns the version of CUDA that torch was built with, for example "13.0"; "none" for a CPU build."""
    return torch.version.cuda or "none"


def compare_versions(one: str, other: str) -> int:
    """Returns -1, 0 or 1 as `one` is older than, equal to or newer than `other`: "12.10" is newer than "12.9"."""
    first, second = Version(one), Version(other)
    return (first > second) - (first < second)


def get_device_capability() -> tuple[int, int]:
    """Returns the compute capability of the current GPU, for example (9, 0); (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else NO_GPU


def is_hopper_or_newer() -> bool:
    return get_device_capability() >= HOPPER


def is_ampere_or_newer() -> bool:
    return get_device_capability() >= (8, 0)


def supports_feature(name: str) -> bool:
    """Returns whether this GPU has a feature.

    Args:
        name: flash_attention_3, fp8_native, tf32_compute, flash_attention_2 or async_memcpy (copies from global to
            shared memory beside computation).

    Raises:
        ValueError: no feature has this name; lists all names.
    """
    capability = get_device_capability()
    if name == "flash_attention_3":  # its kernels are built from instructions that later chips do not have
        return capability == HOPPER
    if name not in FEATURES:
        raise ValueError(f"{name!r} is no known feature; there are flash_attention_3, {', '.join(FEATURES)}")
    return capability >= FEATURES[name]


def get_optimal_settings() -> dict[str, Any]:
    """Returns which features to switch on, as values that JSON can hold."""
    return {
        "use_flash_attention_3": supports_feature("flash_attention_3"),
        "use_fp8": supports_feature("fp8_native"),
        "use_tf32": supports_feature("tf32_compute"),
        "use_flash_attention_2": supports_feature("flash_attention_2"),
        "cuda_version": get_cuda_version(),
        "compute_capability": list(get_device_capability()),
    }


def enable_tf32() -> bool:
    """Switches on TF32 for fp32 matrix products where the GPU has it, and returns whether it is on."""
    if not supports_feature("tf32_compute"):
        return False
    torch.set_float32_matmul_precision("high")
    return True


def get_recommended_dtype() -> torch.dtype:
    """Returns bf16 where the GPU computes in it, else fp32: fp16 overflows in these models."""
    return torch.bfloat16 if is_ampere_or_newer() else torch.float32
