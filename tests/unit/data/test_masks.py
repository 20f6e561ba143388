"""Masks: which part of a picture counts, to the last position of its latents, and what is wrong with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixtune.config.folders import MaskSource, folder_beside, folders_of
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.data.buckets import build_buckets, frame_picture
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.example_table import Example
from pixtune.data.examples import check_purposes, folders_apart, read_examples
from pixtune.data.mask_weights import Masks
from pixtune.data.masks import FoundMasks, FramedMask, MaskFile, average_over_cells, find_masks
from pixtune.data.pairs import Pair
from pixtune.errors import ConfigError, DataError
from pixtune.families import family_of
from pixtune.sizes import Size
from pixtune.storage.model_folder import open_model_folder
from tests.pictures import GREY, png16, save_pair
from tests.runs import TINY_MODEL

# ---- averages


@given(st.data())
def test_averages_are_those_of_a_finer_picture(data: st.DataObject) -> None:
    """Each level as 24 x 24 equal ones: cells then end between levels, and a plain mean will do."""
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    levels = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 256, (rows, columns), dtype=np.uint8)
    height, width = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 4]))
    (top, bottom), (left, right) = (
        sorted(data.draw(st.lists(st.integers(0, 2 * n), min_size=2, max_size=2, unique=True))) for n in (rows, columns)
    )
    fine = np.kron(levels, np.ones((24, 24)))[12 * top : 12 * bottom, 12 * left : 12 * right]
    cells = fine.reshape(height, fine.shape[0] // height, width, fine.shape[1] // width)
    averages = average_over_cells(levels, (left / 2, top / 2, right / 2, bottom / 2), height, width)
    np.testing.assert_allclose(averages, cells.mean((1, 3)), atol=1e-9)


def test_large_masks_are_summed_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 70), dtype=np.uint8)
    whole = average_over_cells(levels, (1.5, 2.0, 69.0, 40.0), 5, 7)
    monkeypatch.setattr("pixtune.data.masks.STRIP_LEVELS", 100)
    assert np.array_equal(average_over_cells(levels, (1.5, 2.0, 69.0, 40.0), 5, 7), whole)


def framed(path: Path, size: Size, target: Size, img_size: int, of: str = "brightness") -> FramedMask:
    """The mask of a target in its own framing, for latents an eighth its size."""
    framing = frame_picture(*target, build_buckets(img_size, 16))
    mask = MaskFile(path, of, size, target)  # type: ignore[arg-type]
    return mask.framed(framing, framing.height // 8, framing.width // 8)


def read(path: Path, mask: FramedMask | None = None) -> tuple[np.ndarray, list[str]]:
    """The mask's shares, of a 32x32 target unless told otherwise, and the notes on it."""
    notes: list[str] = []
    mask = mask or framed(path, Image.open(path).size, (32, 32), 32)
    return mask.read(notes.append), notes


def save(path: Path, levels: Sequence[Sequence[int]] | np.ndarray) -> Path:
    Image.fromarray(np.asarray(levels, dtype=np.uint8)).save(path)
    return path


def test_a_mask_by_hand(tmp_path: Path) -> None:
    """64x32 pixels, of which a square of 32x32 is trained: the left 16 columns are cut off, the right 16 too."""
    levels = np.zeros((32, 64), np.uint8)
    levels[:, 16:24] = 255  # the first column of latents, which are 4x4
    levels[:8, 24:28] = 255  # half of the second position of the first row
    levels[31, 47] = 51  # a fifth of one pixel of 64
    path = save(tmp_path / "mask.png", levels)
    buckets = build_buckets(32, 16, max_aspect=1.0)
    framing = frame_picture(64, 32, buckets)
    assert framing.size == (32, 32) and framing.crop_box == (16.0, 0.0, 48.0, 32.0)
    shares, notes = read(path, MaskFile(path, "brightness", (64, 32), (64, 32)).framed(framing, 4, 4))
    expected = np.zeros((4, 4))
    expected[:, 0], expected[0, 1], expected[3, 3] = 1.0, 0.5, 0.2 / 64
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    assert shares.dtype == np.float32 and not notes


def test_a_mask_of_another_size_is_scaled_as_its_picture_is(tmp_path: Path) -> None:
    """A picture of 96x64 in a square: a sixth is cut off on either side, of a mask half as large as well."""
    small = np.arange(32 * 48).reshape(32, 48) % 251
    masks = [save(tmp_path / "small.png", small), save(tmp_path / "large.png", np.kron(small, np.ones((2, 2))))]
    framing = frame_picture(96, 64, build_buckets(64, 16, max_aspect=1.0))
    both = [
        read(path, MaskFile(path, "brightness", Image.open(path).size, (96, 64)).framed(framing, 8, 8))[0]
        for path in masks
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-6)
    np.testing.assert_allclose(both[0], small[:, 8:40].reshape(8, 4, 8, 4).mean((1, 3)) / 255, rtol=1e-6)


