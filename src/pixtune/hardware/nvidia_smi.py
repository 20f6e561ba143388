"""Asks nvidia-smi about a GPU, which starts no CUDA in this process."""

from __future__ import annotations

import subprocess

TIMEOUT_SECONDS = 20.0


def query(gpu: str, *fields: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str] | None:
    """Reads fields of one GPU; takes tens of milliseconds.

    Args:
        gpu: its number or UUID, which do not depend on CUDA_VISIBLE_DEVICES.
        fields: names that `nvidia-smi --help-query-gpu` lists.

    Returns:
        The value of each field without its unit, "[N/A]" for what the GPU does not report; None where nvidia-smi is
        missing, fails or hangs.
    """
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return values if run.returncode == 0 and len(values) == len(fields) else None
