"""The state of an installation around a GPU: what `pixtune doctor` looks at, read without trusting any of it.

torch is imported with care: a build that misses a library must be a line of advice, not a traceback.
"""

from __future__ import annotations

import platform
import re
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
"""Modules that builds of FlashAttention 3 install; none is on a package index under a settled name."""
SHARED_MEMORY = Path("/dev/shm")
KERNEL = Path("/proc/version")
DRIVER_FOLDER = Path("/proc/driver/nvidia")
DRIVER_VERSION = DRIVER_FOLDER / "version"


@dataclass(frozen=True)
class TorchState:
    """The installed torch."""

    version: str | None
    """Version; None if it is not installed."""
    import_error: str | None = None
    """Message of the error that importing it raised, if any."""
    cuda_version: str | None = None
    """CUDA that it was built with; None for a CPU build."""
    cuda_available: bool = False
    cudnn_version: str | None = None
    """cuDNN that it found; None if there is none."""
    num_gpus: int = 0


@dataclass(frozen=True)
class Machine:
    """Everything that advice is drawn from."""

    torch: TorchState
    facts: HardwareFacts | None
    """Facts of the first GPU, or of the CPU; None if torch cannot be imported."""
    memory: HostMemory
    packages: dict[str, str | None]
    """Versions by name; None for a package that is not installed."""
    has_flash_attention_3: bool
    driver_present: bool
    """Whether there is an NVIDIA driver, usable by torch or not."""
    driver_version: str | None
    """Version of NVIDIA's kernel module; None where Linux does not show one."""
    visible_devices: str | None
    """CUDA_VISIBLE_DEVICES; None if it is not set."""
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
    """Free disk space in the working folder, where runs and their cache are written."""


def read_machine(environment: dict[str, str], folder: Path) -> Machine:
    """Reads this machine's state. Starts CUDA where there is a GPU.

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
        driver_version=read_driver_version(),
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
    """Returns whether this system's GPU driver moves memory to the host when it is full, instead of refusing more."""
    return platform.system() == "Windows" or is_wsl(platform.release())


def is_wsl(kernel: str) -> bool:
    """Returns whether the text of /proc/version is that of Linux under Windows."""
    return "microsoft" in kernel.casefold()


def read_driver_version(path: Path = DRIVER_VERSION) -> str | None:
    """Reads the version of NVIDIA's kernel module, such as "580.95.05"; None where Linux does not show one."""
    if not path.is_file():
        return None
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text(encoding="utf-8", errors="replace"))
    return match[1] if match else None


def cudnn_version(number: int | None) -> str | None:
    """Spells cuDNN's version number: 91900 is "9.19.0", 8907 (before 9) "8.9.7"."""
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def read_torch() -> tuple[TorchState, HardwareFacts | None]:
    """Reads torch's state, and the facts of the device that it would train on."""
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
        cudnn_version=cudnn_version(torch.backends.cudnn.version()),
        num_gpus=torch.cuda.device_count() if available else 0,
    )
    return state, read_facts(torch.device("cuda", 0) if available else torch.device("cpu"))
