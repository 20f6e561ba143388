"""Which pictures a run trains on, and which it holds out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, ValidationConfig
from pixtune.data.example_table import Example
from pixtune.data.examples import (
    check_purposes,
    folders_apart,
    read_examples,
    split_held_out,
    without_held_out,
)
from pixtune.errors import ConfigError, DataError
from tests.runs import DEMO_TRAIN


@pytest.fixture(scope="module")
def examples() -> Sequence[Example]:
    return read_examples(folders_of(DataConfig(img_dir=DEMO_TRAIN, img_size=128)), 16)


def test_every_pair_is_an_example_with_its_caption(examples: list[Example]) -> None:
    assert len(examples) == 48
    assert examples[0].caption == examples[0].image_path.with_suffix(".txt").read_text().strip()
    assert {framing.size for example in examples for framing in example.framings} == {(128, 128)}


def test_random_ratio_frames_each_picture_for_every_ratio() -> None:
    config = DataConfig(img_dir=DEMO_TRAIN, img_size=128, random_ratio=True)
    example = read_examples(folders_of(config), 16)[0]
    assert len(example.framings) == 4
    assert len({framing.size for framing in example.framings}) == 3  # a square picture: 1:1 is its own ratio


def test_the_split_is_stable_disjoint_and_of_the_asked_share(examples: list[Example]) -> None:
    training, held_out = split_held_out(examples, 0.25, seed=1)
    assert len(held_out) == 12 and len(training) == 36
    assert not {s.name for s in training} & {s.name for s in held_out}
    assert split_held_out(examples[::-1], 0.25, seed=1)[1] == held_out[::-1]
    assert split_held_out(examples, 0.25, seed=2)[1] != held_out
    assert split_held_out(examples, 0.0, seed=1) == (examples, [])


def test_a_split_that_leaves_nothing_is_refused(examples: list[Example]) -> None:
    with pytest.raises(DataError, match="leaves nothing"):
        split_held_out(examples[:1], 0.5, seed=1)


def test_header_faults_come_with_all_the_others(tmp_path: Path) -> None:
    (tmp_path / "lonely.png").write_bytes(next(DEMO_TRAIN.glob("*.png")).read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        read_examples(folders_of(DataConfig(img_dir=tmp_path)), 16)
    assert "lonely.png" in str(caught.value) and "empty.png" in str(caught.value)


def write(folder: Path, *names: str, colour: int = 0) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number + 1, colour, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)


def read(folder: Path, apart: tuple[Path, ...] = ()) -> Sequence[Example]:
    return read_examples(folders_of(DataConfig(img_dir=folder, img_size=32)), 16, apart=apart)


def test_copies_of_a_picture_go_to_one_side_together(tmp_path: Path) -> None:
    write(tmp_path, *[f"p{number}.png" for number in range(8)])
    for number in range(8):
        for place in ("copy", "other/copy"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            for suffix in (".png", ".txt"):
                shutil.copy(tmp_path / f"p{number}{suffix}", tmp_path / place / f"q{number}{suffix}")
    examples = read(tmp_path)
    assert len(examples) == 24
    for seed in range(6):
        training, held_out = split_held_out(examples, 0.1, seed)
        assert len(training) + len(held_out) == 24 and len(held_out) >= 2
        assert not {each.image_path.read_bytes() for each in training} & {
            each.image_path.read_bytes() for each in held_out
        }


def test_a_set_of_copies_of_one_picture_has_none_to_hold_out(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match="all 2 pictures are copies"):
        split_held_out(read(tmp_path), 0.5, 1)


def test_pictures_that_are_held_out_elsewhere_are_not_trained_on_under_any_name(tmp_path: Path) -> None:
    write(tmp_path / "train", "a.png", "b.png", "c.png")
    write(tmp_path / "held", "h.png", colour=9)
    shutil.copy(tmp_path / "train" / "b.png", tmp_path / "held" / "x.png")
    (tmp_path / "held" / "x.txt").write_text("another caption")
    training, sentence = without_held_out(read(tmp_path / "train"), read(tmp_path / "held"))
    assert [each.name for each in training] == ["a.png", "c.png"]
    assert sentence is not None and f"{tmp_path}/train/b.png ({tmp_path}/held/x.png)" in sentence
    with pytest.raises(DataError, match="nothing is left to train on"):
        without_held_out(read(tmp_path / "train"), read(tmp_path / "train"))
    assert without_held_out(training, read(tmp_path / "held")) == (training, None)


def test_the_folders_of_a_config_each_have_one_purpose(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a.png", "held/h.png", "out/samples/s.png", "cache/c.png")
    config = TrainConfig(
        pretrained_model_name_or_path="x",
        output_dir=data / "out",
        max_train_steps=1,
        data_config=DataConfig(img_dir=data, cache_dir=data / "cache"),
        validation=ValidationConfig(held_out_dir=data / "held"),
    )
    apart = folders_apart(config)
    assert [each.name for each in read(data, apart)] == ["a.png"]
    assert [each.name for each in read(data / "held", apart)] == ["h.png"]


def test_a_size_below_the_models_unit_is_a_message(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"img_size is 32; it must be at least 64"):
        read_examples(folders_of(DataConfig(img_dir=tmp_path, img_size=32)), 64)


@pytest.mark.parametrize("key", ["output_dir", "validation"])
@pytest.mark.parametrize("name", ["data", "data/", "link", "data/../data"])
def test_one_folder_for_two_purposes_is_refused_by_whatever_name(tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    same = tmp_path / name
    config = TrainConfig(
        pretrained_model_name_or_path="x",
        output_dir=same if key == "output_dir" else tmp_path / "out",
        max_train_steps=1,
        data_config=DataConfig(img_dir=tmp_path / "data"),
        validation=ValidationConfig(held_out_dir=same if key == "validation" else None),
    )
    with pytest.raises(ConfigError, match=f"data_config.img_dir and {key}.* are one folder"):
        check_purposes(config)
