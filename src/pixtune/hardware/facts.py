"""What this machine is: read once, handed around as plain values, so that decisions can be tested without it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from pixtune.errors import PixtuneError

OLDEST_TORCH = "2.10.0a0"
REPORTED_PACKAGES = ("pixtune", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class HardwareFacts:
    """One device and its host."""

    device: str
    """"cuda" or "cpu"."""
    name: str
    capability: tuple[int, int]
    """Compute capability; (0, 0) without a GPU."""
    total_bytes: int
    """Device memory; 0 without a GPU."""
    free_bytes: int


def read_facts(device: torch.device) -> HardwareFacts:
    """The facts of one device."""
    if device.type != "cuda":
        return HardwareFacts("cpu", platform.processor() or platform.machine(), (0, 0), 0, 0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return HardwareFacts("cuda", name, capability, total_bytes, free_bytes)


def package_versions() -> dict[str, str]:
    """Versions that a result depends on, Python's included."""
    versions = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_torch() -> None:
    """torch stands in no dependency list of ours, so its version is checked here.

    Raises:
        PixtuneError: it is older than what this was built for.
    """
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise PixtuneError(
            f"torch {torch.__version__} is installed, pixtune needs {OLDEST_TORCH} or newer. Install one for your GPU "
            "as its vendor or pytorch.org says; pixtune never replaces it."
        )
