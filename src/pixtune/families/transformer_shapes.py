"""Shapes of the transformers' tensors from their configs, by arithmetic, in the order of diffusers' classes.

A plan needs them before any weight is there. diffusers' classes have them as well, but take four seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.errors import WeightsError
from pixtune.family import Shapes

SINUSOIDS = 256
"""Number of features of a timestep before its embedding."""
MLP_RATIO = 4
"""Width of an MLP over the width of a token."""

QWEN_IMAGE_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "use_additional_t_cond": False,
}
"""Values of diffusers' `QwenImageTransformer2DModel` for keys that a config leaves out."""
FLUX_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
"""Values of diffusers' `FluxTransformer2DModel` for keys that a config leaves out."""


def refuse_guidance(config: Mapping[str, Any]) -> None:
    """Refuses the config of a guidance-distilled transformer.

    Raises:
        WeightsError: the config is one.
    """
    if config.get("guidance_embeds", False):
        raise WeightsError(
            "The transformer's config has guidance_embeds set. diffusers' model class cannot run such a model (its "
            "time embedding takes no guidance), so it cannot be trained either."
        )


def qwen_image_shapes(config: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of a `QwenImageTransformer2DModel`."""
    given = {**QWEN_IMAGE_DEFAULTS, **config}
    width, head, text_width = _width(given), given["attention_head_dim"], given["joint_attention_dim"]
    block = {
        **_linear("img_mod.1", width, 6 * width),
        **_norms(head, "attn.norm_q", "attn.norm_k"),
        **_square(width, "attn.to_q", "attn.to_k", "attn.to_v"),
        **_square(width, "attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj"),
        **_square(width, "attn.to_out.0", "attn.to_add_out"),
        **_norms(head, "attn.norm_added_q", "attn.norm_added_k"),
        **_mlp("img_mlp", width),
        **_linear("txt_mod.1", width, 6 * width),
        **_mlp("txt_mlp", width),
    }
    condition = {"time_text_embed.addition_t_embedding.weight": (2, width)} if given["use_additional_t_cond"] else {}
    return {
        **_embedder("time_text_embed.timestep_embedder", SINUSOIDS, width),
        **condition,
        **_norms(text_width, "txt_norm"),
        **_linear("img_in", given["in_channels"], width),
        **_linear("txt_in", text_width, width),
        **_repeated("transformer_blocks", given["num_layers"], block),
        **_ending(given, width),
    }


def flux_shapes(config: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of a `FluxTransformer2DModel`."""
    given = {**FLUX_DEFAULTS, **config}
    width, head = _width(given), given["attention_head_dim"]
    heads = {**_norms(head, "attn.norm_q", "attn.norm_k"), **_square(width, "attn.to_q", "attn.to_k", "attn.to_v")}
    block = {
        **_linear("norm1.linear", width, 6 * width),
        **_linear("norm1_context.linear", width, 6 * width),
        **heads,
        **_square(width, "attn.to_out.0"),
        **_norms(head, "attn.norm_added_q", "attn.norm_added_k"),
        **_square(width, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        **_mlp("ff", width),
        **_mlp("ff_context", width),
    }
    single_block = {
        **_linear("norm.linear", width, 3 * width),
        **_linear("proj_mlp", width, MLP_RATIO * width),
        **_linear("proj_out", (1 + MLP_RATIO) * width, width),
        **heads,
    }
    guidance = _embedder("time_text_embed.guidance_embedder", SINUSOIDS, width) if given["guidance_embeds"] else {}
    return {
        **_embedder("time_text_embed.timestep_embedder", SINUSOIDS, width),
        **guidance,
        **_embedder("time_text_embed.text_embedder", given["pooled_projection_dim"], width),
        **_linear("context_embedder", given["joint_attention_dim"], width),
        **_linear("x_embedder", given["in_channels"], width),
        **_repeated("transformer_blocks", given["num_layers"], block),
        **_repeated("single_transformer_blocks", given["num_single_layers"], single_block),
        **_ending(given, width),
    }


def _width(given: Mapping[str, Any]) -> int:
    """Returns the number of features of a token inside the blocks."""
    return given["num_attention_heads"] * given["attention_head_dim"]


def _repeated(path: str, count: int, block: Shapes) -> Shapes:
    return {f"{path}.{number}.{name}": shape for number in range(count) for name, shape in block.items()}


def _linear(path: str, inputs: int, outputs: int) -> Shapes:
    return {f"{path}.weight": (outputs, inputs), f"{path}.bias": (outputs,)}


def _square(width: int, *paths: str) -> Shapes:
    return {name: shape for path in paths for name, shape in _linear(path, width, width).items()}


def _norms(features: int, *paths: str) -> Shapes:
    return {f"{path}.weight": (features,) for path in paths}


def _mlp(path: str, width: int) -> Shapes:
    return {
        **_linear(f"{path}.net.0.proj", width, MLP_RATIO * width),
        **_linear(f"{path}.net.2", MLP_RATIO * width, width),
    }


def _embedder(path: str, inputs: int, width: int) -> Shapes:
    return {**_linear(f"{path}.linear_1", inputs, width), **_linear(f"{path}.linear_2", width, width)}


def _ending(given: Mapping[str, Any], width: int) -> Shapes:
    outputs = given["patch_size"] ** 2 * (given["out_channels"] or given["in_channels"])
    return {**_linear("norm_out.linear", width, 2 * width), **_linear("proj_out", width, outputs)}
