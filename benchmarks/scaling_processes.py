"""Starts and ends the runs of `benchmarks/scaling.py`, each in a process group of its own, within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from architectures import ARCHITECTURES, write_model_folder

from pixtune.bench.synthetic import timing_words, write_pictures

ROOT = Path(__file__).resolve().parent.parent
CPU_ENV = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
GPU_ENV = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Environment that switches NVLink's multicast off, for which virtual machines often lack the rights."""
LEAST_SECONDS = 20.0
"""Time under which no further run is started."""


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    folder: Path
    """A temporary folder for models, pictures and runs."""
    device: str
    num_processes: int
    num_steps: int
    most_seconds: float
    """Most seconds of one run."""
    end_by: float
    """Time of the clock after which nothing runs."""

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def seconds_left(self) -> float:
        return min(self.most_seconds, self.end_by - time.monotonic())

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **(CPU_ENV if self.on_cpu else GPU_ENV)}

    def config(self, name: str, model: str, num_steps: int, num_pictures: int) -> tuple[Path, list[str]]:
        """Writes the model's folder without weights, its pictures and a config; returns it with the words of a run."""
        folder, size = self.folder / name, 64 if self.on_cpu else 1024
        folder.mkdir(parents=True)
        tokens = 16 if self.on_cpu else ARCHITECTURES[model].num_text_tokens
        pictures = write_pictures(folder / "pictures", size, num_pictures, 0, tokens)
        values: dict[str, object] = {"output_dir": str(folder / "run"), "max_train_steps": 1, "logging_steps": 1}
        if self.on_cpu:
            values |= {
                "pretrained_model_name_or_path": str(ROOT / "assets" / "tiny-qwen-image"),
                "mixed_precision": "no",
                "rank": 4,
            }
        else:
            if not (self.folder / model).exists():
                write_model_folder(self.folder / model, ARCHITECTURES[model])
            values |= {
                "pretrained_model_name_or_path": str(self.folder / model),
                "random_weights": True,
                "rank": 16,
            }
        config = folder / "run.yaml"
        config.write_text(json.dumps({**values, "data_config": {"img_dir": str(pictures.images)}}))  # JSON is YAML
        return config, timing_words(folder, pictures, num_steps, size, None if self.on_cpu else tokens)


class CellError(Exception):
    """A run that failed, with the end of what it printed."""


def launched(num_processes: int, words: Sequence[str]) -> list[str]:
    """Returns the command that starts a script or `-m MODULE` in so many processes of this host."""
    if num_processes == 1:
        return [sys.executable, *words]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*run, *words]


def start_run(bench: Bench, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a process group of its own; all that it prints goes to a file.

    Raises:
        CellError: no time is left for it.
    """
    if bench.seconds_left() < LEAST_SECONDS:
        raise CellError("no time is left")
    with log.open("wb") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=bench.environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(bench: Bench, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a command, and ends its whole group where it takes too long.

    Raises:
        CellError: it failed, or took too long.
    """
    seconds = bench.seconds_left()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        raise CellError(f"took more than {seconds:.0f} s\n{tail(log)}") from None
    if code:
        raise CellError(f"exit code {code}\n{tail(log)}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a command that `start_run` started, with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, num_lines: int = 30) -> str:
    """Returns the last lines that were printed, shortened."""
    return "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-num_lines:])


def children_of(process: int) -> dict[int, int]:
    """Returns the process numbers of a launcher's processes by their rank, from /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            words = dict(word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word)
        except (OSError, ValueError):
            continue
        if int(status[1]) == process and "RANK" in words and status[0] != "Z":
            found[int(words["RANK"])] = int(folder.name)
    return found


def wait_for(bench: Bench, is_there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until something is there. Raises CellError where the process ends before it, or it takes too long."""
    end_by = time.monotonic() + bench.seconds_left()
    while not is_there():
        if process.poll() is not None:
            raise CellError(f"exit code {process.returncode}\n{tail(log)}")
        if time.monotonic() > end_by:
            raise CellError(f"took too long\n{tail(log)}")
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Returns whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
