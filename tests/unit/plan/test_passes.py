"""How the passes of samples run, decided from sizes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.plan import passes as passes_module
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import PLAINLY, EncoderSizes, decoding_bytes
from pixtune.plan.passes import (
    COMPILED_FROM_STEPS,
    PLAIN_PASSES,
    Abilities,
    Passes,
    PassPlan,
    choose_passes,
    needed_bytes,
    pass_bytes,
    ways_of_passing,
)
from pixtune.plan.phases import Surroundings, idle_bytes, phases_of, sampling_bytes, sampling_passes
from pixtune.plan.rungs import Rung
from pixtune.plan.sampling import PASS_FIXED_BYTES, SampleSizes, SamplingPlan, _held_bytes, plan_sampling
from pixtune.plan.situation import situation_of
from pixtune.plan.training import TrainingPlan, plan_training
from tests.full_size import AUTOENCODER, full_size_footprint
from tests.unit.plan.test_phases import CONFIG

FOOTPRINT = full_size_footprint(CONFIG)
SIZES = SampleSizes(1024 * 1024, 30, 2 * AUTOENCODER["qwen_image"], passes_per_step=2, pads_text=True)


LIMIT = passes_module.MOST_TOKENS_TOGETHER


@pytest.fixture(autouse=True)
def _passes_of_any_size_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the sizes of these tests would fill a GPU by themselves."""
    monkeypatch.setattr(passes_module, "MOST_TOKENS_TOGETHER", 1 << 20)


def plan_for(
    limit_gib: float, sizes: SampleSizes = SIZES, abilities: Abilities | None = None, **changes: Any
) -> SamplingPlan:
    config = CONFIG.model_copy(update={"gpu_memory_limit_gib": limit_gib, **changes})
    return plan_sampling(facts_as("H100"), full_size_footprint(config), config, sizes, abilities)


# ---- bytes


def test_two_examples_take_twice_the_memory_of_one_that_is_padded() -> None:
    one = Passes(replace(FOOTPRINT, num_tokens=4352), "bf16", "fp8", compiled=True)
    assert one.activation_bytes() == 15 * 4352 * 3072 * 2
    assert one.activation_bytes(2) == 15 * 2 * (4352 + 64) * 3072 * 2
    assert replace(one, compiled=False).activation_bytes() == 28 * 4352 * 3072 * 2, "an MLP's input passes through fp32"
    assert replace(one, weights_format="bf16", compiled=False).activation_bytes() == 15 * 4352 * 3072 * 2


def test_a_pool_holds_one_pass_and_each_capture_costs_its_code() -> None:
    passes = Passes(FOOTPRINT, "bf16", "bf16", compiled=True)
    assert passes.pool_bytes(2, 0) == 0
    assert passes.activation_bytes(2) < passes.pool_bytes(2, 1) < 1.1 * passes.activation_bytes(2) + 100 * 2**20
    assert passes.pool_bytes(2, 9) - passes.pool_bytes(2, 1) == 8 * 24 * 2**20
    captured = PassPlan(together=True, captures=1)
    pool = passes.pool_bytes(2, 1)
    assert needed_bytes(captured, passes, 4 * GIB) == max(pool, 4 * GIB)
    assert needed_bytes(replace(captured, captures_stay=True), passes, 4 * GIB) == pool + 4 * GIB


def test_the_fastest_way_that_fits_the_smallest_room_is_taken() -> None:
    ways = ways_of_passing(True, 2, 100)
    assert [(way.together, way.captures > 0, way.captures_stay) for way in ways] == [
        (True, True, True), (False, True, True), (True, True, False), (False, True, False),
        (True, False, False), (False, False, False),
    ]  # fmt: skip
    needs = dict(zip(ways, (60, 50, 40, 30, 20, 10), strict=True))
    for rooms, expected in (([70], 0), ([45, 70], 2), ([5, 55], 1), ([15, 70], 5), ([5, 6], 5)):
        assert choose_passes(ways, needs.__getitem__, rooms) is ways[expected]
    assert not any(way.together for way in ways_of_passing(False, 2, 100))
    assert not any(way.captures for way in ways_of_passing(True, 0, 100))


# ---- `pixtune sample`


@pytest.mark.parametrize("limit_gib", [79, 31, 23.3, 15.3, 11.4, 7.4, 6.4, 5.4, 4.9, 4.6, 4.4])
def test_captured_passes_fit_beside_the_weights_at_every_limit(limit_gib: float) -> None:
    plan = plan_for(limit_gib)
    demands = demands_of(CONFIG.model_copy(update={"gpu_memory_limit_gib": limit_gib}))
    situation = situation_of(facts_as("H100"), FOOTPRINT, demands, num_tables=1)
    rung = Rung(plan.weights_format, plan.modulation_rows, streamed_blocks=plan.streamed_blocks)
    held = _held_bytes(rung, situation) + PASS_FIXED_BYTES
    passes = Passes(FOOTPRINT, "bf16", plan.weights_format, plan.compile)
    decoding = 0 if plan.decode_last else SIZES.autoencoder_bytes + decoding_bytes(SIZES.pixels)
    taken = held + pass_bytes(plan.passes, passes) + (decoding if plan.passes.captures_stay else 0)
    assert taken <= situation.usable_bytes and plan.expected_peak_bytes <= situation.usable_bytes
    assert plan.compile and plan.passes.captures == 2, "another block is streamed rather than nothing captured"
    if limit_gib in (79, 23.3):
        assert plan.passes == PassPlan(True, 2, True, situation.usable_bytes)
        (reason, first) = plan.reasons
        assert "both passes of a step as one batch, passes captured and replayed" in reason and "compiles" in first


