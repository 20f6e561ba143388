"""Features of this GPU, re-exported from pixtune.hardware.features."""

from pixtune.hardware.features import (
    compare_versions,
    enable_tf32,
    get_cuda_version,
    get_device_capability,
    get_optimal_settings,
    get_recommended_dtype,
    is_ampere_or_newer,
    is_hopper_or_newer,
    supports_feature,
)

__all__ = [
    "compare_versions",
    "enable_tf32",
    "get_cuda_version",
    "get_device_capability",
    "get_optimal_settings",
    "get_recommended_dtype",
    "is_ampere_or_newer",
    "is_hopper_or_newer",
    "supports_feature",
]
