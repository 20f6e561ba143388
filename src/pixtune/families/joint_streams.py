"""The ways into and out of an attention that image and text tokens share, in diffusers' names for its layers.

The layers that read one input go through `engine.lora.project` together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pixtune.engine.heads import Stream, join_heads
from pixtune.engine.lora import project


def heads_of(
    attn: Any, image_BLC: Tensor, text_BTC: Tensor, image_rotary: Tensor, text_rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values of text and image tokens; shape (B, T + L, H, D) each."""
    image = project(image_BLC, (attn.to_q, attn.to_k, attn.to_v))
    text = project(text_BTC, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    streams = (
        Stream(text, attn.norm_added_q, attn.norm_added_k, text_rotary),
        Stream(image, attn.norm_q, attn.norm_k, image_rotary),
    )
    return join_heads(streams, attn.inner_dim // attn.heads)


def project_out(attn: Any, attended_BSC: Tensor, num_text_tokens: int) -> tuple[Tensor, Tensor]:
    """What the attention hands on of image tokens, and of text tokens, which come first in `attended_BSC`."""
    (image_output,) = project(attended_BSC[:, num_text_tokens:].contiguous(), (attn.to_out[0],))
    (text_output,) = project(attended_BSC[:, :num_text_tokens].contiguous(), (attn.to_add_out,))
    return attn.to_out[1](image_output), text_output
