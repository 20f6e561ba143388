"""Makes queries, keys and values of a block's attention from its tokens' projections: normed, rotated and joined.

Between projections and attention come a norm over each head, the rotary embedding and, where text and image tokens
attend to each other, their joining. Each is a pass over all queries and keys, and another in the backward pass. On a
GPU they are one pass forward and one backward, from the projections alone: no result in between is kept.

Shapes in names: B examples, L tokens of one stream, S of both together, H heads, D features of one, C = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import has_triton

HEADS_AT_ONCE = 8
"""Heads of one token that one program of the kernels computes."""


@dataclass(frozen=True)
class Stream:
    """Tokens of one kind as the attention takes them.

    Args:
        projections_BLC: those to queries, keys and values.
        query_norm, key_norm: root mean square norms over the features of a head.
        rotary: the rotary embedding, cosine and sine of each token's angles; shape (L, D / 2, 2).
    """

    projections_BLC: tuple[Tensor, ...]
    query_norm: nn.Module
    key_norm: nn.Module
    rotary: Tensor


def join_heads(streams: tuple[Stream, ...], head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values of all tokens, one stream after the other; shape (B, S, H, D) each."""
    query = rotated([(stream.projections_BLC[0], stream.query_norm, stream.rotary) for stream in streams], head_size)
    key = rotated([(stream.projections_BLC[1], stream.key_norm, stream.rotary) for stream in streams], head_size)
    values = [stream.projections_BLC[2].unflatten(-1, (-1, head_size)) for stream in streams]
    return query, key, values[0] if len(values) == 1 else torch.cat(values, dim=1)


def rotated(parts: Sequence[tuple[Tensor, nn.Module, Tensor]], head_size: int) -> Tensor:
    """Returns normed, rotated and joined heads, shape (B, S, H, D).

    Args:
        parts: the projections of each stream with their norm and their rotary embedding.
    """
    norms = [norm for _, norm, _ in parts]
    if all(has_triton(states_BLC) for states_BLC, _, _ in parts) and have_kernel(norms):
        *first, (last_BLC, last_norm, last_rotary) = parts
        first_BLC, first_norm, first_rotary = first[0] if first else (None, None, None)
        first_weight = None if first_norm is None else first_norm.weight
        return rotate_heads(
            first_BLC, first_weight, first_rotary, last_BLC, last_norm.weight, last_rotary, last_norm.eps
        )  # fmt: skip
    heads = [rotate(norm(states_BLC.unflatten(-1, (-1, head_size))), rotary) for states_BLC, norm, rotary in parts]
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)


def have_kernel(norms: Sequence[Any]) -> bool:
    """Returns whether the kernels compute these norms: frozen root mean squares with a weight and one epsilon."""
    # torch's and diffusers' classes have the same name and no base class of their kind.
    kinds = all(type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None for norm in norms)
    epsilons = {norm.eps for norm in norms} if kinds else set()
    weights = [norm.weight for norm in norms] if kinds else []
    return (
        len(epsilons) == 1
        and None not in epsilons
        and all(weight is not None and not weight.requires_grad for weight in weights)
        and all(weight.shape[0] & (weight.shape[0] - 1) == 0 for weight in weights)  # a power of two
    )


def rotate(states_BLHD: Tensor, rotary: Tensor) -> Tensor:
    """Rotates each pair of neighbouring features by its angle, in fp32 like the stock code of all families.

    Args:
        rotary: cosine and sine of each token's angles, shape (L, D / 2, 2).
    """
    first, second = states_BLHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotary[:, None, :, 0], rotary[:, None, :, 1]
    rotated = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.flatten(-2).type_as(states_BLHD)


# ---- the same as one operator, on a GPU


@torch.library.custom_op("pixtune::rotate_heads", mutates_args=())
def rotate_heads(
    first_BLC: Tensor | None,
    first_weight_D: Tensor | None,
    first_rotary: Tensor | None,
    last_BLC: Tensor,
    last_weight_D: Tensor,
    last_rotary: Tensor,
    epsilon: float,
) -> Tensor:
    """Computes `rotated` of one stream or two in one pass, in fp32 without roundings in between."""
    from pixtune.engine import triton_kernels

    joined = _new_joined(first_BLC, last_BLC, last_weight_D)
    sources = _sources(first_BLC, first_weight_D, first_rotary, last_BLC, last_weight_D, last_rotary)
    triton_kernels.rotate_heads[_programs(joined)](
        *sources, joined, *_sizes(first_BLC, joined), epsilon, *_tile(joined)
    )
    return joined


