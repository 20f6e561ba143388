"""Clock and temperature of a GPU, where nvidia-smi reports them; they show whether a slow step is a hot card."""

from __future__ import annotations

from dataclasses import dataclass

from pixtune.hardware.nvidia_smi import query

TIMEOUT_SECONDS = 5.0
"""Longest time that a step waits for the reading."""


@dataclass(frozen=True)
class GpuSensors:
    """One reading; a value is None where the card does not report it."""

    clock_mhz: float | None
    temperature_celsius: float | None


def read_sensors(uuid: str) -> GpuSensors | None:
    """Reads a GPU's sensors: now and then, not every step. None where nvidia-smi is missing.

    Args:
        uuid: as `torch.cuda.get_device_properties(device).uuid` gives it: unlike a number it does not depend on
            CUDA_VISIBLE_DEVICES.
    """
    values = query(f"GPU-{uuid}", "clocks.sm", "temperature.gpu", timeout_seconds=TIMEOUT_SECONDS)
    return GpuSensors(*map(_number, values)) if values else None


def _number(word: str) -> float | None:
    return float(word) if word.replace(".", "", 1).isdigit() else None
