"""The linear layers of each transformer as its authors name them, beside diffusers' names.

kohya's trainers (sd-scripts, musubi-tuner) and ComfyUI keep the authors' names in LoRA files.
"""

from __future__ import annotations

from pixtune.families.transformer_shapes import qwen_image_shapes
from pixtune.family import Shapes
from pixtune.storage.model_names import OriginalLayer


def named_alike(shapes: Shapes, block_path: str) -> tuple[OriginalLayer, ...]:
    """Returns the layers of a transformer that its authors and diffusers name alike.

    Args:
        shapes: shapes of the transformer's tensors; one block is enough.
        block_path: path of the list of blocks.
    """
    paths = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight")]
    linear = [path for path in paths if len(shapes[f"{path}.weight"]) == 2 and f"{path}.bias" in shapes]
    general = [path.replace(f"{block_path}.0.", f"{block_path}.{{}}.") for path in linear]
    return tuple(OriginalLayer(path, (path,)) for path in general)


def _double(path: str, diffusers: str) -> OriginalLayer:
    return OriginalLayer(f"double_blocks.{{}}.{path}", (f"transformer_blocks.{{}}.{diffusers}",))


def _single(path: str, diffusers: str) -> OriginalLayer:
    return OriginalLayer(f"single_blocks.{{}}.{path}", (f"single_transformer_blocks.{{}}.{diffusers}",))


def _double_qkv(path: str, *parts: str) -> OriginalLayer:
    paths = tuple(f"transformer_blocks.{{}}.attn.{part}" for part in parts)
    return OriginalLayer(f"double_blocks.{{}}.{path}", paths, (1, 1, 1))


def _embedder(path: str, diffusers: str) -> tuple[OriginalLayer, OriginalLayer]:
    linear = f"time_text_embed.{diffusers}_embedder.linear"
    return OriginalLayer(f"{path}.in_layer", (f"{linear}_1",)), OriginalLayer(f"{path}.out_layer", (f"{linear}_2",))


QWEN_IMAGE_LAYERS = named_alike(qwen_image_shapes({"num_layers": 1}), "transformer_blocks")

FLUX_LAYERS = (
    _double_qkv("img_attn.qkv", "to_q", "to_k", "to_v"),
    _double_qkv("txt_attn.qkv", "add_q_proj", "add_k_proj", "add_v_proj"),
    _double("img_attn.proj", "attn.to_out.0"),
    _double("txt_attn.proj", "attn.to_add_out"),
    _double("img_mlp.0", "ff.net.0.proj"),
    _double("img_mlp.2", "ff.net.2"),
    _double("txt_mlp.0", "ff_context.net.0.proj"),
    _double("txt_mlp.2", "ff_context.net.2"),
    _double("img_mod.lin", "norm1.linear"),
    _double("txt_mod.lin", "norm1_context.linear"),
    OriginalLayer(
        "single_blocks.{}.linear1",
        tuple(f"single_transformer_blocks.{{}}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        (1, 1, 1, 4),
    ),
    _single("linear2", "proj_out"),
    _single("modulation.lin", "norm.linear"),
    OriginalLayer("img_in", ("x_embedder",)),
    OriginalLayer("txt_in", ("context_embedder",)),
    *_embedder("time_in", "timestep"),
    *_embedder("vector_in", "text"),
    *_embedder("guidance_in", "guidance"),
    OriginalLayer("final_layer.linear", ("proj_out",)),
    # The authors' code takes shift and then scale from its outputs, diffusers' scale and then shift.
    OriginalLayer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True),
)
