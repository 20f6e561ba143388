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

STYLES_PER_SET = 16
"""Made-up styles of the drawings of one set, so that a made-up style has a way of drawing, too."""
MAX_TURN_RADIANS = 0.1
MAX_BEND = 0.06
"""Largest displacement of the smooth bend, in half picture widths."""


def made_up_words(count: int, seed: int) -> list[str]:
    """Makes up different words that no language and no icon set has."""
    letters, words = random.Random(seed), dict[str, None]()
    while len(words) < count:
        syllables = range(letters.randint(2, 3))
        word = "".join(letters.choice("bdfgklmnprstvwz") + letters.choice("aeiou") for _ in syllables)
        words[word if letters.random() < 0.7 else "".join(letters.sample(word, len(word)))] = None
    return list(words)


def vary(
    icons: Sequence[Icon], pixels_N3HW: Tensor, seed: int, freedom: float = 1.0, made_up: bool = True
) -> tuple[list[Icon], Tensor]:
    """Redraws the same names, each in one of the made-up styles; uint8 pictures, white around the drawing as before.

    Args:
        freedom: how much a drawing may differ from what its style alone makes of it; 0 is not at all.
        made_up: False: in its own style instead, so that it is bent alone.
    """
    device = pixels_N3HW.device
    generator = torch.Generator(device).manual_seed(seed)
    sets = {style: number for number, style in enumerate(sorted({icon.style for icon in icons}))}
    words = [f"{word} style" for word in made_up_words(STYLES_PER_SET * len(sets), seed=0)]
    sets_N = torch.tensor([sets[icon.style] for icon in icons], device=device)
    drawn_N = torch.randint(STYLES_PER_SET, (len(icons),), device=device, generator=generator)
    styles_N = sets_N * STYLES_PER_SET + drawn_N
    named = [replace(icon, style=words[style]) for icon, style in zip(icons, styles_N.tolist(), strict=True)]
    chunks = zip(pixels_N3HW.split(512), styles_N.split(512), strict=True)
    count = len(words) if made_up else 0
    varied = torch.cat([_redraw(pixels, styles, count, generator, freedom) for pixels, styles in chunks])
    return named if made_up else list(icons), varied


def _redraw(
    pixels_B3HW: Tensor, styles_B: Tensor, num_styles: int, generator: torch.Generator, freedom: float
) -> Tensor:
    size, device = len(pixels_B3HW), pixels_B3HW.device

    def spread(*shape: int) -> Tensor:
        """Draws numbers in [-freedom, freedom], others for each picture."""
        return freedom * (torch.rand(size, *shape, device=device, generator=generator) * 2 - 1)

    def spread_of_style(purpose: int, *shape: int) -> Tensor:
        """Draws numbers in [-1, 1], the same for all pictures of a style; zeros where there are no styles."""
        if not num_styles:
            return torch.zeros(size, *shape, device=device)
        table = torch.rand(num_styles, *shape, generator=torch.Generator().manual_seed(purpose)) * 2 - 1
        return table.to(device)[styles_B]

    # Ink is what differs from white, so that mixing its channels leaves the background white.
    ink = 1 - pixels_B3HW.float() / 255
    mix_B33 = torch.eye(3, device=device) + 0.35 * spread_of_style(1, 3, 3) + 0.1 * spread(3, 3)
    mixed = torch.einsum("bij,bjhw->bihw", mix_B33, ink).clamp(0, 1)
    mixed = mixed ** (2 ** (0.5 * spread_of_style(2, 1, 1, 1)))
    # Half of the styles have dark lines where the drawing's colours change.
    change = (F.max_pool2d(mixed, 3, 1, 1) + F.max_pool2d(-mixed, 3, 1, 1)).amax(1, keepdim=True)
    lines = (2 * change).clamp(max=1) * (0.8 * spread_of_style(4, 1, 1, 1)).clamp(min=0)
    mixed = mixed + (0.85 - mixed).clamp(min=0) * lines

    turn = MAX_TURN_RADIANS * spread()
    scale = 1.02 + 0.12 * spread_of_style(3) + 0.05 * spread()
    rows = (turn.cos() * scale, -turn.sin() * scale, 0.04 * spread(), turn.sin() * scale, turn.cos() * scale)
    affine_B23 = torch.stack([*rows, 0.04 * spread()], 1).view(size, 2, 3)
    bend_B2HW = F.interpolate(MAX_BEND * spread(2, 4, 4), mixed.shape[-2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine_B23, list(mixed.shape), align_corners=False) + bend_B2HW.permute(0, 2, 3, 1)
    bent = F.grid_sample(mixed, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return ((1 - bent) * 255).round().clamp(0, 255).to(torch.uint8)
