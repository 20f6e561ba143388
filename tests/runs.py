"""Small real runs for tests: the shipped model and data through the command line a user types."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests import processes
from tests.shallow import shallow_model

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ROOT / "assets" / "tiny-qwen-image"
DEMO_TRAIN = ROOT / "assets" / "demo-style" / "train"
DEMO_HELD_OUT = ROOT / "assets" / "demo-style" / "held_out"


def overrides(output_dir: Path, cache_dir: Path, **changes: object) -> list[str]:
    """`key=value` words of a run of a few seconds; `__` in a name stands for the dot of a nested key."""
    settings: dict[str, object] = {
        "pretrained_model_name_or_path": shallow_model("tiny-qwen-image"),
        "output_dir": output_dir,
        "data_config.img_dir": DEMO_TRAIN,
        "data_config.cache_dir": cache_dir,
        "data_config.img_size": 64,
        "mixed_precision": "'no'",
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "report_to": "null",
        "rank": 4,
        "validation.held_out": 0.0,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def write_config(folder: Path) -> Path:
    """A config file with nothing in it that `overrides` does not replace."""
    path = folder / "run.yaml"
    path.write_text("pretrained_model_name_or_path: x\noutput_dir: x\nmax_train_steps: 1\ndata_config: {img_dir: x}\n")
    return path


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with one computing thread a process: small models are not faster with more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def pixtune(
    *arguments: object, env: Mapping[str, str] | None = None, before: processes.Before | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `pixtune ...` in a process of its own and returns its outcome with all it printed.

    Args:
        before: what that process does first.
    """
    return python("-m", "pixtune.cli", *arguments, env=env, before=before)


def python(
    *arguments: object, env: Mapping[str, str] | None = None, before: processes.Before | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ...` in at most five minutes, from a process that has the libraries already."""
    words = [*map(str, arguments)]
    code, printed = processes.run(words, env or environment(), 300, before)
    return subprocess.CompletedProcess(words, code, printed)


def start_ranks(*arguments: object, before: processes.Before | None = None, size: int = 2) -> list[processes.Started]:
    """Starts the processes of one `pixtune ...` on the CPU, as a launcher would, without waiting for them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(size)}
    shared |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["-m", "pixtune.cli", *map(str, arguments)]
    return [
        processes.start(words, environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)), before)
        for rank in range(size)
    ]


def end_of(process: processes.Started, seconds: float = 100) -> tuple[int | None, str]:
    """Waits for a process, and returns its exit code and what it printed."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    return process.returncode, printed


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Any command as it is typed, from the repository's root, in at most five minutes."""
    settings = {"cwd": ROOT, "env": environment(), "timeout": 300, "text": True, **options}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)  # type: ignore[call-overload]


def pixtune_together(
    num_processes: int, *arguments: object, before: processes.Before | None = None, **changes: str
) -> list[subprocess.CompletedProcess[str]]:
    """`pixtune ...` as a launcher starts it in several processes of one host, without the launcher's own seconds.

    Args:
        before: what each process does first.
        changes: of their environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "pixtune.cli", *map(str, arguments)]
    started = [
        processes.start(
            words,
            environment(
                ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes), RANK=str(rank),
                LOCAL_RANK=str(rank), GROUP_RANK="0", **changes,
            ),
            before,
        )
        for rank in range(num_processes)
    ]  # fmt: skip
    outcomes = []
    try:
        for each in started:
            printed, _ = each.communicate(timeout=200)
            assert each.returncode is not None
            outcomes.append(subprocess.CompletedProcess(words, each.returncode, printed))
    finally:
        for each in started:
            if each.poll() is None:
                each.send_signal(signal.SIGKILL)
    return outcomes
