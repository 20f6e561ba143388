"""Sizes in pixels, as everything outside the autoencoder counts them.

A tensor of latents or pixels says its shape in its name (`latents_BCHW`), height before width; these are the other way
round, as Pillow and people say them.
"""

from __future__ import annotations

Size = tuple[int, int]
"""(width, height) in pixels."""

Ratio = tuple[int, int]
"""(width, height) as parts, for example (16, 9)."""
