"""The limit of a whole process, divided between torch's allocator and what it does not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixtune.errors import PlanError
from pixtune.hardware import capping
from pixtune.hardware.capping import LOADED_LATER_BYTES, allocator_share, cap_device_memory, own_gpu, used_before_cuda
from pixtune.hardware.facts import GIB

MIB = 2**20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """An 80 GiB card: 500 MiB of others, 600 MiB of context, 100 MiB in the allocator. Returns the fractions set."""
    fractions: list[float] = []
    used = (500 + 600 + 100) * MIB
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * GIB - used, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 100 * MIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device=None: fractions.append(fraction)
    )
    return fractions


def test_the_context_counts(gpu: list[float]) -> None:
    allocator_bytes = cap_device_memory(23.3, used_before_bytes=500 * MIB)
    assert allocator_bytes + 600 * MIB + LOADED_LATER_BYTES == round(23.3 * GIB)
    assert gpu == [pytest.approx(allocator_bytes / (80 * GIB))]


@pytest.mark.usefixtures("gpu")
def test_an_unmeasured_context_is_assumed() -> None:
    assert cap_device_memory(23.3) == round(23.3 * GIB) - capping.ASSUMED_OUTSIDE_BYTES - LOADED_LATER_BYTES


@pytest.mark.parametrize(
    ("limit_gib", "message"),
    [
        (0.6, r"is 0\.60, and the CUDA context with its kernels alone takes 0\.85"),
        (81, r"81\.0 and this GPU has 80"),
    ],
)
def test_a_limit_that_cannot_be(limit_gib: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocator_share(round(limit_gib * GIB), 80 * GIB, GIB // 2)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "0"),
        ({"LOCAL_RANK": "3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "4, 6", "LOCAL_RANK": "1"}, "6"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5a0e,GPU-7b11", "LOCAL_RANK": "1"}, "GPU-7b11"),
        ({"CUDA_VISIBLE_DEVICES": "5", "LOCAL_RANK": "2"}, "5"),  # spread over what is visible
    ],
)
def test_a_process_asks_about_the_gpu_it_works_on(environ: dict[str, str], expected: str) -> None:
    assert own_gpu(environ) == expected


def script(folder: Path, text: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("echo 431", 431 * MIB),
        ('[ "$1" = --id=GPU-5a ] && echo 431', 431 * MIB),  # it is asked about this GPU alone
        ("echo '[N/A]'", None),  # a GB10
        ("echo 431; exit 9", None),
        ("echo 'No devices were found'", None),
    ],
)
def test_nvidia_smi_tells_what_others_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: int | None
) -> None:
    script(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert used_before_cuda("GPU-5a") == expected


def test_without_nvidia_smi_nobody_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert used_before_cuda("0") is None


@pytest.mark.gpu
def test_beyond_the_cap_torch_refuses_and_the_process_stays_within_it() -> None:
    import subprocess
    import sys

    code = """
import os
import torch
from pixtune.hardware.capping import cap_device_memory, outside_allocator_bytes, own_gpu, used_before_cuda
before = used_before_cuda(own_gpu(os.environ))
cap_device_memory(4.0, before)
kept = []
try:
    while True:
        kept.append(torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    outside = outside_allocator_bytes(before or 0)
    print(before is not None, (torch.cuda.memory_reserved() + outside) / 2**30, outside / 2**30)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, held_gib, outside_gib = run.stdout.split()
    assert measured == "True" and 3.5 < float(held_gib) <= 4.0 and 0.1 < float(outside_gib) < 1.5
