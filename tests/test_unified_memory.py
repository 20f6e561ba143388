"""Unified memory is told by the device's own property, and the preset follows from it (contract.md sections 3, 4, C9)."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.runs import ROOT, environment
from utils.unified_memory import get_memory_config, is_unified_memory_system, setup_unified_memory_env

MACHINES = {  # name: (capability, integrated)
    "GB10": ((12, 1), 1),
    "RTX 5090": ((12, 0), 0),
    "GH200": ((9, 0), 0),
    "H100": ((9, 0), 0),
    "RTX 4090": ((8, 9), 0),
    "Orin": ((8, 7), 1),
}


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    (major, minor), integrated = MACHINES[request.param]
    properties = SimpleNamespace(name=request.param, major=major, minor=minor, is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    return str(request.param)


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_only_an_integrated_gpu_shares_its_memory(machine: str) -> None:
    expected = machine in ("GB10", "Orin")
    assert is_unified_memory_system() is expected
    assert get_memory_config()["memory_pool"] == ("unified" if expected else "standard")


def test_a_machine_without_gpu_is_not_unified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert is_unified_memory_system() is False


def test_the_presets_are_the_documents() -> None:
    names = (
        "pin_memory",
        "disable_cpu_offload",
        "prefetch_factor",
        "num_workers",
        "memory_pool",
        "expandable_segments",
    )
    unified, standard = get_memory_config(True), get_memory_config(False)
    assert unified == dict(zip(names, (False, True, 2, 4, "unified", True), strict=True))
    assert standard == dict(zip(names, (True, False, 4, 8, "standard", False), strict=True))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"},
        ),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1,expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},) * 2,
    ],
)
def test_the_users_own_allocator_settings_are_kept(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what the call sets
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    setup_unified_memory_env()
    setup_unified_memory_env()
    assert {
        name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ
    } == after


def test_after_cuda_has_started_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before CUDA starts"):
        setup_unified_memory_env()


def test_importing_starts_no_cuda_and_changes_no_setting() -> None:
    code = "import os, utils.unified_memory, torch; print(torch.cuda.is_initialized(), 'PYTORCH_CUDA_ALLOC_CONF' in os.environ)"
    settings = {name: value for name, value in environment().items() if not name.startswith("PYTORCH_")}
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert outcome.stdout.split() == ["False", "False"], outcome.stderr
