"""Advice for machines with one fault each, and none for sound ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixtune.hardware import machine as reading
from pixtune.hardware.advice import advise
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.hardware.machine import Machine, TorchState, is_wsl, read_machine
from pixtune.hardware.meminfo import HostMemory

SOUND = Machine(
    torch=TorchState("2.13.0", cuda_version="13.0", cuda_available=True, cudnn_version="9.19.0", num_gpus=1),
    facts=facts_as("RTX 4090"),
    memory=HostMemory(64 * GIB, 56 * GIB, 30 * GIB, 20 * GIB),
    packages={"peft": "0.21.2", "torchao": None, "triton": "3.6.0"},
    has_flash_attention_3=False,
    driver_present=True,
    driver_version="580.95.05",
    visible_devices=None,
    ptxas_path=None,
    system="Linux",
    is_wsl=False,
    python="3.12.3",
    machine="x86_64",
    shared_memory_bytes=32 * GIB,
    disk_free_bytes=500 * GIB,
)
SPARK = replace(
    SOUND,
    facts=facts_as("DGX Spark"),
    memory=HostMemory(120 * GIB, 112 * GIB, 90 * GIB, 20 * GIB),
    packages={"peft": "0.21.2", "torchao": "0.18.0", "triton": "3.9.0"},
    machine="aarch64",
)
CPU_BUILD = TorchState("2.13.0+cpu")
CPU = HardwareFacts("cpu", "aarch64", (0, 0), 0, 0)


def test_sound_machines_get_no_advice() -> None:
    assert advise(SOUND) == advise(SPARK) == advise(replace(SOUND, facts=facts_as("H100"))) == []


def with_torch(machine: Machine, **changes: Any) -> Machine:
    return replace(machine, torch=replace(machine.torch, **changes))


def with_package(machine: Machine, name: str, version: str) -> Machine:
    return replace(machine, packages={**machine.packages, name: version})


BROKEN: dict[str, tuple[Machine, str, str, str]] = {  # the machine, severity, what is told, what to do
    "no torch": (
        replace(SOUND, torch=TorchState(None), facts=None),
        "fault", "torch is not installed", "pip install torch",
    ),
    "libcudnn.so.9": (
        replace(
            SPARK,
            torch=TorchState("2.10.0a0+cu130", import_error="libcudnn.so.9: cannot open shared object file"),
            facts=None,
        ),
        "fault", "libcudnn.so.9: cannot open", "LD_LIBRARY_PATH",
    ),
    "another library": (
        replace(SOUND, torch=TorchState("2.13.0", import_error="libcublas.so.13: cannot open"), facts=None),
        "fault", "libcublas.so.13", "pip uninstall torch",
    ),
    "old torch": (with_torch(SOUND, version="2.9.1"), "fault", "2.9.1 is older than 2.10.0a0", "newer"),
    "wheel overwritten": (
        replace(SPARK, torch=CPU_BUILD, facts=CPU),
        "fault", "another package replaced your CUDA wheel", "--no-deps",
    ),
    "GPU hidden": (
        replace(with_torch(SOUND, cuda_available=False), visible_devices=""),
        "fault", "finds no GPU", "CUDA_VISIBLE_DEVICES is ''",
    ),
    "driver too old": (with_torch(SOUND, cuda_available=False), "fault", "finds no GPU", "too old for CUDA 13.0"),
    "no GPU": (
        replace(SOUND, torch=CPU_BUILD, facts=CPU, driver_present=False),
        "warning", "no NVIDIA GPU", "make demo",
    ),
    "no cuDNN": (with_torch(SOUND, cudnn_version=None), "warning", "without cuDNN", "libcudnn.so.9"),
    "Turing": (
        replace(SOUND, facts=replace(facts_as("RTX 4090"), name="Tesla T4", capability=(7, 5))),
        "warning", "Tesla T4 has compute capability 7.5", "Ampere",
    ),
    "cu128 on a Spark": (with_torch(SPARK, cuda_version="12.8"), "warning", "built with CUDA 12.8", "CUDA 13"),
    "Triton of a Spark": (
        with_package(SPARK, "triton", "3.5.1"),
        "warning", "does not know sm_121", "TRITON_PTXAS_PATH",
    ),
    "FA3 on a Spark": (
        replace(SPARK, has_flash_attention_3=True),
        "warning", "not on NVIDIA GB10, and builds of it crash on ARM64", "enable_flash_attention_3: false",
    ),
    "FA3 on a 4090": (replace(SOUND, has_flash_attention_3=True), "warning", "Hopper", "enable_cudnn_sdp"),
    "Windows": (replace(SOUND, system="Windows"), "warning", "moves GPU memory to the host", "Sysmem Fallback"),
    "WSL": (replace(SOUND, is_wsl=True), "warning", "moves GPU memory to the host", "Sysmem Fallback"),
    "page cache": (
        replace(SPARK, memory=HostMemory(120 * GIB, 112 * GIB, 9 * GIB, 100 * GIB)),
        "warning", "100 GiB of the pool hold cached files and 9 GiB are free", "drop_caches",
    ),
    "torchao": (with_package(SOUND, "torchao", "0.14.1"), "fault", "peft refuses", "pip uninstall torchao"),
    "shared memory": (
        replace(with_torch(SOUND, num_gpus=2), shared_memory_bytes=64 * 2**20),
        "warning", "/dev/shm has 64 MiB", "--shm-size",
    ),
    "disk": (replace(SOUND, disk_free_bytes=3 * GIB), "warning", "3.0 GiB are free", "cache_dir"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_fault_one_advice(name: str) -> None:
    machine, severity, found, remedy = BROKEN[name]
    (advice,) = advise(machine)
    assert advice.severity == severity and found in advice.found and remedy in advice.remedy


HARMLESS: dict[str, Machine] = {
    "page cache of a machine with a card": replace(SOUND, memory=HostMemory(64 * GIB, 56 * GIB, GIB, 54 * GIB)),
    "page cache with room beside it": replace(SPARK, memory=HostMemory(120 * GIB, 112 * GIB, 60 * GIB, 52 * GIB)),
    "shared memory, one GPU": replace(SOUND, shared_memory_bytes=64 * 2**20),
    "old CUDA elsewhere": with_torch(SOUND, cuda_version="12.8"),
    "old Triton elsewhere": with_package(SOUND, "triton", "3.5.1"),
    "the Spark's assembler is set": replace(
        with_package(SPARK, "triton", "3.5.1"), ptxas_path="/usr/local/cuda/bin/ptxas"
    ),
    "FA3 on Hopper": replace(SOUND, facts=facts_as("GH200"), has_flash_attention_3=True, machine="aarch64"),
    "no /dev/shm": replace(SOUND, shared_memory_bytes=None),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_is_said_without_a_fault(name: str) -> None:
    assert advise(HARMLESS[name]) == []


def test_faults_come_first() -> None:
    machine = with_package(replace(SOUND, is_wsl=True, disk_free_bytes=0), "torchao", "0.14.1")
    assert [advice.severity for advice in advise(machine)] == ["fault", "warning", "warning"]


# ---- reading


@pytest.mark.parametrize("installed", [[], ["flash_attn_interface"], ["flash_attn_3"]])
def test_this_machine_is_read(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "find_spec", lambda name: name if name in installed else None)
    machine = read_machine({"CUDA_VISIBLE_DEVICES": "3"}, Path.cwd())
    assert machine.torch.version and machine.torch.import_error is None
    assert machine.facts is not None and machine.disk_free_bytes > 0
    assert machine.visible_devices == "3" and machine.packages["peft"]
    assert machine.has_flash_attention_3 is bool(installed)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("Linux version 6.6.87.2-microsoft-standard-WSL2 (root@x) (gcc 13)", True),
        ("Linux version 6.17.0-1014-nvidia (buildd@bos03-arm64-061)", False),
    ],
)
def test_wsl_is_told_by_its_kernel(kernel: str, expected: bool) -> None:
    assert is_wsl(kernel) is expected


class BrokenFinder:
    """Makes `import torch` fail as a build without its library does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            raise self.error


@pytest.fixture
def importing_torch_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def fail(error: Exception) -> None:
        monkeypatch.delitem(sys.modules, "torch")
        monkeypatch.setattr(sys, "meta_path", [BrokenFinder(error), *sys.meta_path])

    return fail


def test_a_torch_that_cannot_be_imported_is_read(importing_torch_fails: Callable[[Exception], None]) -> None:
    importing_torch_fails(ImportError("libcudnn.so.9: cannot open shared object file: No such file or directory"))
    state, facts = reading.read_torch()
    assert facts is None and state.version and state.import_error and "libcudnn.so.9" in state.import_error


def test_a_bug_in_torch_is_not_hidden(importing_torch_fails: Callable[[Exception], None]) -> None:
    importing_torch_fails(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        reading.read_torch()
