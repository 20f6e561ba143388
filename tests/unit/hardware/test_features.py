"""Which GPU has what, by capability: a table, not what the machine at hand happens to be."""

from __future__ import annotations

import pytest
import torch

from pixtune.hardware import features, monitor

NAMES = ("flash_attention_3", "fp8_native", "tf32_compute", "flash_attention_2", "async_memcpy")
TABLE = {  # capability: the features of NAMES it has
    (7, 5): (False, False, False, False, False),  # T4
    (8, 0): (False, False, True, True, True),  # A100
    (8, 6): (False, False, True, True, True),  # 3090
    (8, 9): (False, True, True, True, True),  # 4090
    (9, 0): (True, True, True, True, True),  # H100, GH200
    (10, 0): (False, True, True, True, True),  # B200
    (12, 0): (False, True, True, True, True),  # 5090
    (12, 1): (False, True, True, True, True),  # GB10
}


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    return request.param


@pytest.mark.parametrize("capability", TABLE, indirect=True)
def test_features_by_capability(capability: tuple[int, int]) -> None:
    has = TABLE[capability]
    assert tuple(features.supports_feature(name) for name in NAMES) == has
    settings = features.get_optimal_settings()
    assert settings["compute_capability"] == list(capability)
    names = ("use_flash_attention_3", "use_fp8", "use_tf32", "use_flash_attention_2")
    assert tuple(settings[name] for name in names) == has[:4]
    assert features.is_ampere_or_newer() is (capability >= (8, 0))
    assert features.is_hopper_or_newer() is (capability >= (9, 0))
    assert features.get_recommended_dtype() is (torch.bfloat16 if capability >= (8, 0) else torch.float32)


def test_without_a_gpu_nothing_is_there_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert features.get_device_capability() == (0, 0)
    assert not any(features.supports_feature(name) for name in NAMES)
    assert features.enable_tf32() is False and features.get_recommended_dtype() is torch.float32
    assert monitor.get_memory_stats() == {"allocated_gb": 0.0, "reserved_gb": 0.0, "max_allocated_gb": 0.0}


@pytest.mark.parametrize("capability", [(8, 0)], indirect=True)
def test_tf32_is_switched_on_where_it_is_there(capability: tuple[int, int]) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert features.enable_tf32() is True and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(ValueError, match="'warp_drive' is no known feature; there are flash_attention_3, fp8_native"):
        features.supports_feature("warp_drive")


def test_versions_compare_as_numbers() -> None:
    pairs = [("12.9", "12.10"), ("13.0", "13.0"), ("13.1", "12.8")]
    assert [features.compare_versions(*pair) for pair in pairs] == [-1, 0, 1]
