"""A damaged part of a model is one message that names it, whatever the library would have raised; a sound one loads."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixtune.engine.load import load_transformer
from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.storage.loading.parts import check_parts
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from tests.runs import ROOT

PLACEMENT = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture(params=["tiny-qwen-image", "tiny-flux"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFolder:
    shutil.copytree(ROOT / "assets" / request.param, tmp_path / "model")
    return open_model_folder(str(tmp_path / "model"))


def weights(part: Path) -> Path:
    (file,) = part.glob("*.safetensors")
    return file


def rewrite_header(part: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = weights(part)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def claim_ten_terabytes(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[name] = {"dtype": "F32", "shape": [10 * 2**38], "data_offsets": [0, 10 * 2**40]}


def rewrite_tensors(part: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights(part))
    change(tensors)
    save_file(tensors, weights(part), {"format": "pt"})


def reshape_first(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 5, 7)


def take_one_out(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(name for name in sorted(tensors) if "visual" not in name and "lm_head" not in name))


def put_a_folder_in_place(part: Path) -> None:
    weights(part).rename(part / "x")
    (part / "model.safetensors").mkdir()


HEADERS: dict[str, Callable[[Path], object]] = {
    "a header that claims 10 TB": lambda part: rewrite_header(part, claim_ten_terabytes),
    "an empty file": lambda part: weights(part).write_bytes(b""),
    "a file cut off": lambda part: weights(part).write_bytes(weights(part).read_bytes()[:-100]),
    "noise": lambda part: weights(part).write_bytes(bytes(range(256)) * 8),
    "a web page": lambda part: weights(part).write_bytes(b"<html>404</html>"),
    "a header of lists": lambda part: rewrite_header(part, lambda header: header.update(x=[1])),
    "no weights": lambda part: weights(part).unlink(),
    "a folder in place of the file": put_a_folder_in_place,
}
CONTENTS: dict[str, Callable[[Path], object]] = {
    "a tensor is missing": lambda part: rewrite_tensors(part, take_one_out),
    "a tensor has another shape": lambda part: rewrite_tensors(part, reshape_first),
    "the config is no JSON": lambda part: (part / "config.json").write_text("{"),
    "the config is a list": lambda part: (part / "config.json").write_text("[1]"),
    "the config has words for numbers": lambda part: (part / "config.json").write_text(
        (part / "config.json").read_text().replace(": 4", ': "four"').replace(": 8", ': "eight"').replace(": 2", ": []")
    ),
}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("kind", HEADERS)
def test_damage_to_weight_files_shows_before_anything_is_loaded(folder: ModelFolder, part: str, kind: str) -> None:
    HEADERS[kind](folder.path / part)
    with pytest.raises(WeightsError, match=part):
        check_parts(folder, ("tokenizer", "text_encoder", "vae"))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_damage_to_what_the_files_say_is_a_message_that_names_the_part(
    folder: ModelFolder, part: str, kind: str
) -> None:
    CONTENTS[kind](folder.path / part)
    family = family_of(folder)
    load = family.load_autoencoder if part == "vae" else family.load_text_encoder
    with pytest.raises(WeightsError, match=part):
        load(folder, PLACEMENT)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": 5}'])
def test_a_damaged_tokenizer_is_a_message_that_names_it(folder: ModelFolder, damage: str) -> None:
    name = "tokenizer_2" if (folder.path / "tokenizer_2").is_dir() else "tokenizer"
    for file in (folder.path / name).iterdir():
        if file.name in ("tokenizer.json", "spiece.model", "vocab.json"):
            file.write_text(damage)
    with pytest.raises(WeightsError, match=f"{name} cannot be loaded"):
        family_of(folder).load_text_encoder(folder, PLACEMENT)


def test_a_tokenizer_of_another_model_is_a_message_that_names_it(folder: ModelFolder) -> None:
    """One word more than the text encoder has features of, in each tokenizer of the model."""
    for name in sorted(path.name for path in folder.path.glob("tokenizer*")):
        file = folder.path / name / "tokenizer.json"
        before = file.read_text()
        told = json.loads(before)
        encoder = name.replace("tokenizer", "text_encoder")
        config = json.loads((folder.path / encoder / "config.json").read_text())
        num_words = config.get("text_config", config)["vocab_size"]
        words = told["model"]["vocab"]
        for number in range(len(words), num_words + 1):
            if isinstance(words, dict):
                words[f"<{number}>"] = number
            else:
                words.append([f"<{number}>", 0.0])
        file.write_text(json.dumps(told))
        with pytest.raises(WeightsError, match=rf"{name} has words of numbers from 0 to \d+, and its text encoder"):
            family_of(folder).load_text_encoder(folder, PLACEMENT)
        file.write_text(before)


@pytest.mark.parametrize("layout", ["beside the plain one", "alone"])
def test_a_variant_of_the_autoencoder_loads_as_the_stock_class_loads_it(folder: ModelFolder, layout: str) -> None:
    plain = weights(folder.path / "vae")
    variant = plain.with_name(plain.name.replace(".safetensors", ".fp16.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(plain).items()}, variant, {"format": "pt"})
    wanted = load_file(plain if layout == "beside the plain one" else variant)
    if layout == "alone":
        plain.unlink()
    model = family_of(folder).load_autoencoder(folder, PLACEMENT)
    name, tensor = next(iter(wanted.items()))
    assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("change", [{"num_attention_heads": "four"}, {"num_layers": None}, {"in_channels": [1]}])
def test_a_transformers_config_of_words_is_a_message_that_names_it(folder: ModelFolder, change: dict[str, Any]) -> None:
    path = folder.path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match="transformer"):
        load_transformer(family_of(folder), folder, PLACEMENT)
