"""Other drawings of the same things: recoloured, bent and mirrored pictures under made-up style words.

A model that has only ever seen two exact drawings of a name recites one of them whatever the noisy picture shows, and a
LoRA for a third style then has to break that habit first. With these beside the real ones, an unknown style word means
"drawn in some other way: look at what is there".
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from emoji_pictures import Icon
from torch import Tensor

MAX_TURN_RADIANS = 0.2
MAX_BEND = 0.12
"""Largest displacement of the smooth bend, in half picture widths."""


def vary_icons(icons: list[Icon], seed: int) -> list[Icon]:
    """The same names, each under a style word that no language and no icon set has."""
    words = random.Random(seed)

    def made_up() -> str:
        return "".join(words.choice("bdfgklmnprsvz") + words.choice("aeiou") for _ in range(words.randint(2, 3)))

    return [replace(icon, style=f"{made_up()} style") for icon in icons]


def vary_pictures(pixels_N3HW: Tensor, seed: int) -> Tensor:
    """Each uint8 picture with colours of its own and a smooth change of shape, white around it as before."""
    generator = torch.Generator(pixels_N3HW.device).manual_seed(seed)
    return torch.cat([_vary(chunk, generator) for chunk in pixels_N3HW.split(512)])


def _vary(pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    size, device = len(pixels_B3HW), pixels_B3HW.device

    def spread(*shape: int) -> Tensor:
        """Numbers in [-1, 1]."""
        return torch.rand(size, *shape, device=device, generator=generator) * 2 - 1

    # Ink is what differs from white, so that mixing its channels leaves the background white.
    ink = 1 - pixels_B3HW.float() / 255
    mix_B33 = torch.eye(3, device=device) + 0.45 * spread(3, 3)
    mixed = torch.einsum("bij,bjhw->bihw", mix_B33, ink).clamp(0, 1)
    mixed = mixed ** (2 ** (0.6 * spread(1, 1, 1)))

    turn, scale = MAX_TURN_RADIANS * spread(), 1.05 + 0.12 * spread()
    mirror = torch.where(spread() > 0, 1.0, -1.0)
    rows = (turn.cos() * scale * mirror, -turn.sin() * scale, 0.05 * spread(), turn.sin() * scale * mirror)
    affine_B23 = torch.stack([*rows, turn.cos() * scale, 0.05 * spread()], 1).view(size, 2, 3)
    bend_B2HW = F.interpolate(MAX_BEND * spread(2, 4, 4), mixed.shape[-2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine_B23, list(mixed.shape), align_corners=False) + bend_B2HW.permute(0, 2, 3, 1)
    bent = F.grid_sample(mixed, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return ((1 - bent) * 255).round().clamp(0, 255).to(torch.uint8)
