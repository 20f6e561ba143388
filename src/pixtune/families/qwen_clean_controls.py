"""Models whose control pictures are modulated as if clean (`zero_cond_t`: Qwen-Image-Edit-2511), without a wait.

The stock model lists their tokens on the host and copies the list to the device in each step. That waits for the
device, and a step that waits cannot be captured. Here the device counts, and the blocks get the same list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.forwards import Forward, wrap_forward

INDEX = "modulate_index"
"""Name in diffusers of a block's argument with the time that modulates each image token: 0 for the step's own, 1 for
that of a clean picture."""


def count_on_device(transformer: Any) -> None:
    """Takes the marking of tokens over from a stock model that has `zero_cond_t` set; its blocks keep that setting."""
    transformer.zero_cond_t = False
    wrap_forward(transformer, _with_clean_times)
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(_with_index, with_kwargs=True)
    transformer.norm_out.register_forward_pre_hook(_without_clean_times)


def _with_clean_times(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    image_BLC, timestep_B = kwargs["hidden_states"], kwargs["timestep"]
    target, *_ = kwargs["img_shapes"][0]  # examples of a batch have pictures of the same sizes
    is_control_L = torch.arange(image_BLC.shape[1], device=image_BLC.device) >= math.prod(target)
    index_BL = is_control_L.int().repeat(len(image_BLC), 1)
    changed = {
        "timestep": torch.cat([timestep_B, timestep_B * 0]),
        "attention_kwargs": {**(kwargs.get("attention_kwargs") or {}), INDEX: index_BL},
    }
    return forward(*args, **{**kwargs, **changed})


def _with_index(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Unpacks the index from attention's arguments, the only ones that the model passes through to its blocks."""
    own = dict(kwargs["joint_attention_kwargs"])
    index_BL = own.pop(INDEX)
    return args, {**kwargs, INDEX: index_BL, "joint_attention_kwargs": own or None}


def _without_clean_times(norm_out: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    image_BLC, time_embedding = args
    return image_BLC, time_embedding[: len(image_BLC)]
