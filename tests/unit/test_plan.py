"""The plan is a pure function: what each machine and each demand gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixtune.config.schema import CudaFeatures, DataConfig, TrainConfig
from pixtune.errors import PlanError
from pixtune.fit.plan import GIB, MemoryPlan, RunSize, plan_memory
from pixtune.hardware.facts import HardwareFacts

H100 = HardwareFacts("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
CPU = HardwareFacts("cpu", "x86_64", (0, 0), 0, 0)
QWEN_1024 = RunSize(weight_bytes=20_430_000_000 * 2, num_tokens=4096 + 256, num_blocks=60, block_width=3072)
CONFIG = TrainConfig(
    pretrained_model_name_or_path="model", output_dir="out", max_train_steps=1, data_config=DataConfig(img_dir="data")
)


def test_80_gb_recomputes_nothing_and_predicts_the_measured_peak() -> None:
    plan = plan_memory(H100, QWEN_1024, CONFIG)
    assert not plan.recompute and plan.tf32 and plan.pin_memory and plan.weights_format == "bf16"
    assert plan.expected_peak_bytes / GIB == pytest.approx(64.1, rel=0.06)  # benchmarks/RESULTS.md


def test_recomputing_predicts_the_measured_peak() -> None:
    plan = plan_memory(H100, QWEN_1024, CONFIG.model_copy(update={"disable_gradient_checkpointing": False}))
    assert plan.recompute
    assert plan.expected_peak_bytes / GIB == pytest.approx(40.5, rel=0.06)


@pytest.mark.parametrize("change", [{"free_bytes": 48 * GIB}, {"free_bytes": 70 * GIB}])
def test_less_free_memory_recomputes_and_says_why(change: dict[str, int]) -> None:
    plan = plan_memory(replace(H100, **change), QWEN_1024, CONFIG)
    assert plan.recompute
    assert any("recomputation on" in reason and "GiB usable" in reason for reason in plan.reasons)


def test_a_larger_batch_recomputes() -> None:
    assert plan_memory(H100, replace(QWEN_1024, num_tokens=2 * QWEN_1024.num_tokens), CONFIG).recompute


def test_demands_win_over_the_estimate() -> None:
    config = CONFIG.model_copy(
        update={
            "disable_gradient_checkpointing": True,
            "adam8bit": True,
            "disable_cpu_offload": True,
            "pin_memory": False,
            "cuda_features": CudaFeatures(enable_tf32_compute=False, enable_cudnn_sdp=False),
        }
    )
    plan = plan_memory(replace(H100, free_bytes=GIB), QWEN_1024, config)
    assert (plan.recompute, plan.optimizer, plan.encoders_stay) == (False, "adamw_8bit", True)
    assert (plan.pin_memory, plan.tf32, plan.cudnn_attention) == (False, False, False)


def test_a_cpu_pins_nothing_and_recomputes_nothing() -> None:
    plan = plan_memory(CPU, QWEN_1024, CONFIG.model_copy(update={"pin_memory": True, "mixed_precision": "no"}))
    assert not plan.pin_memory and not plan.recompute and not plan.tf32
    assert plan.weights_format == "fp32" and plan.expected_peak_bytes == 0


def test_a_plan_survives_the_checkpoint() -> None:
    plan = plan_memory(H100, QWEN_1024, CONFIG)
    assert MemoryPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("passed", [True, False])
def test_a_trial_of_cudnn_attention_decides_unless_the_config_does(passed: bool) -> None:
    plan = plan_memory(H100, QWEN_1024, CONFIG, (passed, "the finding"))
    assert plan.cudnn_attention is passed and any("the finding" in reason for reason in plan.reasons)
    demanded = CONFIG.model_copy(update={"cuda_features": CudaFeatures(enable_cudnn_sdp=not passed)})
    assert plan_memory(H100, QWEN_1024, demanded, (passed, "the finding")).cudnn_attention is (not passed)
    assert plan_memory(H100, QWEN_1024, CONFIG).cudnn_attention is None


# ---- all weights

QWEN_FULL = replace(QWEN_1024, num_trained=20_430_000_000)
FULL = CONFIG.model_copy(update={"method": "full", "disable_gradient_checkpointing": False})
H200 = replace(H100, name="NVIDIA H200", total_bytes=140 * GIB, free_bytes=139 * GIB)


def test_all_weights_of_qwen_fit_an_h200_only_in_6_bytes_each() -> None:
    plan = plan_memory(H200, QWEN_FULL, FULL.model_copy(update={"adam8bit": True}))
    assert plan.expected_peak_bytes / GIB == pytest.approx(6 * 20.43e9 / GIB + 2, rel=0.03)
    with pytest.raises(PlanError, match=r"(?s)missing.*stochastic_rounding adam8bit=true needs 1\d\d.* and fits"):
        plan_memory(H200, QWEN_FULL, FULL)


@pytest.mark.parametrize(
    ("change", "bytes_per_weight"),
    [
        ({"adam8bit": True}, 6),
        ({}, 12),
        ({"weight_update": "fp32_master", "adam8bit": True}, 12),
        ({"weight_update": "fp32_master"}, 18),
        ({"mixed_precision": "no"}, 14),
    ],
)
def test_each_way_has_its_bytes_per_weight(change: dict[str, object], bytes_per_weight: int) -> None:
    config, huge = FULL.model_copy(update=change), replace(H100, free_bytes=10_000 * GIB)
    without = plan_memory(huge, QWEN_1024, config)
    extra = plan_memory(huge, QWEN_FULL, config).expected_peak_bytes - without.expected_peak_bytes
    assert extra / QWEN_FULL.num_trained + 2 == pytest.approx(bytes_per_weight, abs=0.1)


def test_what_no_way_fits_names_the_least_and_the_lora() -> None:
    with pytest.raises(PlanError, match=r"(?s)NVIDIA H100.*missing.*The least.*method=lora"):
        plan_memory(H100, QWEN_FULL, FULL)
