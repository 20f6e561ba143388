"""Writes `assets/demo-character/` and `assets/known-edit/`: an invented figure in 24 poses and places.

    python scripts/demo_character.py

All of it is drawn here from a few shapes, so it is free of anybody's rights. `demo-character/images/` has the pictures
with captions that name the figure by a word of its own, `demo-character/masks/` white where the figure is.
`known-edit/control/` has the same scenes and `known-edit/images/` the same with a red hat: the edit is known to the
pixel, and nothing else differs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy
from emoji_pictures import render
from PIL import Image

OUT_DIR = Path(__file__).resolve().parent.parent / "assets"
CHARACTER_PIXELS, EDIT_PIXELS = 128, 256
TRIGGER = "pimlo"
"""The figure's name, which no other caption has."""
INSTRUCTION = "put a red hat on it"
SKIN, DARK, BELLY, LIMBS = "#7b5cd6", "#33245f", "#ffd84d", "#5a3fb0"


@dataclass(frozen=True)
class Pose:
    """Where hands and feet are, from the middle of the body, and how the body leans."""

    words: str
    hands: tuple[tuple[int, int], tuple[int, int]]
    feet: tuple[tuple[int, int], tuple[int, int]]
    lean_degrees: int = 0
    lift: int = 0
    closed_eyes: bool = False


POSES = (
    Pose("standing", ((-24, 12), (24, 12)), ((-9, 36), (9, 36))),
    Pose("waving", ((-24, 12), (27, -22)), ((-9, 36), (9, 36))),
    Pose("jumping", ((-27, -18), (27, -18)), ((-15, 30), (15, 30)), lift=12),
    Pose("running", ((-20, -4), (24, 14)), ((-20, 31), (16, 34)), lean_degrees=14),
    Pose("sitting", ((-22, 18), (22, 18)), ((-24, 27), (24, 27)), lift=-5),
    Pose("sleeping", ((-16, 20), (18, 20)), ((-10, 34), (10, 34)), lean_degrees=-72, lift=-8, closed_eyes=True),
)

SUN = '<circle cx="{x}" cy="22" r="9" fill="#ffcf33"/>'
PLACES = {
    "on a beach": '<rect width="128" height="128" fill="#9fdcf5"/><rect y="62" width="128" height="22" fill="#3f9bd6"/>'
    '<rect y="82" width="128" height="46" fill="#f2dfa3"/>' + SUN.format(x=104),
    "in a forest": '<rect width="128" height="128" fill="#cec"/><rect y="96" width="128" height="32" fill="#5c9b4a"/>'
    + "".join(
        f'<rect x="{x + 8}" y="70" width="6" height="30" fill="#7a5230"/><path d="M{x} 80 L{x + 11} 34 L{x + 22} 80 Z" '
        'fill="#2f7d3c"/>'
        for x in (2, 30, 82, 104)
    ),
    "in the snow": '<rect width="128" height="128" fill="#cfe3f2"/><rect y="92" width="128" height="36" fill="#fff"/>'
    + "".join(f'<circle cx="{(37 * n) % 128}" cy="{(23 * n) % 88}" r="2" fill="#ffffff"/>' for n in range(18)),
    "at night": '<rect width="128" height="128" fill="#1d2450"/><rect y="98" width="128" height="30" fill="#2f3b2f"/>'
    '<circle cx="22" cy="24" r="11" fill="#f4efcf"/>'
    + "".join(
        f'<circle cx="{40 + (31 * n) % 86}" cy="{6 + (17 * n) % 66}" r="1.2" fill="#ffffff"/>' for n in range(14)
    ),
}
MIDDLES = (64, 44, 84, 64, 52, 76)
"""Where the figure stands, from the left, by pose."""


