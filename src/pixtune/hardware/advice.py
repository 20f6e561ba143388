"""Rules that find what is wrong with a machine and how to fix it, one problem each; pure functions.

A rule reports only what it sees: it returns None unless the problem is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from pixtune.hardware.facts import GIB, HOPPER, OLDEST_TORCH, is_too_old, pool_floor_bytes
from pixtune.hardware.machine import Machine

GB10 = (12, 1)
LEAST_CAPABILITY = (8, 0)
OLDEST_TORCHAO = "0.16"
"""Oldest torchao beside which peft makes a LoRA layer; it refuses to beside an older one, even an unused one."""
OLDEST_CUDA_FOR_GB10 = "13.0"
OLDEST_TRITON_FOR_GB10 = "3.7"
LEAST_SHARED_MEMORY_BYTES = GIB // 4
LEAST_DISK_BYTES = 10 * GIB
PAGE_CACHE_SHARE = 0.25
"""Share of a pool from which page cache is worth a line, if little else is free."""


@dataclass(frozen=True)
class Advice:
    """One problem and its remedy."""

    severity: Literal["fault", "warning"]
    """"fault": training cannot work, or not on the GPU. "warning": it works, but worse than it could."""
    topic: str
    found: str
    remedy: str


def advise(machine: Machine) -> list[Advice]:
    """Returns all advice for a machine, faults first, in the order of `RULES`."""
    return [advice for rule in RULES if (advice := rule(machine)) is not None]


# ---- torch


def torch_missing(machine: Machine) -> Advice | None:
    if machine.torch.version is not None:
        return None
    return Advice(
        "fault",
        "torch",
        "torch is not installed; pixtune never installs it, so that it cannot replace the build your GPU needs.",
        "`pip install torch`, or the wheels that your machine's vendor gives; then `pip install -r requirements.txt`.",
    )


def torch_does_not_load(machine: Machine) -> Advice | None:
    error = machine.torch.import_error
    if error is None:
        return None
    if "libcudnn" in error:
        return Advice(
            "fault",
            "cuDNN",
            f"torch {machine.torch.version} cannot be imported: {error}.",
            "It was built against a cuDNN that the loader does not find. Install cuDNN 9 for your CUDA, `ldconfig -p | "
            "grep libcudnn` shows whether it is found; if it lies in a folder of its own, add that to LD_LIBRARY_PATH. "
            "docs/AARCH64_SBSA_COMPATIBILITY.md has the order of installation.",
        )
    return Advice(
        "fault",
        "torch",
        f"torch {machine.torch.version} cannot be imported: {error}.",
        "Install it again; a mixture of two builds is the usual reason: `pip uninstall torch` until nothing is left, "
        "then the one you want.",
    )


def torch_too_old(machine: Machine) -> Advice | None:
    version = machine.torch.version
    if version is None or not is_too_old(version):
        return None
    return Advice(
        "fault",
        "torch",
        f"torch {version} is older than {OLDEST_TORCH}, and pixtune refuses it.",
        "Install a newer one for your GPU.",
    )


def cpu_build_beside_a_gpu(machine: Machine) -> Advice | None:
    torch = machine.torch
    if torch.version is None or torch.import_error or torch.cuda_version is not None or not machine.driver_present:
        return None
    return Advice(
        "fault",
        "torch",
        f"There is an NVIDIA driver, and torch {torch.version} is a build for the CPU: another package replaced your "
        "CUDA wheel, or a CPU wheel was installed.",
        "`pip uninstall torch`, then install your own wheel again (custom build: the .whl file itself, with "
        "`--no-deps`), or `pip install torch`, which has CUDA on Linux for x86-64 and ARM64. requirements.txt never "
        "asks for torch; a file with the line `torch==YOUR_VERSION` in PIP_CONSTRAINT keeps others from replacing it.",
    )


def gpu_out_of_reach(machine: Machine) -> Advice | None:
    torch = machine.torch
    if torch.cuda_version is None or torch.cuda_available or not machine.driver_present:
        return None
    if machine.visible_devices in ("", "-1"):
        remedy = f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}, which hides every GPU: unset it."
    else:
        remedy = (
            "Check whether `nvidia-smi` works. In a container: start it with `--gpus all`. If it works, the driver may "
            f"be too old for CUDA {torch.cuda_version}: nvidia-smi's first line shows its version."
        )
    return Advice("fault", "GPU", f"torch {torch.version} has CUDA {torch.cuda_version} and finds no GPU.", remedy)


def no_gpu(machine: Machine) -> Advice | None:
    torch = machine.torch
    if torch.version is None or torch.import_error or torch.cuda_available or machine.driver_present:
        return None
    return Advice(
        "warning",
        "GPU",
        "There is no NVIDIA GPU and no driver here.",
        "`make demo` trains a small model on the CPU; full-size models need a GPU of the Ampere generation (RTX 30) or "
        "newer with at least 8 GB.",
    )


def cudnn_missing(machine: Machine) -> Advice | None:
    if not machine.torch.cuda_available or machine.torch.cudnn_version is not None:
        return None
    return Advice(
        "warning",
        "cuDNN",
        f"torch {machine.torch.version} runs without cuDNN: the autoencoder is slower, cuDNN's attention is missing.",
        "Install cuDNN 9 for your CUDA; `ldconfig -p | grep libcudnn.so.9` shows whether the loader finds it.",
    )


# ---- the GPU


def gpu_too_old(machine: Machine) -> Advice | None:
    facts = machine.facts
    if facts is None or facts.device != "cuda" or facts.capability >= LEAST_CAPABILITY:
        return None
    return Advice(
        "warning",
        "GPU",
        f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]}: it has no bf16, and pixtune "
        "was never tried on it.",
        "Use a GPU of the Ampere generation (RTX 30, A100) or newer.",
    )


def old_cuda_on_gb10(machine: Machine) -> Advice | None:
    facts, cuda = machine.facts, machine.torch.cuda_version
    if facts is None or facts.capability != GB10 or cuda is None or Version(cuda) >= Version(OLDEST_CUDA_FOR_GB10):
        return None
    return Advice(
        "warning",
        "CUDA",
        f"torch {machine.torch.version} was built with CUDA {cuda}; GB10 (sm_121) is supported by CUDA "
        f"{OLDEST_CUDA_FOR_GB10} and newer. A public comparison of the two found a factor of 2.9 in speed.",
        "Install a build with CUDA 13: `pip install torch` has one for ARM64. torch's warning that sm_121 is not among "
        "its architectures is harmless: binaries for sm_120 run.",
    )


def old_triton_on_gb10(machine: Machine) -> Advice | None:
    facts, triton = machine.facts, machine.packages.get("triton")
    if facts is None or facts.capability != GB10 or triton is None or machine.ptxas_path is not None:
        return None
    if Version(triton) >= Version(OLDEST_TRITON_FOR_GB10):
        return None
    return Advice(
        "warning",
        "Triton",
        f"Triton {triton} brings an assembler that does not know sm_121; compiled training would fail.",
        "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas (of CUDA 13), or install a newer torch with its Triton.",
    )


def flash_attention_3_off_hopper(machine: Machine) -> Advice | None:
    facts = machine.facts
    if not machine.has_flash_attention_3 or facts is None or facts.device != "cuda" or facts.capability == HOPPER:
        return None
    arm = ", and builds of it crash on ARM64" if machine.machine == "aarch64" else ""
    return Advice(
        "warning",
        "attention",
        f"FlashAttention 3 is installed. It runs on Hopper (H100, H200, GH200) alone, not on {facts.name}{arm}.",
        "Set cuda_features.enable_flash_attention_3: false (the default here). A run tries PyTorch's own kernels, "
        "cuDNN's among them unless enable_cudnn_sdp is false, and takes the fastest that is right.",
    )


def driver_spills_to_host(machine: Machine) -> Advice | None:
    facts = machine.facts
    if facts is None or facts.device != "cuda" or not (machine.system == "Windows" or machine.is_wsl):
        return None
    return Advice(
        "warning",
        "memory",
        "On Windows and WSL the driver moves GPU memory to the host when it is full; steps then take 10 to 100 times "
        "as long, without an error.",
        "In NVIDIA Control Panel, Manage 3D settings, set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem "
        "Fallback'.",
    )


def page_cache_fills_the_pool(machine: Machine) -> Advice | None:
    facts, memory = machine.facts, machine.memory
    if facts is None or not facts.integrated:
        return None
    wanted = max(pool_floor_bytes(memory.total_bytes), round(PAGE_CACHE_SHARE * memory.total_bytes))
    if memory.page_cache_bytes < wanted or memory.free_bytes > wanted:
        return None
    return Advice(
        "warning",
        "memory",
        f"{memory.page_cache_bytes / GIB:.0f} GiB of the pool hold cached files and {memory.free_bytes / GIB:.0f} GiB "
        "are free. The GPU's allocations have to wait until the kernel drops pages.",
        "Before a run: `sync; echo 3 | sudo tee /proc/sys/vm/drop_caches`.",
    )


# ---- packages and disks


def torchao_too_old(machine: Machine) -> Advice | None:
    torchao = machine.packages.get("torchao")
    if torchao is None or Version(torchao) >= Version(OLDEST_TORCHAO):
        return None
    return Advice(
        "fault",
        "torchao",
        f"torchao {torchao} is installed, and peft refuses to attach a LoRA beside one older than {OLDEST_TORCHAO}.",
        "`pip uninstall torchao` (pixtune does not use it), or install a newer one.",
    )


def little_shared_memory(machine: Machine) -> Advice | None:
    size = machine.shared_memory_bytes
    if size is None or size >= LEAST_SHARED_MEMORY_BYTES or machine.torch.num_gpus < 2:
        return None
    return Advice(
        "warning",
        "/dev/shm",
        f"/dev/shm has {size / 2**20:.0f} MiB, through which {machine.torch.num_gpus} GPUs may exchange gradients.",
        "In a container: start it with `docker run --shm-size=1g`.",
    )


def little_disk(machine: Machine) -> Advice | None:
    if machine.disk_free_bytes >= LEAST_DISK_BYTES:
        return None
    return Advice(
        "warning",
        "disk",
        f"{machine.disk_free_bytes / GIB:.1f} GiB are free in the working folder, where the cache of encoded pictures, "
        "checkpoints and results go.",
        f"Free {LEAST_DISK_BYTES // GIB} GiB, or set output_dir and data_config.cache_dir to a larger disk.",
    )


RULES: tuple[Callable[[Machine], Advice | None], ...] = (
    torch_missing,
    torch_does_not_load,
    torch_too_old,
    cpu_build_beside_a_gpu,
    gpu_out_of_reach,
    torchao_too_old,
    no_gpu,
    gpu_too_old,
    cudnn_missing,
    old_cuda_on_gb10,
    old_triton_on_gb10,
    flash_attention_3_off_hopper,
    driver_spills_to_host,
    page_cache_fills_the_pool,
    little_shared_memory,
    little_disk,
)
