"""Tells what a file is that is no LoRA, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHTS: tuple[tuple[str, str], ...] = (
    (r".*\.(lora_[AB]|lora_down|lora_up|lokr_w|hada_w)", "a LoRA, which changes a model and is none by itself"),
    (r"(model\.)?diffusion_model\.|double_blocks\.\d+\.img_attn\.qkv\.weight|transformer_blocks\.\d+\..*\.weight",
     "the weights of an image model (a base checkpoint)"),
    (r"(vae\.|first_stage_model\.)?(encoder|decoder)\.(conv_in|conv1|down\.\d|up\.\d|mid|middle|down_blocks|up_blocks|"
     r"upsamples|downsamples)\b", "the weights of an autoencoder (VAE)"),
    (r"(model\.)?visual\.|(model\.)?(language_model\.)?layers\.\d+\.(self_attn|mlp)\.|text_model\.encoder\.|"
     r"(encoder\.)?block\.\d+\.layer\.\d+\.SelfAttention|shared\.weight|text_encoders?\.",
     "the weights of a text encoder"),
    (r"control_|controlnet_", "a ControlNet"),
    (r"emb_params|clip_[lg]$|t5xxl$|string_to_param", "a textual-inversion embedding"),
    (r".*/(exp_avg|exp_avg_sq|state\d|step)$", "the states of an optimizer"),
)  # fmt: skip
"""Beginnings of the names of tensors, and what files with such names are; the first that fits counts."""

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


def describe_weights(names: Iterable[str]) -> str:
    """Returns in words what a file with tensors of these names is."""
    names = list(names)
    if not names:
        return "it holds no tensor at all"
    kinds = _first_match(names, WEIGHTS)
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"it is {kinds}" if kinds else f"it holds {names[0]}{more}, which pixtune does not know"


def other_kind(names: Iterable[str]) -> str | None:
    """Returns which kind of adapter a file is that pixtune does not read; None where the names are of none."""
    return _first_match(names, ADAPTERS)


def _first_match(names: Iterable[str], table: tuple[tuple[str, str], ...]) -> str | None:
    names = list(names)
    return next((what for pattern, what in table if any(re.match(pattern, name) for name in names)), None)
