"""Models in several files: written as diffusers reads them, and never a mixture of two saves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import utils.fast_loading
from pixtune.errors import WeightsError, WriteError
from pixtune.storage import files, loading
from pixtune.storage.loading import load_safetensors_sharded, save_safetensors, save_safetensors_sharded, shard_files
from tests.runs import TINY_MODEL


def numbered(value: float = 1.0) -> dict[str, Tensor]:
    return {f"layer.{number}": torch.full((10,), value + number) for number in range(5)}  # 40 bytes each


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("max_shard_bytes", "sizes"), [(80, [2, 2, 1]), (119, [2, 2, 1]), (1, [1] * 5), (200, [5])])
def test_shards_come_back(tmp_path: Path, max_shard_bytes: int, sizes: list[int]) -> None:
    paths = save_safetensors_sharded(numbered(), tmp_path / "new" / "folder", max_shard_bytes)
    assert [len(load_file(path)) for path in paths] == sizes
    assert shard_files(tmp_path / "new" / "folder") == paths
    assert_same(load_safetensors_sharded(tmp_path / "new" / "folder"), numbered())


def test_diffusers_reads_them(tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    stock = QwenImageTransformer2DModel.from_pretrained(TINY_MODEL / "transformer")
    shutil.copy(TINY_MODEL / "transformer" / "config.json", tmp_path)
    paths = save_safetensors_sharded(stock.state_dict(), tmp_path, 200_000, stem="diffusion_pytorch_model")
    assert len(paths) > 3
    read, report = QwenImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(read.state_dict(), stock.state_dict())


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    stock = QwenImageTransformer2DModel.from_pretrained(TINY_MODEL / "transformer")
    stock.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(shard_files(tmp_path)) > 3
    assert_same(load_safetensors_sharded(tmp_path), stock.state_dict())


@pytest.mark.parametrize("first", [1, 80, 1000])
@pytest.mark.parametrize("second", [1, 80, 1000])
def test_a_second_save_replaces_the_first(tmp_path: Path, first: int, second: int) -> None:
    (tmp_path / "other.txt").write_text("not ours")
    save_safetensors_sharded(numbered(1.0), tmp_path, first)
    paths = save_safetensors_sharded(numbered(2.0), tmp_path, second)
    assert_same(load_safetensors_sharded(tmp_path), numbered(2.0))
    index = [tmp_path / "model.safetensors.index.json"] if len(paths) > 1 else []
    assert sorted(tmp_path.iterdir()) == sorted([*paths, *index, tmp_path / "other.txt"])


def test_the_old_index_is_gone_from_the_disk_before_anything_new_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted and what is written reach a disk in any order, but for a sync between them."""
    old = save_safetensors_sharded(numbered(1.0), tmp_path, 80)
    synced: list[set[Path]] = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append({*folder.iterdir()}))
    save_safetensors_sharded(numbered(2.0), tmp_path, 1)
    assert len(old) > 1 and synced[0] == {*old}


