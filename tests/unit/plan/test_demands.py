"""The meaning of the config's keys on memory: what wins, what is left open, and what a machine makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import CudaFeatures, DataConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, MEMORY_FRACTION
from pixtune.plan.demands import Demands, demands_of


def demands(fp8: bool | None = None, **changes: object) -> Demands:
    config = TrainConfig(
        pretrained_model_name_or_path="model", output_dir=Path("out"), max_train_steps=1,
        data_config=DataConfig(img_dir=Path("data")), cuda_features=CudaFeatures(enable_fp8_training=fp8),
    )  # fmt: skip
    return demands_of(config.model_copy(update=changes))


def test_without_a_word_all_is_left_open() -> None:
    free = demands()
    assert (free.quantize, free.fp8, free.recompute, free.optimizer) == (None, None, None, None)
    assert (free.unified, free.encoders_stay, free.memory_limit_bytes) == (None, None, None)
    assert free.may_quantize_encoders and free.captures and not free.notices
    assert (free.compute_format, free.memory_fraction) == ("bf16", MEMORY_FRACTION)


@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("quantize", [True, False, None])
def test_disable_quantization_wins_and_alone_forbids_it_for_encoders(disabled: bool, quantize: bool | None) -> None:
    asked = demands(quantize=quantize, disable_quantization=disabled)
    assert asked.quantize is (False if disabled else quantize)
    assert asked.may_quantize_encoders is not disabled
    assert bool(asked.notices) is bool(disabled and quantize)


def test_float8_is_overruled_with_a_notice_as_well() -> None:
    assert "disable_quantization wins" in demands(fp8=True, disable_quantization=True).notices[0]
    assert not demands(fp8=True).notices and not demands(fp8=False, disable_quantization=True).notices


@pytest.mark.parametrize(("disabled", "recompute"), [(True, False), (False, True), (None, None)])
def test_negations_become_positive(disabled: bool | None, recompute: bool | None) -> None:
    assert demands(disable_gradient_checkpointing=disabled).recompute is recompute
    assert demands(disable_cpu_offload=disabled).encoders_stay is disabled, "not to offload them is to keep them"


def test_what_is_left_open_is_as_the_machine_has_it() -> None:
    spark, h100 = facts_as("DGX Spark"), facts_as("H100")
    assert [demands().is_unified(facts) for facts in (spark, h100)] == [True, False]
    assert [demands(unified_memory=asked).is_unified(facts) for asked, facts in ((False, spark), (True, h100))] == [
        False,
        True,
    ]
    assert [demands().keeps_encoders(unified) for unified in (True, False)] == [True, False]
    assert [demands(disable_cpu_offload=not unified).keeps_encoders(unified) for unified in (True, False)] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"method": "full", "weight_update": "fp32_master"}, True),
        ({"method": "full", "weight_update": "fp32_master", "mixed_precision": "no"}, False),
        ({"method": "full"}, False),
        ({"weight_update": "fp32_master"}, False),
    ],
)
def test_only_bf16_weights_that_are_all_trained_have_copies(changes: dict[str, Any], copies: bool) -> None:
    assert demands(**changes).fp32_copies is copies


def test_steps_are_captured_for_loras_unless_it_is_forbidden() -> None:
    assert not demands(cuda_graphs=False).captures and not demands(method="full").captures


def test_numbers_become_bytes() -> None:
    assert demands(gpu_memory_limit_gib=7.5).memory_limit_bytes == 7.5 * GIB
    assert demands(memory_fraction=0.5).memory_fraction == 0.5
    assert demands(gradient_accumulation_steps=2).accumulates and not demands().accumulates
    assert demands().clips and not demands(max_grad_norm=0.0).clips
