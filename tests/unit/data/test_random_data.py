"""Stand-in data of runs with random weights: what is held out is not what is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from pixtune.bench.synthetic import write_pictures
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, ValidationConfig
from pixtune.data.prepare import prepare_data
from pixtune.data.prepared import PreparedData
from pixtune.families import family_of
from pixtune.storage.model_folder import open_model_folder
from tests.runs import ROOT


def prepared(folder: Path, validation: ValidationConfig, model: str = "tiny-qwen-image-edit") -> PreparedData:
    opened = open_model_folder(str(ROOT / "assets" / model))
    config = TrainConfig(
        pretrained_model_name_or_path=str(opened.path),
        output_dir=folder / "run",
        max_train_steps=1,
        random_weights=True,
        validation=validation,
        data_config=DataConfig(
            img_dir=folder / "trained" / "images",
            control_dir=folder / "trained" / "control_0" if model.endswith("edit") else None,
            control_size=64,
            img_size=64,
        ),
    )
    return prepare_data(config, family_of(opened), opened, Accelerator(cpu=True))


@pytest.mark.parametrize("in_folder_of_their_own", [False, True])
def test_held_out_pictures_are_draws_of_their_own(tmp_path: Path, in_folder_of_their_own: bool) -> None:
    write_pictures(tmp_path / "trained", 64, num_pictures=4, num_controls=1, num_words=1)
    write_pictures(tmp_path / "held_out", 64, num_pictures=2, num_controls=1, num_words=1)
    for path in (tmp_path / "held_out" / "images").glob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")  # copies of what is held out would not be trained on
    if in_folder_of_their_own:
        data = prepared(tmp_path, ValidationConfig(held_out_dir=tmp_path / "held_out" / "images"))
    else:
        data = prepared(tmp_path, ValidationConfig(held_out=0.5))
    num_trained = len(data.buckets)
    assert (num_trained, len(data.held_out)) == ((4, 2) if in_folder_of_their_own else (2, 2))
    latents = [data.reader.read_latents(example, 0).mean_BCHW for example in range(num_trained)]
    latents += [control for example in range(num_trained) for control in data.reader.read_controls(example, 0)]
    texts = [data.reader.read_text(example, 0, caption) for example in range(num_trained) for caption in (0, None)]
    for picture in data.held_out:
        for drawn in (picture.latents_1CHW, *picture.controls):
            assert drawn.shape == latents[0].shape
            assert not any(drawn.equal(trained) for trained in latents)
            latents.append(drawn)
        assert len(picture.controls) == 1
        assert not any(picture.conditioning["prompt_embeds"].equal(text["prompt_embeds"]) for text in texts)
        texts.append(picture.conditioning)


def test_captions_have_a_token_for_each_word_where_they_have_lengths_of_their_own(tmp_path: Path) -> None:
    write_pictures(tmp_path / "trained", 64, num_pictures=3, num_controls=1, num_words=1)
    for number, words in enumerate((3, 70, 400)):
        (tmp_path / "trained" / "images" / f"{number}.txt").write_text(" ".join(["word"] * words))
    data = prepared(tmp_path, ValidationConfig(), "tiny-qwen-image")
    lengths = [len(data.reader.read_text(example, 0, 0)["prompt_embeds"]) for example in range(3)]
    assert lengths == [3, 70, 256] and data.most_text_tokens == 256 and data.captions.differ
    assert [set(size.turns_by_length) for size in data.captions.sizes] == [{3, 70, 256}]
    padded = prepared(tmp_path, ValidationConfig(), "tiny-flux")
    assert {len(padded.reader.read_text(example, 0, 0)["prompt_embeds"]) for example in range(3)} == {256}
    assert not padded.captions.differ
