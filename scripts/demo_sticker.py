"""Writes `assets/demo-sticker/`: an edit that the small edit model has never seen, and that keeps the drawing.

    python scripts/demo_sticker.py

In `train/` and `held_out/`, `control/` has Noto drawings, `images/` the same drawings cut out as stickers: a white rim,
a shadow, a coloured wall behind. The names are those of `demo_style.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
from demo_edit import CONTROL_SET, SIZE_PIXELS, save
from demo_style import demo_names
from emoji_pictures import read_named_icons, render_all
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

OUT_DIR = Path(__file__).resolve().parent.parent / "assets" / "demo-sticker"
INSTRUCTION = "redraw in sticker style"
WALL = (64, 176, 166)
RIM_PIXELS = 4
SHADOW_OFFSET = (4, 5)
"""Pixels to the right and down."""
SHADOW_DEPTH = 0.45
"""Share of the wall's light that the shadow takes."""


def as_sticker(drawing: Image.Image) -> Image.Image:
    """Cuts a drawing out of its white ground, gives it a white rim and sticks it on a wall."""
    inside = _inside(drawing)
    rim = inside.filter(ImageFilter.GaussianBlur(RIM_PIXELS)).point([255 if level > 20 else 0 for level in range(256)])
    rim = rim.filter(ImageFilter.GaussianBlur(0.8))
    shadow = Image.new("L", drawing.size, 0)
    shadow.paste(rim, SHADOW_OFFSET)
    shadow = shadow.filter(ImageFilter.GaussianBlur(3)).point([round(SHADOW_DEPTH * level) for level in range(256)])
    sticker = Image.new("RGB", drawing.size, WALL)
    sticker.paste((0, 0, 0), mask=shadow)
    sticker.paste((255, 255, 255), mask=rim)
    sticker.paste(drawing, mask=ImageChops.multiply(inside, inside.filter(ImageFilter.GaussianBlur(0.7))))
    return sticker


def _inside(drawing: Image.Image) -> Image.Image:
    """Masks the drawing with what it encloses: all but the white that reaches the picture's edge; 255 inside."""
    white = ImageChops.difference(drawing, Image.new("RGB", drawing.size, "white")).convert("L")
    ground = ImageOps.expand(white.point([0 if level > 10 else 255 for level in range(256)]), border=1, fill=255)
    ImageDraw.floodfill(ground, (0, 0), 128)
    masked = ground.point([0 if level == 128 else 255 for level in range(256)])
    return ImageOps.crop(masked, border=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    arguments = parser.parse_args()
    for folder, names in zip(("train", "held_out"), demo_names(), strict=True):
        drawings = render_all(read_named_icons(CONTROL_SET, names), SIZE_PIXELS)
        for name, pixels in zip(names, drawings, strict=True):
            path = arguments.out / folder / "images" / f"{name.replace(' ', '-')}.png"
            save(path, numpy.asarray(as_sticker(Image.fromarray(pixels))))
            path.with_suffix(".txt").write_text(INSTRUCTION + "\n")
            save(arguments.out / folder / "control" / path.name, pixels)
        print(f"{len(names)} pairs in {arguments.out / folder}")


if __name__ == "__main__":
    main()
