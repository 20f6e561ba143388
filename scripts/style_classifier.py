"""Tells in which of the ten sets' styles a picture is drawn, for `check_tiny_models.py`.

A small network is trained on drawings of names that are not the demo's, made coarser and softer by chance, so that it
judges colours, shading and extent and not how sharp a sample came out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from demo_style import STYLE_SET, demo_names
from emoji_pictures import ICON_SETS, Icon, read_icons
from tiny_sets import load_pixels
from torch import Tensor, nn

SIDE = 48
DRAWINGS_A_SET = 900
NUM_STEPS = 1500
BATCH_SIZE = 64
SETS = tuple(ICON_SETS)


class StyleClassifier:
    """A network that names the set of a drawing, trained when it is made: some minutes on two cores."""

    def __init__(self, device: torch.device) -> None:
        chosen = random.Random(0)
        known = {name for names in demo_names() for name in names}
        icons: list[Icon] = []
        for name in SETS:
            others = [icon for icon in read_icons(name) if icon.name not in known and "skin tone" not in icon.name]
            icons += chosen.sample(others, min(DRAWINGS_A_SET, len(others)))
        labels = torch.tensor([_number(icon) for icon in icons], device=device)
        pixels = as_seen(load_pixels(icons, SIDE, device))
        torch.manual_seed(0)
        widths = (3, 32, 64, 128)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), nn.GroupNorm(8, next_width), nn.GELU()]
        self.network = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], len(SETS))
        )
        self.network.to(device)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.05)
        for step in range(NUM_STEPS):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / NUM_STEPS)
            rows = torch.randint(len(pixels), (BATCH_SIZE,), device=device)
            seen = softened(pixels[rows], chosen.choice((1.0, 0.8, 0.6)))
            loss = F.cross_entropy(self.network(seen), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.network.eval()

    @torch.no_grad()
    def sets(self, pictures_B3HW: Tensor) -> list[str]:
        """Names the set of each picture; uint8."""
        return [SETS[number] for number in self.network(as_seen(pictures_B3HW)).argmax(1).tolist()]

    def accuracy(self, names: Sequence[str]) -> tuple[float, float]:
        """Computes the share of real drawings of these names whose set is told rightly: all, and the demo's alone."""
        right: dict[str, list[bool]] = {}
        for set_name in SETS:
            icons = [icon for icon in read_icons(set_name) if icon.name in names]
            device = next(self.network.parameters()).device
            right[set_name] = [found == set_name for found in self.sets(load_pixels(icons, 2 * SIDE, device))]
        every = [each for found in right.values() for each in found]
        return sum(every) / len(every), sum(right[STYLE_SET]) / len(right[STYLE_SET])


def _number(icon: Icon) -> int:
    return next(number for number, name in enumerate(SETS) if ICON_SETS[name].style == icon.style)


def as_seen(pixels_B3HW: Tensor) -> Tensor:
    """Scales uint8 pictures to the network's size and to [-1, 1]."""
    return F.interpolate(pixels_B3HW.float(), (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1


def softened(seen_B3HW: Tensor, scale: float) -> Tensor:
    """Makes pictures coarser by a scale and back, and changes their values by a little noise."""
    small = F.interpolate(seen_B3HW, scale_factor=scale, mode="bilinear", antialias=True)
    back = F.interpolate(small, seen_B3HW.shape[-2:], mode="bilinear")
    return back + 0.03 * torch.randn_like(back)
