"""Runs hostile cases through the command line, each in a process of its own with bounds, and judges what happened.

The processes are forked from one that has imported every library, so a case takes a tenth of a second. What a process
opens, starts or connects to is heard by Python's audit hooks.
"""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pixtune.inputs.printing import DIRECTIONS, is_unfit
from tests.hostile.case import REFUSED, TAKEN, Attack, Case

KIBIBYTES = 1 << 10
ROOM_BYTES = 6 << 30
"""Address space beyond the case's bound of memory: files are mapped, and threads reserve without using."""
SEEN = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.bind", "os.system", "subprocess.Popen")
"""Audit events that a hostile file must not cause."""
STARTED_ANYWAY = ("nvidia-smi", "ps", "uname")
"""Programs that a run asks about the machine and its launcher."""
TRACEBACK_CODE = 70
FINE = "taken as fine"
NAMED = "refused by name"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    case: Case
    verdict: str
    """`FINE`, `NAMED`, or what went wrong."""
    seconds: float
    mib: float
    """Peak of memory beyond what the process had at its start."""
    printed: str

    @property
    def ok(self) -> bool:
        return self.verdict in (FINE, NAMED)


def draws(case: Case, seed: int) -> random.Random:
    """Returns a case's own draws: the same whichever other cases run."""
    return random.Random(f"{seed} {case.kind} {case.name}")


def run_all(cases: Iterable[Case], seed: int, folder: Path) -> Iterator[Outcome]:
    """Runs cases one after the other, each in a folder of its own that is deleted afterwards."""
    for number, case in enumerate(cases):
        here = folder / f"case{number}"
        here.mkdir(parents=True)
        try:
            yield run(case, case.lay(here, draws(case, seed)), folder)
        finally:
            shutil.rmtree(os.fsencode(here))  # a name may be none in UTF-8


def run(case: Case, attack: Attack, scratch: Path) -> Outcome:
    """Runs one command."""
    printed, heard = scratch / "printed", scratch / "heard"
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _become(case, attack, printed, heard, scratch)
    hung = not _wait(process, case.most_seconds)
    if hung:
        os.killpg(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - began
    text = printed.read_bytes().decode(errors="replace")
    before_kib, *events = heard.read_text(errors="replace").splitlines() or ["0"]
    mib = (usage.ru_maxrss - int(before_kib)) / KIBIBYTES
    verdict = f"hung for {seconds:.0f} s" if hung else judge(case, attack, os.waitstatus_to_exitcode(status), text)
    if mib > case.most_mib:
        verdict = f"took {mib:,.0f} MiB, more than {case.most_mib:,}"
    if events:
        verdict = f"did what it must not: {events[0]}"
    return Outcome(case, verdict, seconds, mib, text)


def judge(case: Case, attack: Attack, code: int, text: str) -> str:
    """Returns what a command did that ended by itself: `FINE`, `NAMED`, or what is wrong about it."""
    if raw := {mark for mark in text if mark not in "\n\r" and (is_unfit(mark) or mark in DIRECTIONS)}:
        return f"printed {sorted(raw)!a} raw"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code < 0:
        return f"killed by signal {-code}"
    if code == 0:
        return "taken as fine, and should be refused" if case.expected == REFUSED else FINE
    if case.expected == TAKEN:
        return "refused, and should be taken"
    if not text.strip():
        return "refused without a word"
    flat = " ".join(text.split())
    return NAMED if any(" ".join(name.split()) in flat for name in attack.culprits) else "refused without naming it"


def _wait(process: int, most_seconds: float) -> bool:
    """Waits until a child ends; False where it does not in time."""
    descriptor = os.pidfd_open(process)
    try:
        return bool(select.select([descriptor], [], [], most_seconds)[0])
    finally:
        os.close(descriptor)


def _become(case: Case, attack: Attack, printed: Path, heard: Path, scratch: Path) -> None:
    """In the child: runs the command as `pixtune` does, and never returns."""
    code = TRACEBACK_CODE
    try:
        os.setsid()
        output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, descriptor)
        os.chdir(scratch)
        os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "XDG_CACHE_HOME": str(scratch / "user-cache")}
        usage = _memory_kib()
        most = usage["VmSize"] * KIBIBYTES + case.most_mib * KIBIBYTES**2 + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        listener = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(listener, f"{usage['VmRSS']}\n".encode())
        _listen(listener)
        from pixtune import cli
        from pixtune.commands.failures import exit_on_user_errors

        sys.argv = ["pixtune", *attack.words]
        exit_on_user_errors(lambda: cli.app(list(attack.words)))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (the parent judges it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _listen(listener: int) -> None:
    """Writes down what a hostile file must not cause."""

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event not in SEEN:
            return
        words = " ".join(map(str, arguments))
        if event == "subprocess.Popen" and Path(str(arguments[0])).name in STARTED_ANYWAY:
            return
        os.write(listener, f"{event} {words[:200]!a}\n".encode())

    sys.addaudithook(hear)


def _memory_kib() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(text.split()[0]) for name, _, text in (line.partition(":") for line in lines) if name[:2] == "Vm"}
