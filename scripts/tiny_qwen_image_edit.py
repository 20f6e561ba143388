"""Builds the parts of `assets/tiny-qwen-image-edit/`: exactly Qwen-Image-Edit's classes at toy size.

    python scripts/tiny_qwen_image_edit.py --out /tmp/tiny-edit-random     # random weights, a valid pipeline folder

The autoencoder makes pictures 16 times smaller, and the text encoder sees them small, so that on a CPU the 1024x1024
control of the stock pipeline takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from tiny_qwen_image import TRANSFORMER_SIZES, save_pipeline, start_autoencoder, start_transformer, write_untrained
from tiny_qwen_image import build_pipeline as build_text_pipeline
from transformers import Qwen2VLImageProcessorPil

PICTURE_PIXELS = 256
SEEN_PIXELS = 112 * 112
"""Most pixels that the text encoder sees of a picture: 16 tokens."""
Z_DIM = 24
VAE_SIZES = {
    "base_dim": 16,
    "z_dim": Z_DIM,
    "dim_mult": [1, 2, 3, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True, True],
}


def build_autoencoder() -> AutoencoderKLQwenImage:
    """Builds Qwen's image autoencoder, narrow, with four down-samplings."""
    model = AutoencoderKLQwenImage(**VAE_SIZES, latents_mean=[0.0] * Z_DIM, latents_std=[1.0] * Z_DIM)
    return start_autoencoder(model)


def build_transformer() -> QwenImageTransformer2DModel:
    """Builds Qwen-Image-Edit's transformer, which is Qwen-Image's."""
    return start_transformer(
        QwenImageTransformer2DModel(in_channels=4 * Z_DIM, out_channels=Z_DIM, **{**TRANSFORMER_SIZES, "num_layers": 4})
    )


def build_pipeline(captions: Iterable[str], seed: int = 0) -> QwenImagePipeline:
    """Builds all parts, untrained, as a text-to-image pipeline: the edit pipeline needs a processor."""
    pipeline = build_text_pipeline(captions, seed)
    torch.manual_seed(seed)
    pipeline.register_modules(vae=build_autoencoder(), transformer=build_transformer())
    return pipeline


def save_edit_pipeline(pipeline: QwenImagePipeline, folder: Path) -> None:
    """Saves the folder of a `QwenImageEditPipeline`: the text pipeline's with a picture processor and another index."""
    save_pipeline(pipeline, folder)
    Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=SEEN_PIXELS).save_pretrained(folder / "processor")
    pipeline.tokenizer.save_pretrained(folder / "processor")
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index |= {"_class_name": "QwenImageEditPipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_untrained(__doc__, build_pipeline, save_edit_pipeline)
