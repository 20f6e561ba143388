"""Two runs never share an output folder, and no lock outlives its run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pixtune.errors import InUseError, WriteError
from pixtune.storage import output_lock
from pixtune.storage.output_lock import Holder, OutputLock, judge, this_process

HOLD = """
import sys, time
from pathlib import Path
from pixtune.storage.output_lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
lock.acquire()
lock.step = 37
print("held", flush=True)
time.sleep(100)
"""


def started(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock on a folder. It imports nothing large, and so starts at once."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write(folder: Path, holder: Holder, age_seconds: float = 0.0) -> None:
    path = folder / output_lock.FILE_NAME
    path.write_text(json.dumps(asdict(holder)))
    now = time.time()
    os.utime(path, (now - age_seconds, now - age_seconds))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network ones are."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(output_lock, "STALE_SECONDS", 0.6)


# ---- the decision

ME = Holder("m", "here", 100, "today", boot="b1", pid_space="p1", started="s1")
ANOTHER = {
    "the same kernel and namespace": replace(ME, name="o", pid=99),
    "another container": replace(ME, name="o", pid=99, pid_space="p2"),
    "another machine": replace(ME, name="o", host="there", boot="b2"),
    "before a reboot": replace(ME, name="o", boot="b0"),
    "a machine without boot names": replace(ME, name="o", host="there", boot=None),
}


@pytest.mark.parametrize(
    ("whose", "locked", "is_running", "verdict"),
    [
        ("the same kernel and namespace", False, False, "alive"),  # by a child that has its lock
        ("another machine", False, False, "alive"),  # a network file system that has locks
        ("the same kernel and namespace", True, True, "dead"),  # another process has its number
        ("another container", True, False, "dead"),
        ("another machine", True, True, "unknown"),
        ("before a reboot", True, True, "unknown"),  # or another machine of the same name
        ("a machine without boot names", True, True, "unknown"),
        ("the same kernel and namespace", None, True, "alive"),
        ("the same kernel and namespace", None, False, "dead"),
        ("another container", None, False, "unknown"),
        ("another machine", None, False, "unknown"),
    ],
)
def test_who_is_alive(whose: str, locked: bool | None, is_running: bool, verdict: str) -> None:
    assert judge(ANOTHER[whose], ME, locked, lambda holder: is_running) == verdict


def test_an_empty_file_is_nobodys_unless_the_system_says_otherwise() -> None:
    assert judge(None, ME, True, lambda holder: True) == "dead"
    assert judge(None, ME, None, lambda holder: True) == "dead"
    assert judge(None, ME, False, lambda holder: False) == "alive"


def test_a_machine_that_names_no_boots_is_known_by_its_host() -> None:
    mine, other = (replace(ME, boot=None, name=name) for name in "mo")
    assert judge(other, mine, True, lambda holder: True) == "dead"
    assert judge(replace(other, host="there"), mine, True, lambda holder: True) == "unknown"


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone() -> None:
    me = this_process()
    assert output_lock.is_running(me)
    assert not output_lock.is_running(replace(me, started="1")), "an earlier process of the same number"
    with subprocess.Popen(["sleep", "100"]) as child:
        holder = replace(me, pid=child.pid, started=output_lock.start_of(child.pid))
        assert output_lock.is_running(holder)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not output_lock.is_running(holder) or holder.started is None, "dead, and not yet waited for"
    assert not output_lock.is_running(holder)


# ---- the lock itself


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with OutputLock(folder) as first:
        first.acquire()
        with OutputLock(folder) as second, pytest.raises(InUseError) as caught:
            second.acquire()
        assert f"(process {os.getpid()}, since 20" in str(caught.value) and str(folder) in str(caught.value)
        assert "choose another output_dir" in str(caught.value)
        assert (folder / output_lock.FILE_NAME).exists(), "the second has not taken it away"
        first.check()
    with OutputLock(folder) as third:
        third.acquire()


def test_another_spelling_of_the_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with OutputLock(tmp_path / "link") as first, OutputLock(tmp_path / "x" / ".." / "out") as second:
        first.acquire()
        (tmp_path / "x").mkdir()
        with pytest.raises(InUseError):
            second.acquire()


def test_a_folder_that_was_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    with OutputLock(tmp_path / "a" / "b") as lock:
        lock.acquire()
    assert list(tmp_path.iterdir()) == []
    with OutputLock(tmp_path / "a" / "b") as lock:
        lock.acquire()
        (tmp_path / "a" / "b" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_blocks_nobody(tmp_path: Path) -> None:
    process = started(tmp_path / "out")
    with OutputLock(tmp_path / "out") as lock:
        with pytest.raises(InUseError):
            lock.acquire()
        process.send_signal(signal.SIGSTOP)  # neither dead nor able to write a heartbeat
        with pytest.raises(InUseError):
            lock.acquire()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert (tmp_path / "out" / output_lock.FILE_NAME).exists()
        begun = time.monotonic()
        lock.acquire()
        assert time.monotonic() - begun < 5


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with OutputLock(tmp_path / "file" / "out") as lock, pytest.raises(WriteError, match=r"output_dir: .*out cannot be"):
        lock.acquire()
    (tmp_path / "out" / output_lock.FILE_NAME).mkdir(parents=True)
    with OutputLock(tmp_path / "out") as lock, pytest.raises(WriteError, match="cannot be written to"):
        lock.acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"\0" * 5000])
def test_a_lock_file_of_other_content_is_nobodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / output_lock.FILE_NAME).write_bytes(content)
    with OutputLock(tmp_path) as lock:
        lock.acquire()
        assert len(lock.path.read_bytes()) == output_lock.NUM_BYTES
        lock.check()


def test_a_run_whose_lock_file_was_deleted_goes_on(tmp_path: Path) -> None:
    with OutputLock(tmp_path) as lock:
        lock.acquire()
        lock.path.unlink()
        lock.check()


# ---- where the system's lock does not reach


@pytest.mark.usefixtures("hasty")
def test_heartbeats_show_that_a_run_on_another_machine_is_alive(tmp_path: Path) -> None:
    """This process plays the other machine: its lock is ended, and its heartbeat goes on."""
    with OutputLock(tmp_path) as other, OutputLock(tmp_path) as lock:
        other.acquire()
        assert other._descriptor is not None and other._mine is not None
        fcntl.flock(other._descriptor, fcntl.LOCK_UN)
        other._mine = replace(other._mine, boot="elsewhere", host="there")
        other.step = 12
        time.sleep(0.2)
        shown: list[str] = []
        with pytest.raises(InUseError, match=r"a run on there .* last seen at step 12"):
            lock.acquire(shown.append)
        (sentence,) = shown
        assert "waiting up to" in sentence


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("whose", ["another machine", "before a reboot"])
def test_without_a_heartbeat_it_is_dead_after_a_while_and_at_once_if_long_ago(tmp_path: Path, whose: str) -> None:
    write(tmp_path, ANOTHER[whose])
    begun = time.monotonic()
    with OutputLock(tmp_path) as lock:
        lock.acquire()
    assert 0.3 < time.monotonic() - begun < 5
    shown: list[str] = []
    write(tmp_path, ANOTHER[whose], age_seconds=3600)
    with OutputLock(tmp_path) as lock:
        lock.acquire(shown.append)
    assert shown == []
    write(tmp_path, ANOTHER[whose], age_seconds=-3600)  # a clock that was ahead
    with OutputLock(tmp_path) as lock:
        lock.acquire()


@pytest.mark.usefixtures("no_locks")
def test_without_any_locks_the_process_itself_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path, this_process())
    with OutputLock(tmp_path) as lock, pytest.raises(InUseError):
        lock.acquire()
    write(tmp_path, replace(this_process(), started="1"))
    with OutputLock(tmp_path) as lock:
        lock.acquire()
        with pytest.raises(InUseError):
            OutputLock(tmp_path).acquire()


@pytest.mark.usefixtures("no_locks")
def test_of_two_that_start_at_the_same_moment_the_last_to_write_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: write(tmp_path, ANOTHER["another machine"]))
    with OutputLock(tmp_path) as lock, pytest.raises(InUseError, match="a run on there"):
        lock.acquire()


def test_a_heartbeat_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.01)
    with OutputLock(tmp_path) as lock:
        lock.acquire()

        def fail(holder: Holder) -> None:
            raise OSError(errno.ESTALE, "stale file handle")

        monkeypatch.setattr(lock, "_write", fail)
        time.sleep(0.2)
    assert caplog.text.count("stale file handle") == 1


def test_a_lock_that_cannot_be_removed_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = OutputLock(tmp_path)
    lock.acquire()

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(WriteError, match="the cache"), lock:
            raise WriteError("the cache could not be written")
    assert "run.lock could not be removed" in caplog.text
    with OutputLock(tmp_path) as another:
        another.acquire()
