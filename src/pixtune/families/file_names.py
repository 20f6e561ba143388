"""Names of the transformers' tensors in single files, as published and as ComfyUI has them, and what they tell.

Qwen-Image's files have the names of diffusers' class. FLUX.1's have those of the original code: three projections lie
in one tensor, in a single-stream block with the MLP's first layer, and the last norm's shift comes before its scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pixtune.families.original_layers import FLUX_LAYERS
from pixtune.families.transformer_shapes import FLUX_DEFAULTS, QWEN_IMAGE_DEFAULTS
from pixtune.family import Shapes
from pixtune.storage.transformer_file import Place

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "")
"""Beginnings of all names of a transformer's tensors. A file with text encoders and autoencoder has the first."""

Named = Iterator[tuple[str, Place]]
"""Tensors of the model by name, that a tensor of a file is or holds."""

FLUX_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}
"""FLUX.1's norms by their authors' names. Their weights are called scales there."""
FLUX_BY_PATH = {layer.path: layer for layer in FLUX_LAYERS}
BLOCK_NUMBER = re.compile(r"\.(\d{1,3})\.")


def own_names(name: str, shapes: Shapes) -> Named:
    """Yields a tensor whose file has the model's own names."""
    yield name, Place(name)


def flux_names(name: str, shapes: Shapes) -> Named:
    """Yields the tensors of a FLUX.1 transformer that one of a file in the original names holds; none: it is unknown.

    Args:
        shapes: shapes of the file's tensors.
    """
    layer, _, leaf = name.rpartition(".")
    number = found[1] if (found := BLOCK_NUMBER.search(layer)) else ""
    path = BLOCK_NUMBER.sub(".{}.", layer, count=1)
    if leaf == "scale" and path in FLUX_NORMS:
        yield f"{FLUX_NORMS[path]}.weight".replace("{}", number), Place(name)
    elif leaf in ("weight", "bias") and path in FLUX_BY_PATH:
        original, first = FLUX_BY_PATH[path], 0
        num_rows = next(iter(shapes[name]), 0)
        for part, share in zip(original.parts, original.shares, strict=True):
            end = first + num_rows * share // sum(original.shares)
            rows = None if len(original.parts) == 1 else (first, end)
            yield f"{part}.{leaf}".replace("{}", number), Place(name, rows, original.swaps_halves)
            first = end


def tensors_in(name: str, shapes: Shapes) -> Named:
    """Yields the tensors of a model that one of a file holds, whether the file has the model's names or others.

    Args:
        shapes: shapes of the file's tensors.
    """
    others = tuple(flux_names(name, shapes))
    yield from others or own_names(name, shapes)


def prefix_of(names: Collection[str]) -> str:
    """Returns the beginning that a file puts before the names of its transformer's tensors."""
    return next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names) or not prefix)


def flux_config(shapes: Shapes) -> dict[str, Any]:
    """Returns what the shapes of a FLUX.1 transformer's tensors tell of its config."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        **_heads(shapes, "x_embedder.weight"),
        "in_channels": shapes["x_embedder.weight"][1],
        "out_channels": _different(shapes["proj_out.weight"][0], shapes["x_embedder.weight"][1]),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def qwen_image_config(shapes: Shapes) -> dict[str, Any]:
    """Returns what the shapes of a Qwen-Image transformer's tensors tell of its config."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "num_layers": _count(shapes, "transformer_blocks"),
        **_heads(shapes, "img_in.weight"),
        "in_channels": shapes["img_in.weight"][1],
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
    }


def _different(number: int, usual: int) -> int | None:
    """Returns a number that is not the usual one; None, as configs have it, for the usual one."""
    return None if number == usual else number


def _count(shapes: Shapes, path: str) -> int:
    """Counts the blocks of a list: one more than the highest number in a name."""
    names = (name.removeprefix(f"{path}.").split(".", 1)[0] for name in shapes if name.startswith(f"{path}."))
    return max((int(number) + 1 for number in names if number.isdecimal() and len(number) < 4), default=0)


def _heads(shapes: Shapes, first_layer: str) -> dict[str, int]:
    width, side = shapes[first_layer][0], shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {"attention_head_dim": side, "num_attention_heads": width // max(side, 1)}


@dataclass(frozen=True)
class FileNames:
    """The names in the files of one kind of transformer."""

    model: str
    """Name of the model for messages."""
    signs: tuple[str, ...]
    """Names that all such files have."""
    names: Callable[[str, Shapes], Named]
    config: Callable[[Shapes], dict[str, Any]]
    """Function from the shapes of the model's tensors to what they tell of its config."""
    pipelines: tuple[str, ...]
    """Pipelines that have such a transformer; the first where nothing else tells."""
    architecture: str
    """Name of its usual config among those that pixtune ships."""
    example: str
    """Hub name of a model whose other parts fit."""
    defaults: Mapping[str, Any]
    """Values of the class for keys that a config leaves out."""
    marks: Mapping[str, tuple[str, object]]
    """Tensors that mark a variant of the model, each with the key and value of the config that it stands for."""


QWEN_PIPELINES = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
FLUX_PIPELINES = ("FluxPipeline", "FluxKontextPipeline")
FILE_NAMES = (
    FileNames(
        "FLUX.1",
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight"),
        flux_names,
        flux_config,
        FLUX_PIPELINES,
        "FLUX.1",
        "black-forest-labs/FLUX.1-dev",
        FLUX_DEFAULTS,
        {},
    ),
    FileNames(
        "FLUX.1",
        ("single_transformer_blocks.0.norm.linear.weight", "context_embedder.weight", "x_embedder.weight"),
        own_names,
        flux_config,
        FLUX_PIPELINES,
        "FLUX.1",
        "black-forest-labs/FLUX.1-dev",
        FLUX_DEFAULTS,
        {},
    ),
    FileNames(
        "Qwen-Image",
        ("transformer_blocks.0.img_mod.1.weight", "img_in.weight", "txt_norm.weight"),
        own_names,
        qwen_image_config,
        QWEN_PIPELINES,
        "Qwen-Image",
        "Qwen/Qwen-Image",
        QWEN_IMAGE_DEFAULTS,
        {"__index_timestep_zero__": ("zero_cond_t", True)},
    ),
)


def names_of_file(names: Mapping[str, Any]) -> tuple[FileNames, str] | None:
    """Returns which kind of transformer a file holds, and the prefix of its names; None: no known one."""
    for prefix in PREFIXES:
        for kind in FILE_NAMES:
            if all(f"{prefix}{sign}" in names for sign in kind.signs):
                return kind, prefix
    return None
