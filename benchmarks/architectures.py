"""Full-size models: the architectures that pixtune ships, and folders without weights for runs with random ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtune.storage.architecture import find_shipped


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder as its folder describes it."""

    model_class: str
    """Class of transformers."""
    values: dict[str, Any]
    """Values of its config that differ from the small model's; sections are merged."""
    names_in_files: dict[str, str] = field(default_factory=dict)
    """Beginnings of parameters' names: in the class, and in the published files."""


@dataclass(frozen=True)
class Architecture:
    """A full-size model as its folder describes it, and what its measurements need."""

    pipeline: str
    """Class of diffusers."""
    transformer: dict[str, Any]
    """Config, as are the next two."""
    autoencoder: dict[str, Any]
    scheduler: dict[str, Any]
    num_controls: int = 0
    text_encoders: dict[str, TextEncoder] = field(default_factory=dict)
    """Text encoders by component."""
    small_model: str = ""
    """Folder in assets/ of the same classes: its tokenizers serve, and its configs where nothing else is said."""
    num_text_tokens: int = 256
    """Tokens of a caption, as real training has them: FLUX.1 pads to this number, Qwen-Image takes any length."""


QWEN_LAYERS, QWEN_WIDTH = 28, 3584
QWEN_TEXT = TextEncoder(
    "Qwen2_5_VLForConditionalGeneration",
    {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": QWEN_WIDTH, "intermediate_size": 18944, "num_hidden_layers": QWEN_LAYERS,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
            "max_position_embeddings": 128000, "layer_types": ["full_attention"] * QWEN_LAYERS,
            "rope_parameters": {"mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": QWEN_WIDTH, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    {"model.language_model.": "model.", "model.visual.": "visual."},
)  # fmt: skip
CLIP_TEXT = TextEncoder(
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
     "vocab_size": 49408, "projection_dim": 768},
)  # fmt: skip
T5_TEXT = TextEncoder(
    "T5EncoderModel",
    {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
)
FLUX_VALUES: dict[str, Any] = {
    "num_text_tokens": 512,
    "small_model": "tiny-flux",
    "text_encoders": {"text_encoder": CLIP_TEXT, "text_encoder_2": T5_TEXT},
}


def shipped_architecture(hub_name: str, **values: Any) -> Architecture:
    """Builds the architecture of a model that pixtune ships; `values` are what its measurements need."""
    model = find_shipped(hub_name)
    assert model, f"{hub_name} is not shipped"
    transformer, autoencoder, scheduler = (model.component_config(part) for part in ("transformer", "vae", "scheduler"))
    return Architecture(model.pipeline_class, transformer, autoencoder, scheduler, **values)


ARCHITECTURES = {
    "qwen-image": shipped_architecture(
        "Qwen/Qwen-Image", text_encoders={"text_encoder": QWEN_TEXT}, small_model="tiny-qwen-image"
    ),
    "qwen-image-edit": shipped_architecture("Qwen/Qwen-Image-Edit", num_controls=1),
    "qwen-image-edit-2509": shipped_architecture("Qwen/Qwen-Image-Edit-2509", num_controls=1),
    "qwen-image-edit-2511": shipped_architecture("Qwen/Qwen-Image-Edit-2511", num_controls=1),
    "flux": shipped_architecture("black-forest-labs/FLUX.1-dev", **FLUX_VALUES),
    "flux-schnell": shipped_architecture("black-forest-labs/FLUX.1-schnell", **FLUX_VALUES),
    "flux-kontext": shipped_architecture("black-forest-labs/FLUX.1-Kontext-dev", num_controls=1, **FLUX_VALUES),
}
"""Models by the names that cells have in results."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, and its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))


def write_model_folder(folder: Path, model: Architecture) -> None:
    """Writes the model's folders with configs and no weights."""
    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": model.pipeline},
        "transformer/config.json": model.transformer,
        "vae/config.json": model.autoencoder,
        "scheduler/scheduler_config.json": model.scheduler,
    }
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "processor"):
        configs[f"{part}/config.json"] = {}
    for name, config in configs.items():
        write_json(folder / name, config)
