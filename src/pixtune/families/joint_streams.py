"""An attention that image and text tokens share, in diffusers' names for its layers.

The layers that read one input go through `engine.lora.project` together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pixtune.engine.activations import recompute
from pixtune.engine.heads import Stream, join_heads
from pixtune.engine.lora import project


def heads_of(
    attn: Any, image_BLC: Tensor, text_BTC: Tensor, image_rotary: Tensor, text_rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes queries and keys, with rotary embedding, and values of both streams; shape (B, T + L, H, D) each."""
    image = project(image_BLC, (attn.to_q, attn.to_k, attn.to_v))
    text = project(text_BTC, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    streams = (
        Stream(text, attn.norm_added_q, attn.norm_added_k, text_rotary),
        Stream(image, attn.norm_q, attn.norm_k, image_rotary),
    )
    return join_heads(streams, attn.inner_dim // attn.heads)


def joint_heads(
    attn: Any, image_BLC: Tensor, text_BTC: Tensor, image_rotary: Tensor, text_rotary: Tensor, recomputed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `heads_of`, a second time in the backward pass if `recomputed`."""
    inputs = (attn, image_BLC, text_BTC, image_rotary, text_rotary)
    return recompute(heads_of, inputs, {}) if recomputed else heads_of(*inputs)


def attend(query_BLHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, mask: Tensor | None) -> Tensor:
    """Attends by the kernel that diffusers is set to; heads lie side by side in the result, (B, L, H * D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return join(dispatch_attention_fn(query_BLHD, key_BLHD, value_BLHD, attn_mask=mask), query_BLHD)


def join(attended_BLHD: Tensor, query_BLHD: Tensor) -> Tensor:
    """Puts heads side by side, (B, L, H * D), in the number format of the queries."""
    return attended_BLHD.flatten(2, 3).to(query_BLHD.dtype)


def project_out(attn: Any, attended_BSC: Tensor, num_text_tokens: int) -> tuple[Tensor, Tensor]:
    """Projects the attention's results of image tokens, and of text tokens, which come first in `attended_BSC`."""
    (image_output,) = project(attended_BSC[:, num_text_tokens:].contiguous(), (attn.to_out[0],))
    (text_output,) = project(attended_BSC[:, :num_text_tokens].contiguous(), (attn.to_add_out,))
    return attn.to_out[1](image_output), text_output
