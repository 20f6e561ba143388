"""Swapped controls and targets: which pairs are asked about, how they are turned round, and what the answer means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixtune.config.folders import folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.controls import ControlRules, frame_control
from pixtune.data.example_table import Example
from pixtune.data.examples import read_examples
from pixtune.data.swapped import Encoded, EncodedBothWays, Gains, choose_pairs, measure_gains, swap, swap_warning
from pixtune.engine.load import LoadedTransformer
from pixtune.judging.validation import HeldOutPicture
from tests.runs import ROOT, overrides, pixtune, write_config

EDIT_MODEL = ROOT / "assets" / "tiny-qwen-image-edit"
RULES = ControlRules(2, lambda size: (size[0] // 2, size[1] // 2), lambda size: (32, 32))


# ---- what gains mean

STEADY = (0.5, 0.6, 0.4, 0.5, 0.7, 0.5)


def negative(gains: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-gain for gain in gains)


def test_captions_that_mislead_as_given_and_help_swapped_are_warned_of_with_figures():
    warning = swap_warning(Gains(as_given=negative(STEADY), swapped=STEADY))
    assert warning is not None and "look swapped: on 6 pairs" in warning
    # The mean gain is 3.2 / 6: exp(0.5333) is 1.705, its inverse 0.587.
    assert "by +70% as the data are given and by -41% the other way" in warning


@pytest.mark.parametrize(
    ("as_given", "swapped_gains"),
    [
        pytest.param(STEADY, negative(STEADY), id="as they should be"),
        pytest.param(STEADY, tuple(gain + 0.3 for gain in STEADY), id="an edit that is its own inverse"),
        pytest.param(negative(STEADY), negative((0.1, 0.2, 0.1, 0.2, 0.1, 0.2)), id="an edit the base does not know"),
        pytest.param(negative(STEADY), (3.0, -0.2, -0.1, -0.2, -0.1, -0.1), id="one odd pair"),
        pytest.param((-0.01,) * 6, STEADY, id="as given too little to mean anything"),
        pytest.param(negative(STEADY), (0.01, 0.011) * 3, id="swapped too little to mean anything"),
        pytest.param((3.0, -3.0, -3.0, 3.0, -3.0, -3.1), (0.5,) * 6, id="as given it goes either way"),
        pytest.param((float("nan"),) * 6, STEADY, id="no numbers as given"),
        pytest.param(negative(STEADY), (float("inf"), *STEADY[1:]), id="no numbers swapped"),
    ],
)
def test_nothing_else_is_warned_of(as_given, swapped_gains):
    assert swap_warning(Gains(as_given, swapped_gains)) is None


def test_a_few_pairs_alike_in_both_directions_hide_no_swap():
    """Grey drawings among those to be made grey: their caption helps as given, too."""
    assert swap_warning(Gains((-1.5, -1.6, -1.4, 1.5, -1.5, -1.6), (1.4, 1.5, 1.6, 1.5, 1.4, 1.6))) is not None


# ---- turning a pair round


def edit_examples(folder: Path, count: int, size: tuple[int, int] = (96, 64), control_scale: int = 2) -> list[Example]:
    """Rows whose controls show the same at another size; at 64 pixels each loses its sides."""
    for number in range(count):
        target = np.zeros((size[1], size[0], 3), np.uint8)
        target[:, : size[0] // 2, number % 3] = 100 + number
        control = np.kron(255 - target, np.ones((control_scale, control_scale, 1), np.uint8))
        for part, pixels in (("images", target), ("control", control)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / part / f"{number:02d}.png")
        (folder / "images" / f"{number:02d}.txt").write_text("invert it")
    config = DataConfig(img_dir=folder / "images", control_dir=folder / "control", img_size=64)
    return [*read_examples(folders_of(config), 32, RULES)]


def test_the_swapped_pair_shows_the_same_part_at_the_same_size(tmp_path):
    (example,) = edit_examples(tmp_path, 1, size=(128, 70))
    turned = swap(example, (128, 70), (256, 140), RULES)
    (before,), (after,) = example.framings, turned.framings
    assert before.share_lost > 0, "the test needs a crop"
    assert after.size == before.size and after.share_lost == before.share_lost
    assert after.crop_box == tuple(2 * edge for edge in before.crop_box)
    assert after.scale == pytest.approx(before.scale / 2)
    assert (turned.image_path, turned.control_paths) == (example.control_paths[0], (example.image_path,))
    assert turned.control_framings == ((frame_control((128, 70), (256, 140), after, RULES),),)
    assert turned.control_framings[0][0].latents.crop_box == before.crop_box
    assert turned.caption == example.caption and turned.name != example.name, "the ledger tells them apart"


def test_turned_round_twice_is_the_pair_itself(tmp_path):
    (example,) = edit_examples(tmp_path, 1)
    back = swap(swap(example, (96, 64), (192, 128), RULES), (192, 128), (96, 64), RULES)
    assert back.framings == example.framings and back.control_framings == example.control_framings


# ---- which pairs


def test_eight_pairs_are_chosen_by_seed_and_name(tmp_path):
    examples = edit_examples(tmp_path, 12)
    chosen = [pair.as_given.name for pair in choose_pairs(examples, RULES, " ", seed=1)]
    assert len(set(chosen)) == 8
    assert [pair.as_given.name for pair in choose_pairs(examples[::-1], RULES, " ", seed=1)] == chosen
    assert [pair.as_given.name for pair in choose_pairs(examples, RULES, " ", seed=2)] != chosen


def test_only_captioned_pairs_with_one_control_of_the_targets_shape_are_asked_about(tmp_path):
    examples = edit_examples(tmp_path, 7)
    Image.new("RGB", (64, 64)).save(tmp_path / "control" / "00.png")
    (tmp_path / "images" / "01.txt").write_text("")
    config = DataConfig(img_dir=tmp_path / "images", control_dir=tmp_path / "control", img_size=64)
    examples = [*read_examples(folders_of(config), 32, RULES)]
    both = DataConfig(img_dir=tmp_path / "images", control_dir=(tmp_path / "control",) * 2, img_size=64)
    examples[2] = read_examples(folders_of(both), 32, RULES)[2]
    assert sorted(pair.as_given.name for pair in choose_pairs(examples, RULES, " ", seed=0)) == [
        "03.png", "04.png", "05.png", "06.png",
    ]  # fmt: skip
    assert choose_pairs(examples[:-1], RULES, " ", seed=0) == [], "three pairs have no spread"
    assert choose_pairs(examples, None, " ", seed=0) == [], "the model takes no controls"


# ---- the measurement


class KnownError:
    """A family whose loss is known: for latents of zero it predicts the velocity, missed by what the caption says."""

    def stack_conditioning(self, rows):
        return {"error": torch.stack([row["error"] for row in rows])}

    def predict_velocity(self, transformer, noisy_BCHW, sigma_B, conditioning, controls, guidance):
        return noisy_BCHW / sigma_B.view(-1, 1, 1, 1) + conditioning["error"].view(-1, 1, 1, 1) * controls[0]


def encoded(captioned_error: float, uncaptioned_error: float, control: float) -> Encoded:
    controls = (torch.full((1, 2, 4, 4), control),)
    return Encoded(
        *(
            HeldOutPicture("a", torch.zeros(1, 2, 4, 4), {"error": torch.tensor(error)}, controls)
            for error in (captioned_error, uncaptioned_error)
        )
    )


def test_a_gain_is_the_log_of_loss_without_caption_over_loss_with_it():
    pairs = [EncodedBothWays(encoded(1.0, 2.0, 0.5), encoded(3.0, 1.0, 2.0))]
    state = torch.random.get_rng_state()
    family: Any = KnownError()
    gains = measure_gains(family, LoadedTransformer(torch.nn.Identity()), pairs, 42, torch.device("cpu"), 1.0)
    assert gains.as_given == pytest.approx([math.log(4)], abs=1e-4)
    assert gains.swapped == pytest.approx([math.log(1 / 9)], abs=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state), "draws are functions of their place"


# ---- a real model that knows the edit


def make_red_pairs(folder: Path, red: str, plain: str) -> None:
    """Five drawings and the same "made red", as the small model was taught it (scripts/train_tiny_models.py)."""
    for path in sorted((ROOT / "assets/demo-edit/train/control").glob("*.png"))[:25:5]:
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
        darkness = 1 - pixels.mean(2, keepdims=True) / 255
        made_red = (1 - (0.3 * (darkness > 0.03) + 0.7 * darkness) * np.array([0.15, 1.0, 1.0])) * 255
        for part, content in ((plain, pixels), (red, made_red)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.round().astype(np.uint8)).save(folder / part / path.name)
    for path in (folder / "images").glob("*.png"):
        path.with_suffix(".txt").write_text("make it red")


def train(folder: Path, steps: int, **changes: object) -> str:
    words = overrides(
        folder / "out", folder / "cache", pretrained_model_name_or_path=EDIT_MODEL, max_train_steps=steps,
        train_batch_size=1, data_config__img_dir=folder / "images", data_config__control_dir=folder / "control",
        data_config__img_size=256, data_config__control_size=256, **changes,
    )  # fmt: skip
    done = pixtune("train", "--config", write_config(folder), *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_run_warns_of_swapped_folders_once_and_of_right_ones_never(tmp_path):
    make_red_pairs(tmp_path / "right", red="images", plain="control")
    assert "look swapped" not in train(tmp_path / "right", 1)
    make_red_pairs(tmp_path / "wrong", red="control", plain="images")
    said = train(tmp_path / "wrong", 1)
    assert "warning: controls and targets look swapped: on 5 pairs" in said
    resumed = train(tmp_path / "wrong", 2, resume_from_checkpoint="latest")
    assert "resuming after step 1" in resumed and "look swapped" not in resumed
