"""Full-size models' folders without weights: what a run with `random_weights=true` needs of a model."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

QWEN_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
FLUX_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
"""Of the models on the hub."""


@dataclass(frozen=True)
class Architecture:
    """What a full-size model's folder says; the classes' own defaults are the full size, but for a few values."""

    pipeline: str
    transformer: str
    autoencoder: str
    scheduler: dict[str, object]
    num_controls: int = 0
    transformer_values: dict[str, object] = field(default_factory=dict)
    autoencoder_values: dict[str, object] = field(default_factory=dict)
    num_text_tokens: int = 256
    """Of a caption, as real training has them: FLUX.1's are padded to so many, Qwen-Image's are of any length."""

    @property
    def transformer_config(self) -> dict[str, object]:
        return default_config(self.transformer) | self.transformer_values


QWEN = ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", QWEN_SCHEDULER)
FLUX = ("FluxTransformer2DModel", "AutoencoderKL", FLUX_SCHEDULER)
FLUX_VALUES: dict[str, Any] = {
    "num_text_tokens": 512,
    "transformer_values": {"guidance_embeds": True},
    "autoencoder_values": {
        "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
ARCHITECTURES = {
    "qwen-image": Architecture("QwenImagePipeline", *QWEN),
    "qwen-image-edit": Architecture("QwenImageEditPipeline", *QWEN, 1),
    "qwen-image-edit-2509": Architecture("QwenImageEditPlusPipeline", *QWEN, 1),
    "qwen-image-edit-2511": Architecture("QwenImageEditPlusPipeline", *QWEN, 1, {"zero_cond_t": True}),
    "flux": Architecture("FluxPipeline", *FLUX, **FLUX_VALUES),
    "flux-kontext": Architecture("FluxKontextPipeline", *FLUX, 1, **FLUX_VALUES),
}


def write_model_folder(folder: Path, model: Architecture) -> None:
    """The model's folders with configs and no weights."""
    configs = {
        "model_index.json": {"_class_name": model.pipeline},
        "transformer/config.json": model.transformer_config,
        "vae/config.json": default_config(model.autoencoder) | model.autoencoder_values,
        "scheduler/scheduler_config.json": model.scheduler,
    }
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "processor"):
        configs[f"{part}/config.json"] = {}
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))


def default_config(model_class: str) -> dict[str, object]:
    """A diffusers model's default arguments."""
    parameters = inspect.signature(getattr(diffusers, model_class).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