def test_a_mirrored_picture_has_a_mirrored_mask(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(1, 256, (32, 32), dtype=np.uint8)
    path = save(tmp_path / "mask.png", levels)
    framing = frame_picture(32, 32, build_buckets(32, 16))
    mask = MaskFile(path, "brightness", (32, 32), (32, 32))
    plain, mirrored = (mask.framed(each, 4, 4) for each in (framing, replace(framing, flipped=True)))
    assert np.array_equal(read(path, mirrored)[0], read(path, plain)[0][:, ::-1])
    assert mirrored.parts != plain.parts, "they are two entries of the cache"


def test_a_turned_picture_has_a_turned_mask(tmp_path: Path) -> None:
    levels = np.zeros((32, 32), np.uint8)
    levels[:8] = 255
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(levels).save(tmp_path / "mask.png", exif=exif)
    assert read(tmp_path / "mask.png")[0].tolist() == [[0.0] * 4] * 3 + [[1.0] * 4]


# ---- kinds of files


def test_what_is_transparent_in_a_mask_is_black(tmp_path: Path) -> None:
    """A white figure on a transparent ground: over white, as pictures are read, it would mask nothing."""
    levels = np.full((32, 32, 4), 255, np.uint8)
    levels[:, 16:, 3] = 0
    path = save(tmp_path / "mask.png", levels)
    shares, notes = read(path)
    assert shares.tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4
    assert notes == ["is a mask with an alpha channel: what is transparent counts as black"]
    alpha, notes = read(path, framed(path, (32, 32), (32, 32), 32, "alpha"))
    assert np.array_equal(alpha, shares) and not notes


def test_deep_and_shallow_masks(tmp_path: Path) -> None:
    (tmp_path / "16.png").write_bytes(png16(GREY, *[(65535,)] * 16, *[(32768,)] * 16))
    deep = MaskFile(tmp_path / "16.png", "brightness", (32, 1), (32, 1))
    shares = FramedMask(deep.path, deep.digest, "brightness", (0.0, 0.0, 32.0, 1.0), 1, 4).read(print)
    np.testing.assert_allclose(shares, [[1.0, 1.0, 128 / 255, 128 / 255]], rtol=1e-6)
    one_bit = Image.new("1", (32, 32), 1)
    one_bit.paste(0, (0, 0, 32, 8))
    one_bit.save(tmp_path / "1.png")
    assert read(tmp_path / "1.png")[0].tolist() == [[0.0] * 4] + [[1.0] * 4] * 3
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "p.png")
    assert read(tmp_path / "p.png")[0].min() == 1.0


def test_labels_of_0_and_1_are_told_of(tmp_path: Path) -> None:
    levels = np.zeros((32, 32), np.uint8)
    levels[:16] = 1
    shares, notes = read(save(tmp_path / "mask.png", levels))
    np.testing.assert_allclose(shares[0], np.full(4, 1 / 255), rtol=1e-6)
    assert notes == ["is dark: its brightest level is 1 of 255. White counts, and black does not"]


def test_a_mask_that_counts_nothing_is_refused(tmp_path: Path) -> None:
    black = save(tmp_path / "black.png", np.zeros((32, 32)))
    with pytest.raises(DataError, match=r"black\.png is black everywhere, so that nothing of the picture counts"):
        read(black)
    beside = np.zeros((32, 64), np.uint8)
    beside[:, :16] = 255
    path = save(tmp_path / "beside.png", beside)
    framing = frame_picture(64, 32, build_buckets(32, 16, max_aspect=1.0))
    with pytest.raises(DataError, match="is black where its picture is not cut off"):
        read(path, MaskFile(path, "brightness", (64, 32), (64, 32)).framed(framing, 4, 4))
    clear = save(tmp_path / "clear.png", np.zeros((32, 32, 4)))
    with pytest.raises(DataError, match="is transparent everywhere"):
        read(clear, framed(clear, (32, 32), (32, 32), 32, "alpha"))


def test_a_mask_that_changed_meanwhile_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", np.full((32, 32), 255))
    mask = framed(path, (32, 32), (32, 32), 32)
    save(path, np.full((32, 32), 200))
    with pytest.raises(DataError, match="changed while it was in use"):
        mask.read(print)


