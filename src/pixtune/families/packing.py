"""2x2 latents as one token, the way all families here order them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 2
"""Latents along a side of a token."""


def pack_latents(latents_BCHW: Tensor) -> Tensor:
    """Packs 2x2 neighbours into a token: (B, C, H, W) -> (B, H/2 * W/2, 4C), channel-major within a token."""
    batch_size, channels, height, width = latents_BCHW.shape
    tiles = latents_BCHW.reshape(batch_size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, channels * PATCH * PATCH)


def unpack_latents(tokens_BLC: Tensor, height: int, width: int) -> Tensor:
    """Undoes `pack_latents` for latents of the given height and width."""
    batch_size, _, packed = tokens_BLC.shape
    channels = packed // (PATCH * PATCH)
    tiles = tokens_BLC.reshape(batch_size, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, channels, height, width)


def grid(latents_BCHW: Tensor) -> tuple[int, int]:
    """Returns the rows and columns of tokens."""
    height, width = latents_BCHW.shape[-2:]
    return height // PATCH, width // PATCH


def num_tokens(latent_height: int, latent_width: int) -> int:
    """Counts the tokens of latents of this height and width."""
    return (latent_height // PATCH) * (latent_width // PATCH)
