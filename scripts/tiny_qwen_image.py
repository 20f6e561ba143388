"""Builds the parts of `assets/tiny-qwen-image/`: exactly Qwen-Image's classes at toy size.

    python scripts/tiny_qwen_image.py --out /tmp/tiny-qwen-image-random     # random weights, a valid pipeline folder

Sizes are set here and nowhere else; `train_tiny_models.py` gives the weights their values.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from emoji_pictures import PART_SETS, read_base_icons
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from pixtune.families.qwen_image import NUM_TEMPLATE_TOKENS, CaptionReader
from pixtune.families.qwen_image_edit import NUM_TEMPLATE_TOKENS as NUM_EDIT_TEMPLATE_TOKENS
from pixtune.families.qwen_image_edit import EditReader

PICTURE_PIXELS = 128
TEXT_FEATURES = 128
VOCABULARY_SIZE = 3584
VAE_SIZES: dict[str, Any] = {"base_dim": 24, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
TRANSFORMER_SIZES = {
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": TEXT_FEATURES,
}

EDIT_TEMPLATE = EditReader.template
"""Template of `QwenImageEditPipeline`, so that the same tokenizer serves the small edit model."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def build_tokenizer(captions: Iterable[str]) -> Qwen2Tokenizer:
    """Builds Qwen2's byte-level tokenizer with a vocabulary learnt from the captions and both pipelines' templates.

    The pipelines drop a fixed number of leading features, so the words of the templates must become single tokens, as
    they are in Qwen's own vocabulary; they are repeated so that they are merged first.
    """
    shell = Qwen2Tokenizer().backend_tokenizer  # no vocabulary, but Qwen2's own way to split text
    learner = Tokenizer(BPE())
    learner.normalizer, learner.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    texts = [CaptionReader.template, EDIT_TEMPLATE, "Picture 1: "]
    for special in SPECIAL_TOKENS:
        texts = [piece for text in texts for piece in text.split(special)]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*captions, *texts * 100], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="right",
        model_max_length=4096,
    )
    check_templates(tokenizer)
    return tokenizer


def check_templates(tokenizer: Qwen2Tokenizer) -> None:
    """Checks the templates' lengths: the pipelines cut the first 34 and 64 features, which precede the user's part."""
    for template, expected in (
        (CaptionReader.template.partition("{}"), NUM_TEMPLATE_TOKENS),
        (EDIT_TEMPLATE.partition("{}"), NUM_EDIT_TEMPLATE_TOKENS),
    ):
        prefix = tokenizer(template[0]).input_ids
        whole = tokenizer("".join(template).format("pizza, noto style")).input_ids
        assert len(prefix) == expected, (expected, tokenizer.convert_ids_to_tokens(prefix))
        assert whole[:expected] == prefix, "the caption must not merge into the template"


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Builds a random Qwen2.5-VL that is not trained.

    Its token vectors are large beside what its two layers add, so that each feature still identifies its token, and the
    layers mix in a little of what came before.
    """
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": TEXT_FEATURES,
            "intermediate_size": 2 * TEXT_FEATURES,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_FEATURES,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return randomized(Qwen2_5_VLForConditionalGeneration(config), "embed_tokens", ("visual",))


def randomized(model: nn.Module, embedding: str, left_alone: Sequence[str]) -> nn.Module:
    """Draws the weights of a text encoder that is not trained, and returns it.

    Args:
        embedding: part of the names of token vectors, which get unit variance.
        left_alone: parts of the names of weights that keep their values.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if embedding in name:
                parameter.normal_()
            elif parameter.ndim >= 2 and not any(part in name for part in left_alone):
                parameter.normal_(0, 0.5 / math.sqrt(parameter.shape[-1]))
    return model.eval().requires_grad_(False)


def build_autoencoder() -> AutoencoderKLQwenImage:
    """Builds Qwen's image autoencoder, narrow: 8x smaller, 16 channels. Latent statistics are set after training."""
    z_dim = VAE_SIZES["z_dim"]
    return start_autoencoder(AutoencoderKLQwenImage(**VAE_SIZES, latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim))


def start_autoencoder(model: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Sets an autoencoder's starting values, and returns it.

    With a single picture, only a causal kernel's last time slice sees anything but padding: the others are zero, and
    the last is drawn for the inputs that it has. The posterior starts narrow, so that the decoder has a signal from the
    first step.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "time_conv" in name:
                parameter.zero_()
            elif parameter.ndim == 5:
                parameter[:, :, :-1] = 0
                nn.init.kaiming_normal_(parameter[:, :, -1], nonlinearity="linear")
        model.quant_conv.bias[len(model.quant_conv.bias) // 2 :] = -6
    return model


def build_transformer() -> QwenImageTransformer2DModel:
    """Builds Qwen-Image's transformer, narrow and shallow."""
    return start_transformer(
        QwenImageTransformer2DModel(
            in_channels=4 * VAE_SIZES["z_dim"], out_channels=VAE_SIZES["z_dim"], **TRANSFORMER_SIZES
        )
    )


def start_transformer(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """Makes blocks start as the identity (Peebles & Xie 2023, adaLN-Zero), and returns the transformer."""
    zero_parameters([model.proj_out, model.norm_out.linear])
    for block in model.transformer_blocks:
        zero_parameters([block.img_mod[1], block.txt_mod[1]])
    return model


def zero_parameters(modules: Iterable[nn.Module]) -> None:
    """Sets all parameters of modules to zero."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Builds Qwen-Image's sampler, with its shift stated for this model's 64 tokens instead of 256."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=(PICTURE_PIXELS // 16) ** 2,
        max_image_seq_len=(PICTURE_PIXELS // 4) ** 2,
        base_shift=0.5,
        max_shift=0.9,
        time_shift_type="exponential",
    )


def build_pipeline(captions: Iterable[str], seed: int = 0) -> QwenImagePipeline:
    """Builds all parts, untrained."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(captions)
    return QwenImagePipeline(
        scheduler=build_scheduler(),
        vae=build_autoencoder(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(),
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline in diffusers' folder layout, with weights in bf16 that load in fp32 unless asked otherwise."""
    for part in pipeline.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.to(torch.bfloat16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Without this, transformers alone would load bf16 while diffusers loads fp32, and the two would not fit together.
    for config_file in folder.glob("text_encoder*/config.json"):
        config = json.loads(config_file.read_text())
        for part_config in (config, config.get("text_config"), config.get("vision_config")):
            if part_config is not None:
                part_config["dtype"] = "float32"
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_untrained(
    description: str,
    build: Callable[[Sequence[str]], DiffusionPipeline],
    save: Callable[[DiffusionPipeline, Path], None] = save_pipeline,
) -> None:
    """Writes a pipeline with random weights to the folder of `--out`, and prints how many weights each part has.

    Args:
        description: for `--help`.
        build: builds the pipeline from all captions.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipeline = build([icon.caption for icon in read_base_icons(PART_SETS)])
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} million weights")
    # A velocity of exactly zero has no direction, which classifier-free guidance divides by.
    nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.02)
    save(pipeline, arguments.out)


if __name__ == "__main__":
    write_untrained(__doc__, build_pipeline)
