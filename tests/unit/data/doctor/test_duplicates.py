"""Near copies: pictures saved again, resized, cropped and lightened are found; drawings in one style are told apart."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pixtune.data.doctor import duplicates
from pixtune.data.doctor.across import copies_across
from pixtune.data.doctor.duplicates import NearCopies, find_near_copies
from pixtune.data.doctor.looks import Look, hash_bits, make_thumbnail, take_look

ASSETS = Path(__file__).parents[4] / "assets"


def pictures(folder: str) -> dict[str, Image.Image]:
    return {path.stem: Image.open(path).convert("RGB") for path in sorted((ASSETS / folder).glob("*.png"))}


def textures(number: int) -> list[Image.Image]:
    """Random pictures with the spectrum of photographs."""
    draw = np.random.default_rng(7)
    across, down = np.fft.rfftfreq(160)[None], np.fft.fftfreq(160)[:, None]
    frequency = np.hypot(across, down)
    frequency[0, 0] = 1
    made = []
    for _ in range(number):
        waves = np.stack([np.fft.irfft2(np.fft.rfft2(draw.normal(size=(160, 160))) / frequency) for _ in range(3)], -1)
        levels = 128 + 50 * (waves - waves.mean()) / waves.std()
        made.append(Image.fromarray(levels.clip(0, 255).astype(np.uint8)))
    return made


def as_jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=40)
    return Image.open(stream).convert("RGB")


def smaller(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.BICUBIC)


def cropped(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((width // 25, 0, width - width // 30, height - height // 20))


def lighter(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.06)


def all_of_it(picture: Image.Image) -> Image.Image:
    return as_jpeg(smaller(cropped(picture)))


CHANGES: list[Callable[[Image.Image], Image.Image]] = [as_jpeg, smaller, cropped, lighter, all_of_it]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_copy_is_found_with_its_original_and_nothing_else(change):
    originals = [*list(pictures("demo-style/train").values())[::5], *textures(8)]
    looks = [take_look(picture) for picture in originals]
    looks += [take_look(change(picture)) for picture in originals]
    expected = {(number, number + len(originals)) for number in range(len(originals))}
    found = set(find_near_copies(looks).groups)
    assert found <= expected and len(found) >= len(expected) - 1, "a drawing that lost a lot may be missed"


@pytest.mark.parametrize("folder", ["demo-style/train", "demo-style/held_out", "demo-character/images"])
def test_similar_drawings_are_no_copies(folder):
    looks = [take_look(picture) for picture in pictures(folder).values()]
    assert find_near_copies(looks).groups == ()


def test_the_planted_copies_are_found():
    names = list(pictures("planted-faults/images"))
    found = find_near_copies([take_look(picture) for picture in pictures("planted-faults/images").values()])
    expected = json.loads((ASSETS / "planted-faults/faults.json").read_text())["near_duplicates"]
    assert {frozenset(names[n] for n in group) for group in found.groups} == set(map(frozenset, expected))


def test_one_of_equal_files_stands_for_them():
    a, b = textures(2)
    looks = [take_look(picture) for picture in (a, a, as_jpeg(a), b)]
    assert find_near_copies(looks, known=[(0, 1)]).groups == ((0, 2),)


def test_copies_in_several_folders_are_told_from_held_out_ones():
    a, b, c, d = textures(4)

    def folder(name: str, *made: Image.Image) -> list[tuple[Path, Look]]:
        return [(Path(f"{name}/{number}.png"), take_look(picture)) for number, picture in enumerate(made)]

    found = copies_across([folder("cats", a, as_jpeg(a), b), folder("dogs", lighter(b), c)], folder("held_out", c, d))
    assert [(each.code, [case.files for case in each.cases]) for each in found] == [
        ("held-out-copies", [("dogs/1.png", "held_out/0.png")]),
        ("copies-across-folders", [("cats/2.png", "dogs/0.png")]),
    ]


def test_plain_pictures_are_not_compared():
    looks = [take_look(Image.new("RGB", (64, 64), (level, 0, 0))) for level in (0, 1, 200)]
    assert find_near_copies(looks) == NearCopies((), 0)


def test_what_is_not_compared_is_counted(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 1)
    monkeypatch.setattr(duplicates, "_BATCH", 1)
    looks = [take_look(as_jpeg(picture)) for picture in textures(3) for _ in range(2)]
    found = find_near_copies(looks)
    assert len(found.groups) == 1 and found.num_left_out == 2


def test_bits_are_the_signs_of_the_cosine_transform():
    """Against the sums of the definition, for a picture with one frequency alone."""
    places = np.arange(32) + 0.5
    for down, right in [(0, 1), (3, 0), (2, 5)]:
        wave = np.cos(np.pi / 32 * down * places)[:, None] * np.cos(np.pi / 32 * right * places)
        levels = (128 + 100 * wave).round().astype(np.uint8)
        expected = 1 << (63 - (8 * down + right - 1))  # 63 bits, left in 64
        assert hash_bits(np.repeat(levels[..., None], 3, 2)) == expected


def test_a_thumbnail_is_the_mean_of_blocks():
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    means = levels.reshape(32, 2, 32, 3, 3).mean((1, 3))
    assert np.abs(make_thumbnail(Image.fromarray(levels)) - means).max() <= 1
