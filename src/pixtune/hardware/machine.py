"""The state of an installation around a GPU: what `pixtune doctor` looks at, read without trusting any of it.

torch is imported with care: a build that misses a library must be a line of advice, not a traceback.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pixtune.hardware.facts import HardwareFacts, installed_version
from pixtune.hardware.meminfo import HostMemory, read_meminfo

PACKAGES = (
    "pixtune", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "triton",
    "fastsafetensors", "flash-attn",
)  # fmt: skip
FLASH_ATTENTION_3_MODULES = ("flash_attn_interface", "flash_attn_3")
"""Modules that its builds install; none of them is on a package index under a settled name."""
SHARED_MEMORY = Path("/dev/shm")
KERNEL = Path("/proc/version")
DRIVER_FOLDER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class TorchState:
    """What there is of torch."""

    version: str | None
    """None: not installed."""
    import_error: str | None = None
    """What importing it said, if that failed."""
    cuda_version: str | None = None
    """None: a build for the CPU."""
    cuda_available: bool = False
    cudnn_available: bool = False
    num_gpus: int = 0


@dataclass(frozen=True)
class Machine:
    """Everything that advice is drawn from."""

    torch: TorchState
    facts: HardwareFacts | None
    """Of the first GPU, or of the CPU; None if torch cannot be imported."""
    memory: HostMemory
    packages: dict[str, str | None]
    """Versions; None: not installed."""
    has_flash_attention_3: bool
    driver_present: bool
    """There is an NVIDIA driver, whether or not torch can use it."""
    visible_devices: str | None
    """CUDA_VISIBLE_DEVICES; None: not set."""
    ptxas_path: str | None
    """TRITON_PTXAS_PATH."""
    system: str
    """"Linux", "Windows", "Darwin"."""
    is_wsl: bool
    python: str
    machine: str
    shared_memory_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    disk_free_bytes: int
    """Where runs and their cache are written: the working folder."""


def read_machine(environment: dict[str, str], folder: Path) -> Machine:
    """The machine as it is. Starts CUDA where there is a GPU.

    Args:
        environment: `os.environ`.
        folder: where runs would be written.
    """
    state, facts = read_torch()
    return Machine(
        torch=state,
        facts=facts,
        memory=read_meminfo(),
        packages={name: installed_version(name) for name in PACKAGES},
        has_flash_attention_3=any(find_spec(name) is not None for name in FLASH_ATTENTION_3_MODULES),
        driver_present=DRIVER_FOLDER.exists() or shutil.which("nvidia-smi") is not None,
        visible_devices=environment.get("CUDA_VISIBLE_DEVICES"),
        ptxas_path=environment.get("TRITON_PTXAS_PATH"),
        system=platform.system(),
        is_wsl=KERNEL.is_file() and is_wsl(KERNEL.read_text(encoding="utf-8", errors="replace")),
        python=platform.python_version(),
        machine=platform.machine(),
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        disk_free_bytes=shutil.disk_usage(folder).free,
    )


def driver_may_spill() -> bool:
    """Whether this system's GPU driver moves memory to the host when it is full, instead of refusing more."""
    return platform.system() == "Windows" or is_wsl(platform.release())


def is_wsl(kernel: str) -> bool:
    """Whether the text of /proc/version is that of Linux under Windows."""
    return "microsoft" in kernel.casefold()


def read_torch() -> tuple[TorchState, HardwareFacts | None]:
    """torch's state, and the facts of the device it would train on."""
    version = installed_version("torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchState(version, import_error=None if version is None else str(error)), None
    from pixtune.hardware.read import read_facts

    available = torch.cuda.is_available()
    state = TorchState(
        version=torch.__version__,
        cuda_version=torch.version.cuda,
        cuda_available=available,
        cudnn_available=torch.backends.cudnn.is_available(),
        num_gpus=torch.cuda.device_count() if available else 0,
    )
    return state, read_facts(torch.device("cuda", 0) if available else torch.device("cpu"))
