"""Runs with masks, a Huber loss and a range of sigmas: resumed bit for bit, and never with other masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixtune.config import load_config
from pixtune.errors import CheckpointError
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.train import train
from tests.runs import ROOT, overrides

CHARACTER = ROOT / "assets" / "demo-character"
SETTINGS: dict[str, object] = {
    "max_train_steps": 3,
    "checkpointing_steps": 2,
    "data_config__random_ratio": "true",
    "data_config__weight_outside_mask": 0.1,
    "data_config__allow_missing_masks": "true",
    "objective__loss": "huber",
    "objective__min_sigma": 0.2,
    "objective__max_sigma": 0.9,
    "validation__held_out": 0.3,
    "validation__num_draws": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with masks and one without, and a run in one go."""
    folder = tmp_path_factory.mktemp("masked")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number, image in enumerate(sorted((CHARACTER / "images").glob("*.png"))[:4]):
        shutil.copy(image, folder / "images")
        shutil.copy(image.with_suffix(".txt"), folder / "images")
        if number:
            shutil.copy(CHARACTER / "masks" / image.name, folder / "masks")
    run(folder, "whole")
    return folder


def run(folder: Path, output: str, masks: str = "masks", **changes: object) -> None:
    settings = {"data_config__img_dir": folder / "images", "data_config__mask_dir": folder / masks, **SETTINGS}
    train(load_config(None, overrides(folder / output, folder / "cache", **{**settings, **changes})))


def weights_of(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(folder, step) / "pytorch_lora_weights.safetensors")


def test_a_masked_run_goes_on_bit_for_bit(place: Path) -> None:
    """From an empty cache as well, into which masks are read anew, and from a folder of masks of another name."""
    shutil.copytree(place / "whole", place / "again")
    shutil.rmtree(checkpoint_path(place / "again", 3))
    shutil.copytree(place / "masks", place / "moved")
    shutil.rmtree(place / "cache")
    run(place, "again", "moved", resume_from_checkpoint=checkpoint_path(place / "again", 2))
    before, after = weights_of(place / "whole"), weights_of(place / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().max() > 0 for tensor in after.values())


def test_another_mask_is_another_run(place: Path) -> None:
    shutil.copytree(place / "masks", place / "others")
    masks = sorted((place / "others").glob("*.png"))
    for mask in masks:
        Image.eval(Image.open(mask), lambda level: 255 - level).save(mask)
    with pytest.raises(CheckpointError, match="the data set has changed: picture, control or mask of"):
        run(place, "whole", "others", resume_from_checkpoint="latest", max_train_steps=4)
    with pytest.raises(CheckpointError, match=r"data_config\.weight_outside_mask: was 0\.1, is 0\.2"):
        run(place, "whole", resume_from_checkpoint="latest", max_train_steps=4, data_config__weight_outside_mask=0.2)
