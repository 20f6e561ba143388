"""contract.md section 4: names, arguments and results of `utils`. What they are right about: tests/unit."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
import torch

from utils import cuda_utils, fast_loading, memory_monitor, unified_memory, validate_dataset


def test_every_module_says_what_it_exports() -> None:
    for module in (cuda_utils, fast_loading, memory_monitor, unified_memory, validate_dataset):
        assert all(hasattr(module, name) for name in module.__all__)


def test_unified_memory() -> None:
    assert isinstance(unified_memory.is_unified_memory_system(), bool)
    assert unified_memory.get_memory_config(unified_memory=True) == {
        "pin_memory": False, "disable_cpu_offload": True, "prefetch_factor": 2, "num_workers": 4,
        "memory_pool": "unified", "expandable_segments": True,
    }  # fmt: skip
    assert unified_memory.get_memory_config(unified_memory=False) == {
        "pin_memory": True, "disable_cpu_offload": False, "prefetch_factor": 4, "num_workers": 8,
        "memory_pool": "standard", "expandable_segments": False,
    }  # fmt: skip
    detected = unified_memory.is_unified_memory_system()
    assert unified_memory.get_memory_config() == unified_memory.get_memory_config(detected)
    assert inspect.signature(unified_memory.setup_unified_memory_env).parameters == {}


FEATURES = ("flash_attention_3", "fp8_native", "tf32_compute", "flash_attention_2", "async_memcpy")


def test_cuda_utils() -> None:
    assert isinstance(cuda_utils.get_cuda_version(), str)
    assert len(cuda_utils.get_device_capability()) == 2
    assert {type(cuda_utils.supports_feature(name)) for name in FEATURES} == {bool}
    assert {cuda_utils.is_hopper_or_newer(), cuda_utils.is_ampere_or_newer()} <= {True, False}
    settings = cuda_utils.get_optimal_settings()
    assert settings["use_flash_attention_3"] is cuda_utils.supports_feature("flash_attention_3")
    assert settings["use_fp8"] is cuda_utils.supports_feature("fp8_native")
    assert settings["use_tf32"] is cuda_utils.supports_feature("tf32_compute")
    assert settings["use_flash_attention_2"] is cuda_utils.supports_feature("flash_attention_2")
    assert settings["cuda_version"] == cuda_utils.get_cuda_version()
    assert tuple(settings["compute_capability"]) == cuda_utils.get_device_capability()
    assert cuda_utils.get_recommended_dtype() in (torch.bfloat16, torch.float32)
    assert cuda_utils.compare_versions("12.9", "12.10") == -1
    assert inspect.signature(cuda_utils.enable_tf32).parameters == {}


def test_memory_monitor(caplog: pytest.LogCaptureFixture) -> None:
    stats = memory_monitor.get_memory_stats()
    assert {"allocated_gb", "reserved_gb", "max_allocated_gb"} <= stats.keys()
    with caplog.at_level(logging.INFO):
        memory_monitor.log_memory_usage(checkpoint_name="after text encoding")
    assert "after text encoding" in caplog.text
    memory_monitor.reset_peak_memory_stats()
    after = memory_monitor.get_memory_stats()
    assert after["max_allocated_gb"] == after["allocated_gb"]


def test_fast_loading(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7], dtype=torch.bfloat16)}
    path = tmp_path / "weights.safetensors"
    fast_loading.save_safetensors(tensors, path)
    defaults = {name: p.default for name, p in inspect.signature(fast_loading.load_safetensors).parameters.items()}
    assert defaults == {"path": inspect.Parameter.empty, "num_threads": 8, "device": "cpu", "use_fast": True}
    for use_fast in (True, False):
        loaded = fast_loading.load_safetensors(path, num_threads=2, device="cpu", use_fast=use_fast)
        assert loaded.keys() == tensors.keys()
        assert all(
            loaded[name].equal(tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
    assert isinstance(fast_loading.is_fastsafetensors_available(), bool)


def test_fast_loading_in_shards(tmp_path: Path) -> None:
    tensors = {f"block.{number}.weight": torch.full((64,), float(number)) for number in range(4)}
    written = fast_loading.save_safetensors_sharded(tensors, tmp_path, max_shard_bytes=600)
    assert len([path for path in written if path.suffix == ".safetensors"]) == 2
    loaded = fast_loading.load_safetensors_sharded(tmp_path)
    assert loaded.keys() == tensors.keys() and all(loaded[name].equal(tensor) for name, tensor in tensors.items())


def test_validate_dataset(scene: Path, tmp_path: Path) -> None:
    assert validate_dataset.validate_dataset(scene / "pictures") is True
    assert validate_dataset.validate_dataset(str(tmp_path)) is False
