"""A file is written whole or not at all, and stays through a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixtune.errors import PixtuneError, WriteError
from pixtune.files import save_safetensors, user_cache_folder, write_atomically


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_made_and_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_atomically(path, b"old and longer")
    write_atomically(path, b"new")
    assert files_below(tmp_path) == {"a/b/file.json": b"new"}


def test_the_old_file_stands_until_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    seen: list[tuple[str, bytes]] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        seen.append((name, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, b"new")
    assert [content for _, content in seen] == [b"old", b"new"]
    assert [name == tmp_path.name for name, _ in seen] == [False, True], "first the file, then its folder"


@pytest.mark.parametrize("call", [1, 2], ids=["the file", "the folder"])
def test_a_full_disk_is_one_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    calls: list[int] = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"file could not be written \(No space left on device\)") as caught:
        write_atomically(path, b"new")
    assert isinstance(caught.value, PixtuneError), "the command line shows it without a traceback"
    assert files_below(tmp_path) == {"file": b"old" if call == 1 else b"new"}


def test_a_folder_that_is_a_file_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(WriteError, match="could not be written"):
        write_atomically(tmp_path / "taken" / "file", b"new")
    assert files_below(tmp_path) == {"taken": b"mine"}


def test_tensors_of_any_layout_come_back_with_their_metadata(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"turned": base.T, "part": base[:, 1:3], "half": base.detach().bfloat16(), "number": torch.tensor(7)}
    save_safetensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach())
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "3"}


def test_where_a_user_keeps_what_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache_folder() == tmp_path / "cache" / "pixtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / ".cache" / "pixtune"
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert user_cache_folder() is None
