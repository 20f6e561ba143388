"""A refusal names what is missing, and what it promises to fit does fit on the same machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import CudaFeatures, DataConfig, DistributedConfig
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts, host_room_bytes
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import ladder, with_rows
from pixtune.plan.situation import situation_of
from pixtune.plan.training import TrainingPlan, plan_training
from tests.full_size import full_size_footprint

CONFIG = TrainConfig(
    pretrained_model_name_or_path="model",
    output_dir=Path("out"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("data")),
)
CARDS = ("RTX 3080", "RTX 4060", "RTX 4070", "RTX 4090", "RTX 5090", "A100 80 GB", "H100", "H200", "DGX Spark")
NUM_BLOCKS = 60
"""Qwen-Image's."""
FP8 = "cuda_features.enable_fp8_training"
VALUES: dict[str, tuple[object, ...]] = {
    "disable_gradient_checkpointing": (True, False, None, None),
    "quantize": (True, False, None, None),
    "disable_quantization": (True, False, False),
    "adam8bit": (True, False, None),
    "unified_memory": (True, False, None, None, None),
    "train_batch_size": (1, 1, 2, 4),
    "rank": (16, 256),
    "gradient_accumulation_steps": (1, 1, 4),
    "weight_update": ("stochastic_rounding", "fp32_master"),
    FP8: (None, None, True),
}
"""Values that keys are drawn from; those that are there several times more often."""
PROMISE = re.compile(
    r"missing\. (?:Without (?P<without>[\w. ]+?))?(?: and )?(?:[Ww]ith (?P<given>[\w.= ]+?))?"
    r"(?: instead of \d+)? it (?:needs (?P<gib>[\d.]+) GiB and )?fits[.:]"
)


def plan_for(
    card: str, host_gb: float = 64, num_processes: int = 1, model: str = "qwen_image", **keys: Any
) -> TrainingPlan:
    fp8 = keys.pop(FP8, None)
    config = CONFIG.model_copy(update={**keys, "cuda_features": CudaFeatures(enable_fp8_training=fp8)})
    facts, footprint = facts_as(card, round(host_gb * 1e9)), full_size_footprint(config, model)
    return plan_training(facts, footprint, config, num_processes=num_processes)


def refusal(*args: Any, **keys: Any) -> str:
    """The words of a refusal, or none where there is a plan."""
    try:
        plan_for(*args, **keys)
    except PlanError as error:
        return str(error)
    return ""


def changed_by(promise: re.Match[str]) -> dict[str, Any]:
    """The keys that a refusal would have otherwise."""
    without = promise["without"].split(" and ") if promise["without"] else []
    keys: dict[str, Any] = {key: False if key == "disable_quantization" else None for key in without}
    if promise["given"] == "one process":
        return {"num_processes": 1}
    for word in promise["given"].split(" and ") if promise["given"] else []:
        key, value = word.split("=")
        keys[key] = {"true": True, "1": 1}.get(value, value)
    return keys


@pytest.mark.parametrize(("method", "cards", "least_promises"), [("lora", CARDS, 8), ("full", CARDS[3:], 6)])
def test_a_plan_fits_and_does_as_demanded_and_what_a_refusal_promises_gets_a_plan(
    method: str, cards: tuple[str, ...], least_promises: int
) -> None:
    """Over any machines and demands; 8 bits of float8 are asked of no GPU that lacks them."""
    promises = []

    @settings(max_examples=40)
    @given(
        st.sampled_from(cards),
        st.sampled_from((4, 8, 16, 64, 128)),
        st.sampled_from((1, 1, 2, 8)),
        st.fixed_dictionaries({key: st.sampled_from(values) for key, values in VALUES.items()}),
    )
    def check(card: str, host_gb: int, processes: int, keys: dict[str, Any]) -> None:
        keys = {"method": method, **keys}
        if facts_as(card).capability < (8, 9):
            keys[FP8] = None
        try:
            plan = plan_for(card, host_gb, processes, **keys)
        except PlanError as error:
            message = str(error)
            assert "GiB are missing" in message
        else:
            assert_fits_and_does_as_demanded(plan, facts_as(card, round(host_gb * 1e9)), keys)
            return
        if promise := PROMISE.search(message):
            promises.append(message)
            plan = plan_for(card, host_gb, **{"num_processes": processes, **keys, **changed_by(promise)})
            if promise["gib"]:
                assert f"{plan.expected_peak_bytes / GIB:.1f}" == promise["gib"], message

    check()
    assert len(promises) >= least_promises, "too few to show anything"


