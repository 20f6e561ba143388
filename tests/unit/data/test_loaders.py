"""The data set as a `DataLoader`: what the trainer would see, before encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pixtune.data.loaders import loader
from pixtune.errors import ConfigError, DataError
from tests.runs import DEMO_TRAIN, ROOT

PAIRS = ROOT / "assets" / "demo-edit" / "train"


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (255, 10 * number, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption of {name}")


def test_batches_hold_one_size_and_every_picture_with_its_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": (64, 64), "b": (128, 32), "c": (64, 64), "d": (100, 100)})
    batches = list(loader(train_batch_size=2, num_workers=0, img_dir=str(tmp_path), img_size=64))
    assert sorted(batch.pixels_B3HW.shape[2:] for batch in batches) == [(32, 128), (64, 64), (64, 64)]
    green: dict[str, float] = {}
    for batch in batches:
        assert len(batch.pixels_B3HW) == len(batch.captions) == 2 and not batch.controls
        assert batch.pixels_B3HW[:, 0].eq(1).all() and batch.pixels_B3HW[:, 2].eq(-1).all()
        green |= dict(zip(batch.captions, ((batch.pixels_B3HW[:, 1].amax((1, 2)) + 1) * 127.5).tolist(), strict=True))
    assert {name: round(level) for name, level in green.items()} == {
        "caption of a": 0, "caption of b": 10, "caption of c": 20, "caption of d": 30,
    }  # fmt: skip


def test_an_epoch_is_another_order_and_a_seed_the_same_again() -> None:
    def captions(seed: int) -> list[list[str]]:
        data = loader(train_batch_size=4, num_workers=0, seed=seed, img_dir=str(DEMO_TRAIN), img_size=32)
        return [[caption for batch in data for caption in batch.captions] for _ in range(2)]

    first, second = captions(1)
    assert sorted(first) == sorted(second) and first != second
    assert captions(1) == [first, second] and captions(2)[0] != first


def test_workers_give_the_same_batches() -> None:
    def pixels(num_workers: int) -> list[torch.Tensor]:
        data = loader(train_batch_size=16, num_workers=num_workers, img_dir=str(DEMO_TRAIN), img_size=32)
        return [batch.pixels_B3HW for batch in data]

    assert all(one.equal(other) for one, other in zip(pixels(0), pixels(2), strict=True))


def test_controls_come_with_their_targets() -> None:
    folders: dict[str, Any] = {"img_dir": str(PAIRS / "images"), "control_dir": str(PAIRS / "control")}
    batch = next(iter(loader(train_batch_size=3, num_workers=0, img_size=64, control_size=32, **folders)))
    assert batch.pixels_B3HW.shape == (3, 3, 64, 64) and [c.shape for c in batch.controls] == [(3, 3, 32, 32)]
    small = torch.nn.functional.interpolate(batch.pixels_B3HW, (32, 32), mode="area")
    assert (small - batch.controls[0]).abs().mean() > 0.01, "the control is the target itself"


def test_caption_dropout_and_random_ratio_are_drawn(tmp_path: Path) -> None:
    write_pictures(tmp_path, {f"{number}": (256, 256) for number in range(40)})
    settings: dict[str, Any] = {"img_dir": str(tmp_path), "img_size": 128}
    data = loader(train_batch_size=1, num_workers=0, caption_dropout_rate=0.5, random_ratio=True, **settings)
    batches = list(data)
    assert 5 < sum(batch.captions == [""] for batch in batches) < 35
    assert len({batch.pixels_B3HW.shape for batch in batches}) == 3, "1:1 and own are the same here"


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"img_size is 'big'(.|\n)*img_sizze"):
        loader(train_batch_size=1, num_workers=0, img_dir=str(tmp_path), img_sizze=3, img_size="big")
    with pytest.raises(DataError, match="holds no picture"):
        loader(train_batch_size=1, num_workers=0, img_dir=str(tmp_path))