@rotate_heads.register_fake
def _(
    first_BLC: Tensor | None,
    first_weight_D: Tensor | None,
    first_rotary: Tensor | None,
    last_BLC: Tensor,
    last_weight_D: Tensor,
    last_rotary: Tensor,
    epsilon: float,
) -> Tensor:
    return _new_joined(first_BLC, last_BLC, last_weight_D)


@torch.library.custom_op("pixtune::rotate_heads_backward", mutates_args=())
def rotate_heads_backward(
    gradient_BSHD: Tensor,
    first_BLC: Tensor | None,
    first_weight_D: Tensor | None,
    first_rotary: Tensor | None,
    last_BLC: Tensor,
    last_weight_D: Tensor,
    last_rotary: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `first_BLC` (an empty tensor if that is None) and of `last_BLC`."""
    from pixtune.engine import triton_kernels

    gradient_BSHD = gradient_BSHD if gradient_BSHD.stride(-1) == 1 else gradient_BSHD.contiguous()
    first_gradient, last_gradient = _new_gradients(first_BLC, last_BLC)
    sources = _sources(first_BLC, first_weight_D, first_rotary, last_BLC, last_weight_D, last_rotary)
    triton_kernels.rotate_heads_backward[_programs(gradient_BSHD)](
        *sources, gradient_BSHD, *gradient_BSHD.stride()[:3], first_gradient, last_gradient,
        *_sizes(first_BLC, gradient_BSHD), epsilon, *_tile(gradient_BSHD),
    )  # fmt: skip
    return first_gradient, last_gradient


@rotate_heads_backward.register_fake
def _(
    gradient_BSHD: Tensor,
    first_BLC: Tensor | None,
    first_weight_D: Tensor | None,
    first_rotary: Tensor | None,
    last_BLC: Tensor,
    last_weight_D: Tensor,
    last_rotary: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    return _new_gradients(first_BLC, last_BLC)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient_BSHD: Tensor) -> tuple[Tensor | None, ...]:
    first_BLC, *others = ctx.saved_tensors
    first_gradient, last_gradient = rotate_heads_backward(gradient_BSHD, first_BLC, *others, ctx.epsilon)
    return None if first_BLC is None else first_gradient, None, None, last_gradient, None, None, None


rotate_heads.register_autograd(_backward, setup_context=_keep_inputs)


def _new_joined(first_BLC: Tensor | None, last_BLC: Tensor, weight_D: Tensor) -> Tensor:
    num_examples, num_tokens, width = last_BLC.shape
    num_tokens += 0 if first_BLC is None else first_BLC.shape[1]
    return last_BLC.new_empty(num_examples, num_tokens, width // weight_D.shape[0], weight_D.shape[0])


def _new_gradients(first_BLC: Tensor | None, last_BLC: Tensor) -> tuple[Tensor, Tensor]:
    first = last_BLC.new_empty(0) if first_BLC is None else first_BLC.new_empty(first_BLC.shape)
    return first, last_BLC.new_empty(last_BLC.shape)


def _sources(*tensors: Tensor | None) -> list[Tensor]:
    """Returns tensors as the kernels take them. A missing first stream is replaced by the last one and not read."""
    last = tensors[3:]
    return [(tensor if tensor is not None else last[number % 3]).contiguous() for number, tensor in enumerate(tensors)]  # type: ignore[union-attr]


def _sizes(first_BLC: Tensor | None, joined_BSHD: Tensor) -> tuple[int, int, int]:
    """Counts the tokens of the first stream and of the last one, and the heads."""
    num_first = 0 if first_BLC is None else first_BLC.shape[1]
    return num_first, joined_BSHD.shape[1] - num_first, joined_BSHD.shape[2]


def _programs(joined_BSHD: Tensor) -> tuple[int, int]:
    num_examples, num_tokens, num_heads, _ = joined_BSHD.shape
    return num_examples * num_tokens, -(-num_heads // HEADS_AT_ONCE)


def _tile(joined_BSHD: Tensor) -> tuple[int, int]:
    return HEADS_AT_ONCE, joined_BSHD.shape[3]
