"""Runs one session of a run in processes of its own, and does to it what was drawn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from tests import processes
from tests.io_faults import FailingDisk
from tests.runs import ROOT, environment
from tests.soak.judge import Ended

HANG_SECONDS = 400.0
ORPHAN_SECONDS = 30.0
REQUEST_SECONDS = 1.0
TRAIN = ("-m", "pixtune.cli", "train")
MARK = "SOAK_SESSION"
HERE = Path(__file__).resolve().parent


class Launched:
    """A run in two processes under torchrun, with what `processes.Forked` has."""

    def __init__(self, words: Sequence[str], fault: FailingDisk | None) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        env = environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", **{MARK: self.mark})
        if fault is not None:
            env |= {"SOAK_FAULT": json.dumps(asdict(fault), default=str)}
            env["PYTHONPATH"] = os.pathsep.join([str(HERE / "child"), str(ROOT), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            [*command, *TRAIN, *words], cwd=ROOT, env=env, stdout=self._output, stderr=subprocess.STDOUT
        )

    def poll(self) -> int | None:
        return self._popen.poll()

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def ranks(self) -> list[psutil.Process]:
        """Lists the processes that it started and that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.pid != self._popen.pid]

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._popen.wait(timeout)
        self._output.seek(0)
        return self._output.read().decode(errors="replace"), None


def start(words: Sequence[str], num_processes: int, fault: FailingDisk | None) -> processes.Started | Launched:
    """Starts `pixtune train WORDS`, under torchrun where it has several processes."""
    if num_processes > 1:
        return Launched(words, fault)
    return processes.start([*TRAIN, *words], environment(), fault)


def run_session(
    words: Sequence[str],
    num_processes: int,
    whole_seconds: float = 0.0,
    fault: FailingDisk | None = None,
    signals: Sequence[tuple[str, float]] = (),
    to_rank: bool = False,
    rival: float | None = None,
    requests: Sequence[tuple[Path, float]] = (),
) -> list[Ended]:
    """Runs a session to its end, and a rival in the same folder if one is drawn; see `draws.Happening`.

    Raises:
        subprocess.TimeoutExpired: it hangs; it was killed.
    """
    began = time.monotonic()
    started = [start(words, num_processes, fault)]
    if rival is not None:
        _wait(started[0], rival * whole_seconds)
        started.append(start(words, num_processes, None))
    asking = [threading.Thread(target=_ask, args=(started[0], path, share * whole_seconds)) for path, share in requests]
    for thread in asking:
        thread.start()
    reached, signalled_at = [], 0.0
    for name, share in signals:
        _wait(started[0], share * whole_seconds)
        receiver = _receiver(started[0], to_rank)
        if started[0].poll() is None and receiver is not None:
            try:
                receiver.send_signal(signal.Signals[name])
            except (ProcessLookupError, psutil.NoSuchProcess):
                break
            reached.append(name)
            signalled_at = signalled_at or time.monotonic()
    ended = []
    for number, process in enumerate(started):
        try:
            printed, _ = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            error.output = process.communicate()[0]
            raise
        now = time.monotonic()
        assert process.returncode is not None
        mine = tuple(reached) if number == 0 else ()
        late = now - signalled_at if signalled_at and number == 0 else 0.0
        ended.append(Ended(process.returncode, printed, now - began, mine, "", late, num_processes > 1))
        if isinstance(process, Launched):
            ended[-1] = replace(ended[-1], num_orphans=_left_after(process))
    for thread in asking:
        thread.join()
    if fault is not None and fault.number:
        ended[0] = replace(ended[0], fault=_call_that_failed(fault))
    return ended


def _wait(process: processes.Started | Launched, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)


def _ask(process: processes.Started | Launched, path: Path, seconds: float) -> None:
    """Leaves a request for some time, and takes it back."""
    _wait(process, seconds)
    with suppress(OSError):  # there is no folder yet, or the disk is one that fails
        path.touch()
    _wait(process, REQUEST_SECONDS)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _receiver(
    process: processes.Started | Launched, to_rank: bool
) -> processes.Started | Launched | psutil.Process | None:
    if not isinstance(process, Launched) or not to_rank:
        return process
    ranks = process.ranks()
    return ranks[-1] if ranks else None


def _left_after(process: Launched) -> int:
    """Waits for the processes of a launcher that has ended; kills and counts those that do not end."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := process.ranks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for orphan in left:
        orphan.kill()
    return len(left)


def _kill(process: processes.Started | Launched) -> None:
    process.send_signal(signal.SIGKILL)
    if isinstance(process, Launched):
        for rank in process.ranks():
            rank.kill()


def _call_that_failed(fault: FailingDisk) -> str:
    """Reads in the journal which call failed; empty where the process never came so far."""
    assert fault.journal is not None
    for path in fault.journal.parent.glob(f"{fault.journal.name}*"):
        lines = path.read_text().splitlines()
        if len(lines) >= fault.number:
            return f"{lines[fault.number - 1]} ({os.strerror(fault.error)}{', lasting' if fault.lasts else ''})"
    return ""


def words_of(config: Path, settings: Mapping[str, object]) -> list[str]:
    """Returns the words of a command line."""
    return ["--config", str(config), *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())]
