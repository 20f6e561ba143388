"""Safetensors to and from a device: whole files, models in shards, or one tensor after the other."""

from pixtune.storage.loading.fast import is_fastsafetensors_available
from pixtune.storage.loading.parts import check_parts, naming_part
from pixtune.storage.loading.read import iterate_tensors, load_safetensors
from pixtune.storage.loading.shards import (
    load_safetensors_sharded,
    save_safetensors,
    save_safetensors_sharded,
    shard_files,
)
from pixtune.storage.loading.transformer import ScaledWeight, TransformerTensors, open_transformer

__all__ = [
    "ScaledWeight",
    "TransformerTensors",
    "check_parts",
    "is_fastsafetensors_available",
    "iterate_tensors",
    "load_safetensors",
    "load_safetensors_sharded",
    "naming_part",
    "open_transformer",
    "save_safetensors",
    "save_safetensors_sharded",
    "shard_files",
]
