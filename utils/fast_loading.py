"""Reading and writing of safetensors, re-exported from pixtune.storage.loading."""

from pixtune.storage.loading import (
    is_fastsafetensors_available,
    load_safetensors,
    load_safetensors_sharded,
    save_safetensors,
    save_safetensors_sharded,
)

__all__ = [
    "is_fastsafetensors_available",
    "load_safetensors",
    "load_safetensors_sharded",
    "save_safetensors",
    "save_safetensors_sharded",
]