# ---- which masks there are


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures and their masks, one of these with a shouting extension."""
    for number, name in enumerate(("a.png", "sub/b.png", "c.jpg")):
        save_pair(tmp_path / "images", name, number)
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "masks" / Path(name).with_suffix(".png"), np.full((32, 32), 255))
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "a.PNG")
    return tmp_path


def find(folder: Path, source: MaskSource, may_be_missing: bool = False) -> FoundMasks:
    pairs = [Pair(folder / "images" / name, name) for name in ("a.png", "c.jpg", "sub/b.png")]
    (own,) = folders_of(DataConfig(img_dir=folder / "images", allow_missing_masks=may_be_missing))
    return find_masks(pairs, replace(own, masks=source))


def test_masks_are_found_by_stem(folder: Path) -> None:
    found = find(folder, folder / "masks")
    masks = {name: mask.path.relative_to(folder / "masks").as_posix() for name, mask in found.of_picture.items()}
    assert masks == {"a.png": "a.PNG", "c.jpg": "c.png", "sub/b.png": "sub/b.png"}
    assert not found.faults and not found.warnings


def fault_of(folder: Path, source: MaskSource, may_be_missing: bool = False) -> str:
    (fault,) = find(folder, source, may_be_missing).faults
    return fault


def test_missing_masks_are_named_unless_they_may_be(folder: Path) -> None:
    (folder / "masks" / "c.png").unlink()
    assert fault_of(folder, folder / "masks").startswith(
        f"1 picture has no mask of the same name in {folder / 'masks'}: {folder / 'images' / 'c.jpg'}. Add masks"
    )
    found = find(folder, folder / "masks", True)
    assert not found.faults and found.of_picture.keys() == {"a.png", "sub/b.png"}


def test_a_mask_without_a_picture_is_a_warning(folder: Path) -> None:
    shutil.copy(folder / "masks" / "c.png", folder / "masks" / "d.png")
    found = find(folder, folder / "masks")
    assert not found.faults
    assert found.warnings == (f"1 mask has no picture of its name: {folder / 'masks' / 'd.png'}.",)


def test_masks_of_other_names_alone_are_refused_even_where_masks_may_be_missing(folder: Path) -> None:
    """A run would be one without masks, which nobody sees in its losses."""
    for path in [*(folder / "masks").rglob("*.*")]:
        path.rename(path.with_stem(path.stem + "_mask"))
    (fault,) = find(folder, folder / "masks", True).faults
    assert (
        fault.startswith("No picture has a mask of its name in")
        and "_mask" in fault
        and "Name each mask as its picture, such as a.png" in fault
    )
    shutil.rmtree(folder / "masks")
    (folder / "masks").mkdir()
    assert not find(folder, folder / "masks", True).faults, "none is there yet"


def test_two_masks_of_one_picture(folder: Path) -> None:
    shutil.copy(folder / "masks" / "c.png", folder / "masks" / "c.bmp")
    assert "belong to one picture" in fault_of(folder, folder / "masks")


def test_a_mask_of_another_shape_names_both_sizes(folder: Path) -> None:
    save(folder / "masks" / "c.png", np.full((32, 48), 255))
    assert "c.png is 48x32 pixels and its picture" in fault_of(folder, folder / "masks")
    save(folder / "masks" / "c.png", np.full((64, 64), 255))
    (warning,) = find(folder, folder / "masks").warnings
    assert warning == f"1 mask is of another size than its picture, and scaled: {folder / 'masks' / 'c.png'}."


def test_a_mask_that_is_no_picture(folder: Path) -> None:
    (folder / "masks" / "c.png").write_text("white")
    assert "c.png is not a picture that can be read: it is text" in fault_of(folder, folder / "masks", True)


def test_a_folder_of_masks_that_is_not_there(folder: Path) -> None:
    assert fault_of(folder, folder / "none") == f"The mask folder {folder / 'none'} does not exist."


def test_alpha_channels_as_masks(folder: Path) -> None:
    Image.new("RGBA", (32, 32)).save(folder / "images" / "a.png")
    assert fault_of(folder, "alpha").startswith("2 pictures have no alpha channel: ")
    found = find(folder, "alpha", True)
    assert {name: (mask.path.name, mask.of) for name, mask in found.of_picture.items()} == {"a.png": ("a.png", "alpha")}


# ---- in a run


def config_of(folder: Path, **data: object) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="x",
        output_dir=folder / "out",
        max_train_steps=1,
        data_config=DataConfig.model_validate({"img_dir": folder / "images", "img_size": 32, **data}),
    )


def examples_of(config: TrainConfig, folder: Path | None = None) -> Sequence[Example]:
    data = config.data_config
    folders = folders_of(data) if folder is None else [folder_beside(data, folder)]
    return read_examples(folders, 16, apart=folders_apart(config))


def test_masks_within_the_folder_of_pictures_are_no_pictures(folder: Path) -> None:
    shutil.move(folder / "masks", folder / "images" / "masks")
    examples = examples_of(config_of(folder, mask_dir=folder / "images" / "masks"))
    assert [example.name for example in examples] == ["a.png", "c.jpg", "sub/b.png"]
    assert all(example.mask for example in examples)


def test_problems_of_masks_come_with_the_others(folder: Path) -> None:
    (folder / "masks" / "c.png").unlink()
    (folder / "images" / "a.txt").unlink()
    with pytest.raises(DataError) as raised:
        examples_of(config_of(folder, mask_dir=folder / "masks"))
    caption, mask = raised.value.faults
    assert "a.txt" in caption and "1 picture has no mask" in mask


def test_a_held_out_folder_has_its_masks_beside_it(folder: Path) -> None:
    config = config_of(folder, mask_dir=folder / "masks")
    for part in ("images", "masks"):
        shutil.copytree(folder / part, folder / "held_out" / part)
    masks = [example.mask for example in examples_of(config, folder / "held_out" / "images")]
    assert all(mask and mask.path.is_relative_to(folder / "held_out" / "masks") for mask in masks)
    next((folder / "held_out" / "masks").iterdir()).unlink()
    with pytest.raises(DataError, match=r"as a whole: data_config\.allow_missing_masks=true"):
        examples_of(config, folder / "held_out" / "images")
    shutil.rmtree(folder / "held_out" / "masks")
    with pytest.raises(DataError, match=r"held_out/masks does not exist"):
        examples_of(config, folder / "held_out" / "images")
    may_lack = config_of(folder, mask_dir=folder / "masks", allow_missing_masks=True)
    assert not any(example.mask for example in examples_of(may_lack, folder / "held_out" / "images"))


def test_held_out_pictures_may_lie_beside_the_masks_of_the_others(folder: Path) -> None:
    """With pictures, masks and held-out pictures side by side, the masks' folder is beside both."""
    (folder / "held_out").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "held_out" / "other.png")
    (folder / "held_out" / "other.txt").write_text("another")
    config = config_of(folder, mask_dir=folder / "masks")
    with pytest.raises(DataError, match=r"count as a whole: data_config\.allow_missing_masks=true\.$"):
        examples_of(config, folder / "held_out")
    may_lack = config_of(folder, mask_dir=folder / "masks", allow_missing_masks=True)
    assert [example.mask for example in examples_of(may_lack, folder / "held_out")] == [None]
    assert all(example.mask for example in examples_of(may_lack))


