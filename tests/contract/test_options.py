"""contract.md section 2: defaults, the three-state rule, batch size in two places, faults of a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig, leaf_keys
from pixtune.errors import ConfigError, NotYetError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.resume import flatten
from tests.contract.not_yet import needs
from tests.full_size import full_size_footprint

Load = Callable[..., TrainConfig]

H100 = facts_as("H100")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A config of nothing but what is required, and some words."""
    required = ("pretrained_model_name_or_path=m", f"output_dir={tmp_path}", f"data_config.img_dir={tmp_path}")

    def load(*words: str) -> TrainConfig:
        return load_config(None, [*required, "max_train_steps=1", *words])

    return load


def plan_of(config: TrainConfig, facts: HardwareFacts = H100) -> TrainingPlan:
    return plan_training(facts, full_size_footprint(config), config)


# ---- defaults

COMMON_KEYS = (
    "pretrained_model_name_or_path", "output_dir", "logging_dir", "report_to", "tracker_project_name", "seed",
    "mixed_precision", "train_batch_size", "max_train_steps", "num_train_epochs", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm", "rank", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "freeze_text_encoder", "data_config.img_dir", "data_config.control_dir", "data_config.img_size",
    "data_config.train_batch_size", "data_config.num_workers", "data_config.caption_type",
    "data_config.caption_dropout_rate", "data_config.random_ratio",
)  # fmt: skip


@pytest.mark.parametrize("key", COMMON_KEYS)
def test_a_common_key_is_a_key(key: str) -> None:
    assert key in set(leaf_keys())


def test_use_8bit_adam_is_an_older_name_of_adam8bit(load: Load) -> None:
    assert load("use_8bit_adam=true").adam8bit is True


PLAIN_DEFAULTS = {
    "disable_quantization": False,
    "precompute_text_embeddings": True,
    "precompute_image_embeddings": True,
    "save_cache_on_disk": True,
    "use_fastsafetensors": True,
    "fastsafetensors_num_threads": 8,
}


@pytest.mark.parametrize("key", [pytest.param(key, marks=needs(key, raises=AssertionError)) for key in PLAIN_DEFAULTS])
def test_a_plain_default(load: Load, key: str) -> None:
    assert flatten(load().model_dump())[key] == PLAIN_DEFAULTS[key]


@pytest.mark.parametrize(
    ("key", "in_force"),
    [
        ("disable_cpu_offload", lambda plan: plan.encoders_stay is False),
        ("pin_memory", lambda plan: plan.pin_memory is True),
        ("quantize", lambda plan: plan.weights_format == "bf16"),
        ("adam8bit", lambda plan: plan.optimizer == "adamw"),
        ("cuda_features.enable_tf32_compute", lambda plan: plan.tf32 is True),
    ],
)
def test_a_default_is_what_the_planner_yields_on_80_gb(
    load: Load, key: str, in_force: Callable[[TrainingPlan], bool]
) -> None:
    assert flatten(load().model_dump())[key] is None, "absent, so that the planner chooses"
    assert in_force(plan_of(load()))


def test_tf32_is_off_before_sm_80(load: Load) -> None:
    assert plan_of(load(), replace(H100, capability=(7, 5))).tf32 is False


UNIFIED_DEFAULTS = {"memory_fraction": 0.9, "expandable_segments": True}


@pytest.mark.parametrize("key", [pytest.param(key, marks=needs(key, "unified_memory")) for key in UNIFIED_DEFAULTS])
def test_a_default_of_the_unified_profile_can_be_written_out(load: Load, key: str) -> None:
    config = load("unified_memory=true", f"{key}={json.dumps(UNIFIED_DEFAULTS[key])}")
    assert replace(plan_of(config), reasons=()) == replace(plan_of(load("unified_memory=true")), reasons=())


# ---- three states

THREE_STATES: dict[str, Callable[[TrainingPlan], Any]] = {
    "disable_gradient_checkpointing": lambda plan: not plan.recompute,
    "disable_cpu_offload": lambda plan: plan.encoders_stay,
    "pin_memory": lambda plan: plan.pin_memory,
    "adam8bit": lambda plan: plan.optimizer == "adamw_8bit",
    "quantize": lambda plan: plan.weights_format not in ("bf16", "fp32"),
    "cuda_features.enable_tf32_compute": lambda plan: plan.tf32,
    "cuda_features.enable_cudnn_sdp": lambda plan: plan.attention == "cudnn",
}


@pytest.mark.parametrize("free_gib", [79, 40])
@pytest.mark.parametrize("key", [pytest.param(key, marks=needs(key)) for key in THREE_STATES])
def test_true_demands_and_false_forbids_on_any_machine(load: Load, key: str, free_gib: int) -> None:
    facts = replace(H100, free_bytes=free_gib * GIB)
    in_plan = THREE_STATES[key]
    assert in_plan(plan_of(load(f"{key}=true"), facts)) is True
    assert in_plan(plan_of(load(f"{key}=false"), facts)) is False


def test_absence_lets_the_planner_choose(load: Load) -> None:
    chosen = [plan_of(load(), replace(H100, free_bytes=gib * GIB)).recompute for gib in (79, 18)]
    assert chosen == [False, True]


@needs("quantize")
def test_disable_quantization_wins(load: Load) -> None:
    assert plan_of(load("quantize=true")).weights_format != "bf16"
    assert plan_of(load("quantize=true", "disable_quantization=true")).weights_format == "bf16"


def test_disable_quantization_wins_with_a_notice(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load("quantize=true", "disable_quantization=true").quantize is False
    assert "disable_quantization is true and wins over quantize" in caplog.text


# ---- batch size, text encoder


def test_batch_size_may_stand_in_both_places_but_not_differ(load: Load) -> None:
    assert load("train_batch_size=3").batch_size == load("data_config.train_batch_size=3").batch_size == 3
    assert load("train_batch_size=3", "data_config.train_batch_size=3").batch_size == 3
    with pytest.raises(ConfigError, match=r"train_batch_size is 3 and data_config\.train_batch_size is 4"):
        load("train_batch_size=3", "data_config.train_batch_size=4")


def test_training_the_text_encoder_is_refused_by_name(load: Load) -> None:
    with pytest.raises(NotYetError, match="freeze_text_encoder is false"):
        load("freeze_text_encoder=false")


# ---- faults


def test_all_faults_come_at_once_with_key_value_file_and_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"pretrained_model_name_or_path: m\noutput_dir: out\nmax_train_steps: 1\nlearning_rat: 1e-4\nrank: sixteen\n"
        f"train_batch_size: 2\ndata_config: {{img_dir: {tmp_path}, train_batch_size: 4, random_ration: true}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    faults = caught.value.faults
    assert len(faults) == 4
    for line, *parts in (
        (4, "learning_rat is not a known key (value 0.0001)", "did you mean learning_rate?"),
        (5, 'rank is "sixteen"', "must be a whole number"),
        (7, "train_batch_size is 2 and data_config.train_batch_size is 4"),
        (7, "data_config.random_ration is not a known key", "did you mean data_config.random_ratio?"),
    ):
        assert any(fault.startswith(f"{path}:{line}: ") and all(p in fault for p in parts) for fault in faults), faults