@pytest.mark.parametrize("first", [1, 80, 1000])
@pytest.mark.parametrize("second", [1, 80, 1000])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_two_saves_never_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, written: int
) -> None:
    save_safetensors_sharded(numbered(1.0), tmp_path, first)
    replacing, calls = files.replacing, []

    def full(path: Path) -> AbstractContextManager[BinaryIO]:
        calls.append(path)
        if len(calls) > written:
            raise WriteError("full")
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replacing", full)
        with contextlib.suppress(WriteError):
            save_safetensors_sharded(numbered(2.0), tmp_path, second)
    try:
        loaded = load_safetensors_sharded(tmp_path)
    except WeightsError as error:
        assert str(tmp_path) in str(error)
    else:
        assert_same(loaded, numbered(1.0 if len(calls) > written else 2.0))


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def leave_a_pickle(folder: Path) -> None:
    remove(folder, *[path.name for path in folder.iterdir()])
    (folder / "model.bin").write_bytes(b"")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "two files are missing": (
        lambda folder: remove(folder, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        r"lacks 2 of 3 files.*model-00001-of-00003\.safetensors, model-00003",
    ),
    "no index": (lambda folder: remove(folder, "model.safetensors.index.json"), "no .*index.json that says"),
    "one shard alone": (
        lambda folder: remove(
            folder, "model.safetensors.index.json",
            "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors",
        ),
        "no .*index.json that says",
    ),
    "two indexes": (
        lambda folder: [
            shutil.copy(folder / "model.safetensors.index.json", folder / name)
            for name in ("model.fp16.safetensors.index.json", "other.safetensors.index.json")
        ],
        r"several indexes: model\.safetensors\.index\.json, other",
    ),
    "a file above the folder": (
        lambda folder: rewrite_index(folder, lambda index: index["weight_map"].update(a="../../etc/passwd")),
        r"names a file outside its folder, '\.\./\.\./etc/passwd'",
    ),
    "a file from the root": (
        lambda folder: rewrite_index(folder, lambda index: index["weight_map"].update(a="/etc/passwd")),
        "outside its folder",
    ),
    "a file of another system's folder": (
        lambda folder: rewrite_index(folder, lambda index: index["weight_map"].update(a="..\\x.safetensors")),
        "outside its folder",
    ),
    "the folder itself": (
        lambda folder: rewrite_index(folder, lambda index: index["weight_map"].update(a="..")),
        "outside its folder",
    ),
    "an index without end": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 200_000),
        "not valid JSON",
    ),
    "a list for an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "not a JSON object but a list",
    ),
    "a pipe for an index": (
        lambda folder: put_a_pipe(folder / "model.safetensors.index.json"),
        "a named pipe, not a file",
    ),
    "an index of nothing": (lambda folder: rewrite_index(folder, lambda index: index.clear()), "no weight_map"),
    "another model's index": (
        lambda folder: rewrite_index(
            folder, lambda index: index["weight_map"].update(extra="model-00001-of-00003.safetensors")
        ),
        "1 tensors, extra among them, are not in the files",
    ),
    "a damaged shard": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"PK\x03\x04rest"),
        r"model-00002-of-00003\.safetensors is no safetensors file",
    ),
    "pickles": (
        lambda folder: leave_a_pickle(folder),
        r"holds only model\.bin, which may run",
    ),
    "nothing": (lambda folder: shutil.rmtree(folder), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize(("break_folder", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, break_folder: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    save_safetensors_sharded(numbered(), folder, 80)
    break_folder(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        load_safetensors_sharded(folder)
    assert str(folder) in str(caught.value)


def test_a_single_file_says_its_format(tmp_path: Path) -> None:
    save_safetensors(numbered(), tmp_path / "f.safetensors", {"step": "3"})
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    assert_same(load_file(tmp_path / "f.safetensors"), numbered())


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(WriteError, match="could not be"):
        save_safetensors_sharded(numbered(), tmp_path / "taken", 80)


def test_the_documented_path_leads_to_the_same_functions() -> None:
    for name in utils.fast_loading.__all__:
        assert getattr(utils.fast_loading, name) is getattr(loading, name)
    assert {"load_safetensors", "save_safetensors", "is_fastsafetensors_available"} <= set(utils.fast_loading.__all__)


PLAIN, HALF = 1.0, 2.0


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "model.fp16.safetensors"],
        ["model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"],
        ["model.safetensors", "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ["model.safetensors", "model-00001-of-00001.fp16.safetensors"],
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
    ],
)
def test_the_plain_weights_are_taken_where_a_variant_lies_beside_them(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save_safetensors({"a": torch.full((1,), PLAIN if name == names[0] else HALF)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"a": names[1]}}))
    assert load_safetensors_sharded(tmp_path)["a"].item() == PLAIN


def test_shards_without_a_variant_are_taken_where_those_of_a_variant_lie_beside_them(tmp_path: Path) -> None:
    save_safetensors_sharded(numbered(), tmp_path, 80)
    save_safetensors({"a": torch.ones(1)}, tmp_path / "model.fp16-00001-of-00001.safetensors")
    for name in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"):
        index = {"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}
        (tmp_path / name).write_text(json.dumps(index))
    assert_same(load_safetensors_sharded(tmp_path), numbered())


def test_variants_without_a_plain_one_are_a_choice_that_is_left_to_the_user(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        save_safetensors({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"several variants .*bf16.*fp16"):
        load_safetensors_sharded(tmp_path)
    (tmp_path / "model.bf16.safetensors").unlink()
    assert load_safetensors_sharded(tmp_path)["a"].item() == 1
