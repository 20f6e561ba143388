"""What can be known before the long work is reported before it; what is done otherwise than asked is printed."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import TINY_MODEL, overrides, pixtune, write_config

PARTS = ["vae", "text_encoder", "transformer"]


def refused(tmp_path: Path, **changes: object) -> str:
    """The message of a run that ends before anything is encoded."""
    words = overrides(tmp_path / "run", tmp_path / "cache")
    changed = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    outcome = pixtune("train", "--config", write_config(tmp_path), *words, *changed)
    assert outcome.returncode == 1, outcome.stdout
    assert "Traceback" not in outcome.stdout and "captions:" not in outcome.stdout
    assert not list(tmp_path.glob("cache/entries/**/*.safetensors"))
    return outcome.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root may write to")
@pytest.mark.parametrize(
    ("key", "remedy"),
    [("output_dir", "output_dir"), ("logging_dir", "Set logging_dir"), ("data_config__cache_dir", "cache_dir")],
)
def test_a_folder_that_refuses_is_found_out_before_encoding(tmp_path: Path, key: str, remedy: str) -> None:
    message = refused(tmp_path, report_to="tensorboard", **{key: "/proc/pixtune"})
    assert re.search("/proc/pixtune (could not|cannot) be written to", message) and remedy in message


def test_damage_to_any_part_of_the_model_is_found_out_before_encoding(tmp_path: Path) -> None:
    for part in PARTS:
        model = tmp_path / part
        shutil.copytree(TINY_MODEL, model)
        (file,) = (model / part).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        message = refused(tmp_path, pretrained_model_name_or_path=model)
        assert f"{file} is cut off" in message


def write_pictures(folder: Path) -> None:
    for number in range(5):
        size = (48, 80) if number == 4 else (64, 64)
        folder.mkdir(exist_ok=True)
        Image.new("RGB", size, (50 * number, 90, 10)).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"a picture of many words, number {number}")
    (folder / "held").mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "held" / "h.png")
    shutil.copy(folder / "p0.png", folder / "held" / "copy.png")
    for name in ("h", "copy"):
        (folder / "held" / f"{name}.txt").write_text("held out")


def test_a_run_inside_its_pictures_prints_what_it_does_otherwise_than_asked_and_resumes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pictures(data)
    settings = {
        "data_config__img_dir": data,
        "data_config__img_size": 70,
        "data_config__max_text_tokens": 3,
        "validation__held_out_dir": data / "held",
        "train_batch_size": 4,
        "lr_warmup_steps": 50,
        "samples__prompts": "['a cat']",
        "samples__num_steps": 1,
        "samples__width": 100,
        "samples__height": 70,
    }
    config = write_config(tmp_path)
    words = overrides(data / "out", data / "cache", max_train_steps=2, **settings)
    outcome = pixtune("train", "--config", config, *words)
    assert outcome.returncode == 0, outcome.stdout
    notes = [line for line in outcome.stdout.splitlines() if line.startswith(("note: ", "warning: "))]
    for words_of_note in (
        "p0.png (" + str(data / "held" / "copy.png"),  # never trained on
        "p4.png (4.0 times an epoch)",
        "96x64, not 100x70",
        "longer than the 3 tokens",
        "img_size 70 is no multiple of 16: square pictures train at 64x64",
        "warm-up of 50 steps",
    ):
        assert len([note for note in notes if words_of_note in note]) == 1, (words_of_note, outcome.stdout)
    assert "data: 4 pictures in 2 sizes, 2 held out" in outcome.stdout
    with Image.open(next((data / "out" / "samples").rglob("*.png"))) as sample:
        assert sample.size == (96, 64)

    resumed = pixtune("train", "--config", config, *words, "max_train_steps=3", "resume_from_checkpoint=latest")
    assert resumed.returncode == 0, resumed.stdout
    assert "data: 4 pictures in 2 sizes, 2 held out" in resumed.stdout
    other = overrides(data / "out2", data / "cache", max_train_steps=1, **{**settings, "lr_warmup_steps": 0})
    beside = pixtune("train", "--config", config, *other)
    assert beside.returncode == 0, beside.stdout
    assert f"note: {data}/out is the output of a run" in beside.stdout