def test_where_one_batch_does_not_fit_passes_follow_one_another() -> None:
    assert (plan_for(11.4).passes.together, plan_for(9.5).passes.together) == (True, False)
    assert plan_for(9.5).weights_format == "nf4" and not plan_for(9.5).streamed_blocks


@pytest.mark.parametrize(
    ("sizes", "abilities", "changes", "expected"),
    [
        ({}, {}, {}, (True, True, True)),
        ({}, {"pads": False}, {}, (True, False, True)),
        ({}, {"compiles": False}, {}, (False, True, True)),
        ({}, {}, {"mixed_precision": "no"}, (True, False, True)),
        ({}, {}, {"cuda_graphs": False}, (True, True, False)),
        ({"passes_per_step": 1}, {}, {}, (True, False, True)),
        ({"pads_text": False}, {}, {}, (True, False, True)),
        ({"num_steps": COMPILED_FROM_STEPS - 1}, {}, {}, (False, True, False)),
        ({"num_steps": COMPILED_FROM_STEPS // 2, "num_pictures": 2}, {}, {}, (True, True, True)),
    ],
)
def test_what_pays_and_what_is_possible_decides(
    sizes: dict[str, Any], abilities: dict[str, bool], changes: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    plan = plan_for(79, replace(SIZES, **sizes), Abilities(**abilities), **changes)
    assert (plan.compile, plan.passes.together, plan.passes.captures > 0) == expected


def test_where_one_pass_fills_a_gpu_two_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "MOST_TOKENS_TOGETHER", LIMIT)
    assert FOOTPRINT.num_tokens > 4000
    assert not plan_for(79).passes.together and plan_for(79).passes.captures == 2


# ---- between steps


def training_plan(card: str, **changes: Any) -> tuple[TrainingPlan, Any]:
    config = CONFIG.model_copy(update=changes)
    footprint = full_size_footprint(config)
    return plan_training(facts_as(card), footprint, config), footprint


AROUND = Surroundings(EncoderSizes(0, GIB // 4), PLAINLY, 1024 * 1024, 4352, 2, may_join_passes=True)


def test_samples_leave_captured_steps_alone_where_they_fit_beside_them() -> None:
    plan, footprint = training_plan("H200")
    way = sampling_passes(plan, footprint, AROUND, None)
    assert way == PassPlan(True, 2, True, plan.usable_bytes)
    beside = plan.usable_bytes - plan.expected_peak_bytes
    assert sampling_bytes(plan, footprint, AROUND, way, None) <= beside


def test_samples_become_leaner_before_captured_steps_have_to_go() -> None:
    plan, footprint = training_plan("H200")
    passes = Passes(replace(footprint, num_tokens=4352), "bf16", plan.weights_format, plan.compile)
    decoding = GIB // 4 + decoding_bytes(1024 * 1024)
    ways = ways_of_passing(True, 2, 0)
    for way in ways[:4]:
        room = needed_bytes(way, passes, decoding)
        tight = replace(plan, usable_bytes=plan.expected_peak_bytes + room)
        assert needed_bytes(sampling_passes(tight, footprint, AROUND, None), passes, decoding) <= room
    full = replace(plan, usable_bytes=plan.expected_peak_bytes + 1)
    assert sampling_passes(full, footprint, AROUND, None).together, "captured steps go in any case"
    assert sampling_passes(replace(plan, captures=0), footprint, AROUND, None).captures == 0


def test_the_phase_of_sampling_counts_what_is_planned() -> None:
    plan, footprint = training_plan("H200")
    *_, sampling = phases_of(plan, footprint, AROUND)
    way = sampling_passes(plan, footprint, AROUND, None)
    expected = idle_bytes(plan, footprint) + sampling_bytes(plan, footprint, AROUND, way, None)
    assert sampling.device_bytes == expected > idle_bytes(plan, footprint) + decoding_bytes(1024 * 1024)


def test_transposes_and_tables_in_one_pool_are_there_between_steps() -> None:
    plan, footprint = training_plan("H200", quantize=True)
    kept = replace(plan, kept_transposes=True)
    (kind,) = footprint.kinds
    more = idle_bytes(kept, footprint) - idle_bytes(replace(plan, kept_transposes=False), footprint)
    assert more == kind.count * kind.linear_weights == pytest.approx(12.7 * GIB, rel=0.01)
    tables = replace(plan, modulation_rows=128)
    in_one_pool = idle_bytes(tables, replace(footprint, one_pool=True)) - idle_bytes(tables, footprint)
    row, largest = 60 * 2 * 6 * 3072, 6 * 3072 * 3072  # two layers of six modulations in each block
    assert in_one_pool == pytest.approx(2 * (2 * 128 * row + 2 * largest), rel=1e-3)
    assert PassPlan(False, 0, False, 0) == PLAIN_PASSES
