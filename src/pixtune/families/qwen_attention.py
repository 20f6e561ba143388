"""Attention of Qwen-Image's blocks to image and text tokens together, and its rotary embedding.

All results are those of diffusers' `QwenDoubleStreamAttnProcessor2_0` and `QwenEmbedRope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.padded_attention import attend_padded, padding_kernel
from pixtune.families.joint_streams import attend, join, joint_heads, project_out


class RealRotaryEmbedding(nn.Module):
    """The stock rotary embedding as cosines and sines: fp32 of shape (tokens, head size / 2, 2) for image and text."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        image, text = self.stock(*args, **kwargs)
        return torch.view_as_real(image), torch.view_as_real(text)


class JointAttention:
    """The stock attention of image and text tokens, with its rotary embedding in real numbers.

    The compiler neither fuses nor recomputes complex numbers: with them, queries and keys would be kept for the
    backward pass both before and after their rotary embedding, a sixth of a block's activations.
    """

    recomputes_projections = False
    """Whether queries, keys and values are recomputed in the backward pass; `engine.activations` switches it on."""

    # The parameters' names are those that diffusers calls it by and, for `real_BL` and `mask_BL`, passes through.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        real_BL: Tensor | None = None,
        mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        query, key, value = joint_heads(
            attn, hidden_states, encoder_hidden_states, *image_rotary_emb, self.recomputes_projections
        )
        if encoder_hidden_states_mask is not None:
            image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None, :]
        if mask_BL is not None:
            attention_mask = mask_BL[:, None, None, :]
        if real_BL is not None:
            attended = join(attend_padded(query, key, value, real_BL, padding_kernel(query.device)), query)
        else:
            attended = attend(query, key, value, attention_mask)
        return project_out(attn, attended, encoder_hidden_states.shape[1])
