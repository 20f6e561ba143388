"""Makes other drawings of the same things: in the colours of made-up styles, each bent a little in its own way.

A model that has only ever seen two exact drawings of a name recites one of them whatever the noisy picture shows, and a
LoRA for a third style then has to break that habit first. With these beside the real ones, a model learns that a style
goes with every name and that a drawing may differ a little from the known ones, so it looks at the noisy picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from emoji_pictures import Icon
from torch import Tensor

NUM_STYLES = 64
MAX_TURN_RADIANS = 0.1
MAX_BEND = 0.06
"""Largest displacement of the smooth bend, in half picture widths."""


def made_up_styles() -> list[str]:
    """Makes up style words that no language and no icon set has."""
    words = random.Random(0)
    return [
        "".join(words.choice("bdfgklmnprsvz") + words.choice("aeiou") for _ in range(words.randint(2, 3))) + " style"
        for _ in range(NUM_STYLES)
    ]


def vary(icons: Sequence[Icon], pixels_N3HW: Tensor, seed: int, freedom: float = 1.0) -> tuple[list[Icon], Tensor]:
    """Redraws the same names, each in one of the made-up styles; uint8 pictures, white around the drawing as before.

    Args:
        freedom: how much a drawing may differ from what its style alone makes of it; 0 is not at all.
    """
    generator = torch.Generator(pixels_N3HW.device).manual_seed(seed)
    styles_N = torch.randint(NUM_STYLES, (len(icons),), device=pixels_N3HW.device, generator=generator)
    words = made_up_styles()
    named = [replace(icon, style=words[style]) for icon, style in zip(icons, styles_N.tolist(), strict=True)]
    chunks = zip(pixels_N3HW.split(512), styles_N.split(512), strict=True)
    return named, torch.cat([_redraw(pixels, styles, generator, freedom) for pixels, styles in chunks])


def _redraw(pixels_B3HW: Tensor, styles_B: Tensor, generator: torch.Generator, freedom: float) -> Tensor:
    size, device = len(pixels_B3HW), pixels_B3HW.device

    def spread(*shape: int) -> Tensor:
        """Draws numbers in [-freedom, freedom], others for each picture."""
        return freedom * (torch.rand(size, *shape, device=device, generator=generator) * 2 - 1)

    def spread_of_style(purpose: int, *shape: int) -> Tensor:
        """Draws numbers in [-1, 1], the same for all pictures of a style."""
        table = torch.rand(NUM_STYLES, *shape, generator=torch.Generator().manual_seed(purpose)) * 2 - 1
        return table.to(device)[styles_B]

    # Ink is what differs from white, so that mixing its channels leaves the background white.
    ink = 1 - pixels_B3HW.float() / 255
    mix_B33 = torch.eye(3, device=device) + 0.35 * spread_of_style(1, 3, 3) + 0.1 * spread(3, 3)
    mixed = torch.einsum("bij,bjhw->bihw", mix_B33, ink).clamp(0, 1)
    mixed = mixed ** (2 ** (0.5 * spread_of_style(2, 1, 1, 1)))

    turn = MAX_TURN_RADIANS * spread()
    scale = 1.03 + 0.08 * spread_of_style(3) + 0.05 * spread()
    rows = (turn.cos() * scale, -turn.sin() * scale, 0.04 * spread(), turn.sin() * scale, turn.cos() * scale)
    affine_B23 = torch.stack([*rows, 0.04 * spread()], 1).view(size, 2, 3)
    bend_B2HW = F.interpolate(MAX_BEND * spread(2, 4, 4), mixed.shape[-2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine_B23, list(mixed.shape), align_corners=False) + bend_B2HW.permute(0, 2, 3, 1)
    bent = F.grid_sample(mixed, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return ((1 - bent) * 255).round().clamp(0, 255).to(torch.uint8)
