"""Printing that cannot end a run."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from pixtune.console import SafeStream


def stream_to(number: int, encoding: str = "utf-8") -> SafeStream:
    written = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return SafeStream(written, encoding=encoding, errors="backslashreplace", line_buffering=True)


def test_letters_that_an_encoding_lacks_are_escaped() -> None:
    reader, writer = os.pipe()
    print("Größe 中 \udc80", file=stream_to(writer, "cp1252"), flush=True)
    os.close(writer)
    assert os.read(reader, 100) == "Größe \\u4e2d \\udc80\n".encode("cp1252")


def test_a_reader_that_has_gone_is_noted_once_and_nothing_fails_later(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = stream_to(writer)
    for _ in range(5000):
        print("a line", file=stream)
    stream.flush()
    assert stream.problem == "Broken pipe"
    os.write(writer, b"what a library prints")  # the descriptor itself leads nowhere now
    stream.close()
    os.close(writer)
    assert capfd.readouterr().err.count("can no longer be printed (Broken pipe)") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full disk to print to")
def test_a_full_disk_may_have_room_again(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stream = stream_to(full)
    print("lost or late", file=stream)
    assert stream.problem == "No space left on device"
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, full)
    print("again", file=stream)
    assert "again\n" in (tmp_path / "log").read_text()


def test_streams_of_notebooks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixtune.console import make_printing_safe

    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stderr", own)
    make_printing_safe()
    assert sys.stdout is own and sys.stderr is own
