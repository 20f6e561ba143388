"""The names by which LoRA managers know each model, as kohya's trainers write them, and licences of published bases."""

from __future__ import annotations

from collections.abc import Mapping

from pixtune.storage.model_names import ModelSpec

QWEN, FLUX_REPOSITORY = "https://github.com/QwenLM/Qwen-Image", "https://github.com/black-forest-labs/flux"
APACHE, FLUX_DEV = "Apache-2.0", "FLUX.1 [dev] Non-Commercial License"

SPECS: Mapping[str, ModelSpec] = {
    "qwen_image": ModelSpec(
        "qwen-image", QWEN, "qwen_image", "networks.lora_qwen_image", {"qwen-image": APACHE, "qwen-image-2512": APACHE}
    ),
    "qwen_image_edit": ModelSpec(
        "qwen-image-edit", QWEN, "qwen_image_edit", "networks.lora_qwen_image", {"qwen-image-edit": APACHE}
    ),
    "qwen_image_edit_plus": ModelSpec(
        "qwen-image-edit-plus", QWEN, "qwen_image_edit", "networks.lora_qwen_image",
        {"qwen-image-edit-2509": APACHE, "qwen-image-edit-2511": APACHE},
    ),
    "flux": ModelSpec(
        "flux-1", FLUX_REPOSITORY, "flux1", "networks.lora_flux",
        {"flux.1-dev": FLUX_DEV, "flux.1-krea-dev": FLUX_DEV, "flux.1-schnell": APACHE},
        {"schnell": "flux-1-schnell", "dev": "flux-1-dev", "krea": "flux-1-dev"},
    ),
    "flux_kontext": ModelSpec(
        "flux-1-dev", FLUX_REPOSITORY, "flux1", "networks.lora_flux", {"flux.1-kontext-dev": FLUX_DEV}
    ),
}  # fmt: skip
"""Each family's names, by the family's own."""
