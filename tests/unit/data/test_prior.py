"""Prior preservation: pictures that the base model draws before it learns, or that are given."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixtune import assembly
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data import prior as module
from pixtune.data.batches import ExampleReader
from pixtune.data.measured import measured_example
from pixtune.data.prepare import prepare_data
from pixtune.data.prepared import PreparedData
from pixtune.data.prior import prior_path
from pixtune.errors import CheckpointError, ConfigError, DataError
from pixtune.judging.validation import HeldOutPicture
from pixtune.sampler import PromptPicture
from pixtune.services import training_pictures
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.files import file_digest
from pixtune.train import train
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, ROOT, overrides

SETTINGS: dict[str, object] = {
    "max_train_steps": 3,
    "checkpointing_steps": 2,
    "train_batch_size": 3,
    "logging_steps": 1,
    "prior_preservation__prompts": "[a red heart, a cat]",
    "prior_preservation__num_pictures": 2,
    "prior_preservation__num_steps": 2,
    "prior_preservation__guidance_scale": 2.0,
    "prior_preservation__loss_weight": 0.5,
}


def pictures(folder: Path, source: Path = DEMO_TRAIN, count: int = 2) -> Path:
    folder.mkdir()
    for picture in sorted(source.glob("*.png"))[:count]:
        shutil.copy(picture, folder)
        shutil.copy(picture.with_suffix(".txt"), folder)
    return folder


def config_of(place: Path, output: str, **changes: object) -> TrainConfig:
    settings = {"data_config__img_dir": place / "pictures", **SETTINGS, **changes}
    return load_config(None, overrides(place / output, place / "cache", **settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, and a run with four that the base drew."""
    folder = tmp_path_factory.mktemp("prior")
    pictures(folder / "pictures")
    train(config_of(folder, "run"))
    return folder


def drawn_in(output: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(output.glob("prior/*/*"))}


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(output, 3) / "pytorch_lora_weights.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    before, after = weights_of(one), weights_of(other)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_base_model_draws_what_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_in(place / "run")
    stems = ["000-0000", "000-0001", "001-0000", "001-0001"]
    assert sorted(drawn) == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "txt"))
    assert len(set(drawn.values())) == 6, "four pictures unlike each other, and two captions"
    (folder,) = (place / "run" / "prior").iterdir()
    assert (folder / "001-0001.txt").read_text() == "a cat" and Image.open(folder / "001-0001.png").size == (64, 64)

    shutil.copytree(place / "run", place / "again")
    shutil.rmtree(checkpoint_path(place / "again", 3))
    for name in ("000-0001.png", "001-0000.png"):  # a run that was killed while they were drawn
        next((place / "again").glob(f"prior/*/{name}")).unlink()
    written: list[str] = []
    write = module._write

    def watched(path: Path, picture: PromptPicture) -> None:
        written.append(path.name)
        write(path, picture)

    monkeypatch.setattr(module, "_write", watched)
    train(config_of(place, "again", resume_from_checkpoint="latest"))
    assert written == ["000-0001.png", "001-0000.png"]
    assert drawn_in(place / "again") == drawn, "each is a function of its prompt and seed alone"
    assert_equal_weights(place / "run", place / "again")


def test_an_edited_picture_is_another_run(place: Path) -> None:
    shutil.copytree(place / "run", place / "edited")
    Image.new("RGB", (64, 64)).save(next((place / "edited").glob("prior/*/000-0000.png")))
    with pytest.raises(CheckpointError, match=r"picture, control or mask of prior_preservation/000-0000\.png"):
        train(config_of(place, "edited", resume_from_checkpoint="latest", max_train_steps=4))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_pictures", 3), ("num_steps", 3), ("guidance_scale", 3.0), ("prompts", "[a dog]")],
)
def test_what_decides_the_pictures_decides_their_folder(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "pictures").mkdir()
    one, other = config_of(tmp_path, "run"), config_of(tmp_path, "run", **{f"prior_preservation__{key}": value})
    path = prior_path(one, "base")
    assert path is not None and re.fullmatch(r"[0-9a-f]{12}", path.name) and path.parent == tmp_path / "run" / "prior"
    assert path == prior_path(one, "base")
    assert path != prior_path(other, "base") and path != prior_path(one, "another base")


