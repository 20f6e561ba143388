"""Every kind of picture file becomes the upright sRGB pixels that a person sees in a viewer."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pixtune.data import images
from pixtune.data import images as images_module
from pixtune.data import levels as levels_module
from pixtune.data.buckets import build_buckets, frame_picture
from pixtune.data.images import crop_resize, decode, decoded, open_rgb, read_size, to_pixels
from pixtune.errors import DataError
from tests.pictures import GREY, GREY_ALPHA, RGB, RGBA, chunk, noise, png, png16, tiff

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def write(folder: Path, data: bytes, name: str = "a.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(path: Path) -> list[tuple[int, int, int]]:
    """All pixels row by row, after the checks that hold for every picture."""
    image = open_rgb(path)
    assert image.mode == "RGB"
    assert read_size(path) == image.size
    return [(int(red), int(green), int(blue)) for red, green, blue in np.asarray(image).reshape(-1, 3)]


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def near(found: list[tuple[int, int, int]], wanted: list[tuple[int, int, int]], tolerance: int) -> bool:
    return len(found) == len(wanted) and np.abs(np.subtract(found, wanted)).max() <= tolerance


# ---- orientation

CORNERS = {  # EXIF value: where the stored corners (top left, top right, bottom left, bottom right) are seen
    1: "abcd",
    2: "badc",
    3: "dcba",
    4: "cdab",
    5: "acbd",
    6: "cadb",
    7: "dbca",
    8: "bdac",
}
COLORS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 0)}


def four_corners() -> Image.Image:
    """3 x 2 blocks of 16 pixels with a colour in each corner."""
    image = Image.new("RGB", (48, 32), "white")
    for letter, place in zip("abcd", [(0, 0), (32, 0), (0, 16), (32, 16)], strict=True):
        image.paste(COLORS[letter], (*place, place[0] + 16, place[1] + 16))
    return image


def seen_corners(image: Image.Image) -> str:
    """Which colours are in the corners of a picture."""
    right, bottom = image.width - 8, image.height - 8
    values = np.asarray(image).astype(int)
    seen = [values[y, x] for x, y in [(8, 8), (right, 8), (8, bottom), (right, bottom)]]
    return "".join(min(COLORS, key=lambda c: sum(abs(x - y) for x, y in zip(COLORS[c], s, strict=True))) for s in seen)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, orientation, extension):
    path = tmp_path / f"a.{extension}"
    if extension == "tiff":
        four_corners().save(path, tiffinfo={0x0112: orientation})
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"lossless": True} if extension == "webp" else {}
        four_corners().save(path, exif=exif, **options)
    image = open_rgb(path)
    assert image.size == read_size(path) == ((48, 32) if orientation < 5 else (32, 48))
    assert seen_corners(image) == CORNERS[orientation]


def orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def test_orientation_behind_a_pngs_pixels(tmp_path):
    """Where exiftool puts it: a reader that stops at the pixels never sees it."""
    late = png((2, 1), 8, RGB, [bytes([1, 2, 3, 4, 5, 6])], after=chunk(b"eXIf", orientation_exif(6)))
    path = write(tmp_path, late)
    assert read_size(path) == (1, 2)
    assert pixels(path) == [(1, 2, 3), (4, 5, 6)]


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise(64, 48).save(path)

    def refuse(self):
        raise AssertionError("read_size decoded the whole picture")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    assert read_size(path) == (64, 48)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    data = png((1, 1), 8, RGB, [b"\1\2\3"], before=chunk(b"eXIf", b"nonsense" * 3))
    assert pixels(write(tmp_path, data)) == [(1, 2, 3)]


# ---- transparency


def test_alpha_is_laid_over_white(tmp_path):
    data = png((3, 1), 8, RGBA, [bytes([10, 20, 30, 255, 10, 20, 30, 0, 100, 0, 200, 128])])
    assert pixels(write(tmp_path, data)) == [(10, 20, 30), WHITE, (177, 127, 227)]


def test_grey_alpha_is_laid_over_white(tmp_path):
    data = png((3, 1), 8, GREY_ALPHA, [bytes([10, 255, 10, 0, 100, 128])])
    assert pixels(write(tmp_path, data)) == [(10, 10, 10), WHITE, (177, 177, 177)]


def test_palette_with_alpha_for_each_entry(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's, for a palette whose transparency is dropped
        assert near(pixels(tmp_path / "a.png"), [(10, 20, 30), WHITE, (162, 167, 172)], 1)


def test_palette_with_one_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert pixels(tmp_path / "a.png") == [(10, 20, 30), WHITE]


def test_palette_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [(10, 20, 30), (40, 50, 60)]


def test_palette_with_alpha_channel(tmp_path):
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([(0, 255), (1, 0)])
    image.save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff") == [(10, 20, 30), WHITE]


def trns(*levels: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(levels)}H", *levels))


def test_one_transparent_colour_in_8_bits(tmp_path):
    rows = [bytes([9, 8, 7, 9, 8, 6])]
    assert pixels(write(tmp_path, png((2, 1), 8, RGB, rows, trns(9, 8, 7)))) == [WHITE, (9, 8, 6)]
    assert pixels(write(tmp_path, png((2, 1), 8, GREY, [bytes([9, 8])], trns(9)))) == [WHITE, (8, 8, 8)]


def test_one_transparent_colour_in_16_bits(tmp_path):
    """Pillow compares the 16-bit colour with the 8-bit pixels and finds it nowhere."""
    data = png16(RGB, (40_000, 2_000, 257), (40_000, 2_000, 40_000), before=trns(40_000, 2_000, 257))
    opaque = open_rgb(write(tmp_path, png16(RGB, (40_000, 2_000, 40_000)))).getpixel((0, 0))
    assert pixels(write(tmp_path, data)) == [WHITE, opaque]
    data = png16(GREY, (40_000,), (40_001,), before=trns(40_000))
    assert pixels(write(tmp_path, data)) == [WHITE, (156, 156, 156)]


@pytest.mark.parametrize(("depth", "row", "key", "levels"), [(2, 0b11_10_00_00, 2, 85), (4, 0xA5, 10, 17)])
def test_one_transparent_grey_in_2_and_4_bits(tmp_path, depth, row, key, levels):
    width = 8 // depth
    found = pixels(write(tmp_path, png((width, 1), depth, GREY, [bytes([row])], trns(key))))
    values = [row >> (8 - depth * (i + 1)) & (2**depth - 1) for i in range(width)]
    assert found == [WHITE if value == key else (value * levels,) * 3 for value in values]


@pytest.mark.parametrize("key", [0, 1])
def test_one_transparent_grey_in_1_bit(tmp_path, key):
    found = pixels(write(tmp_path, png((2, 1), 1, GREY, [b"\x40"], trns(key))))
    assert found == ([WHITE, WHITE] if key == 0 else [BLACK, WHITE])


def test_transparent_webp(tmp_path):
    Image.fromarray(np.array([[[1, 2, 3, 255], [9, 9, 9, 0]]], dtype=np.uint8)).save(tmp_path / "a.webp", lossless=True)
    assert pixels(tmp_path / "a.webp") == [(1, 2, 3), WHITE]


# ---- depths


def test_16_bit_colour_is_scaled(tmp_path):
    data = png16(RGB, (65535, 32768, 0), (257 * 200, 257 * 3, 257 * 100))
    assert near(pixels(write(tmp_path, data)), [(255, 128, 0), (200, 3, 100)], 1)
    data = png16(RGBA, (257 * 200, 257 * 3, 257 * 100, 65535), (0, 0, 0, 0))
    assert near(pixels(write(tmp_path, data)), [(200, 3, 100), WHITE], 1)
    data = png16(GREY_ALPHA, (257 * 200, 65535), (0, 0))
    assert near(pixels(write(tmp_path, data)), [(200, 200, 200), WHITE], 1)


def test_16_bit_grey_is_scaled_to_the_nearest_level(tmp_path):
    levels = np.linspace(0, 65535, 700).astype(int)
    found = pixels(write(tmp_path, png16(GREY, *((int(level),) for level in levels))))
    assert found == [(round(level / 257),) * 3 for level in levels]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_tiff(tmp_path, order):
    path = tmp_path / "a.tiff"
    if order == "<u2":
        path.write_bytes(tiff(np.array([[0, 257 * 7, 65535]], dtype=order)))
    else:
        Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 257 * 7, 65535)).save(path)
    assert pixels(path) == [BLACK, (7, 7, 7), WHITE]


def test_16_bit_rgb_tiff(tmp_path):
    array = np.array([[[65535, 257 * 9, 0], [257, 257 * 128, 65535]]], dtype="<u2")
    assert near(pixels(write(tmp_path, tiff(array), "a.tif")), [(255, 9, 0), (1, 128, 255)], 1)


def test_12_bit_grey_tiff(tmp_path):
    packed = np.array([[0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]], dtype="u1")  # 4095, 0, 2048, 0
    data = tiff(packed, bits=12, width=4)
    assert pixels(write(tmp_path, data, "a.tif")) == [WHITE, BLACK, (128, 128, 128), BLACK]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
def test_a_negative_tiff_is_turned_round(tmp_path, dtype):
    white = {"u1": 255, "<u2": 65535, "<f4": 1}[dtype]
    data = tiff(np.array([[0, white]], dtype=dtype), white_is_zero=True)
    assert pixels(write(tmp_path, data, "a.tif")) == [WHITE, BLACK]


def test_float_tiff_from_0_to_1(tmp_path):
    data = tiff(np.array([[0.0, 0.5, 1.0]], dtype="<f4"))
    assert pixels(write(tmp_path, data, "a.tif")) == [BLACK, (128, 128, 128), WHITE]


def test_32_bit_whole_numbers_within_16_bits(tmp_path):
    data = tiff(np.array([[0, 257 * 9, 65535]], dtype="<i4"))
    assert pixels(write(tmp_path, data, "a.tif")) == [BLACK, (9, 9, 9), WHITE]


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0, 70_000]], dtype="<i4"),
        np.array([[-1, 5]], dtype="<i2"),
        np.array([[0.0, 1.5]], dtype="<f4"),
        np.array([[-0.1, 1.0]], dtype="<f4"),
        np.array([[0.0, np.nan]], dtype="<f4"),
    ],
)
def test_numbers_without_a_white_are_refused_not_guessed(tmp_path, array):
    path = write(tmp_path, tiff(array), "a.tif")
    with pytest.raises(DataError) as caught:
        open_rgb(path)
    (fault,) = caught.value.faults
    assert str(path) in fault and "white is unknown" in fault


def test_1_bit(tmp_path):
    assert pixels(write(tmp_path, png((2, 1), 1, GREY, [b"\x40"]))) == [BLACK, WHITE]


def test_8_bit_is_left_exactly_as_it_is(tmp_path):
    image = noise(31, 17)
    for extension in ("png", "bmp", "tiff"):
        path = tmp_path / f"a.{extension}"
        image.save(path)
        assert same(open_rgb(path), image)


# ---- colours


def test_cmyk_jpeg_as_adobe_writes_it(tmp_path):
    """Stored inverted, and said so by the Adobe marker."""
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(path, quality=100)
    assert b"Adobe" in path.read_bytes()
    assert near(pixels(path)[:1], [(0, 255, 255)], 3)
    assert "CMYK without a colour profile" in decode(path).notes[0]


def test_cmyk_tiff(tmp_path):
    path = tmp_path / "a.tiff"
    Image.new("CMYK", (2, 2), (0, 255, 0, 0)).save(path)
    assert pixels(path)[0] == (255, 0, 255)


def test_lab_tiff(tmp_path):
    path = tmp_path / "a.tiff"
    Image.new("LAB", (1, 1), (255, 128, 128)).save(path)
    assert near(pixels(path), [WHITE], 2)


def profile(kind: Literal["LAB", "XYZ", "sRGB"] = "sRGB") -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 monitor profile of a colour space, b"RGB " or b"GRAY"."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79), b"wtpt": xyz(D50)} | tags
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s12x4s", size, b"none", 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + table + body


D50 = (0.9642, 1.0, 0.8249)


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(levels: np.ndarray) -> bytes:
    """A tone curve as a table, 0 to 1."""
    return b"curv\0\0\0\0" + struct.pack(">I", len(levels)) + np.rint(levels * 65535).astype(">u2").tobytes()


def matrix_profile(red: Sequence[float], green: Sequence[float], levels: np.ndarray) -> bytes:
    """An RGB profile of given primaries (XYZ under D50; blue is what is left of white) and tone curve."""
    blue = [white - r - g for white, r, g in zip(D50, red, green, strict=True)]
    primaries = {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    return icc_profile(b"RGB ", primaries | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(levels)))


SRGB_RED, SRGB_GREEN = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971)


def swapping_profile() -> bytes:
    """Red and green change places: no one can overlook whether it was applied."""
    return matrix_profile(SRGB_GREEN, SRGB_RED, np.linspace(0, 1, 256) ** 2.2)


def rounded_srgb_profile() -> bytes:
    """sRGB with a coarse table for its curve, as cameras and web sites embed it: off by a level here and there."""
    signal = np.linspace(0, 1, 256)
    light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return matrix_profile((0.4358, 0.2224, 0.0139), (0.3853, 0.7170, 0.0971), light)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff"])
def test_an_embedded_profile_is_converted(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    options = {"lossless": True} if extension == "webp" else {"quality": 100} if extension == "jpg" else {}
    Image.new("RGB", (16, 16), (230, 20, 20)).save(path, icc_profile=swapping_profile(), **options)
    red, green, blue = pixels(path)[0]
    assert green > 200 and red < 60 and blue < 60
    assert decode(path).notes == ()


def test_a_profile_of_a_picture_with_alpha(tmp_path):
    image = Image.new("RGBA", (2, 1), (230, 20, 20, 255))
    image.putpixel((1, 0), (230, 20, 20, 0))
    image.save(tmp_path / "a.png", icc_profile=swapping_profile())
    (red, green, _), second = pixels(tmp_path / "a.png")
    assert green > 200 and red < 60 and second == WHITE


def test_a_profile_of_a_palette_picture(tmp_path):
    image = Image.new("P", (1, 1))
    image.putpalette([230, 20, 20])
    image.save(tmp_path / "a.png", icc_profile=swapping_profile())
    ((red, green, _),) = pixels(tmp_path / "a.png")
    assert green > 200 and red < 60


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_converted(tmp_path, mode):
    linear = icc_profile(b"GRAY", {b"kTRC": curve(np.linspace(0, 1, 256))})
    Image.new("L", (1, 1), 55).convert(mode).save(tmp_path / "a.png", icc_profile=linear)
    assert near(pixels(tmp_path / "a.png"), [(128, 128, 128)], 3)  # 55/255 of the light is half way in sRGB
    assert decode(tmp_path / "a.png").notes == ()


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    image = noise(64, 64)
    embedded = rounded_srgb_profile()
    converted = ImageCms.profileToProfile(image, io.BytesIO(embedded), ImageCms.createProfile("sRGB"))
    assert converted is not None and not same(converted, image), "this profile cannot show it"
    image.save(tmp_path / "a.png", icc_profile=embedded)
    assert same(open_rgb(tmp_path / "a.png"), image)


def test_a_grey_picture_with_a_colour_profile(tmp_path):
    Image.new("L", (1, 1), 100).save(tmp_path / "a.png", icc_profile=profile())
    assert pixels(tmp_path / "a.png") == [(100, 100, 100)]
    assert decode(tmp_path / "a.png").notes == ()


@pytest.mark.parametrize("data", [b"not a profile" * 20, profile("LAB")])
def test_an_unusable_profile_is_noted_and_left_out(tmp_path, data):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png", icc_profile=data)
    assert pixels(tmp_path / "a.png") == [(1, 2, 3)]
    (note,) = decode(tmp_path / "a.png").notes
    assert "colour profile that cannot be used" in note


# ---- files


def test_the_first_frame_of_an_animation_with_a_note(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green")]
    for extension in ("png", "webp", "tiff"):
        path = tmp_path / f"a.{extension}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert near(pixels(path)[:1], [(255, 0, 0)], 3)
        assert decode(path).notes == ("has 3 frames; only the first is used",)


def test_the_previews_behind_a_phones_picture_are_not_noted(tmp_path):
    path = tmp_path / "a.jpg"
    noise(16, 16).save(path, format="MPO", save_all=True, append_images=[noise(16, 16, 1)])
    assert decode(path).notes == ()


def test_content_decides_not_the_extension(tmp_path):
    stream = io.BytesIO()
    noise(8, 8).save(stream, "JPEG")
    assert open_rgb(write(tmp_path, stream.getvalue(), "a.png")).size == (8, 8)


def test_formats_that_run_programs_are_not_opened(tmp_path):
    with pytest.raises(DataError, match="is not a picture that can be read"):
        open_rgb(write(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"))


def test_pixels_up_to_the_limit_open_without_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise(20, 10).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    monkeypatch.setattr(images, "MAX_PICTURE_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_rgb(path).size == (20, 10)
    monkeypatch.setattr(images, "MAX_PICTURE_PIXELS", 199)
    with pytest.raises(DataError, match="more than 199 pixels"):
        open_rgb(path)


def test_the_result_carries_nothing_of_the_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(8, 4).save(tmp_path / "a.jpg", exif=exif, dpi=(72, 72))
    image = open_rgb(tmp_path / "a.jpg")
    assert image.info == {} and not image.getexif()


# ---- to training pixels


def test_to_pixels_maps_0_and_255_to_minus_1_and_1():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 0]]], dtype=np.uint8))
    found = to_pixels(image)
    assert found.shape == (3, 1, 2) and found.dtype == torch.float32 and found.is_contiguous()
    expected = torch.tensor([[[-1.0, 1.0]], [[-0.6, -1.0]], [[1.0, -1.0]]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_crop_resize_cuts_out_the_middle_and_keeps_shapes():
    image = Image.new("RGB", (400, 100), "white")
    image.paste((255, 0, 0), (150, 0, 250, 100))  # a square in the middle
    framing = frame_picture(400, 100, build_buckets(64, 16, max_aspect=1))
    found = np.asarray(crop_resize(image, framing))
    assert found.shape == (64, 64, 3)
    assert (found[:, 3:-3] == (255, 0, 0)).all()  # the filter reaches 3 pixels over the edge
    assert (found[:, :3, 0] > 240).all() and (found[:, :1, 1] < 128).all()


def test_crop_resize_does_not_alias():
    """A fine checkerboard becomes grey, not a pattern."""
    board = Image.fromarray((np.indices((960, 960)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    found = np.asarray(crop_resize(board, frame_picture(960, 960, build_buckets(64, 16)))).astype(int)
    assert np.abs(found - 127.5).max() < 3


def test_crop_resize_of_a_picture_of_bucket_size_changes_nothing():
    image = noise(64, 64)
    assert same(crop_resize(image, frame_picture(64, 64, build_buckets(64, 16))), image)


# ---- large pictures


def stored(kind: str, path: Path) -> Path:
    """A picture of 90 x 70 pixels of some kind, written to a file."""
    rng = np.random.default_rng(5)
    levels = rng.integers(0, 65536, (70, 90)).astype(np.uint16)
    colours = rng.integers(0, 256, (70, 90, 4)).astype(np.uint8)
    picture = {
        "16 bits": lambda: Image.fromarray(levels),
        "32 bits": lambda: Image.fromarray(levels.astype(np.int32)),
        "floats": lambda: Image.fromarray((levels / 65535).astype(np.float32)),
        "colours": lambda: Image.fromarray(colours[:, :, :3]),
        "opacity": lambda: Image.fromarray(colours),
        "palette": lambda: Image.fromarray(colours[:, :, :3]).quantize(16),
        "one bit": lambda: Image.fromarray(colours[:, :, 0]).convert("1"),
        "CMYK": lambda: Image.fromarray(colours, "CMYK"),
        "one transparent grey": lambda: Image.fromarray(colours[:, :, 0] // 64 * 64),
    }[kind]()
    tags = Image.Exif()
    tags[0x0112] = 6
    options: dict[str, Any] = {"transparency": 64} if kind == "one transparent grey" else {}
    suffix = "tif" if kind in ("32 bits", "floats", "CMYK") else "png"
    picture.save(path.with_suffix(f".{suffix}"), exif=tags, **options)
    return path.with_suffix(f".{suffix}")


@pytest.mark.parametrize(
    "kind",
    ["16 bits", "32 bits", "floats", "colours", "opacity", "palette", "one bit", "CMYK", "one transparent grey"],
)
@pytest.mark.parametrize("strip_pixels", [1, 90 * 7, 90 * 33 + 5])
def test_strips_change_no_pixel_and_no_note(tmp_path, monkeypatch, kind, strip_pixels):
    path = stored(kind, tmp_path / "a")
    whole = decode(path)
    assert whole.image.size == ((90, 70) if kind == "CMYK" else (70, 90))  # upright, but where Pillow writes no EXIF
    monkeypatch.setattr(levels_module, "STRIP_PIXELS", strip_pixels)
    parts = decode(path)
    assert parts.image.tobytes() == whole.image.tobytes() and parts.notes == whole.notes


def test_large_pictures_are_in_memory_one_at_a_time_and_small_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "LARGE_PIXELS", 64 * 64)
    for name, side in (("large", 64), ("small", 32)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    inside, most = {"large": 0, "small": 0}, {"large": 0, "small": 0}
    lock, both_small = threading.Lock(), threading.Barrier(2)

    def hold(name: str) -> None:
        with decoded(tmp_path / f"{name}.png"):
            with lock:
                inside[name] += 1
                most[name] = max(most[name], inside[name])
            if name == "small":
                both_small.wait(timeout=20)
            else:
                time.sleep(0.05)
            with lock:
                inside[name] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hold, ["large", "small", "large", "small", "large", "large"]))
    assert most == {"large": 1, "small": 2}
