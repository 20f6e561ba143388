"""Tells what a safetensors file holds that is no transformer which is trained here, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

Signs: TypeAlias = tuple[str, ...]
"""Parts of names, of which a file with that model has one."""

LORA_SIGNS = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lokr_", "hada_w", "oft_", "dora_scale")
OTHER_MODELS: tuple[tuple[str, Signs], ...] = (
    (
        "a ControlNet, which steers a model and is none by itself",
        ("controlnet_blocks.", "control_model.", "input_hint"),
    ),
    ("an IP-Adapter, which steers a model and is none by itself", ("ip_adapter.", "image_proj.")),
    ("FLUX.2", ("double_stream_modulation_img.", "single_stream_modulation.")),
    ("Chroma", ("distilled_guidance_layer.",)),
    ("HunyuanVideo", ("individual_token_refiner.",)),
    ("Qwen-Image 2.1", ("txt_in.text_norm.",)),
    ("Krea 2", ("txtfusion.",)),
    ("HiDream", ("double_stream_blocks.",)),
    ("Stable Diffusion 3", ("joint_blocks.",)),
    ("Z-Image or Lumina", ("noise_refiner.", "cap_embedder.")),
    ("LTX-Video", ("patchify_proj.",)),
    ("AuraFlow", ("double_layers.",)),
    ("PixArt", ("adaln_single.",)),
    ("Wan", ("blocks.0.cross_attn.", "condition_embedder.time_proj.")),
    ("SDXL", ("conditioner.embedders.1.", "label_emb.0.0.weight", "add_embedding.linear_1.")),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.weight", "down_blocks.0.attentions.")),
)
"""Models that are not trained here, each with names of which a file with it has one."""
TEXT_ENCODERS: tuple[tuple[str, Signs], ...] = (
    ("Qwen2.5-VL", ("visual.blocks.0.", "visual.patch_embed.")),
    ("CLIP", ("text_model.encoder.layers.0.", "transformer.resblocks.0.")),
    ("T5", ("encoder.block.0.layer.0.SelfAttention", "enc_layers.0.", "encoder.block.0.layer.0.")),
    ("a language model", ("model.layers.0.self_attn", "model.layers.0.mlp")),
)
AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "conv1.", "conv2.", "bn.")
"""Beginnings of the names in a file with nothing but an autoencoder."""
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
ENCODER_ADVICE = "It belongs to a model as one of model_parts. Name the transformer here, and this as that part"


def kind_of_tensors(names: Collection[str]) -> str:
    """Returns what a safetensors file with these names is, apart from a transformer that is trained here.

    It is the rest of a sentence, mostly with what to do.
    """
    if not names:
        return "a safetensors file without a tensor in it. Fetch the model again"
    if any(sign in name for name in names for sign in LORA_SIGNS):
        return "a LoRA, which changes a model and is none by itself. Name the model that it was trained on"
    if set(names) <= {"emb_params", "clip_l", "clip_g", "t5xxl", "qwen25_7b"}:
        return "an embedding of a few words (textual inversion), not a model"
    for model, signs in OTHER_MODELS:
        if any(sign in name for name in names for sign in signs):
            if model.startswith(("a ", "an ")):
                return model
            return f"{model}, which no family here trains. FLUX.1 and Qwen-Image are trained here"
    for model, signs in TEXT_ENCODERS:
        if any(sign in name for name in names for sign in signs):
            return f"only a text encoder ({model}), without a transformer. {ENCODER_ADVICE}: model_parts.text_encoder"
    if all(name.startswith((*AUTOENCODER, *AUTOENCODER_PREFIXES)) for name in names):
        return f"only an autoencoder (VAE), without a transformer. {ENCODER_ADVICE}: model_parts.vae"
    if any(name.startswith(("optimizer", "exp_avg")) for name in names):
        return "the state of an optimizer, not a model"
    some = ", ".join(sorted(names)[:3])
    return f"no model that pixtune knows: it has {len(names):,} tensors, {some} among them"