def assert_fits_and_does_as_demanded(plan: TrainingPlan, facts: HardwareFacts, keys: dict[str, Any]) -> None:
    """The keys of three states are constraints, whatever else the machine would allow."""
    assert plan.expected_peak_bytes <= plan.usable_bytes <= facts.total_bytes - GIB // 4
    recompute, is_plain = keys["disable_gradient_checkpointing"], plan.weights_format in ("bf16", "fp32")
    if recompute is True:
        assert plan.recomputed_blocks == plan.streamed_blocks == 0 and not plan.selective
    if recompute is False:
        assert plan.recomputed_blocks == NUM_BLOCKS
    if keys["disable_quantization"] or keys["quantize"] is False or keys["method"] == "full":
        assert is_plain
    elif keys["quantize"] or keys[FP8]:
        assert not is_plain and plan.weights_format != "nf4"
    if keys["adam8bit"] is not None:
        assert plan.optimizer == ("adamw_8bit" if keys["adam8bit"] else "adamw")
    if keys["unified_memory"] is not None:
        assert plan.encoders_stay == keys["unified_memory"]


def test_no_more_is_named_than_is_in_the_way() -> None:
    """A demand for 8 bits stays where recomputation is what lacks."""
    message = refusal("RTX 4080", disable_gradient_checkpointing=True, quantize=True, adam8bit=True)
    assert "Without disable_gradient_checkpointing it needs" in message
    both = refusal("RTX 4060", 16, disable_gradient_checkpointing=True, disable_quantization=True)
    assert "Without disable_gradient_checkpointing and disable_quantization it needs" in both


def test_float8_that_is_demanded_can_be_in_the_way() -> None:
    message = refusal("RTX 4060", 12, **{FP8: True})
    assert f"Without {FP8} it fits: add {FP8}=null to the command." in message


def test_processes_lack_host_memory_together_and_one_of_them_fits() -> None:
    facts, footprint = facts_as("RTX 4060", 16 * 10**9), full_size_footprint(CONFIG)
    config = CONFIG.model_copy(update={"distributed": DistributedConfig(shards=1)})
    message = refusal("RTX 4060", 16, 8, distributed=config.distributed)
    situation = situation_of(facts, footprint, demands_of(config), num_processes=8)
    fitting = [with_rows(rung, footprint) for rung in ladder(situation) if situation.fits_device(rung)]
    batches = 2**27
    least = 8 * (min(rung.host_bytes(situation) for rung in fitting) + batches) + 8 * footprint.trained_weights
    room = host_room_bytes(facts)
    assert room is not None and f"needs {least / GIB:.1f} GiB of host memory for 8 processes" in message
    assert f": {(least - room) / GIB:.1f} GiB are missing. Without distributed.shards it fits: add dis" in message
    assert plan_for("RTX 4060", 16, 8).shards > 1, "GPUs hold together what the host cannot"


def test_more_gpus_are_named_where_they_hold_what_one_cannot() -> None:
    keys: dict[str, Any] = {"disable_quantization": True, "quantize": False}
    message = refusal("RTX 3080", 16, **keys)
    promise = re.search(r"Or: (\d) such GPUs of one host hold the weights together and fit the run: start", message)
    assert promise, message
    count = int(promise[1])
    assert plan_for("RTX 3080", 16, count, **keys).shards > 1 and refusal("RTX 3080", 16, count // 2, **keys)


def test_what_fits_the_gpu_and_not_the_host_is_not_promised() -> None:
    message = refusal("RTX 4060", 4, disable_gradient_checkpointing=True)
    assert not PROMISE.search(message) and "Without disable_gradient_checkpointing it fits the GPU, and" in message
    missing = re.search(r"it fits the GPU, and ([\d.]+) GiB of host memory are missing\. Close other", message)
    assert missing and f": {missing[1]} GiB are missing" in refusal("RTX 4060", 4)


LIMIT = re.compile(r"needs about ([\d.]+) [GM]iB, and ([\d.]+) [GM]iB of .* are usable: ([\d.]+) [GM]iB are missing\. "
                   r"With gpu_memory_limit_gib=([\d.]+) it fits this GPU\.")  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"method": "full"}, {"disable_quantization": True}], ids=str)
def test_a_limit_that_is_too_small_is_answered_with_the_one_that_is_not(keys: dict[str, Any]) -> None:
    """Down to where a rounded figure would say that nothing is missing."""

    def words(limit_gib: float) -> str:
        return refusal("H200", 128, gpu_memory_limit_gib=limit_gib, **keys)

    asked = LIMIT.search(words(2))
    assert asked, words(2)
    enough = float(asked[4])
    assert not words(enough)
    for less in (0.01, 0.06, 0.1, 0.3):
        found = LIMIT.search(words(enough - 0.1 - less))
        assert found and float(found[4]) == enough, words(enough - 0.1 - less)
        needed, usable, missing = map(float, found.groups()[:3])
        assert needed > usable and missing > 0 and needed - usable == pytest.approx(missing, abs=0.11)
    summed: dict[str, Any] = {"method": "full", "gradient_accumulation_steps": 4}
    assert "gpu_memory_limit_gib" not in refusal("RTX 4060", 128, gpu_memory_limit_gib=7.0, **summed)
    assert "gpu_memory_limit_gib" not in refusal("RTX 4060", 128, **summed)
