"""Files of others are read only where they are files, and only so far."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pixtune.inputs.reading import check_regular, check_size, read_bounded, read_lines


def test_a_file_of_just_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_bounded(tmp_path / "a", 100) == b"x" * 100
    with pytest.raises(OSError, match="it has more than 99 bytes"):
        read_bounded(tmp_path / "a", 99)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_bounded(tmp_path / "b", 1) == b"x"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("pipe", "a named pipe"), ("socket", "a socket"), ("device", "a device"), ("folder", "a folder")],
)
def test_what_is_no_file_is_named_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(tmp_path)  # a socket's path has 108 bytes at most
        listening.bind("x.png")
        listening.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for read in (check_regular, lambda path: read_bounded(path, 10)):
        with pytest.raises(OSError, match=f"it is {words}, not a file"):
            read(path)


def test_an_endless_file_ends_at_the_limit() -> None:
    path = Path("/proc/self/pagemap")  # a regular file of size 0 that never ends
    if not path.exists():
        pytest.skip("no such file on this system")
    with pytest.raises(OSError):
        read_bounded(path, 10)


def test_circles_of_links_are_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError):
        check_regular(tmp_path / "a")


def test_lines_end_at_line_feeds_and_long_ones_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(
        b"ab\r\n\xe2\x80\xa8c\n" + b"x" * 9 + b"\n" + b"y" * 3_000_000 + b"\n12345678\n" + b"z" * 7
    )
    lines = list(read_lines(tmp_path / "a", 4_000_000, 9))
    assert lines == [b"ab\r\n", b"\xe2\x80\xa8c\n", None, None, b"12345678\n", b"z" * 7]
    with pytest.raises(OSError, match="it has more than 100 bytes"):
        list(read_lines(tmp_path / "a", 100, 9))


def test_a_file_of_a_terabyte_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a").open("wb") as stream:
        stream.truncate(2**40)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    for read in (check_size, read_bounded):
        with pytest.raises(OSError, match="1 MiB"):
            read(tmp_path / "a", 2**20)
