"""Several GPUs: when each has a copy of the weights and when they hold one together, and what travels between them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from pixtune.config.adapter_section import AdapterConfig
from pixtune.config.sections import DistributedConfig
from pixtune.errors import CheckpointError, ConfigError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.hardware.gpu_links import GpuLinks
from pixtune.plan.demands import demands_of
from pixtune.plan.processes import together
from pixtune.plan.rungs import STREAM_SLOTS, Rung, ladder, weight_bytes
from pixtune.plan.seconds import gather_seconds, gathered_blocks, step_seconds
from pixtune.plan.shards import possible_shards, refuse_other_format
from pixtune.plan.situation import NCCL_BYTES, Situation, situation_of
from pixtune.plan.training import TrainingPlan, plan_training
from tests.full_size import full_size_footprint
from tests.unit.plan.test_training import CONFIG, asking

NVLINK = GpuLinks("nvlink", 360e9, 40e9)
SLOW = GpuLinks("host", 1e9, 1e9)
BLOCK = 226_492_416
"""Weights of a block's linear layers, of which Qwen-Image has 60; modulations are computed ahead."""


def plan_for(
    card: str, gpus: int, hosts: int = 1, links: GpuLinks | None = None, host_gb: float = 64, **changes: Any
) -> TrainingPlan:
    config = asking(**changes)
    facts = facts_as(card, round(host_gb * 1e9))
    return plan_training(
        facts, full_size_footprint(config), config, num_processes=gpus, num_hosts=hosts, links=links
    )  # fmt: skip


def situation(card: str, gpus: int, hosts: int = 1, links: GpuLinks = NVLINK, **changes: Any) -> Situation:
    config = asking(**changes)
    footprint = full_size_footprint(config)
    return situation_of(facts_as(card), footprint, demands_of(config), num_processes=gpus, num_hosts=hosts, links=links)


def test_a_plan_of_one_process_is_what_it_was_without_others() -> None:
    for card in ("RTX 4060", "RTX 4090", "H100"):
        config, facts = CONFIG, facts_as(card)
        footprint = full_size_footprint(config)
        assert plan_training(facts, footprint, config) == plan_for(card, 1, links=NVLINK)
        assert not any(rung.shards > 1 for rung in ladder(situation_of(facts, footprint, demands_of(config))))


def test_what_fits_each_gpu_is_there_on_each_with_no_bit_changed() -> None:
    one, eight = plan_for("H100", 1), plan_for("H100", 8, hosts=4)
    assert eight.shards == 1 and eight.weights_format == "bf16" and not eight.recomputed_blocks
    assert replace(eight, usable_bytes=one.usable_bytes, reasons=one.reasons, captures=one.captures) == one


def test_what_one_gpu_cannot_hold_is_held_together_in_more_bits() -> None:
    one, two = plan_for("RTX 4070", 1), plan_for("RTX 4070", 2)
    assert one.weights_format == "nf4"
    assert (two.weights_format, two.shards, two.recomputed_blocks) == ("fp8", 2, 60)
    assert STREAM_SLOTS < two.streamed_blocks <= 60
    assert plan_for("RTX 4070", 2, distributed=DistributedConfig(shards=1)).shards == 1


def test_parts_stay_within_a_host_and_copies_go_across_hosts() -> None:
    """No weight crosses the network; of more GPUs each holds less, so that fewer blocks have to come each time."""
    plan = plan_for("RTX 4070", 8, hosts=2)
    assert plan.shards in (2, 4, 8) and plan.streamed_blocks <= plan_for("RTX 4070", 2).streamed_blocks
    copies = f"{16 // plan.shards} copies of the weights, each in parts on {plan.shards} GPUs"
    assert any(copies in reason for reason in plan.reasons)
    assert any("only gradients go from host to host" in reason for reason in plan.reasons)


def test_possible_numbers_of_shards_are_parts_of_a_host_and_then_whole_hosts() -> None:
    assert possible_shards(1) == ()
    assert possible_shards(8) == (2, 4, 8)
    assert possible_shards(6, 3) == (2, 3, 6, 18)
    assert possible_shards(1, 4) == (2, 4), "hosts of one GPU each hold it together where nothing else fits"


def test_a_number_that_is_asked_for_is_taken_for_as_many_blocks_as_must() -> None:
    plan = plan_for("H200", 8, distributed=DistributedConfig(shards=4))
    assert (plan.shards, plan.streamed_blocks, plan.recomputed_blocks) == (4, STREAM_SLOTS + 1, 60)
    limits: dict[str, Any] = {"gpu_memory_limit_gib": 24, "disable_quantization": True}
    capped = plan_for("H200", 8, links=NVLINK, distributed=DistributedConfig(shards=4), **limits)
    assert STREAM_SLOTS + 1 < capped.streamed_blocks < 40
    assert plan.weights_format == "bf16" and not plan.offload_inputs
    assert any("distributed.shards asks for it" in reason for reason in plan.reasons)


def test_a_gpu_holds_its_part_and_a_ring_of_whole_blocks() -> None:
    of = situation("H100", 4)
    whole, parts = Rung("bf16", 128), Rung("bf16", 128, True, 60, streamed_blocks=60, shards=4)
    spared = weight_bytes(whole, of.footprint, "bf16") - weight_bytes(parts, of.footprint, "bf16")
    assert spared == pytest.approx(2 * BLOCK * (60 - 60 / 4 - STREAM_SLOTS), rel=0.01)
    assert parts.host_bytes(of) == whole.host_bytes(of), "nothing of the weights is on the host"
    assert parts.beside_bytes(of) - replace(parts, shards=1).beside_bytes(of) == NCCL_BYTES