def test_given_pictures_join_the_others(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """They come last, are never held out, and weigh what they are to weigh; an epoch may use less than one of them."""
    pictures(place / "given", DEMO_HELD_OUT, 2)
    for path in [*(place / "pictures").iterdir()][:1]:
        for each in place.glob(f"pictures/{path.stem}.*"):
            shutil.copy(each, place / "given")
    prepared: list[PreparedData] = []

    def watched(*arguments: Any) -> PreparedData:
        prepared.append(prepare_data(*arguments))
        return prepared[-1]

    measured: list[int] = []

    def watched_example(reader: ExampleReader, example: int) -> HeldOutPicture:
        measured.append(example)
        return measured_example(reader, example)

    monkeypatch.setattr(assembly, "prepare_data", watched)
    monkeypatch.setattr(training_pictures, "measured_example", watched_example)
    changes = {"prior_preservation__prompts": "[]", "prior_preservation__repeats": 0.25, "validation__held_out": 0.5}
    given = {"prior_preservation__folder": place / "given", "max_train_steps": 1, "train_batch_size": 1}
    train(config_of(place, "with-given", **changes, **given))
    (data,) = prepared
    names, weights = data.reader.names, data.reader.example_weights
    assert len(data.held_out) == 1 and not data.held_out[0].name.startswith("prior_preservation/")
    assert len(names) == 4 and [name.startswith("prior_preservation/") for name in names] == [False, True, True, True]
    assert weights == [1.0, 0.5, 0.5, 0.5]
    assert data.num_prior == 3 and set(measured) == {0}, "over-fitting is told by what is learned"
    assert [use.repeats for use in data.uses] == [1.0, 0.25, 0.25, 0.25]
    assert not (place / "with-given" / "prior").exists()
    assert "1 picture lies in several folders, byte for byte" in capfd.readouterr().out, "it is no other picture"


def test_a_folder_without_pictures_is_named(place: Path) -> None:
    (place / "empty").mkdir()
    changes = {"prior_preservation__prompts": "[]", "prior_preservation__folder": place / "empty"}
    with pytest.raises(DataError, match=r"empty holds no picture"):
        train(config_of(place, "with-none", **changes))


def test_an_edit_model_is_given_pairs_and_draws_none(place: Path) -> None:
    pairs = ROOT / "assets" / "demo-edit" / "train"
    changes = {
        "pretrained_model_name_or_path": ROOT / "assets" / "tiny-qwen-image-edit",
        "data_config__img_dir": pairs / "images",
        "data_config__control_dir": pairs / "control",
    }
    with pytest.raises(ConfigError, match="this model edits control pictures, of which prompts give none"):
        train(config_of(place, "edit", **changes))
    given = {"prior_preservation__prompts": "[]", "prior_preservation__folder": place / "pictures"}
    with pytest.raises(DataError, match=r"Give them beside it.*: data_config\.allow_missing_controls=true"):
        train(config_of(place, "edit", **changes, **given))


def test_nothing_is_drawn_for_pictures_that_cannot_be_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"data_config\.exclude names 'nobody'"):
        train(config_of(place, "with-nobody", data_config__exclude="[nobody]"))
    assert "draws" not in capsys.readouterr().out and not (place / "with-nobody" / "prior").exists()


def test_given_and_drawn_is_a_contradiction(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ConfigError, match=r"folder and prior_preservation\.prompts are both given"):
        config_of(tmp_path, "run", prior_preservation__folder=tmp_path / "pictures")
    with pytest.raises(ConfigError, match="has 'a cat' twice"):
        config_of(tmp_path, "run", prior_preservation__prompts="[a cat, a cat]")
