"""Plans of sampling on cards of every size, decided from sizes alone, at full size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import Rung
from pixtune.plan.sampling import SampleSizes, SamplingPlan, pass_peak_bytes, plan_sampling, sampling_ladder
from pixtune.plan.situation import CONTEXT_BYTES, Situation, situation_of
from tests.full_size import AUTOENCODER, full_size_footprint

CONFIG = TrainConfig(
    pretrained_model_name_or_path="model",
    output_dir=Path("out"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("data")),
)
CARDS_GIB = {80: 79.0, 24: 23.3, 16: 15.3, 12: 11.4, 8: 7.4}
"""Memory of a whole process by the size of a card in GB."""
PASSES_PER_STEP = {"qwen_image": 2, "flux": 1}
NUM_STEPS = 30


def plan_for(
    model: str = "qwen_image", limit_gib: float = 79.0, facts: HardwareFacts | None = None, **changes: object
) -> SamplingPlan:
    """Plans sampling with a LoRA of rank 16 on the attention layers."""
    config = CONFIG.model_copy(update={"gpu_memory_limit_gib": limit_gib, **changes})
    footprint = full_size_footprint(config, model)
    sizes = SampleSizes(
        1024 * 1024, NUM_STEPS, 2 * AUTOENCODER[model], passes_per_step=PASSES_PER_STEP[model],
        pads_text=model == "qwen_image",
    )  # fmt: skip
    return plan_sampling(facts or facts_as("H100"), footprint, config, sizes)


def situation_on(
    card: str = "H100",
    model: str = "qwen_image",
    limit_gib: float | None = None,
    footprint: Footprint | None = None,
) -> Situation:
    demands = demands_of(CONFIG.model_copy(update={"gpu_memory_limit_gib": limit_gib}))
    return situation_of(facts_as(card), footprint or full_size_footprint(CONFIG, model), demands, compiled=False)


@pytest.mark.parametrize(
    ("model", "card_gb", "weights_format", "ahead", "streams", "decode_last"),
    [
        ("qwen_image", 80, "bf16", False, False, False),
        ("qwen_image", 24, "fp8", True, False, False),
        ("qwen_image", 16, "fp8", True, False, True),
        ("qwen_image", 12, "nf4", True, False, True),
        ("qwen_image", 8, "nf4", True, True, True),
        ("flux", 80, "bf16", False, False, False),
        ("flux", 24, "bf16", True, False, False),
        ("flux", 16, "fp8", True, False, False),
        ("flux", 12, "fp8", True, False, True),
        ("flux", 8, "nf4", True, False, True),
    ],
)
def test_a_full_size_model_samples_on_every_card(
    model: str, card_gb: int, weights_format: str, ahead: bool, streams: bool, decode_last: bool
) -> None:
    plan = plan_for(model, CARDS_GIB[card_gb])
    assert (plan.weights_format, plan.modulation_rows > 0, plan.streamed_blocks > 0, plan.decode_last) == (
        weights_format, ahead, streams, decode_last,
    )  # fmt: skip
    assert plan.tile_pixels is None, "a picture of a megapixel fits whole once the transformer is gone"
    assert 0 < plan.expected_peak_bytes + CONTEXT_BYTES <= CARDS_GIB[card_gb] * GIB
    reason, first = plan.reasons
    assert f"weights in {weights_format}" in reason and ("decoded at the end" in reason) is decode_last
    assert "compiles the blocks, which takes" in first
    assert f"about {plan.expected_peak_bytes / GIB:.1f} GiB at the peak" in reason


@pytest.mark.parametrize("model", PASSES_PER_STEP)
def test_sampling_takes_less_than_training_and_no_more_than_it_must(model: str) -> None:
    """The rung before the one that is taken does not fit."""
    for limit_gib in (*CARDS_GIB.values(), 5.4, 4.4):
        plan, situation = plan_for(model, limit_gib), situation_on("H100", model, limit_gib)
        rungs = sampling_ladder(situation, NUM_STEPS)
        taken = Rung(plan.weights_format, plan.modulation_rows, streamed_blocks=plan.streamed_blocks)
        faster = rungs[: rungs.index(taken)]
        assert all(pass_peak_bytes(rung, situation) > situation.usable_bytes for rung in faster)


def test_no_rung_keeps_anything_for_a_backward_pass() -> None:
    rungs = sampling_ladder(situation_on("RTX 4090"), NUM_STEPS)
    assert len(rungs) == len(set(rungs)) and {rung.modulation_rows for rung in rungs} == {0, NUM_STEPS + 1}
    assert not any(rung.selective or rung.recomputed_blocks or rung.offload_inputs for rung in rungs)
    assert [rung.weights_format for rung in rungs if not rung.streamed_blocks] == ["bf16"] * 2 + ["fp8", "nf4"]


def test_large_pictures_are_tiled_only_where_the_decoder_alone_does_not_fit() -> None:
    config = CONFIG.model_copy(update={"gpu_memory_limit_gib": 7.4})
    footprint = full_size_footprint(config, "flux")
    plan = plan_sampling(facts_as("H100"), footprint, config, SampleSizes(2048 * 2048, 30, 2 * AUTOENCODER["flux"]))
    assert plan.decode_last and plan.tile_pixels == 1024 and "in tiles of 1024 pixels" in plan.reasons[0]


def test_a_lora_costs_its_weights_alone_and_keeps_its_layers_in_place() -> None:
    footprint = full_size_footprint(CONFIG)
    without = situation_on(footprint=replace(footprint, trained_weights=0))
    more = pass_peak_bytes(Rung("bf16"), situation_on()) - pass_peak_bytes(Rung("bf16"), without)
    assert more == 4 * footprint.trained_weights > 0
    on_modulation = plan_for(limit_gib=23.3, lora_targets=("img_mod.1",))
    assert on_modulation.modulation_rows == 0 and plan_for(limit_gib=23.3).modulation_rows == NUM_STEPS + 1


@pytest.mark.parametrize(
    ("changes", "weights_format"),
    [({"quantize": True}, "fp8"), ({"disable_quantization": True}, "bf16"), ({"mixed_precision": "no"}, "fp32")],
)
def test_demands_are_kept(changes: dict[str, Any], weights_format: str) -> None:
    plan = plan_for("flux", **changes)
    assert plan.weights_format == weights_format
    assert plan.compute_format == ("fp32" if "mixed_precision" in changes else "bf16")


@pytest.mark.parametrize("quantize", [None, True])
def test_a_cpu_has_no_limit(quantize: bool | None) -> None:
    plan = plan_for(facts=HardwareFacts("cpu", "x86_64", (0, 0), 0, 0), quantize=quantize)
    assert not plan.compile
    assert plan.weights_format == ("int8" if quantize else "bf16") and not plan.decode_last and not plan.reasons


def test_what_does_not_fit_says_how_much_is_missing_and_what_would() -> None:
    with pytest.raises(
        PlanError, match=r"about 1\.4 GiB, and 0\.4 GiB of NVIDIA H100.* 1\.0 GiB are missing\. Sample smaller"
    ):
        plan_for(limit_gib=1.5)
    pc = facts_as("RTX 4060", host_bytes=16 * 10**9)
    assert plan_for(facts=pc, limit_gib=7.4).expected_host_bytes < 3.2 * GIB
    lack = r"2\d\.\d GiB of host memory beside NVIDIA GeForce RTX 4060: \d+\.\d GiB are missing\. Without .* in nf4"
    with pytest.raises(PlanError, match=lack):
        plan_for(facts=pc, limit_gib=7.4, disable_quantization=True)
