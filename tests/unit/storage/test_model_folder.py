"""Model folders: what is found, what is refused and by which name, what their content is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.storage import files
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from tests.runs import TINY_MODEL


def test_parameters_are_counted_from_headers_alone() -> None:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(TINY_MODEL / "transformer")
    assert ModelFolder(TINY_MODEL).num_parameters("transformer") == sum(p.numel() for p in model.parameters())


def test_the_fingerprint_follows_every_byte(tmp_path: Path) -> None:
    shutil.copytree(TINY_MODEL / "tokenizer", tmp_path / "model" / "tokenizer")
    folder = ModelFolder(tmp_path / "model")
    before = folder.fingerprint("tokenizer", tmp_path / "memo")
    assert before == ModelFolder(TINY_MODEL).fingerprint("tokenizer")
    file = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert folder.fingerprint("tokenizer", tmp_path / "memo") != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:5] + bytes([text[5] ^ 1]) + text[6:],
        lambda text: bytes(len(text)),
        lambda text: text[:40],
        lambda text: text[:64],  # what version 0.1.0 wrote
        lambda text: b"",
        lambda text: b"\xff" + text,
    ],
)
def test_a_large_files_digest_is_remembered_and_a_damaged_memo_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memos = tmp_path / "model", tmp_path / "memo"
    (folder / "vae").mkdir(parents=True)
    with (folder / "vae" / "weights.safetensors").open("wb") as stream:
        stream.truncate(64 * 2**20)
    before = ModelFolder(folder).fingerprint("vae", memos)
    assert before == ModelFolder(folder).fingerprint("vae")
    with monkeypatch.context() as patch:
        patch.setattr(files, "file_digest", None)
        assert ModelFolder(folder).fingerprint("vae", memos) == before, "the file was hashed again"
    (memo,) = memos.iterdir()
    written = memo.read_bytes()
    memo.write_bytes(damage(written))
    assert ModelFolder(folder).fingerprint("vae", memos) == before
    assert memo.read_bytes() == written


def test_another_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(WeightsError, match="StableDiffusionPipeline"):
        family_of(ModelFolder(tmp_path))


def test_a_language_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    with pytest.raises(WeightsError, match=r"Qwen2_5_VLForConditionalGeneration.*not an image pipeline"):
        open_model_folder(str(tmp_path))


def test_missing_parts_are_listed(tmp_path: Path) -> None:
    shutil.copytree(TINY_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("vae", "scheduler", "*.safetensors"))
    with pytest.raises(WeightsError, match="folders scheduler, vae are missing"):
        open_model_folder(str(tmp_path / "model"))


def test_a_name_that_is_nowhere_says_what_was_tried() -> None:
    with pytest.raises(WeightsError, match="is no folder here"):
        open_model_folder("nobody/nothing-of-that-name")


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(WeightsError, match="cut off"):
        ModelFolder(tmp_path).num_parameters("transformer")
