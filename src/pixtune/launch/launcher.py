"""Finds the program that started this process and is to end with it: `accelerate launch` or `torchrun`.

A shell is no launcher: a run that was sent to the background goes on when its shell ends.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LAUNCHER = re.compile(
    r"(.*/)?(accelerate|accelerate-launch|torchrun|deepspeed)(\.exe)?"  # a command
    r"|(accelerate|torch\.distributed)\..+"  # python -m MODULE
    r"|.*/(accelerate/commands|torch/distributed)/.+\.py"
)
NUM_WORDS = 5
"""Number of leading words of a command among which the launcher's name stands: the rest are the script's own."""
ADOPTERS = {"init", "systemd", "launchd", "tini", "dumb-init", "docker-init"}
"""Names of programs that become the parent of a process whose own is gone; so does process 1, whatever it is."""


def find_launcher() -> int | None:
    """Returns the process number of the launcher that started this process; None where it was started otherwise."""
    parent = os.getppid()
    return parent if sys.platform != "win32" and is_launcher(command_of(parent)) else None


def is_orphan(environ: Mapping[str, str]) -> bool:
    """Returns whether a launcher started this process and is gone already, before anyone looked."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"} & environ.keys() or sys.platform == "win32":
        return False
    parent = os.getppid()
    words = command_of(parent)
    program = Path(words[0]).name if words else ""
    starts_python = is_launcher(words) or program.startswith("python")  # in a container, process 1 may be a launcher
    return not starts_python and (parent == 1 or program in ADOPTERS)


def is_launcher(words: list[str]) -> bool:
    """Returns whether a command, word by word, is that of a launcher."""
    return any(LAUNCHER.fullmatch(word) for word in words[:NUM_WORDS])


def command_of(process: int) -> list[str]:
    """Reads the words of a process's command; empty where it cannot be read."""
    try:
        return os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        pass
    try:
        listed = subprocess.run(["ps", "-o", "args=", "-p", str(process)], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return listed.stdout.split()
