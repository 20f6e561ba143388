"""Sizes in pixels, (width, height) as Pillow and people give them, and shapes of latents, height before width."""

from __future__ import annotations

Size = tuple[int, int]
"""(width, height) in pixels."""

Ratio = tuple[int, int]
"""(width, height) as parts, for example (16, 9)."""

LatentShape = tuple[int, int, int]
"""(channels, height, width) of one picture's latents: the axes of a tensor named `latents_CHW`."""
