"""Requests to a run by files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.errors import WriteError
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.requests import REQUESTS, ask, is_asked, withdraw


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_stands_until_it_is_withdrawn(tmp_path: Path, request_: str) -> None:
    assert not is_asked(tmp_path, request_)  # type: ignore[arg-type]
    for _ in range(2):
        ask(tmp_path, request_)  # type: ignore[arg-type]
    assert is_asked(tmp_path, request_)  # type: ignore[arg-type]
    for _ in range(2):
        withdraw(tmp_path, request_)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_requests_end_with_their_session_and_leave_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "run"
    with OutputLock(folder) as lock:
        lock.acquire()
        ask(folder, "stop_now")
    assert not (tmp_path / "new").exists(), "as the lock has found it"
    folder.mkdir(parents=True)
    for request in REQUESTS:
        ask(folder, request)
    with OutputLock(folder) as lock:
        lock.acquire()
        assert [request for request in REQUESTS if is_asked(folder, request)] == ["sample_now"]
        (folder / "pause").mkdir()
    assert "pause asks a run that has ended, and cannot be deleted" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="pause could not be written"):
        ask(tmp_path / "nowhere", "pause")
