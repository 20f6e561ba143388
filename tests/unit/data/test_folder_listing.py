"""What each folder gives to an epoch, as `pixtune validate CONFIG` prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config import load_config
from pixtune.data.folder_listing import count_folders
from pixtune.errors import DataError
from tests.unit.data.test_folders import write


def words(tmp_path: Path, folders: str, *more: str) -> list[str]:
    return [
        "pretrained_model_name_or_path=x", f"output_dir={tmp_path}/out", "max_train_steps=9",
        f"data_config.folders={folders}", "data_config.img_size=64", *more,
    ]  # fmt: skip


def test_pictures_sizes_turns_and_steps_of_each_folder_are_counted(tmp_path):
    cats = write(tmp_path / "cats", "a", "b", "c")
    dogs = write(tmp_path / "dogs", *"defghijk", size=(128, 64))
    text = f"[{{img_dir: {cats}, repeats: 4}}, {{img_dir: {dogs}, repeats: 0.5, flip: true, img_size: [64, 32]}}]"
    config = load_config(None, words(tmp_path, text, "train_batch_size=2", "gradient_accumulation_steps=2"))
    listing = count_folders(config, 16, None)
    one, other = listing.folders
    assert (one.num_pictures, one.turns, one.sizes) == (3, 12.0, {(64, 64): 3.0})
    assert (other.num_pictures, other.sizes) == (8, {(80, 48): 4.0, (48, 16): 4.0})
    # Four turns an epoch of dogs, of two sizes, fill two to four micro-batches of two.
    assert 4 <= other.turns <= 6 and listing.steps == (12 + other.turns) / 2 / 2
    lines = listing.render().split("\n")
    assert lines[0].endswith("steps of 4 pictures on one GPU")
    assert lines[1].startswith("  cats/: 3 pictures, 4 times an epoch: 12 turns, ") and lines[2] == "    64 x 64: 3"
    assert lines[3].startswith("  dogs/: 8 pictures, 0.5 times an epoch: ")
    assert lines[3].endswith("of all, half of the turns mirrored")


def test_shared_pictures_and_a_held_out_share_are_mentioned(tmp_path):
    cats = write(tmp_path / "cats", "a", "b")
    text = f"[{{img_dir: {cats}}}, {{img_dir: {cats}, img_size: 32, shuffle_tags: true}}]"
    shown = count_folders(load_config(None, words(tmp_path, text, "validation.held_out=0.5")), 16, None).render()
    assert "2 pictures lie in several folders" in shown and "of 4 pictures are held out, and not counted" in shown


def test_what_a_run_does_not_use_is_not_counted_and_what_it_adds_is(tmp_path):
    """As `prepare_data` has it: no picture without weight is held out, and no regularization picture."""
    cats, dogs, prior = (
        write(tmp_path / "cats", "a", "b"),
        write(tmp_path / "dogs", *"cdef"),
        write(tmp_path / "x", "g"),
    )
    text = f"[{{img_dir: {cats}}}, {{img_dir: {dogs}, loss_weight: 0}}]"
    more = ("validation.held_out=0.5", f"prior_preservation.folder={prior}", "prior_preservation.repeats=2")
    listing = count_folders(load_config(None, words(tmp_path, text, *more)), 16, None)
    assert [(each.num_pictures, each.turns) for each in listing.folders] == [(1, 1.0), (4, 0.0), (1, 2.0)]
    shown = listing.render()
    assert "dogs/: 4 pictures, not used at a loss_weight of 0: 0 turns" in shown and "1 of 2 pictures are" in shown
    assert "prior_preservation/: 1 picture, 2 times an epoch" in shown


def test_problems_of_all_folders_come_first(tmp_path):
    one, other = write(tmp_path / "one", "a"), write(tmp_path / "other", "b")
    (one / "a.txt").unlink()
    (other / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError) as caught:
        count_folders(load_config(None, words(tmp_path, f"[{{img_dir: {one}}}, {{img_dir: {other}}}]")), 16, None)
    assert "a.png has no caption" in str(caught.value) and "b.txt is UTF-16" in str(caught.value)
    with pytest.raises(DataError, match="An epoch would use 0 pictures"):
        count_folders(load_config(None, words(tmp_path, f"[{{img_dir: {write(one, 'a')}, repeats: 0}}]")), 16, None)
