"""Attention of FLUX.1's blocks, and the blocks that put an MLP beside it.

All results are those of diffusers' `FluxAttnProcessor`, `FluxSingleTransformerBlock` and `FluxPosEmbed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.activations import recompute
from pixtune.engine.attention import with_dense_gradient
from pixtune.engine.heads import Stream, join_heads
from pixtune.engine.lora import project
from pixtune.engine.mlp import mlp
from pixtune.families.joint_streams import attend, joint_heads, project_out


def compute_by_ours(model: Any) -> None:
    """Replaces attention, single-stream blocks and rotary embedding of a `FluxTransformer2DModel` by those below."""
    model.pos_embed = PairedRotaryEmbedding(model.pos_embed)
    for block in model.transformer_blocks:
        block.attn.set_processor(JointAttention())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(AttentionBesideMlp())
        block.forward = MethodType(single_block, block)


class PairedRotaryEmbedding(nn.Module):
    """The stock rotary embedding, which holds cosines and sines twice, as pairs; fp32, (tokens, head size / 2, 2)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, ids: Tensor) -> Tensor:
        cosine, sine = self.stock(ids)
        return torch.stack([cosine[:, ::2], sine[:, ::2]], dim=-1)


class JointAttention:
    """The stock attention of image and text tokens, with the projections of each by `engine.lora.project`."""

    recomputes_projections = False
    """Whether queries, keys and values are recomputed in the backward pass; `engine.activations` switches it on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        num_text_tokens = encoder_hidden_states.shape[1]
        text_rotary, image_rotary = image_rotary_emb.split([num_text_tokens, hidden_states.shape[1]])
        query, key, value = joint_heads(
            attn, hidden_states, encoder_hidden_states, image_rotary, text_rotary, self.recomputes_projections
        )
        return project_out(attn, attend(query, key, value, attention_mask), num_text_tokens)


class AttentionBesideMlp:
    """The stock attention of blocks that put the MLP's features beside its result, with `engine.lora.project`.

    The result's gradient is then a slice of a wider tensor; `engine.attention` describes what follows.
    """

    recomputes_projections = False
    """Whether queries, keys and values are recomputed, as in `JointAttention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        assert image_rotary_emb is not None
        inputs = (attn, hidden_states, image_rotary_emb)
        again = self.recomputes_projections
        query, key, value = recompute(single_heads, inputs, {}) if again else single_heads(*inputs)
        return with_dense_gradient(attend(query, key, value, attention_mask))


def single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tensor,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the stock `FluxSingleTransformerBlock.forward`, with its arguments and the MLP of `engine.mlp`.

    It returns copies, not slices of one tensor: slices leave a compiled block as views, whose gradients are then joined
    outside of it, in four more passes over them.
    """
    states_BLC = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed_BLC, gate_BC = block.norm(states_BLC, emb=temb)
    attended_BLC = block.attn(hidden_states=normed_BLC, image_rotary_emb=image_rotary_emb)
    update_BLC = mlp(normed_BLC, block.proj_mlp, block.act_mlp, block.proj_out, attended_BLC)
    text_BTC, image_BLC = (states_BLC + gate_BC.unsqueeze(1) * update_BLC).split(
        [encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1
    )
    return text_BTC.clone(), image_BLC.clone()


def single_heads(attn: Any, states_BLC: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes queries and keys, with rotary embedding, and values of one stream; shape (B, L, H, D) each."""
    projected = project(states_BLC, (attn.to_q, attn.to_k, attn.to_v))
    return join_heads((Stream(projected, attn.norm_q, attn.norm_k, rotary),), attn.head_dim)
