"""Writes `assets/planted-faults/`: edit pairs of which some are wrong, to try what finds them.

    python scripts/demo_faults.py

24 of the pairs of `assets/demo-edit/` with captions that name the thing. `faults.json` says what was done: three
captions are swapped round, one control is shifted by three pixels, and two pairs came a second time, hardly changed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy
from demo_edit import OUT_DIR as PAIRS_DIR
from demo_edit import save
from demo_style import demo_names
from PIL import Image

OUT_DIR = PAIRS_DIR.parent / "planted-faults"
NUM_PAIRS = 24
SWAPPED = ("robot", "panda", "whale")
SHIFTED, SHIFT_PIXELS = "owl", 3
REPEATED = {"alien": "alien-again", "lion": "lion-again"}
"""Pairs that come twice, and the second one's name."""


def read(part: str, name: str) -> numpy.ndarray:
    """Reads the demo's picture of a name; uint8, shape (H, W, 3)."""
    return numpy.array(Image.open(PAIRS_DIR / "train" / part / f"{name.replace(' ', '-')}.png").convert("RGB"))


def caption(name: str) -> str:
    """Names what is redrawn."""
    return f"redraw the {name} in twemoji style"


def shifted(pixels_HW3: numpy.ndarray, pixels: int) -> numpy.ndarray:
    """Moves a drawing to the right, white behind it."""
    moved = numpy.full_like(pixels_HW3, 255)
    moved[:, pixels:] = pixels_HW3[:, :-pixels]
    return moved


def brighter(pixels_HW3: numpy.ndarray) -> numpy.ndarray:
    """Lightens a picture by less than an eye sees."""
    return numpy.minimum(pixels_HW3.astype(int) + 2, 255).astype(numpy.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    arguments = parser.parse_args()
    wanted = [*SWAPPED, SHIFTED, *REPEATED]
    names = [*wanted, *(name for name in demo_names()[0] if name not in wanted)][: NUM_PAIRS - len(REPEATED)]
    captions = {name: caption(name) for name in names}
    for number, name in enumerate(SWAPPED):
        captions[name] = caption(SWAPPED[(number + 1) % len(SWAPPED)])

    def write(stem: str, image: numpy.ndarray, control: numpy.ndarray, text: str) -> None:
        save(arguments.out / "images" / f"{stem}.png", image)
        save(arguments.out / "control" / f"{stem}.png", control)
        (arguments.out / "images" / f"{stem}.txt").write_text(text + "\n")

    for name in names:
        image, control, stem = read("images", name), read("control", name), name.replace(" ", "-")
        write(stem, image, shifted(control, SHIFT_PIXELS) if name == SHIFTED else control, captions[name])
        if name in REPEATED:
            write(REPEATED[name], brighter(image), brighter(control), captions[name])
    faults = {
        "swapped_captions": list(SWAPPED),
        "shifted_control": {"name": SHIFTED, "pixels": SHIFT_PIXELS},
        "near_duplicates": [[name, again] for name, again in REPEATED.items()],
    }
    (arguments.out / "faults.json").write_text(json.dumps(faults, indent=2) + "\n")
    print(f"{NUM_PAIRS} pairs in {arguments.out}")


if __name__ == "__main__":
    main()