@pytest.mark.parametrize("other", ["img_dir", "control_dir"])
def test_masks_need_a_folder_of_their_own(folder: Path, other: str) -> None:
    config = config_of(folder, **{"mask_dir": folder / "images", "control_dir": folder / "c", other: folder / "images"})
    with pytest.raises(ConfigError, match=rf"data_config\.{other} and data_config\.mask_dir are one folder"):
        check_purposes(config)


def masks_in(store: MemoryStore) -> Masks:
    folder = open_model_folder(str(TINY_MODEL))
    return Masks(family_of(folder), folder, store, Ledger(None))


def test_weights_in_a_run(folder: Path) -> None:
    levels = np.zeros((32, 32), np.uint8)
    levels[:, :16] = 255
    save(folder / "masks" / "c.png", levels)
    (folder / "masks" / "sub" / "b.png").unlink()
    config = config_of(folder, mask_dir=folder / "masks", allow_missing_masks=True, weight_outside_mask=0.25)
    examples = examples_of(config)
    masks = masks_in(MemoryStore())
    assert not masks.fill([(example, 0) for example in examples])
    _, masked, without = (masks.weights(example, 0) for example in examples)
    assert masked.tolist() == [[[[1.0, 1.0, 0.25, 0.25]] * 4]]
    assert without.tolist() == [[[[1.0] * 4] * 4]]
    config = config_of(folder, mask_dir=folder / "masks", allow_missing_masks=True)
    _, example, _ = examples_of(config)
    assert example.mask and example.mask.digest
    (folder / "masks" / "c.png").unlink()  # what the cache holds needs no file
    assert not masks.fill([(example, 0)])
    assert masks.weights(example, 0).flatten().tolist() == pytest.approx([1.0, 1.0, 0.02, 0.02] * 4)


def test_masks_that_cannot_be_used_are_reported_together(folder: Path) -> None:
    for name in ("c.png", "a.PNG"):
        save(folder / "masks" / name, np.zeros((32, 32)))
    save(folder / "masks" / "sub" / "b.png", np.full((32, 32), 9))
    examples = examples_of(config_of(folder, mask_dir=folder / "masks"))
    with pytest.raises(DataError) as raised:
        masks_in(MemoryStore()).fill([(example, 0) for example in examples])
    assert len(raised.value.faults) == 2
    save(folder / "masks" / "c.png", np.full((32, 32), 255))
    save(folder / "masks" / "a.PNG", np.full((32, 32), 254))
    (note,) = masks_in(MemoryStore()).fill(
        [(each, 0) for each in examples_of(config_of(folder, mask_dir=folder / "masks"))]
    )
    assert note.startswith("mask ") and "sub/b.png: is dark: its brightest level is 9 of 255" in note
