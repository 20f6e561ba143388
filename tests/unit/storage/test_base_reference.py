"""A base model is named by its hub name or folder, and recognized by samples of its content, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixtune.storage.base_reference import (
    BaseReference,
    copy_without_paths,
    refer_to_base,
    sampled_fingerprint,
    steps_fingerprint,
    without_path,
)
from pixtune.storage.model_folder import ModelFolder


@pytest.fixture(scope="module")
def shipped(repo_root: Path) -> ModelFolder:
    return ModelFolder(repo_root / "assets" / "tiny-qwen-image")


@pytest.fixture
def copy(shipped: ModelFolder, tmp_path: Path) -> ModelFolder:
    shutil.copytree(shipped.path, tmp_path / "elsewhere")
    return ModelFolder(tmp_path / "elsewhere")


def test_a_hub_name_stays_and_a_folder_becomes_its_last_part(
    shipped: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refer_to_base("Qwen/Qwen-Image", shipped).name == "Qwen/Qwen-Image"
    assert refer_to_base(f"{shipped.path}/", shipped).name == "tiny-qwen-image"
    monkeypatch.setenv("HOME", str(shipped.path.parent))
    assert refer_to_base("~/tiny-qwen-image", shipped).name == "tiny-qwen-image"
    monkeypatch.chdir(shipped.path.parent.parent)
    assert refer_to_base("assets/tiny-qwen-image", shipped).name == "tiny-qwen-image", "looks like a hub name"
    monkeypatch.chdir(shipped.path)
    assert refer_to_base(".", ModelFolder(Path("."))).name == "tiny-qwen-image"


@pytest.mark.parametrize(
    "path", ["/srv/a/model", "/srv/a/model/", "~/model", "../model", r"D:\people\a\model", "runs/model", "model"]
)
def test_a_paths_last_part(path: str) -> None:
    assert without_path(path) == "model"


def test_a_published_models_name_is_no_path() -> None:
    assert without_path("Qwen/Qwen-Image") == "Qwen/Qwen-Image"
    assert without_path("/srv/a/Qwen/Qwen-Image") == "Qwen-Image"


def test_an_unknown_fingerprint_is_left_out() -> None:
    assert BaseReference("a", None).entries("x.") == {"x.base_model": "a"}
    assert BaseReference("a", "1").entries() == {"base_model": "a", "base_model_hash": "1"}


def test_a_copy_has_the_same_fingerprint_whatever_its_config_says_of_its_origin(
    shipped: ModelFolder, copy: ModelFolder
) -> None:
    config = copy.path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "/elsewhere", "_more": 1}))
    assert sampled_fingerprint(copy) == sampled_fingerprint(shipped)


def test_other_weights_and_another_config_have_another_fingerprint(shipped: ModelFolder, copy: ModelFolder) -> None:
    (weights,) = (copy.path / "transformer").glob("*.safetensors")
    original = weights.read_bytes()
    save_file({name: torch.nextafter(t, t + 1) for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert weights.stat().st_size == len(original)
    assert sampled_fingerprint(copy) != sampled_fingerprint(shipped)
    weights.write_bytes(original)
    config = copy.path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 99}))
    assert sampled_fingerprint(copy) != sampled_fingerprint(shipped)


def test_every_layer_counts_and_the_division_into_files_does_not(shipped: ModelFolder, copy: ModelFolder) -> None:
    """One number of each tensor in turn: its last, which lies in no sample of the file as a whole."""
    (path,) = (copy.path / "transformer").glob("*.safetensors")
    original = load_file(path)
    names = sorted(original)
    for name in (names[0], names[len(names) // 2], names[-1], max(names, key=lambda name: original[name].numel())):
        changed = original[name].clone()
        changed.view(-1)[-1] += 1
        save_file({**original, name: changed}, path, {"format": "pt"})
        assert sampled_fingerprint(copy) != sampled_fingerprint(shipped), name
    path.unlink()
    halves = {f"part-{number}.safetensors": names[number::2] for number in range(2)}
    for file, part in halves.items():
        save_file({name: original[name] for name in part}, path.with_name(file), {"format": "pt"})
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert sampled_fingerprint(copy) == sampled_fingerprint(shipped)


def test_two_tensors_that_changed_places_are_another_model(shipped: ModelFolder, copy: ModelFolder) -> None:
    (path,) = (copy.path / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    one, other = [name for name in tensors if name.endswith("attn.to_q.weight")][:2]
    save_file({**tensors, one: tensors[other], other: tensors[one]}, path, {"format": "pt"})
    assert sampled_fingerprint(copy) != sampled_fingerprint(shipped)


def test_steps_take_the_schedulers_config_too_and_nothing_else(shipped: ModelFolder, copy: ModelFolder) -> None:
    assert steps_fingerprint(copy) == steps_fingerprint(shipped)
    config = copy.path / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_diffusers_version": "9"}))
    (copy.path / "tokenizer" / "more.txt").write_text("encodings name this")
    assert steps_fingerprint(copy) == steps_fingerprint(shipped)
    config.write_text(json.dumps({**values, "max_shift": 0.1}))
    assert steps_fingerprint(copy) != steps_fingerprint(shipped)
    assert sampled_fingerprint(copy) == sampled_fingerprint(shipped), "which exported files name"


def test_a_folder_without_weights_is_known_by_its_config(copy: ModelFolder) -> None:
    for file in (copy.path / "transformer").glob("*.safetensors"):
        file.unlink()
    assert len(sampled_fingerprint(copy)) == 16


def test_copies_of_json_lose_paths_and_nothing_else(tmp_path: Path) -> None:
    before = {
        "_name_or_path": "/srv/jürgen/models/base",
        "inner": {"tokenizer_file": r"D:\people\j\tokenizer.json", "pad_dir": ""},
        "chat_template": "{{ '/srv' }}",
        "vocab_file": "vocab.json",
        "weight_map": {"a.path": "model.safetensors"},
        "path": None,
    }
    for ascii_only in (True, False):
        (tmp_path / "one.json").write_text(json.dumps(before, ensure_ascii=ascii_only))
        copy_without_paths(str(tmp_path / "one.json"), str(tmp_path / "other.json"))
        after = json.loads((tmp_path / "other.json").read_text())
        expected = {**before, "_name_or_path": "base", "inner": {"tokenizer_file": "tokenizer.json", "pad_dir": ""}}
        assert after == expected


@pytest.mark.parametrize("name", ["merges.txt", "broken.json"])
def test_what_is_no_json_is_copied_byte_for_byte(name: str, tmp_path: Path) -> None:
    data = b'"a_path": "\xff/b"\r\n'
    (tmp_path / name).write_bytes(data)
    copy_without_paths(str(tmp_path / name), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
