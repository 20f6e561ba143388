"""Draws the pictures of docs/preparing_pictures.md from the shipped data sets, with the doctor's own figures beneath.

python scripts/preparing_pictures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pixtune.data.doctor.examine import in_words
from pixtune.data.doctor.looks import take_look
from pixtune.judging.alignment import align_pictures

ROOT = Path(__file__).parents[1]
ASSETS, OUT_DIR = ROOT / "assets", ROOT / "docs"
SIDE, GAP, TEXT = 160, 10, 22


def read(path: str) -> Image.Image:
    """Reads a shipped picture."""
    return Image.open(ASSETS / path).convert("RGB")


def row(cells: list[tuple[Image.Image, str]], out: Path) -> None:
    """Writes pictures side by side, each with a line beneath."""
    sheet = Image.new("RGB", (GAP + len(cells) * (SIDE + GAP), SIDE + TEXT + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, words) in enumerate(cells):
        left = GAP + number * (SIDE + GAP)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP))
        draw.text((left, GAP + SIDE + 6), words, fill=(40, 40, 40))
    sheet.quantize(128).save(out, optimize=True)
    print(out)


def copies() -> list[tuple[Image.Image, str]]:
    """Returns a picture and changes of it after which it is still found."""
    picture = read("demo-style/train/owl.png")
    width, height = picture.size
    small = picture.resize((width // 3, height // 3), Image.Resampling.BICUBIC)
    return [
        (picture, "the picture"),
        (small.resize(picture.size, Image.Resampling.NEAREST), "a third of the size"),
        (picture.crop((width // 25, 0, width - width // 30, height - height // 20)), "cropped"),
        (Image.fromarray((np.asarray(picture) * 0.93).astype(np.uint8)), "a little darker"),
        (read("demo-style/train/turtle.png"), "another in the style"),
    ]


def blurs() -> list[tuple[Image.Image, str]]:
    """Returns a picture as it is, blurred all over, blurred behind, and enlarged, with what the doctor measures."""
    picture = read("known-edit/control/jumping-in-a-forest.png")
    usual = take_look(picture).sharpness or 1.0
    portrait = picture.filter(ImageFilter.GaussianBlur(3))
    portrait.paste(picture.crop((80, 60, 180, 200)), (80, 60))
    small = picture.resize((100, 100), Image.Resampling.BICUBIC)
    shown = {
        "sharp": picture,
        "blurred ground": portrait,
        "blurred": picture.filter(ImageFilter.GaussianBlur(1.5)),
        "enlarged": small.resize(picture.size, Image.Resampling.BICUBIC),
    }
    return [(each, f"{words}: {(take_look(each).sharpness or 0) / usual:.0%}") for words, each in shown.items()]


def pair() -> list[tuple[Image.Image, str]]:
    """Returns a control, a target, and where the two differ once the control is shifted by three pixels."""
    name = "waving-on-a-beach.png"
    control, target = read(f"known-edit/control/{name}"), read(f"known-edit/images/{name}")
    levels = np.asarray(control).copy()
    levels[:, 3:] = levels[:, :-3].copy()
    shifted = Image.fromarray(levels)

    def differences(one: Image.Image) -> Image.Image:
        difference = np.abs(np.asarray(one, np.int16) - np.asarray(target)).max(-1)
        return Image.fromarray(255 - np.minimum(difference * 3, 255).astype(np.uint8)).convert("RGB")

    return [
        (control, "control"),
        (target, "target"),
        (differences(control), f"differ; {in_words(align_pictures(control, target))}"),
        (differences(shifted), f"control {in_words(align_pictures(shifted, target))}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    out = parser.parse_args().out
    row(copies(), out / "preparing_copies.png")
    row(blurs(), out / "preparing_blur.png")
    row(pair(), out / "preparing_pair.png")


if __name__ == "__main__":
    main()
