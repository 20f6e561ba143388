"""Full-size models: what their configs say, and folders without weights for runs with `random_weights=true`."""

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
class TextEncoder:
    """What a text encoder's folder says."""

    model_class: str
    """Of transformers."""
    values: dict[str, Any]
    """Of its config, where they differ from the small model's; sections are merged."""
    names_in_files: dict[str, str] = field(default_factory=dict)
    """How parameters' names begin in the class, and in the published files."""


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
    text_encoders: dict[str, TextEncoder] = field(default_factory=dict)
    """By component."""
    small_model: str = ""
    """In assets/, of the same classes: its tokenizers serve, and its configs where nothing else is said."""
    num_text_tokens: int = 256
    """Of a caption, as real training has them: FLUX.1's are padded to so many, Qwen-Image's are of any length."""

    @property
    def transformer_config(self) -> dict[str, object]:
        return default_config(self.transformer) | self.transformer_values


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
QWEN = ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", QWEN_SCHEDULER)
FLUX = ("FluxTransformer2DModel", "AutoencoderKL", FLUX_SCHEDULER)
FLUX_VALUES: dict[str, Any] = {
    "num_text_tokens": 512,
    "small_model": "tiny-flux",
    "text_encoders": {"text_encoder": CLIP_TEXT, "text_encoder_2": T5_TEXT},
    "transformer_values": {"guidance_embeds": True},
    "autoencoder_values": {
        "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
ARCHITECTURES = {
    "qwen-image": Architecture(
        "QwenImagePipeline", *QWEN, text_encoders={"text_encoder": QWEN_TEXT}, small_model="tiny-qwen-image"
    ),
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
