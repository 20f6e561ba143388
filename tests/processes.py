"""Processes of their own that start at once: forked from one that has imported every library already.

Python takes five seconds to import what a run needs, and a run on a small model one. A forked process is as much on its
own as one that was executed: it can be killed, limited and told to stop, and nothing that it changes outlives it.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = "tests.preloaded"

Before = Callable[[], None]
"""What the new process does first: a function of a module, so that it can be sent there."""


@dataclass(frozen=True)
class Forked:
    """What tests use of `subprocess.Popen`."""

    process: ForkServerProcess
    output: Connection

    def poll(self) -> int | None:
        """The exit code; negative: the signal that ended it."""
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for its end; stdout and stderr as they were written.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        printed = bytearray()
        while wait([self.output], None if timeout is None else max(0, deadline - time.monotonic())):
            if not (part := os.read(self.output.fileno(), 1 << 16)):
                self.process.join()
                return printed.decode(errors="replace"), None
            printed += part
        raise subprocess.TimeoutExpired(self.process.name, timeout or 0)


Started = Forked | subprocess.Popen[str]


def start(words: Sequence[str], env: Mapping[str, str], before: Before | None = None) -> Started:
    """`python WORDS` from the repository's root.

    Args:
        words: `-m MODULE ...` or `SCRIPT ...`.
    """
    if not can_fork():
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=dict(env), preexec_fn=before, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    output, written = multiprocessing.Pipe(duplex=False)
    process = server().Process(target=_run, args=(list(words), dict(env), written, before))
    process.start()
    written.close()
    return Forked(process, output)


def run(words: Sequence[str], env: Mapping[str, str], timeout: float, before: Before | None = None) -> tuple[int, str]:
    """The same to its end: exit code and all it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
    """
    started = start(words, env, before)
    try:
        printed, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGKILL)
        raise
    assert started.returncode is not None
    return started.returncode, printed


def forked_run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stands in for `subprocess.run` in scripts under test that start `sys.executable` anew; other programs are run.

    Both streams are one, and stand in the outcome as both.

    Raises:
        subprocess.CalledProcessError: it failed, and `check` was asked for.
        subprocess.TimeoutExpired: it took longer than its `timeout`, and was killed.
    """
    if command[0] != sys.executable:
        return really_run(command, **options)
    code, printed = run(command[1:], options.get("env", os.environ), options.get("timeout", 300))
    stream = options.get("stdout")
    if isinstance(stream, io.TextIOBase):
        stream.write(printed)
        stream.flush()
    if code and options.get("check"):
        raise subprocess.CalledProcessError(code, command, printed)
    return subprocess.CompletedProcess(command, code, printed, printed)


really_run = subprocess.run


@cache
def can_fork() -> bool:
    """CUDA does not survive a fork, and macOS's own libraries may not."""
    if sys.platform != "linux":
        return False
    import torch

    return not torch.cuda.is_available()


@cache
def server() -> ForkServerContext:
    """The process that forks, with one computing thread as its children."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _run(words: list[str], env: Mapping[str, str], output: Connection, before: Before | None) -> None:
    """In the forked process: becomes what `python WORDS` would be."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    if PRELOADED not in sys.modules:
        raise RuntimeError(f"{PRELOADED} could not be imported, and so every process imports all libraries anew")
    if before is not None:
        before()
    by_name = words[0] == "-m"
    sys.argv = words[1:] if by_name else words
    if by_name:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(ROOT / Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
