"""Writes `assets/demo-edit/`: pictures to redraw in a style that the small edit model has never seen.

    python scripts/demo_edit.py

In `train/` and `held_out/`, `control/` has Noto drawings, `images/` the Twemoji drawings of the same names with the
instruction as caption. The names are those of `demo_style.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
from demo_style import STYLE_SET, demo_names
from emoji_pictures import read_named_icons, render_all
from PIL import Image

OUT_DIR = Path(__file__).resolve().parent.parent / "assets" / "demo-edit"
CONTROL_SET = "noto"
SIZE_PIXELS = 256
INSTRUCTION = "redraw in twemoji style"
COLOURS = 64
"""Colours of a stored picture: flat drawings lose nothing visible, and take a third of the space."""


def save(path: Path, pixels_HW3: numpy.ndarray) -> None:
    """Writes a picture as PNG in few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HW3).quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    arguments = parser.parse_args()
    for folder, names in zip(("train", "held_out"), demo_names(), strict=True):
        for part, set_name in (("images", STYLE_SET), ("control", CONTROL_SET)):
            pictures = render_all(read_named_icons(set_name, names), SIZE_PIXELS)
            for name, pixels in zip(names, pictures, strict=True):
                path = arguments.out / folder / part / f"{name.replace(' ', '-')}.png"
                save(path, pixels)
                if part == "images":
                    path.with_suffix(".txt").write_text(INSTRUCTION + "\n")
        print(f"{len(names)} pairs in {arguments.out / folder}")


if __name__ == "__main__":
    main()
