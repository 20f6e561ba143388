"""Which pictures a run trains on, and which it holds out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config.schema import DataConfig
from pixtune.data.examples import Example, read_examples, split_held_out
from pixtune.errors import DataError
from tests.runs import DEMO_TRAIN


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return read_examples(DataConfig(img_dir=DEMO_TRAIN, img_size=128), DEMO_TRAIN, 16, random_ratio=False)


def test_every_pair_is_an_example_with_its_caption(examples: list[Example]) -> None:
    assert len(examples) == 48
    assert examples[0].caption == examples[0].image_path.with_suffix(".txt").read_text().strip()
    assert {framing.size for example in examples for framing in example.framings} == {(128, 128)}


def test_random_ratio_frames_each_picture_for_every_ratio() -> None:
    config = DataConfig(img_dir=DEMO_TRAIN, img_size=128, random_ratio=True)
    example = read_examples(config, DEMO_TRAIN, 16, random_ratio=True)[0]
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
        read_examples(DataConfig(img_dir=tmp_path), tmp_path, 16, random_ratio=False)
    assert "lonely.png" in str(caught.value) and "empty.png" in str(caught.value)
