"""LoRA files of the shipped models for tests, with drawn numbers, in diffusers' format unless a test renames them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixtune.deltas.base_files import open_base
from tests.runs import ROOT

MODELS = {"qwen_image": ROOT / "assets" / "tiny-qwen-image", "flux": ROOT / "assets" / "tiny-flux"}


def shapes_of(name: str, wanted: Callable[[str], bool] = lambda layer: ".attn." in layer) -> dict[str, tuple[int, int]]:
    """Layers of a shipped model with their numbers of outputs and inputs."""
    base = open_base(str(MODELS[name]))
    return {layer: base.shape(layer) for layer in base.places if wanted(layer)}


def lora_tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int | Callable[[str], int] = 4, seed: int = 0, size: float = 0.1
) -> dict[str, Tensor]:
    """`LAYER.lora_A.weight` and `LAYER.lora_B.weight` of drawn numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (outputs, inputs) in shapes.items():
        of_layer = rank if isinstance(rank, int) else rank(layer)
        tensors[f"{layer}.lora_A.weight"] = torch.randn(of_layer, inputs, generator=generator) * size
        tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, of_layer, generator=generator) * size
    return tensors


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, **config: Any
) -> Path:
    """Writes a file as PEFT and diffusers do."""
    stated = (
        {} if not config else {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    )
    save_file(
        {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        path,
        {"format": "pt", **stated, **(metadata or {})},
    )
    return path
