"""Models that no family here is, and adapters that are not read, told by the names of a file's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHER_MODELS: tuple[tuple[str, str], ...] = (
    (r"(lora_unet_|unet\.|diffusion_model\.)?(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)"
     r"[._]", "Stable Diffusion 1.5, 2 or XL"),
    (r"(diffusion_model\.|transformer\.)?layers\.\d+\.(attention|feed_forward|adaLN)", "Z-Image or Lumina"),
    (r"(lora_unet_|lycoris_)layers_\d+_(attention|feed_forward|adaLN)", "Z-Image or Lumina"),
    (r"(diffusion_model\.|transformer\.|lora_unet_)?blocks[._]\d+[._](self_attn|cross_attn|ffn|attn1|attn2)", "Wan"),
    (r".*joint_blocks[._]\d+|.*transformer_blocks\.\d+\.norm1_context\.linear_", "Stable Diffusion 3"),
    (r".*double_stream_modulation|.*single_stream_modulation|.*\.to_qkv_mlp_proj", "FLUX.2"),
    (r".*(double|single)_blocks[._]\d+[._](img|txt)_(attn|mod|mlp)", "a model with FLUX's kind of blocks"),
    (r".*token_refiner|.*txt_in[._]individual", "HunyuanVideo"),
    (r".*caption_projection|.*transformer_blocks\.\d+\.attn[12]\.", "LTX-Video, PixArt or Sana"),
    (r".*model\.layers[._]\d+[._](self_attn|mlp)", "a language model"),
)  # fmt: skip
"""Beginnings of the names of LoRA tensors, and the models that have such layers."""


ADAPTERS: tuple[tuple[str, str], ...] = (
    (r".*\.hada_(w|t)", "a LoHa"),
    (r".*\.(oft_blocks|oft_diag|oft_r)", "an OFT"),
    (r".*\.(boft_)", "a BOFT"),
    (r".*\.(ia3_l|on_input)", "an (IA)3"),
    (r".*\.glora_|.*\.(a1|a2|b1|b2)\.weight$", "a GLoRA"),
    (r".*\.vera_", "a VeRA"),
    (r".*\.diff(_b)?$", "an adapter with whole differences of weights"),
)
"""Kinds of adapters that are known by name and not read."""


def other_kind(names: Iterable[str]) -> str | None:
    """Returns which kind of adapter a file is that pixtune does not read; None where the names are of none."""
    return _first_match(names, ADAPTERS)


def other_model(names: Iterable[str]) -> str | None:
    """Returns which other model a LoRA's layers are of; None where the names of its tensors tell of none."""
    return _first_match(names, OTHER_MODELS)


def _first_match(names: Iterable[str], table: tuple[tuple[str, str], ...]) -> str | None:
    names = list(names)
    return next((what for pattern, what in table if any(re.match(pattern, name) for name in names)), None)