def test_two_caps_of_24_gib_hold_qwen_image_in_bf16_and_two_of_12_in_8_bits() -> None:
    """Streaming from host memory is a little faster on the H200 that was measured; without that memory parts are."""
    for cap, asked in ((24, {"disable_quantization": True}), (12, {"quantize": True})):
        limits: dict[str, Any] = {"gpu_memory_limit_gib": cap, **asked}
        streamed = plan_for("H200", 2, links=NVLINK, **limits)
        assert streamed.shards == 1 and streamed.streamed_blocks
        for plan in (
            plan_for("H200", 2, links=NVLINK, distributed=DistributedConfig(shards=2), **limits),
            plan_for("H200", 2, links=NVLINK, host_gb=16, **limits),
        ):
            assert plan.shards == 2 and plan.expected_peak_bytes <= plan.usable_bytes < cap * GIB
            assert streamed.micro_batch_seconds < plan.micro_batch_seconds


@pytest.mark.parametrize(
    ("weights_format", "measured_seconds"),
    [("bf16", 0.489), pytest.param("fp8", 0.381)],
)
def test_seconds_are_near_what_two_h200_took(weights_format: str, measured_seconds: float) -> None:
    """`benchmarks/results/two_gpus_h200/lora.json`: all blocks recomputed and in parts of two.

    On that host a single GPU by itself was 4 to 7% faster than is estimated, too.
    """
    rung = Rung(weights_format, 128, True, 60, streamed_blocks=60, shards=2)
    assert step_seconds(rung, situation("H200", 2)) == pytest.approx(measured_seconds, rel=0.08)


def test_seconds_and_bytes_are_those_of_the_blocks_that_are_gathered() -> None:
    of, rung = situation("H100", 4), Rung("fp8", 128, True, 60, streamed_blocks=30, shards=4)
    blocks = gathered_blocks(rung, of)
    assert len(blocks) == 30 and min(blocks) > BLOCK
    sent = sum(blocks) * 3 // 4
    assert gather_seconds(rung, of) == pytest.approx(sent / 360e9 + 30 * 3 * 8e-6, rel=1e-3)
    found = together(rung, of)
    in_both_passes = 2 * sent * (30 - STREAM_SLOTS) / 30
    assert sum(each.sent_bytes for each in found.gathers) == pytest.approx(in_both_passes, rel=1e-6)
    assert [each.num_bytes for each in found.sums] == [4 * (of.footprint.trained_weights + 2)]
    assert found.step is not None and 0.9 < found.step.efficiency < 0.97


def test_a_slow_link_decides_and_is_warned_of() -> None:
    rung = Rung("bf16", 128, True, 60, streamed_blocks=60, shards=2)
    fast, slow = (situation("H100", 2, links=links) for links in (NVLINK, SLOW))
    assert 1.1 < step_seconds(rung, fast) / step_seconds(rung, fast, gathers=False) < 1.3
    assert step_seconds(rung, slow) == pytest.approx(2 * gather_seconds(rung, slow), rel=0.1)
    plan = plan_for("H100", 2, links=SLOW, distributed=DistributedConfig(shards=2))
    (warning,) = (reason for reason in plan.reasons if "the link bounds the step: weights come in" in reason)
    assert "quantize=true halves it" in warning
    far = plan_for("H100", 1, hosts=2, links=replace(SLOW, network_bytes_per_second=1e8))
    (warning,) = (reason for reason in far.reasons if "the link bounds the step: gradients take" in reason)
    times = int(re.findall(r"(\d+) times the gradient_accumulation_steps", warning)[0])
    enough = plan_for(
        "H100", 1, hosts=2, links=replace(SLOW, network_bytes_per_second=1e8), gradient_accumulation_steps=times
    )  # fmt: skip
    assert not any("the link bounds" in reason for reason in enough.reasons)


def test_accumulation_gathers_again_and_sums_once() -> None:
    rung = Rung("bf16", 128, True, 60, streamed_blocks=60, shards=2)
    once, thrice = (together(rung, situation("H100", 2, gradient_accumulation_steps=steps)) for steps in (1, 3))
    assert (
        len(thrice.gathers) == 3 * len(once.gathers) == 3 * 2 * (60 - STREAM_SLOTS)
        and len(thrice.sums) == len(once.sums) == 1
    )
    assert thrice.step is not None and once.step is not None
    assert thrice.step.compute_seconds == pytest.approx(3 * once.step.compute_seconds)
    assert thrice.step.exposed_seconds == once.step.exposed_seconds


def test_a_dora_is_refused_where_the_base_would_lie_in_parts() -> None:
    dora = AdapterConfig(kind="dora")
    assert plan_for("H100", 2, adapter=dora).shards == 1
    refusal = "2 processes would hold the frozen weights together"
    with pytest.raises(ConfigError, match=refusal):
        plan_for("H100", 2, adapter=dora, distributed=DistributedConfig(shards=2))
    small: dict[str, Any] = {"host_gb": 12, "gpu_memory_limit_gib": 24.0, "disable_quantization": True}
    assert plan_for("H100", 2, **small).shards == 2, "the planner itself chooses parts"
    with pytest.raises(ConfigError, match=refusal):
        plan_for("H100", 2, adapter=dora, **small)


def test_a_run_that_is_planned_anew_for_other_processes_keeps_its_format() -> None:
    refuse_other_format(None, "bf16")
    refuse_other_format("nf4", "nf4")
    with pytest.raises(CheckpointError, match="weights in nf4, and with these processes they would be in bf16"):
        refuse_other_format("nf4", "bf16")
