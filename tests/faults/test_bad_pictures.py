"""Every bad input of a data set is found before training, all in one report with paths, never as a stack trace."""

from __future__ import annotations

import functools
import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixtune.data.images import open_rgb, read_size
from pixtune.data.validate import validate_folder
from pixtune.errors import DataError
from tests.pictures import noise, png16, save_pair, tiff


def encoded(format: str, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    noise(48, 40).convert(mode).save(stream, format, **options)
    return stream.getvalue()


@functools.cache
def one_bit_png(width: int, height: int) -> bytes:
    """A picture of many pixels in few bytes."""
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def damaged_page_list() -> bytes:
    """A TIFF whose second page is said to lie behind the end of the file."""
    data = bytearray(tiff(np.zeros((20, 20), "u1")))
    next_page = 8 + 2 + 11 * 12
    data[next_page : next_page + 4] = b"\0\0\0\x80"
    return bytes(data)


def unfolding_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))
    return encoded("PNG")[:33] + text + encoded("PNG")[33:]


BAD_FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {  # name: file, its bytes, words of the fault
    "zero bytes": ("a.jpg", lambda: b"", "is empty (0 bytes)"),
    "text": ("a.png", lambda: b"this is no picture\n", "it is text"),
    "binary rubbish": ("a.webp", lambda: bytes(range(256)), "it is damaged or of another kind"),
    "HEIC": ("a.jpg", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    "half an AVIF": ("a.jpg", lambda: encoded("AVIF")[:200], "is a damaged AVIF picture"),
    "a PNG whose text unfolds": (
        "a.png",
        unfolding_png,
        "cannot be decoded: Decompressed data too large",
    ),
    "LFS pointer": ("a.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "truncated JPEG": ("a.jpg", lambda: encoded("JPEG")[:-300], "cannot be decoded: image file is truncated"),
    "truncated PNG": ("a.png", lambda: encoded("PNG")[:-300], "cannot be decoded"),
    "truncated WebP": ("a.webp", lambda: encoded("WEBP")[:-300], "cannot be decoded"),
    "truncated BMP": ("a.bmp", lambda: encoded("BMP")[:-300], "cannot be decoded: image file is truncated"),
    "truncated TIFF": ("a.tif", lambda: encoded("TIFF")[:-300], "cannot be decoded"),
    "TIFF with a damaged list of pages": ("a.tif", damaged_page_list, "cannot be decoded: Missing dimensions"),
    "header alone": ("a.png", lambda: encoded("PNG")[:20], "a.png"),
    "one pixel": ("a.png", lambda: one_bit_png(1, 1), "is 1x1 pixels; each side must have at least 16"),
    "too many pixels": ("a.png", lambda: one_bit_png(20_000, 20_000), "more than 178,956,970 pixels"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_each_bad_picture_is_one_fault_with_its_path(tmp_path, case):
    name, data, words = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(data())
    path.with_suffix(".txt").write_text("a picture")
    (fault,) = validate_folder(tmp_path).faults
    assert fault.startswith(str(path)) and words in fault
    assert "\n" not in fault and fault.endswith(".")


def test_a_20000_pixel_panorama_works_and_says_what_is_cropped(tmp_path):
    (tmp_path / "a.png").write_bytes(one_bit_png(20_000, 100))
    (tmp_path / "a.txt").write_text("a wide picture")
    report = validate_folder(tmp_path, img_size=1024)
    assert report.ok and report.bucket_counts == {(400, 96): 1}
    assert "a.png (98%)" in report.warnings[1]


@pytest.mark.filterwarnings("error")
def test_nothing_is_printed_beside_the_report(tmp_path, recwarn):
    (tmp_path / "a.tif").write_bytes(damaged_page_list())
    (tmp_path / "a.txt").write_text("a picture")
    (fault,) = validate_folder(tmp_path).faults
    assert "Missing dimensions" in fault and not recwarn.list


def test_the_size_limit_is_checked_before_any_pixel_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(BAD_FILES["too many pixels"][1]())

    def refuse(self):
        raise AssertionError("decoded a picture beyond the limit")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for read in (open_rgb, read_size):
        with pytest.raises(DataError, match="limit"):
            read(path)


def test_a_picture_that_vanishes_or_may_not_be_read_is_a_fault(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("a picture")
    (fault,) = validate_folder(tmp_path).faults
    assert fault.startswith(f"{tmp_path}/a.png cannot be read") and "No such file" in fault


def make_bad_set(folder: Path) -> dict[str, str]:
    """A folder with one of every fault; file name to words of its fault."""
    save_pair(folder, "good.png", 1)
    save_pair(folder, "good.too.jpg", 2)
    wanted = {}
    for number, (name, data, words) in enumerate(BAD_FILES.values()):
        path = folder / f"bad{number}{Path(name).suffix}"
        path.write_bytes(data())
        path.with_suffix(".txt").write_text("a picture")
        wanted[path.name] = words if words != "a.png" else path.name
    save_pair(folder, "lonely.png", 3).with_suffix(".txt").unlink()
    (folder / "orphan.txt").write_text("a caption")
    save_pair(folder, "Case.png", 4)
    save_pair(folder, "case.png", 5)
    save_pair(folder, "twice.png", 6)
    noise(32, 32, 7).save(folder / "twice.bmp")
    save_pair(folder, "latin.png", 8).with_suffix(".txt").write_bytes("un caf\u00e9".encode("latin-1"))
    wanted |= {
        "lonely.png": "has no caption",
        "orphan.txt": "has no picture",
        "Case.png": "differ only in letter case",
        "twice.bmp": "share one caption name",
        "latin.txt": "byte 0xe9 at position 6",
    }
    return wanted


def test_all_faults_of_a_folder_are_in_one_report(tmp_path):
    wanted = make_bad_set(tmp_path)
    faults = validate_folder(tmp_path).faults
    for name, words in wanted.items():
        assert sum(f"{tmp_path / name}" in fault and words in fault for fault in faults) == 1, f"{name}: {words}"
    assert not any(str(tmp_path / "good") in fault for fault in faults)
    # Two pictures and two captions whose names differ in case are two faults.
    assert len(faults) == len(wanted) + 1


def test_the_command_prints_them_all_and_exits_with_1(tmp_path, repo_root):
    wanted = make_bad_set(tmp_path)
    command = [sys.executable, "utils/validate_dataset.py", "--path", str(tmp_path)]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    for name, words in wanted.items():
        assert any(str(tmp_path / name) in line and words in line for line in result.stdout.splitlines()), name
    assert "Traceback" not in result.stdout + result.stderr


def test_a_picture_with_two_faults_shows_both(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    faults = validate_folder(tmp_path).faults
    assert len(faults) == 2
    assert "has no caption" in faults[0] and "is empty" in faults[1]


FUZZED = {
    "JPEG": lambda: encoded("JPEG", exif=exif()),
    "CMYK JPEG": lambda: encoded("JPEG", "CMYK"),
    "progressive JPEG": lambda: encoded("JPEG", progressive=True),
    "PNG": lambda: encoded("PNG", exif=exif()),
    "palette PNG": lambda: encoded("PNG", "P", transparency=3),
    "16-bit PNG": lambda: png16(0, *((level,) for level in range(0, 65535, 999))),
    "WebP": lambda: encoded("WEBP", exif=exif()),
    "lossless WebP": lambda: encoded("WEBP", "RGBA", lossless=True),
    "BMP": lambda: encoded("BMP", "P"),
    "TIFF": lambda: encoded("TIFF"),
    "LZW TIFF": lambda: encoded("TIFF", compression="tiff_lzw"),
    "16-bit TIFF": lambda: tiff(np.arange(900, dtype="<u2").reshape(30, 30)),
    "GIF": lambda: encoded("GIF", "P"),
}


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010E] = "a description"
    return tags.tobytes()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged EXIF and TIFF tags
@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_bytes_end_in_a_picture_or_one_fault(tmp_path, kind):
    """Whatever a decoder raises, a person sees a sentence."""
    draw = random.Random(kind)
    original = FUZZED[kind]()
    path = tmp_path / "a.png"
    path.write_bytes(original)
    assert open_rgb(path).size == read_size(path)
    for _ in range(50):
        data = bytearray(original)
        for _ in range(draw.choice([1, 1, 2, 5, 20])):
            # Headers decide what code runs, so hit them more often.
            place = draw.randrange(min(len(data), draw.choice([64, 200, len(data)])))
            data[place] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        for read in (open_rgb, read_size):
            try:
                read(path)
            except DataError as error:
                assert len(error.faults) == 1 and str(path) in error.faults[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to decode image"),
        AssertionError(),
        AttributeError("x"),
        ZeroDivisionError(),
        Exception("odd"),
    ],
)
def test_whatever_a_decoder_raises_is_one_fault_with_its_path(tmp_path, monkeypatch, error):
    noise(32, 32, 1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")

    def fail(*_):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    (fault,) = validate_folder(tmp_path).faults
    assert fault.startswith(f"{tmp_path}/a.png cannot be decoded: {str(error) or type(error).__name__}")
