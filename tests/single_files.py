"""Transformers of small models in one file, as other tools keep them: written by rules of the files' own, not ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runs import ROOT

Tensors = dict[str, Tensor]

BESIDE = ("weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant")
"""Endings of the names of tensors that belong to a weight beside them."""
FP8 = torch.float8_e4m3fn


def transformer_of(model: str) -> Tensors:
    """All tensors of a small model's transformer, under diffusers' names."""
    (file,) = (ROOT / "assets" / model / "transformer").glob("*.safetensors")
    return load_file(file)


def original_flux(tensors: Mapping[str, Tensor]) -> Tensors:
    """FLUX.1's tensors under the names of the original code, put together as that has them."""

    def layer(path: str) -> Tensors:
        return {leaf: tensors[f"{path}.{leaf}"] for leaf in ("weight", "bias")}

    written: Tensors = {}

    def write(name: str, *paths: str) -> None:
        for leaf in ("weight", "bias"):
            written[f"{name}.{leaf}"] = torch.cat([layer(path)[leaf] for path in paths])

    for name, path in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        write(f"{name}.in_layer", f"time_text_embed.{path}_embedder.linear_1")
        write(f"{name}.out_layer", f"time_text_embed.{path}_embedder.linear_2")
    write("img_in", "x_embedder")
    write("txt_in", "context_embedder")
    for leaf, tensor in layer("norm_out.linear").items():
        scale, shift = tensor.chunk(2)
        written[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    write("final_layer.linear", "proj_out")
    for number in sorted({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        write(f"{theirs}.img_mod.lin", f"{ours}.norm1.linear")
        write(f"{theirs}.txt_mod.lin", f"{ours}.norm1_context.linear")
        write(f"{theirs}.img_attn.qkv", *(f"{ours}.attn.{each}" for each in ("to_q", "to_k", "to_v")))
        added = ("add_q_proj", "add_k_proj", "add_v_proj")
        write(f"{theirs}.txt_attn.qkv", *(f"{ours}.attn.{each}" for each in added))
        write(f"{theirs}.img_attn.proj", f"{ours}.attn.to_out.0")
        write(f"{theirs}.txt_attn.proj", f"{ours}.attn.to_add_out")
        for stream, path in (("img", "ff"), ("txt", "ff_context")):
            write(f"{theirs}.{stream}_mlp.0", f"{ours}.{path}.net.0.proj")
            write(f"{theirs}.{stream}_mlp.2", f"{ours}.{path}.net.2")
            for what in ("query", "key"):
                norm = f"norm_{what[0]}" if stream == "img" else f"norm_added_{what[0]}"
                written[f"{theirs}.{stream}_attn.norm.{what}_norm.scale"] = tensors[f"{ours}.attn.{norm}.weight"]
    for number in sorted({name.split(".")[1] for name in tensors if name.startswith("single_transformer_blocks.")}):
        ours, theirs = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        write(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        write(f"{theirs}.linear1", *(f"{ours}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        write(f"{theirs}.linear2", f"{ours}.proj_out")
        for what in ("query", "key"):
            written[f"{theirs}.norm.{what}_norm.scale"] = tensors[f"{ours}.attn.norm_{what[0]}.weight"]
    return written


def published(model: str) -> Tensors:
    """A small model's transformer under the names that files of its kind are published with."""
    tensors = transformer_of(model)
    return original_flux(tensors) if model == "tiny-flux" else tensors


def in_blocks(name: str, tensor: Tensor) -> bool:
    """Whether tools put a tensor into 8 bits: a matrix of a block."""
    return tensor.ndim == 2 and name.endswith(".weight") and "_blocks." in name


def with_prefix(tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def fp8_cast(tensors: Mapping[str, Tensor]) -> Tensors:
    """`fp8_e4m3fn`: every tensor rounded."""
    return {name: tensor.to(FP8) for name, tensor in tensors.items()}


def fp8_scaled_old(tensors: Mapping[str, Tensor]) -> Tensors:
    """`fp8_scaled` as it was at first: `scale_weight`, and a mark of the file."""
    written: Tensors = {"scaled_fp8": torch.empty(2, dtype=FP8)}
    for name, tensor in tensors.items():
        written[name] = tensor
        if in_blocks(name, tensor):
            scale = tensor.float().abs().max() / 448
            written[name] = (tensor.float() / scale).to(FP8)
            written[name.replace(".weight", ".scale_weight")] = scale
            written[name.replace(".weight", ".scale_input")] = torch.ones(())
    return written


def note(**content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def fp8_scaled(tensors: Mapping[str, Tensor]) -> Tensors:
    """`fp8_scaled` as it is now: `weight_scale`, and a note beside each weight."""
    written: Tensors = {}
    for name, tensor in fp8_scaled_old(tensors).items():
        if name.endswith(".scale_weight"):
            written[name.replace(".scale_weight", ".weight_scale")] = tensor
            written[name.replace(".scale_weight", ".comfy_quant")] = note(format="float8_e4m3fn")
        elif name != "scaled_fp8":
            written[name.replace(".scale_input", ".input_scale")] = tensor
    return written


def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of the paper and of ComfyUI's files, written out."""
    fourth = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = fourth
    while len(matrix) < size:
        matrix = torch.kron(matrix, fourth)
    return matrix / size**0.5


def int8_convrot(tensors: Mapping[str, Tensor], group: int = 256) -> Tensors:
    """int8 ConvRot: groups of each row rotated, then rounded with a scale for each row."""
    written = dict(tensors)
    for name, tensor in tensors.items():
        if in_blocks(name, tensor):
            rows, columns = tensor.shape
            rotated = (tensor.float().view(rows, columns // group, group) @ hadamard(group).T).reshape(rows, columns)
            scale = rotated.abs().amax(dim=1, keepdim=True) / 127
            written[name] = (rotated / scale).round().clamp(-127, 127).to(torch.int8)
            written[name.replace(".weight", ".weight_scale")] = scale
            written[name.replace(".weight", ".comfy_quant")] = note(
                format="int8_tensorwise", convrot=True, convrot_groupsize=group
            )
    return written


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path
