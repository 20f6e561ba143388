"""Asks nvidia-smi about a GPU, which starts no CUDA in this process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

TIMEOUT_SECONDS = 20.0


def own_gpu(environ: Mapping[str, str]) -> str:
    """Returns the number or UUID of this process's GPU for nvidia-smi, which ignores CUDA_VISIBLE_DEVICES.

    Args:
        environ: environment with LOCAL_RANK where there are several processes.
    """
    rank = int(environ.get("LOCAL_RANK", "0"))
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[rank % len(visible)] if visible else str(rank)  # as processes are spread over GPUs


def query(gpu: str, *fields: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str] | None:
    """Reads fields of one GPU; takes tens of milliseconds.

    Args:
        gpu: its number or UUID, which do not depend on CUDA_VISIBLE_DEVICES.
        fields: names that `nvidia-smi --help-query-gpu` lists.

    Returns:
        The value of each field without its unit, "[N/A]" for what the GPU does not report; None where nvidia-smi is
        missing, fails or hangs.
    """
    lines = _run(gpu, f"--query-gpu={','.join(fields)}", timeout_seconds)
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return values if len(values) == len(fields) else None


def query_processes(gpu: str) -> list[tuple[int, int]] | None:
    """Reads the process numbers and bytes of all processes that compute on one GPU; takes tens of milliseconds.

    In a container the numbers may be those of the host, or of nobody that the container knows. Processes whose memory
    the GPU does not report are left out.

    Returns:
        None where nvidia-smi is missing, fails or hangs.
    """
    lines = _run(gpu, "--query-compute-apps=pid,used_memory", TIMEOUT_SECONDS)
    if lines is None:
        return None
    words = [[word.strip() for word in line.split(",")] for line in lines]
    numbers = [line for line in words if len(line) == 2 and all(word.isdigit() for word in line)]
    return [(int(process), int(mebibytes) * 2**20) for process, mebibytes in numbers]


def run_nvidia_smi(words: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> str | None:
    """Runs nvidia-smi and returns what it printed; None where it is missing, fails or hangs."""
    try:
        run = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def _run(gpu: str, what: str, timeout_seconds: float) -> list[str] | None:
    printed = run_nvidia_smi([f"--id={gpu}", what, "--format=csv,noheader,nounits"], timeout_seconds)
    return None if printed is None else printed.strip().splitlines()
