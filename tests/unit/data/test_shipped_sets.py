"""The data sets in assets/ are what their scripts and faults.json say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests.runs import ROOT

CHARACTER, KNOWN_EDIT, FAULTS = (ROOT / "assets" / name for name in ("demo-character", "known-edit", "planted-faults"))


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def caption(image: Path) -> str:
    return image.with_suffix(".txt").read_text().strip()


def test_every_mask_covers_its_figure() -> None:
    images = sorted((CHARACTER / "images").glob("*.png"))
    assert len(images) == 24
    for image in images:
        covered = pixels(CHARACTER / "masks" / image.name)[..., 0]
        assert set(numpy.unique(covered)) == {0, 255}
        red, green, blue = numpy.moveaxis(pixels(image), -1, 0)
        violet = (abs(red - 0x7B) < 8) & (abs(green - 0x5C) < 8) & (abs(blue - 0xD6) < 8)  # the figure's skin
        assert violet.sum() > 300 and (covered[violet] == 255).all(), image.name
        assert caption(image).startswith("pimlo ")


def test_known_edits_differ_in_the_hat_alone() -> None:
    for image in sorted((KNOWN_EDIT / "images").glob("*.png")):
        changed = (pixels(image) != pixels(KNOWN_EDIT / "control" / image.name)).any(-1)
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        assert 1500 < changed.sum() < 4500, image.name
        assert numpy.ptp(rows) < 90 and numpy.ptp(columns) < 90, image.name


def test_the_planted_faults_are_there_and_no_others() -> None:
    faults = json.loads((FAULTS / "faults.json").read_text())
    images = {path.stem: path for path in sorted((FAULTS / "images").glob("*.png"))}
    again = {second: first for first, second in faults["near_duplicates"]}
    assert len(images) == 24 and len(faults["swapped_captions"]) == 3 and len(again) == 2
    for stem, image in images.items():
        first = again.get(stem, stem)
        right = caption(image) == f"redraw the {first.replace('-', ' ')} in twemoji style"
        assert right == (stem not in faults["swapped_captions"]), stem
        for part in ("images", "control"):
            here = pixels(FAULTS / part / image.name)
            there = pixels(ROOT / "assets" / "demo-edit" / "train" / part / f"{first}.png")
            moved = (
                faults["shifted_control"]["pixels"]
                if (part, stem) == ("control", faults["shifted_control"]["name"])
                else 0
            )
            difference = numpy.abs(here[:, moved:] - there[:, : there.shape[1] - moved]).max()
            assert difference == pytest.approx(2 if stem in again else 0, abs=1.5 if stem in again else 0), (stem, part)
