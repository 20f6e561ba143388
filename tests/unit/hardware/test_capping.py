"""The limit of a whole process, divided between torch's allocator and what it does not see."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixtune.errors import PlanError
from pixtune.hardware import capping
from pixtune.hardware.capping import (
    LARGEST_CONTEXT_BYTES,
    LOADED_LATER_BYTES,
    BeforeCuda,
    allocator_share,
    cap_device_memory,
    outside_allocator_bytes,
    read_before_cuda,
)
from pixtune.hardware.facts import GIB
from pixtune.hardware.nvidia_smi import own_gpu

MIB = 2**20
APPS = "--query-compute-apps=pid,used_memory"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """An 80 GiB card: 500 MiB of others, 600 MiB of context, 100 MiB in the allocator. Returns the fractions set.

    nvidia-smi reports no processes.
    """
    monkeypatch.setattr(capping, "query_processes", lambda gpu: None)
    fractions: list[float] = []
    used = (500 + 600 + 100) * MIB
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * GIB - used, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 100 * MIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device=None: fractions.append(fraction)
    )
    return fractions


def before(used_mib: int, *processes: int) -> BeforeCuda:
    return BeforeCuda("0", used_mib * MIB, frozenset(processes))


def test_the_context_counts(gpu: list[float]) -> None:
    allocator_bytes = cap_device_memory(23.3, before(500))
    assert allocator_bytes + 600 * MIB + LOADED_LATER_BYTES == round(23.3 * GIB)
    assert gpu == [pytest.approx(allocator_bytes / (80 * GIB))]


OTHER = 1
"""Number of a process that is not this one."""


@pytest.mark.usefixtures("gpu")
def test_what_others_take_meanwhile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others grew by 400 MiB since the first reading, so that the difference is 1000 MiB; this process holds 700."""
    listed = [(OTHER, 500 * MIB), (os.getpid(), 700 * MIB), (OTHER + 1, 400 * MIB)]
    monkeypatch.setattr(capping, "query_processes", lambda gpu: listed)
    assert outside_allocator_bytes(before(100, OTHER)) == 600 * MIB
    assert cap_device_memory(23.3, before(100, OTHER)) == round(23.3 * GIB) - 600 * MIB - LOADED_LATER_BYTES


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("listed", "earlier"),
    [
        (None, ()),  # no nvidia-smi any more
        ([], ()),  # a container, whose processes it does not list
        ([(OTHER, 700 * MIB)], ()),  # or lists by the host's numbers
        ([(os.getpid(), 700 * MIB)], (os.getpid(),)),  # another container's process has our number
        ([(os.getpid(), 90 * MIB)], ()),  # less than the allocator alone holds
        ([(os.getpid(), 400 * MIB), (os.getpid(), 300 * MIB)], ()),  # two slices of one GPU
    ],
)
def test_a_process_that_is_not_listed_beyond_doubt_is_the_difference(
    monkeypatch: pytest.MonkeyPatch, listed: list[tuple[int, int]] | None, earlier: tuple[int, ...]
) -> None:
    monkeypatch.setattr(capping, "query_processes", lambda gpu: listed)
    assert outside_allocator_bytes(before(500, *earlier)) == 600 * MIB
    assert cap_device_memory(23.3, before(500, *earlier)) == round(23.3 * GIB) - 600 * MIB - LOADED_LATER_BYTES


@pytest.mark.usefixtures("gpu")
def test_a_difference_that_is_no_context_is_not_believed() -> None:
    """Three other runs made their contexts at the same time."""
    assert cap_device_memory(23.3, before(0)) == round(23.3 * GIB) - LARGEST_CONTEXT_BYTES - LOADED_LATER_BYTES


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
        ("echo 431", before(431)),  # and no list that can be read
        ('[ "$1" = --id=GPU-5a ] && echo 431', before(431)),  # it is asked about this GPU alone
        (f"case $2 in {APPS}) printf '17, 400\\n9, [N/A]\\n';; *) echo 431;; esac", before(431, 17)),
        (f"case $2 in {APPS}) exit 6;; *) echo 431;; esac", before(431)),
        ("echo '[N/A]'", None),  # a GB10
        ("echo 431; exit 9", None),
        ("echo 'No devices were found'", None),
    ],
)
def test_nvidia_smi_tells_what_others_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: BeforeCuda | None
) -> None:
    script(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = read_before_cuda("GPU-5a")
    assert (found and replace(found, gpu="0")) == expected


def test_without_nvidia_smi_nobody_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_before_cuda("0") is None


@pytest.mark.gpu
def test_beyond_the_cap_torch_refuses_and_the_process_stays_within_it() -> None:
    import subprocess
    import sys

    code = """
import os
import torch
from pixtune.hardware.capping import cap_device_memory, outside_allocator_bytes, read_before_cuda
from pixtune.hardware.nvidia_smi import own_gpu
before = read_before_cuda(own_gpu(os.environ))
cap_device_memory(4.0, before)
kept = []
try:
    while True:
        kept.append(torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    outside = outside_allocator_bytes(before)
    print(before is not None, (torch.cuda.memory_reserved() + outside) / 2**30, outside / 2**30)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, held_gib, outside_gib = run.stdout.split()
    assert measured == "True" and 3.5 < float(held_gib) <= 4.0 and 0.1 < float(outside_gib) < 1.5
