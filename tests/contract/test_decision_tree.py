"""contract.md section 3: what a user with no opinion gets on each machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.plan.training import TrainingPlan, plan_training
from tests.full_size import full_size_footprint

NO_OPINION = TrainConfig(
    pretrained_model_name_or_path="m",
    output_dir=Path("o"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("d")),
)


def plan_for(card: str) -> TrainingPlan:
    return plan_training(facts_as(card), full_size_footprint(NO_OPINION), NO_OPINION)


def test_dgx_spark_keeps_everything_in_its_one_pool() -> None:
    plan = plan_for("DGX Spark")
    assert (plan.encoders_stay, plan.pin_memory, plan.recompute) == (True, False, False)
    assert plan.weights_format == "bf16" and plan.attention == "cudnn"


@pytest.mark.parametrize("card", ["H100", "A100 80 GB", "H200", "RTX PRO 6000", "GH200"])
def test_80_gb_and_more_get_nothing_special(card: str) -> None:
    plan = plan_for(card)
    assert (plan.weights_format, plan.optimizer) == ("bf16", "adamw")
    assert (plan.recompute, plan.encoders_stay, plan.pin_memory, plan.tf32) == (False, False, True, True)


@pytest.mark.parametrize("card", ["RTX 4090", "RTX 3090"])
def test_24_gb_get_a_quantized_base_and_8_bit_adam(card: str) -> None:
    plan = plan_for(card)
    assert plan.weights_format not in ("bf16", "fp32") and plan.optimizer == "adamw_8bit"
    assert plan.expected_peak_bytes <= facts_as(card).free_bytes


def test_the_cache_is_on_disk_unless_told_otherwise() -> None:
    assert NO_OPINION.save_cache_on_disk is True


@pytest.mark.parametrize("card", ["RTX 5090", "RTX 4080", "RTX 4070", "RTX 3080", "RTX 4060"])
def test_less_gets_a_plan_that_fits_or_is_told_how_much_is_missing(card: str) -> None:
    try:
        plan = plan_for(card)
    except PlanError as refusal:
        assert "GiB are missing" in str(refusal)
    else:
        assert plan.expected_peak_bytes <= facts_as(card).free_bytes