def figure(pose: Pose, middle: int, hat: bool = False) -> str:
    """Draws the figure as SVG shapes on a canvas of 128 by 128."""

    def line(start: tuple[int, int], end: tuple[int, int], end_fill: str) -> str:
        return (
            f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{LIMBS}" stroke-width="6" '
            f'stroke-linecap="round"/><circle cx="{end[0]}" cy="{end[1]}" r="5" fill="{end_fill}"/>'
        )

    (left_hand, right_hand), (left_foot, right_foot) = pose.hands, pose.feet
    if pose.closed_eyes:
        eyes = "".join(f'<path d="M{x} -8 q4 4 8 0" stroke="{DARK}" stroke-width="2" fill="none"/>' for x in (-12, 4))
    else:
        eyes = "".join(
            f'<circle cx="{x}" cy="-8" r="5.5" fill="#fff"/><circle cx="{x + 1}" cy="-7" r="2.6" fill="{DARK}"/>'
            for x in (-7, 7)
        )
    parts = [
        f'<g transform="translate({middle} {74 - pose.lift}) rotate({pose.lean_degrees})">',
        line((-13, 6), left_hand, BELLY),
        line((13, 6), right_hand, BELLY),
        line((-8, 18), left_foot, "#e4572e"),
        line((8, 18), right_foot, "#e4572e"),
        f'<line x1="0" y1="-22" x2="5" y2="-34" stroke="{DARK}" stroke-width="2.5"/><circle cx="5" cy="-35" r="4.5" '
        'fill="#22b8a6"/>',
        f'<ellipse rx="19" ry="25" fill="{SKIN}"/><circle cy="10" r="11" fill="{BELLY}"/>',
        eyes,
        f'<path d="M-4 1 q4 3 8 0" stroke="{DARK}" stroke-width="2" fill="none"/>',
        '<path d="M-17 -17 L17 -17 L0 -44 Z" fill="#d62839"/><rect x="-19" y="-20" width="38" height="5" rx="2.5" '
        'fill="#fff3d6"/>'
        if hat
        else "",
        "</g>",
    ]
    return "".join(parts)


def drawing(*parts: str) -> str:
    """Makes a complete SVG."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{"".join(parts)}</svg>'


def save(path: Path, pixels_HW3: numpy.ndarray) -> None:
    """Writes a picture as PNG, every pixel as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HW3).save(path, optimize=True)


def mask(pose: Pose, middle: int, size_pixels: int) -> numpy.ndarray:
    """Draws where the figure is: 255 on it, 0 beside it; uint8, shape (size, size, 3)."""
    white, black = (
        render(drawing(f'<rect width="128" height="128" fill="{ground}"/>', figure(pose, middle)), size_pixels)
        for ground in ("#ffffff", "#000000")
    )
    # Beside the figure the ground shows fully, on it not at all.
    covered = 255 - (white.astype(int) - black).max(-1, keepdims=True)
    return numpy.repeat(numpy.where(covered > 127, 255, 0).astype(numpy.uint8), 3, axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    arguments = parser.parse_args()
    character, edit = arguments.out / "demo-character", arguments.out / "known-edit"
    for place, ground in PLACES.items():
        for pose, middle in zip(POSES, MIDDLES, strict=True):
            stem = f"{pose.words}-{place.replace(' ', '-')}"
            plain = drawing(ground, figure(pose, middle))
            save(character / "images" / f"{stem}.png", render(plain, CHARACTER_PIXELS))
            (character / "images" / f"{stem}.txt").write_text(f"{TRIGGER} {pose.words} {place}\n")
            save(character / "masks" / f"{stem}.png", mask(pose, middle, CHARACTER_PIXELS))
            save(edit / "control" / f"{stem}.png", render(plain, EDIT_PIXELS))
            save(edit / "images" / f"{stem}.png", render(drawing(ground, figure(pose, middle, hat=True)), EDIT_PIXELS))
            (edit / "images" / f"{stem}.txt").write_text(INSTRUCTION + "\n")
    print(f"{len(PLACES) * len(POSES)} pictures in {character}, as many pairs in {edit}")


if __name__ == "__main__":
    main()
