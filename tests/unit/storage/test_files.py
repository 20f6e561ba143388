"""A file is written whole or not at all, and stays through a power cut."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from pixtune.errors import PixtuneError, WriteError
from pixtune.storage.files import (
    STALE_SECONDS,
    check_writable,
    remove_stale,
    remove_temporary,
    replacing,
    user_cache_folder,
    write_atomically,
    write_if_possible,
)


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


def test_what_only_saves_time_is_written_where_that_is_possible(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_if_possible(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not caplog.text
    write_if_possible(tmp_path / "file" / "below", b"new")
    assert f"{tmp_path / 'file' / 'below'} could not be written" in caplog.text and "goes on without it" in caplog.text


def test_a_file_that_need_not_be_durable_is_whole_and_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with replacing(tmp_path / "file", durable=False) as stream:
        stream.write(b"new")
        assert not (tmp_path / "file").exists()
    assert files_below(tmp_path) == {"file": b"new"} and not synced
    with replacing(tmp_path / "file") as stream:
        stream.write(b"newer")
    assert len(synced) == 2, "the file and its folder"


def test_any_other_error_within_the_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == {"file": b"old"}


def test_where_a_user_keeps_what_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache_folder() == tmp_path / "cache" / "pixtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / ".cache" / "pixtune"
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert user_cache_folder() is None


# ---- whether a folder can be written to


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "x")
    check_writable(tmp_path, "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    check_writable(tmp_path / "a", "x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["file", "file/run", "dangling", "loop/run", "x" * 300, "proc"])
def test_what_stands_in_the_way_is_named_with_the_remedy(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "proc").symlink_to("/proc")
    folder = tmp_path / place
    if place == "dangling":
        (tmp_path / "nowhere").touch()
    if place == "proc":
        folder = folder / "run"  # a folder that nobody, not even root, may write to
    with pytest.raises(WriteError, match=r"could not be written to \(.+\)[.:].* Take another\.") as caught:
        check_writable(folder, "Take another.")
    assert str(folder) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "nowhere") == [
        "dangling",
        "file",
        "loop",
        "proc",
    ]


@pytest.mark.parametrize(
    ("code", "question"),
    [
        (errno.ENOSPC, "is the disk full?"),
        (errno.EDQUOT, "is the disk full?"),
        (errno.EROFS, "may this user write there?"),
        (errno.EACCES, "may this user write there?"),
    ],
)
def test_a_disk_that_refuses_shows_although_permissions_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, question: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    for check in (lambda: check_writable(tmp_path / "run", ""), lambda: write_atomically(tmp_path / "file", b"x")):
        with pytest.raises(WriteError, match=question.replace("?", r"\?")):
            check()
        assert not list(tmp_path.iterdir())


def test_what_a_killed_process_never_finished_is_cleared_away(tmp_path: Path) -> None:
    write_atomically(tmp_path / "lora.safetensors", b"whole")
    process = os.fork()
    if process == 0:
        with replacing(tmp_path / "lora.safetensors") as stream:
            stream.write(b"ha")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(files_below(tmp_path)) == 2
    remove_temporary(tmp_path)
    remove_temporary(tmp_path / "no folder")
    assert files_below(tmp_path) == {"lora.safetensors": b"whole"}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers, whose processes have the same numbers."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "entry"
    with replacing(path, durable=False) as first:
        first.write(b"the sa")
        with replacing(path, durable=False) as second:
            assert len(files_below(tmp_path)) == 2
            second.write(b"the same")
        assert path.read_bytes() == b"the same", "whole, while the other one is half"
        first.write(b"me")
    assert files_below(tmp_path) == {"entry": b"the same"}


def test_a_rename_whose_answer_was_lost_has_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS over a bad line: the server renames, the client asks again and is told that there is nothing to rename."""
    real = Path.replace

    def twice(self: Path, target: Path) -> None:
        real(self, target)
        real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", twice)
        write_atomically(tmp_path / "entry", b"whole")
    assert files_below(tmp_path) == {"entry": b"whole"}

    def taken_away(self: Path, target: Path) -> None:
        self.unlink()
        real(self, target)

    monkeypatch.setattr(Path, "replace", taken_away)  # another file of that name is there, and is not this one
    with pytest.raises(WriteError, match="No such file"):
        write_atomically(tmp_path / "entry", b"newer")
    assert files_below(tmp_path) == {"entry": b"whole"}


def test_what_killed_writers_left_goes_by_its_age(tmp_path: Path) -> None:
    old, young, no_temporary = (tmp_path / "ab" / name for name in (".x.123.tmp", ".y.456.tmp", "z.safetensors"))
    old.parent.mkdir()
    for path in (old, young, no_temporary):
        path.write_bytes(b"half")
    long_ago = young.stat().st_mtime - STALE_SECONDS - 60
    for path in (old, no_temporary):
        os.utime(path, (long_ago, long_ago))
    remove_stale(tmp_path)
    remove_stale(tmp_path / "no folder")
    assert sorted(files_below(tmp_path)) == ["ab/.y.456.tmp", "ab/z.safetensors"]
