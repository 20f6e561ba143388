"""Clock and temperature of a GPU, where nvidia-smi tells; they show whether a slow step is a hot card."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

QUERY = ("clocks.sm", "temperature.gpu", "power.draw")
TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class GpuSensors:
    """One reading; None for what the card does not tell."""

    clock_mhz: float | None
    temperature_celsius: float | None
    power_watts: float | None


def read_sensors(uuid: str) -> GpuSensors | None:
    """Asks nvidia-smi, which takes tens of milliseconds: now and then, not every step. None where it is missing.

    Args:
        uuid: of the device, as `torch.cuda.get_device_properties(device).uuid` has it: unlike a number it does not
            depend on CUDA_VISIBLE_DEVICES.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return parse_sensors(run.stdout) if run.returncode == 0 else None


def parse_sensors(text: str) -> GpuSensors | None:
    """Reads a line such as "1980, 64, 512.30" or "2418, 71, [N/A]"; None if it is something else."""
    words = [word.strip() for word in text.strip().split(",")]
    if len(words) != len(QUERY):
        return None
    return GpuSensors(*(_number(word) for word in words))


def _number(word: str) -> float | None:
    return float(word) if word.replace(".", "", 1).isdigit() else None
