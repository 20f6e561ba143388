"""The listing that `pixtune validate CONFIG` ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from pixtune.commands.folders import folder_listing
from pixtune.commands.validate import check_config, finish
from pixtune.config import load_config
from tests.runs import ROOT
from tests.unit.data.test_folders import write


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    cats, dogs = write(tmp_path / "cats", "a", "b"), write(tmp_path / "dogs", "c")
    return [
        "pretrained_model_name_or_path=some/model", f"output_dir={tmp_path}/out", "max_train_steps=1",
        "data_config.img_size=72", "train_batch_size=2",
        f"data_config.folders=[{{img_dir: {cats}, repeats: 3}}, {{img_dir: {dogs}}}]",
    ]  # fmt: skip


def test_the_folders_of_a_config_are_listed_without_its_model(words):
    listing = folder_listing(load_config(None, words)).split("\n")
    assert listing == [
        "An epoch: 4 steps of 2 pictures on one GPU",
        "  cats/: 2 pictures, 3 times an epoch: 6.9 turns, 86% of all",
        "    64 x 64: 2",
        "  dogs/: 1 picture, once an epoch: 1.1 turns, 14% of all",
        "    64 x 64: 1",
        "  1 picture lies in several folders, byte for byte, and each folder's repeats count: cats/a.png = dogs/c.png.",
    ]


def test_with_its_model_sizes_are_the_models_own(words):
    listing = folder_listing(
        load_config(None, [*words, f"pretrained_model_name_or_path={ROOT}/assets/tiny-qwen-image"])
    )
    assert "    64 x 64: 2" in listing.split("\n")


def test_data_with_problems_are_not_counted(words, tmp_path):
    (tmp_path / "dogs" / "c.txt").unlink()
    listing = folder_listing(load_config(None, words))
    assert listing.startswith("An epoch of 2 folders cannot be counted: ") and "\n" not in listing


def test_masks_are_checked_with_the_folders(words, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes((tmp_path / "cats" / "a.png").read_bytes())
    cats = f"data_config.folders=[{{img_dir: {tmp_path}/cats, mask_dir: {masks}}}]"
    (report,) = check_config(load_config(None, [*words, cats]), Console(quiet=True))
    dogs = cats.replace("}]", f"}},{{img_dir: {tmp_path}/dogs}}]")
    reports = check_config(load_config(None, [*words, dogs]), Console(quiet=True))
    printed: list[str] = []
    assert finish(reports, "", printed.append, as_json=False, all_names=False, strict=False) == 1
    number = sum(each.num_pictures for each in reports)
    assert printed[0].startswith("2 folders together: The data set cannot be trained on: 1 problem")
    assert f", {number} pictures." in printed[0].splitlines()[0]
    assert not report.ok and "1 picture has no mask of the same name" in "".join(report.faults)
