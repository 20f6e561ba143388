"""A data set of several folders: names, repeats, sizes, flips, and faults of all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixtune.config.folders import folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.buckets import Framing
from pixtune.data.controls import ControlRules, frame_control
from pixtune.data.encode import FramedPicture
from pixtune.data.example_table import Example
from pixtune.data.examples import read_examples, shared_pictures, used_examples
from pixtune.data.images import crop_resize
from pixtune.data.order import BatchOrder, Use
from pixtune.errors import DataError


def write(folder: Path, *names: str, size: tuple[int, int] = (64, 64), extension: str = "txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number * 40, len(folder.name) * 10, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.{extension}").write_text(f"{name} of {folder.name}")
    return folder


def read(*folders: dict[str, Any], **common: Any) -> Sequence[Example]:
    data = DataConfig.model_validate(
        {"folders": [{**each, "img_dir": str(each["img_dir"])} for each in folders], **common}
    )
    return read_examples(folders_of(data), 16)


def test_folders_give_their_examples_in_turn_under_names_of_their_own(tmp_path):
    cats, dogs = write(tmp_path / "cats", "b", "a"), write(tmp_path / "dogs", "a", extension="note")
    examples = read(
        {"img_dir": cats, "repeats": 2}, {"img_dir": dogs, "caption_type": "note", "img_size": 32}, img_size=64
    )
    assert [(each.name, each.caption, each.use.repeats) for each in examples] == [
        ("cats/a.png", "a of cats", 2.0), ("cats/b.png", "b of cats", 2.0), ("dogs/a.png", "a of dogs", 1.0),
    ]  # fmt: skip
    assert [each.framings[0].size for each in examples] == [(64, 64), (64, 64), (32, 32)]


def test_faults_of_all_folders_come_together(tmp_path):
    one, other = write(tmp_path / "one", "a"), write(tmp_path / "other", "b")
    (one / "a.txt").unlink()
    (other / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        read({"img_dir": one}, {"img_dir": other}, {"img_dir": write(tmp_path / "empty")})
    faults = "\n".join(caught.value.faults)
    assert "one/a.png has no caption" in faults and "other/b.png" in faults and "holds no picture" in faults


def test_a_folder_of_no_repeats_is_read_and_not_used(tmp_path):
    one, other = write(tmp_path / "one", "a"), write(tmp_path / "other", "b")
    examples = read({"img_dir": one, "repeats": 0}, {"img_dir": other}, img_size=64)
    assert [each.name for each in used_examples(examples)] == ["other/b.png"]
    with pytest.raises(DataError, match="An epoch would use 0 pictures"):
        used_examples(read({"img_dir": one, "repeats": 0}, img_size=64))
    with pytest.raises(DataError, match=r"An epoch would use 0\.5 pictures"):
        used_examples(read({"img_dir": one, "repeats": 0.5}, img_size=64))


def test_a_folder_of_no_weight_is_read_and_not_used(tmp_path):
    """A step of its pictures alone would move nothing, and end the run as one that does not learn."""
    one, other = write(tmp_path / "one", "a"), write(tmp_path / "other", "b")
    examples = read({"img_dir": one, "loss_weight": 0}, {"img_dir": other}, img_size=64)
    assert [each.name for each in used_examples(examples)] == ["other/b.png"]
    with pytest.raises(DataError, match="without folders whose loss_weight is 0"):
        used_examples(read({"img_dir": one, "loss_weight": 0}, img_size=64))


SQUARE = ((64, 64),)


def uses(repeats: list[float], epochs: int, seed: int = 3) -> list[Counter[int]]:
    order = BatchOrder([[SQUARE]] * len(repeats), 1, seed, [Use(each) for each in repeats])
    return [Counter(turn.example for batch in order.epoch(epoch) for turn in batch) for epoch in range(epochs)]


def test_repeats_count_exactly_and_fractions_evenly_over_the_epochs():
    epochs = uses([1, 3, 0.5, 1.5, 0.25], 8)
    assert all(epoch[0] == 1 and epoch[1] == 3 for epoch in epochs)
    assert [sum(epoch[number] for epoch in epochs) for number in (2, 3, 4)] == [4, 12, 2]
    assert all(before[2] + after[2] == 1 for before, after in pairwise(epochs))
    assert all(epoch[3] in (1, 2) for epoch in epochs)


def test_examples_of_a_fraction_take_their_turns_in_different_epochs():
    first, second = uses([0.5] * 40, 2)
    assert 10 < sum(first.values()) < 30 and first.keys().isdisjoint(second) and len(first) + len(second) == 40


def test_an_order_of_single_repeats_is_the_order_without_any():
    plain, single = BatchOrder([[SQUARE]] * 9, 2, 5), BatchOrder([[SQUARE]] * 9, 2, 5, [Use(1.0)] * 9)
    assert [plain.epoch(number) for number in range(4)] == [single.epoch(number) for number in range(4)]


def test_a_position_is_found_in_epochs_of_different_lengths():
    uses = [Use(repeats) for repeats in (0.5, 0.3, 1, 2.25, 0.5, 0.1, 1)]
    order, again = (BatchOrder([[SQUARE]] * 7, 2, 11, uses) for _ in range(2))
    in_turn = [batch for epoch in range(16) for batch in again.epoch(epoch)]
    assert not order.is_even
    assert [order.micro_batch(index) for index in (40, 3, 17, 0)] == [in_turn[index] for index in (40, 3, 17, 0)]


# ---- sizes and flips


def test_each_size_and_its_mirror_image_is_a_variant_with_its_share(tmp_path):
    (example,) = read({"img_dir": write(tmp_path / "a", "x", size=(200, 100)), "img_size": [64, 32, 48], "flip": True,
                       "img_size_shares": [3, 1, 0]})  # fmt: skip
    assert [(framing.size, framing.flipped) for framing in example.framings] == [
        ((80, 48), False), ((48, 16), False), ((80, 48), True), ((48, 16), True),
    ]  # fmt: skip
    assert example.use.shares == (0.375, 0.125, 0.375, 0.125)


def test_one_size_in_a_list_is_that_size(tmp_path):
    folder = write(tmp_path / "a", "x")
    assert read({"img_dir": folder, "img_size": [64]}) == read({"img_dir": folder, "img_size": 64})


def test_turns_draw_variants_by_their_shares():
    order = BatchOrder([[SQUARE, SQUARE, SQUARE]], 1, 7, [Use(shares=(0.5, 0.125, 0.375))])
    counts = Counter(order.epoch(epoch)[0][0].variant for epoch in range(2000))
    assert all(abs(counts[n] / 2000 - share) < 0.04 for n, share in enumerate((0.5, 0.125, 0.375)))  # deviation 0.011


def test_turns_draw_captions_evenly_and_apart_from_variants():
    order = BatchOrder([[SQUARE, SQUARE]], 1, 7, [Use(num_captions=3)])
    turns = [order.epoch(epoch)[0][0] for epoch in range(1800)]
    counts = Counter((turn.variant, turn.caption) for turn in turns)
    assert len(counts) == 6 and all(abs(count / 300 - 1) < 0.25 for count in counts.values())  # deviation 0.053


def test_a_mirrored_cut_is_the_mirror_image_of_the_cut(tmp_path):
    picture = Image.effect_noise((97, 64), 80).convert("RGB")
    framing = Framing(32, 32, 0.5, (10.0, 0.0, 74.0, 64.0), 0.3)
    cut, mirrored = crop_resize(picture, framing), crop_resize(picture, replace(framing, flipped=True))
    assert np.array_equal(np.asarray(mirrored), np.asarray(cut)[:, ::-1]) and mirrored != cut


def test_controls_are_mirrored_with_their_target_and_cached_apart():
    rules = ControlRules(2, lambda size: (32, 32), lambda size: (16, 16))
    plain = Framing(64, 64, 0.064, (500.0, 0.0, 1500.0, 1000.0), 0.5)
    for control in ((2000, 1000), (300, 100)):  # of the target's shape, and a reference
        one = frame_control(control, (2000, 1000), plain, rules)
        other = frame_control(control, (2000, 1000), replace(plain, flipped=True), rules)
        assert other.vision and (other.latents.flipped, other.vision.flipped) == (True, True)
        assert replace(other.latents, flipped=False) == one.latents
        parts = [FramedPicture("a", Path("a"), "d", each.latents).parts for each in (one, other)]
        assert parts[0] == {"picture": "d", "size": "32x32", "crop": repr(one.latents.crop_box)}, "keys of old caches"
        assert parts[1] == {**parts[0], "flip": "left to right"}


def test_captions_of_a_folder_reach_its_examples(tmp_path):
    one, other = write(tmp_path / "one", "a_b"), write(tmp_path / "other", "c")
    (one / "a_b.txt").unlink()
    (other / "c.txt").write_text("first\nsecond")
    named, lined = read(
        {"img_dir": one, "caption_source": "file_name"}, {"img_dir": other, "caption_source": "lines"},
        caption_prefix="sks", img_size=32,
    )  # fmt: skip
    assert (named.caption, named.captions) == ("sks, a b", ("sks, a b",))
    assert (lined.caption, lined.captions, lined.use.num_captions) == ("sks, first", ("sks, first", "sks, second"), 2)


def test_a_picture_in_two_folders_is_named_once(tmp_path):
    one, other = write(tmp_path / "one", "a", "b"), write(tmp_path / "other", "c")
    (other / "d.png").write_bytes((one / "b.png").read_bytes())
    (other / "d.txt").write_text("d")
    (one / "e.png").write_bytes((one / "a.png").read_bytes())  # a copy within a folder is not the same matter
    (one / "e.txt").write_text("e")
    examples = read({"img_dir": one}, {"img_dir": other}, img_size=32)
    assert shared_pictures(examples) == (
        "1 picture lies in several folders, byte for byte, and each folder's repeats count: one/b.png = other/d.png."
    )
    assert shared_pictures(read({"img_dir": one}, img_size=32)) is None
    assert "2 pictures lie" in str(
        shared_pictures(read({"img_dir": one}, {"img_dir": one, "img_size": 48}, img_size=32))
    )
