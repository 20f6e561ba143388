"""contract.md section 5: both layouts, every extension in any letter case, loaders that import."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from image_datasets import control_dataset, dataset
from tests.pictures import noise
from utils.validate_dataset import validate_dataset

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tiff", "tif")
SIZE = 64


def spellings(extension: str) -> tuple[str, str, str]:
    return extension, extension.upper(), extension.capitalize()


def write_picture(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    noise(SIZE, SIZE, seed).save(folder / name)


def captions_of(batches: Iterable[Any]) -> list[str]:
    return sorted(caption for batch in batches for caption in batch.captions)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_text_to_image_layout(tmp_path: Path, extension: str) -> None:
    """dataset/img1.png + img1.txt, in any letter case."""
    for number, spelling in enumerate(spellings(extension)):
        write_picture(tmp_path, f"img{number}.{spelling}", number)
        (tmp_path / f"img{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    assert validate_dataset(tmp_path)
    data = dataset.loader(train_batch_size=1, num_workers=0, img_dir=str(tmp_path), img_size=SIZE)
    assert captions_of(data) == ["picture 0", "picture 1", "picture 2"]


def test_edit_layout(tmp_path: Path) -> None:
    """dataset/images/NAME.jpg + NAME.txt and dataset/control/NAME.jpg; the extensions may differ."""
    for number, extension in enumerate(EXTENSIONS):
        write_picture(tmp_path / "images", f"name{number}.jpg", number)
        (tmp_path / "images" / f"name{number}.txt").write_text(f"edit {number}", encoding="utf-8")
        write_picture(tmp_path / "control", f"name{number}.{extension.upper()}", 100 + number)
    assert validate_dataset(tmp_path)
    folders: dict[str, Any] = {"img_dir": str(tmp_path / "images"), "control_dir": str(tmp_path / "control")}
    data = control_dataset.loader(train_batch_size=1, num_workers=0, img_size=SIZE, control_size=SIZE, **folders)
    assert captions_of(data) == [f"edit {number}" for number in range(len(EXTENSIONS))]
    batch = next(iter(data))
    assert len(batch.controls) == 1 and batch.controls[0].shape == batch.pixels_B3HW.shape
    assert not batch.controls[0].equal(batch.pixels_B3HW)


def test_a_missing_control_is_found_in_the_edit_layout(tmp_path: Path) -> None:
    for number in range(2):
        write_picture(tmp_path / "images", f"name{number}.jpg", number)
        (tmp_path / "images" / f"name{number}.txt").write_text(f"edit {number}", encoding="utf-8")
    write_picture(tmp_path / "control", "name0.jpg", 100)
    assert not validate_dataset(tmp_path)


def test_caption_type_is_the_extension_of_the_caption_files(tmp_path: Path) -> None:
    write_picture(tmp_path, "img.png", 0)
    for extension in ("txt", "caption"):
        (tmp_path / f"img.{extension}").write_text(f"from {extension}", encoding="utf-8")
    for extension in ("txt", "caption"):
        folder: dict[str, Any] = {"img_dir": str(tmp_path), "img_size": SIZE, "caption_type": extension}
        assert captions_of(dataset.loader(train_batch_size=1, num_workers=0, **folder)) == [f"from {extension}"]


def test_random_ratio_crops_to_one_of_four_each_time(tmp_path: Path) -> None:
    noise(1280, 512).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide", encoding="utf-8")
    folder: dict[str, Any] = {"img_dir": str(tmp_path), "img_size": 512, "random_ratio": True}
    data = dataset.loader(train_batch_size=1, num_workers=0, **folder)
    sizes = [batch.pixels_B3HW.shape[:1:-1] for _ in range(24) for batch in data]
    ratios = sorted({width / height for width, height in sizes})
    assert ratios == pytest.approx([1, 4 / 3, 16 / 9, 2.5], rel=0.07), "1:1, 4:3, 16:9 and its own"
    assert len(set(sizes[:12])) > 1 and sizes[:12] != sizes[12:]
