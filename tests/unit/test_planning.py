"""A transformer's config and files are compared by headers alone, before anything is built or encoded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.planning import check_transformer
from pixtune.storage.model_folder import ModelFolder
from tests.runs import ROOT

MODELS = ("tiny-qwen-image", "tiny-qwen-image-edit", "tiny-flux")


def open_copy(tmp_path: Path, name: str, **changes: Any) -> ModelFolder:
    source = ROOT / "assets" / name
    (tmp_path / "transformer").mkdir()
    shutil.copy(source / "model_index.json", tmp_path)
    config = json.loads((source / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, **changes}))
    file = "diffusion_pytorch_model.safetensors"
    (tmp_path / "transformer" / file).symlink_to(source / "transformer" / file)
    return ModelFolder(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_those_of_the_tensors(tmp_path: Path, name: str) -> None:
    folder = open_copy(tmp_path, name)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    assert check_transformer(family_of(folder), folder) == shapes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, "tensors differ"),
        ({"num_layers": 900}, "is absent and should be"),
        ({"num_attention_heads": 10**6}, "of shape"),
        ({"joint_attention_dim": 5}, "and should be"),
        ({"attention_head_dim": 0}, "layers have no sizes"),
        ({"num_attention_heads": -1}, "layers have no sizes"),
    ],
)
def test_a_config_of_another_transformer_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    folder = open_copy(tmp_path, name, **changes)
    with pytest.raises(WeightsError, match=words) as caught:
        check_transformer(family_of(folder), folder)
    assert str(tmp_path / "transformer") in str(caught.value)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    folder = open_copy(tmp_path, MODELS[0])
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    tensors = {**load_file(file), "evil.weight": torch.zeros(1)}
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"1 tensors differ, evil.weight among them, which is of shape \[1\]"):
        check_transformer(family_of(folder), folder)
