"""`pixtune validate` of a config with a stream: its first rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pixtune.commands.validate import FolderRequest, check
from pixtune.errors import DataError


def words(folder: Path, **changes: object) -> list[str]:
    given = {"pretrained_model_name_or_path": "x/y", "output_dir": "out", "max_train_steps": 3,
             "data_config.img_dir": folder, "data_config.img_size": 64, "stream.window": 14, **changes}  # fmt: skip
    path = folder.parent / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {"output_dir": "x", "data_config": "{}"}.items()))
    return [str(path), *(f"{key}={value}" for key, value in given.items())]


def write(folder: Path, num_good: int, num_bad: int) -> None:
    folder.mkdir()
    for number in range(num_good + num_bad):
        path = folder / f"{number:02d}.png"
        Image.new("RGB", (96, 64) if number % 2 else (64, 64)).save(path)
        if number >= num_good:
            path.write_bytes(path.read_bytes()[:50])
        path.with_suffix(".txt").write_text("" if number == 0 else "a caption")


def test_the_first_rows_are_read_and_described(tmp_path):
    write(tmp_path / "pictures", 12, 2)
    reports, page = check(words(tmp_path / "pictures"), None, None, FolderRequest())
    assert not reports
    assert "A stream of 1 shards. The first 14 rows" in page and "12 can be trained on, 2 are skipped" in page
    assert "1 have an empty caption" in page and "64 x 64: 6" in page


def test_a_stream_of_damaged_rows_is_an_error(tmp_path):
    write(tmp_path / "pictures", 2, 12)
    with pytest.raises(DataError, match="12 of the 14 rows"):
        check(words(tmp_path / "pictures"), None, None, FolderRequest())
