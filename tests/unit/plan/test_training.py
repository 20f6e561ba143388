"""The plan is a pure function: what each machine and each demand gives, at full size."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import CudaFeatures, DataConfig
from pixtune.errors import CheckpointError, ConfigError, PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts, host_room_bytes, missing_on_host
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import Footprint
from pixtune.plan.kernel_choice import Finding
from pixtune.plan.rungs import (
    CAPTURE_BYTES,
    FUSED_AT_WORK_BYTES,
    LEAST_CAPTURES,
    MOST_CAPTURES,
    Rung,
    ladder,
    modulation_row,
)
from pixtune.plan.situation import CONTEXT_BYTES, TABLES, Situation, situation_of
from pixtune.plan.text_padding import LEAST_MULTIPLE, CaptionedSize, Captions, least_multiple
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.checkpoint import read_decision
from tests.full_size import full_size_footprint

H100, CPU = facts_as("H100"), HardwareFacts("cpu", "x86_64", (0, 0), 0, 0)
CONFIG = TrainConfig(
    pretrained_model_name_or_path="model",
    output_dir=Path("out"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("data")),
)
MODELS = ("qwen_image", "flux")


def asking(**changes: Any) -> TrainConfig:
    """A config that asks for something; `fp8=True` stands for the key in `cuda_features`."""
    if "fp8" in changes:
        changes["cuda_features"] = CudaFeatures(enable_fp8_training=changes.pop("fp8"))
    return CONFIG.model_copy(update=changes)


def plan_for(facts: HardwareFacts = H100, model: str = "qwen_image", **changes: Any) -> TrainingPlan:
    config = asking(**changes)
    return plan_training(facts, full_size_footprint(config, model), config)


def situation_for(
    config: TrainConfig = CONFIG, model: str = "qwen_image", compiled: bool = True, footprint: Footprint | None = None
) -> Situation:
    """A run on an H100."""
    return situation_of(H100, footprint or full_size_footprint(config, model), demands_of(config), compiled)


def capped(limit_gib: float, model: str = "qwen_image", **changes: Any) -> TrainingPlan:
    """An H100 under a limit for the whole process."""
    return plan_for(H100, model, gpu_memory_limit_gib=limit_gib, **changes)


def test_transposes_are_kept_where_there_is_room_for_them() -> None:
    assert plan_for(H100, quantize=True).kept_transposes
    assert capped(47, quantize=True).kept_transposes and capped(47, quantize=True).selective
    assert not capped(31, quantize=True).kept_transposes
    assert not plan_for(H100).kept_transposes, "there is nothing to transpose in bf16"
    situation = situation_for()
    one, other = (situation.peak(Rung("fp8", 32, kept_transposes=kept)) for kept in (True, False))
    made = one - other - 60 * situation.footprint.kinds[0].linear_weights
    assert -FUSED_AT_WORK_BYTES < made <= 0, "no more than those that are made for each product"
    for rung in ladder(situation):
        assert not rung.kept_transposes or (rung.weights_format == "fp8" and not rung.recomputed_blocks)


# ---- the estimate


@pytest.mark.parametrize(
    ("model", "rung", "compiled", "measured_gib"),
    [
        ("qwen_image", Rung("bf16"), True, 57.9),
        ("qwen_image", Rung("bf16", recomputed_blocks=60), True, 40.2),
        ("qwen_image", Rung("fp8"), True, 45.6),
        ("qwen_image", Rung("bf16"), False, 64.1),
        ("qwen_image", Rung("bf16", recomputed_blocks=60), False, 40.5),
        ("flux", Rung("bf16", recomputed_blocks=57), False, 24.5),
    ],
)
def test_it_is_within_5_percent_of_peaks_that_were_measured(
    model: str, rung: Rung, compiled: bool, measured_gib: float
) -> None:
    """One H100, 1024x1024, batch 1, rank 16: benchmarks/RESULTS.md and a bare loop before it."""
    predicted = situation_for(model=model, compiled=compiled).peak(rung)
    assert predicted / GIB == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize("leaner", [
    {"modulation_rows": 64}, {"weights_format": "fp8"}, {"weights_format": "nf4"}, {"selective": True},
    {"recomputed_blocks": 30}, {"recomputed_blocks": 60, "offload_inputs": True},
    {"recomputed_blocks": 60, "streamed_blocks": 30},
])  # fmt: skip
def test_each_technique_saves_memory(leaner: dict[str, Any]) -> None:
    plain, saving = Rung("bf16"), replace(Rung("bf16"), **leaner)
    assert situation_for().peak(saving) < situation_for().peak(plain)


@pytest.mark.parametrize("changes", [{"train_batch_size": 2}, {"rank": 256}, {"mixed_precision": "no"}])
def test_more_work_needs_more_memory(changes: dict[str, Any]) -> None:
    huge = replace(H100, free_bytes=1000 * GIB)
    assert plan_for(huge, **changes).expected_peak_bytes > plan_for(huge).expected_peak_bytes


# ---- the table of cards: whole-process limits on an H100


@dataclass(frozen=True)
class Cell:
    """The most that a plan may resort to."""

    formats: tuple[str, ...]
    selective: bool = True
    most_recomputed: float = 0
    """Share of the blocks."""
    offload: bool = False
    streaming: bool = False


EIGHT = ("fp8", "int8")
KEEP = Cell(("bf16",), selective=False)
TABLE = [
    ("qwen_image", 79, KEEP),
    ("qwen_image", 47, KEEP),
    ("qwen_image", 31, Cell(EIGHT)),
    ("qwen_image", 23.3, Cell(EIGHT, most_recomputed=0.5)),
    ("qwen_image", 15.3, Cell(EIGHT, most_recomputed=1, offload=True)),
    ("qwen_image", 11.4, Cell(("nf4",), most_recomputed=1, offload=True)),
    ("qwen_image", 7.4, Cell(("nf4",), most_recomputed=1, offload=True, streaming=True)),
    ("flux", 79, KEEP),
    ("flux", 47, KEEP),
    ("flux", 31, Cell(("bf16",))),
    ("flux", 23.3, Cell(EIGHT)),
    ("flux", 15.3, Cell(EIGHT, most_recomputed=1, offload=True)),
    ("flux", 11.4, Cell(EIGHT, most_recomputed=1, offload=True)),
    ("flux", 7.4, Cell(("nf4",), most_recomputed=1, offload=True)),
    ("flux", 5.5, Cell(("nf4",), most_recomputed=1, offload=True, streaming=True)),
]  # fmt: skip
MISSED: dict[tuple[str, float], str] = {}


def marked(model: str, limit_gib: float, cell: Cell) -> object:
    reason = MISSED.get((model, limit_gib))
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(model, limit_gib, cell, marks=marks, id=f"{model} {limit_gib} GiB")


@pytest.mark.parametrize(("model", "limit_gib", "cell"), [marked(*row) for row in TABLE])
def test_a_card_resorts_to_no_more_than_it_must(model: str, limit_gib: float, cell: Cell) -> None:
    plan = capped(limit_gib, model)
    num_blocks = full_size_footprint(CONFIG, model).num_blocks
    assert plan.weights_format in cell.formats
    assert plan.recomputed_blocks <= cell.most_recomputed * num_blocks
    assert plan.selective <= cell.selective and plan.offload_inputs <= cell.offload
    assert (plan.streamed_blocks > 0) <= cell.streaming


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("limit_gib", [79, 64, 47, 40, 31, 23.3, 20, 15.3, 11.4, 9.5, 7.4, 5.5])
def test_every_plan_fits_its_limit_with_the_context(model: str, limit_gib: float) -> None:
    plan = capped(limit_gib, model)
    assert 0 < plan.expected_peak_bytes + CONTEXT_BYTES <= limit_gib * GIB


@pytest.mark.parametrize("model", MODELS)
def test_less_memory_never_means_fewer_savings(model: str) -> None:
    plans = [capped(limit, model) for limit in (79, 60, 47, 40, 31, 23.3, 15.3, 11.4, 7.4, 5.5)]
    order = ["bf16", "fp8", "nf4"]
    effort = [(order.index(p.weights_format), p.selective, p.recomputed_blocks, p.offload_inputs, p.streamed_blocks)
              for p in plans]  # fmt: skip
    assert effort == sorted(effort)


@pytest.mark.parametrize("model", MODELS)
def test_the_fewest_blocks_that_suffice_are_recomputed_and_streamed(model: str) -> None:
    for limit_gib, counted in (
        (23.3 if model == "qwen_image" else 19, "reprojected_blocks"),
        (20 if model == "qwen_image" else 15.3, "recomputed_blocks"),
        (5.5, "streamed_blocks"),
    ):
        config = asking(gpu_memory_limit_gib=limit_gib)
        situation, plan = situation_for(config, model), capped(limit_gib, model)
        assert getattr(plan, counted) > 1
        rung = Rung(
            plan.weights_format, plan.modulation_rows, plan.selective, plan.recomputed_blocks, plan.offload_inputs,
            plan.streamed_blocks, plan.reprojected_blocks,
        )  # fmt: skip
        one_less = replace(rung, **{counted: getattr(plan, counted) - 1})
        assert situation.fits_device(rung) and not situation.fits_device(one_less)


def test_a_family_that_cannot_project_again_is_never_asked_to() -> None:
    footprint = full_size_footprint(CONFIG)
    stiff = replace(
        footprint,
        kinds=tuple(replace(kind, units=replace(kind.units, projections=0)) for kind in footprint.kinds),
    )
    rungs = list(ladder(situation_for(footprint=stiff)))
    assert not any(rung.reprojected_blocks for rung in rungs) and any(rung.recomputed_blocks for rung in rungs)
    assert any(rung.reprojected_blocks for rung in ladder(situation_for()))


@pytest.mark.parametrize("model", MODELS)
def test_as_many_shapes_are_captured_as_there_is_room_for(model: str) -> None:
    assert plan_for(model=model).captures == MOST_CAPTURES
    for limit_gib in (31, 23.3, 15.3, 11.4, 7.4, 5.5):
        plan = capped(limit_gib, model)
        assert LEAST_CAPTURES <= plan.captures <= MOST_CAPTURES
        held = plan.expected_peak_bytes + (plan.captures - 1) * CAPTURE_BYTES
        assert held <= plan.usable_bytes
    assert plan_for(model=model, cuda_graphs=False).captures == plan_for(CPU, model).captures == 0


def test_a_limit_counts_as_a_smaller_card_for_the_optimizer() -> None:
    assert capped(23.3).optimizer == plan_for(facts_as("RTX 4090")).optimizer == "adamw_8bit"
    assert capped(47).optimizer == plan_for().optimizer == "adamw"


# ---- machines: contract.md section 3


def test_one_pool_needs_nothing_special() -> None:
    plan = plan_for(facts_as("DGX Spark"))
    assert (plan.weights_format, plan.recomputed_blocks, plan.selective, plan.modulation_rows) == ("bf16", 0, False, 0)
    assert (plan.pin_memory, plan.encoders_stay, plan.offload_inputs, plan.streamed_blocks) == (False, True, False, 0)


@pytest.mark.parametrize("card", ["H100", "A100 80 GB", "H200", "RTX PRO 6000", "GH200"])
def test_80_gb_need_nothing_special(card: str) -> None:
    plan = plan_for(facts_as(card))
    assert (plan.weights_format, plan.recomputed_blocks, plan.selective, plan.modulation_rows) == ("bf16", 0, False, 0)
    assert (plan.pin_memory, plan.encoders_stay, plan.optimizer) == (True, False, "adamw")


@pytest.mark.parametrize(("card", "weights_format"), [("RTX 4090", "fp8"), ("RTX 3090", "int8"), ("L4", "fp8")])
def test_24_gb_get_8_bits_of_the_kind_their_cores_have(card: str, weights_format: str) -> None:
    plan = plan_for(facts_as(card))
    assert (plan.weights_format, plan.optimizer, plan.streamed_blocks) == (weights_format, "adamw_8bit", 0)


@pytest.mark.parametrize("card", ["RTX 5090", "RTX 4080", "RTX 3060", "RTX 3080", "RTX 4060"])
@pytest.mark.parametrize("model", MODELS)
def test_every_card_from_8_gb_up_gets_a_plan(card: str, model: str) -> None:
    plan = plan_for(facts_as(card), model)
    assert plan.expected_peak_bytes <= facts_as(card).free_bytes


@pytest.mark.parametrize("limit_gib", [40, 20, 12])
def test_one_pool_moves_nothing_to_the_host_which_is_the_same_memory(limit_gib: int) -> None:
    facts = replace(facts_as("DGX Spark"), free_bytes=limit_gib * GIB)
    plan = plan_for(facts)
    assert not plan.offload_inputs and not plan.streamed_blocks and plan.expected_host_bytes == 0


def test_a_cpu_pins_nothing_and_saves_nothing() -> None:
    plan = plan_for(CPU, pin_memory=True, mixed_precision="no")
    assert (plan.compute_format, plan.weights_format, plan.expected_peak_bytes) == ("fp32", "fp32", 0)
    assert not (plan.pin_memory or plan.recomputed_blocks or plan.tf32 or plan.compile or plan.selective)


def test_blocks_are_compiled_where_that_works() -> None:
    footprint = full_size_footprint(CONFIG)
    assert plan_training(H100, footprint, CONFIG).compile
    plan = plan_training(H100, footprint, CONFIG, can_compile=False)
    assert not plan.compile and any("torch.compile" in reason for reason in plan.reasons)


# ---- demands


@pytest.mark.parametrize(
    ("card", "changes", "weights_format"),
    [
        ("H100", {"quantize": True}, "fp8"),
        ("A100 80 GB", {"quantize": True}, "int8"),
        ("H100", {"quantize": True, "fp8": False}, "int8"),
        ("H100", {"fp8": True}, "fp8"),
        ("RTX 4090", {"quantize": False}, "bf16"),
        ("RTX 4090", {"quantize": True, "disable_quantization": True}, "bf16"),
        ("RTX 4070", {"quantize": True}, "fp8"),
    ],
)
def test_quantize_demands_8_bits_and_forbids_them(card: str, changes: dict[str, Any], weights_format: str) -> None:
    assert plan_for(facts_as(card), **changes).weights_format == weights_format


def test_quantize_is_refused_where_nothing_multiplies_8_bits() -> None:
    turing = replace(H100, name="NVIDIA TITAN RTX", capability=(7, 5))
    with pytest.raises(ConfigError, match=r"(?s)quantize is true.*TITAN RTX has compute capability 7\.5.*Leave"):
        plan_for(turing, quantize=True)
    others: tuple[dict[str, Any], ...] = ({}, {"quantize": False}, {"quantize": True, "disable_quantization": True})
    for changes in others:
        assert plan_for(turing, **changes).weights_format == "bf16"


def test_what_waits_in_host_memory_is_as_wide_as_the_run() -> None:
    """fp32 runs have tables, inputs and norms of 4 bytes a number."""
    rung = Rung("int8", 32, recomputed_blocks=60, offload_inputs=True, streamed_blocks=60)
    narrow, wide = (situation_for(CONFIG.model_copy(update={"mixed_precision": words})) for words in ("bf16", "no"))
    kind = narrow.footprint.kinds[0]
    codes = 60 * (kind.linear_weights + 4 * kind.rows)
    assert rung.host_bytes(wide) - codes == 2 * (rung.host_bytes(narrow) - codes)


def test_fp8_is_refused_where_no_core_has_it() -> None:
    with pytest.raises(ConfigError, match=r"(?s)enable_fp8_training is true.*8\.0.*int8"):
        plan_for(facts_as("A100 80 GB"), fp8=True)


@pytest.mark.parametrize("card", ["H100", "RTX 5090"])
def test_recomputation_is_forbidden_or_demanded_whole(card: str) -> None:
    none = plan_for(facts_as(card), "flux", disable_gradient_checkpointing=True)
    assert none.recomputed_blocks == 0 and not none.selective
    every = plan_for(facts_as(card), "flux", disable_gradient_checkpointing=False)
    assert every.recomputed_blocks == 57


@pytest.mark.parametrize(("unified", "stays"), [(True, True), (False, False)])
def test_unified_memory_is_demanded_or_forbidden_whatever_the_device_says(unified: bool, stays: bool) -> None:
    for card in ("H100", "DGX Spark"):
        plan = plan_for(facts_as(card), unified_memory=unified)
        assert (plan.encoders_stay, plan.pin_memory) == (stays, not stays)


def test_switches_are_taken_as_they_are_given() -> None:
    features = CudaFeatures(enable_tf32_compute=False, enable_cudnn_sdp=False)
    plan = plan_for(adam8bit=True, disable_cpu_offload=True, pin_memory=False, cuda_features=features)
    assert (plan.optimizer, plan.encoders_stay, plan.pin_memory) == ("adamw_8bit", True, False)
    assert (plan.tf32, plan.attention, plan.attention_off) == (False, None, ("cudnn",))


ASKS_FOR_3 = CONFIG.model_copy(update={"cuda_features": CudaFeatures(enable_flash_attention_3=True)})


RIGHT = {
    "cudnn": Finding(error=0.003, milliseconds=1.5, padded_error=0.003),
    "flash": Finding(error=0.003, milliseconds=2.9, padded_error=0.003),
}


def test_flash_attention_3_is_used_where_it_runs_and_else_the_plan_says_why_not() -> None:
    footprint = full_size_footprint(CONFIG)
    on = plan_training(H100, footprint, ASKS_FOR_3, RIGHT)
    assert (on.attention, on.attention_off) == ("flash_3", ("cudnn",)) and "as asked" in " ".join(on.reasons)
    not_installed = plan_training(H100, footprint, ASKS_FOR_3, RIGHT, flash_attention_3_obstacle="no module")
    elsewhere = plan_training(facts_as("RTX 5090"), footprint, ASKS_FOR_3, RIGHT)
    for plan, why in ((not_installed, "no module"), (elsewhere, "it runs only on Hopper (compute capability 9.0)")):
        assert (plan.attention, plan.attention_off) == ("cudnn", ())
        assert any(f"FlashAttention 3 is off, though asked for: {why}" in reason for reason in plan.reasons)
    assert plan_training(H100, footprint, CONFIG).attention is None


def test_a_trial_of_attention_kernels_decides() -> None:
    plan = plan_training(H100, full_size_footprint(CONFIG), CONFIG, RIGHT)
    assert (plan.attention, plan.attention_off) == ("cudnn", ())
    assert "attention by cuDNN: right within 0.3%, 1.50 ms a block; flash 2.90" in plan.reasons
    untried = plan_training(H100, full_size_footprint(CONFIG), CONFIG)
    assert untried.attention is None and any("no kernel was tried" in reason for reason in untried.reasons)


MANY_LENGTHS = Captions(differ=True, sizes=(CaptionedSize(4096, dict.fromkeys(range(20, 120), 1.0)),))


def padding_plan(
    facts: HardwareFacts = H100, captions: Captions | None = MANY_LENGTHS, passed: bool = True, **changes: object
) -> TrainingPlan:
    """Plans for a machine where the trials of attention went well, unless told otherwise."""
    config = asking(**changes)
    error = 0.003 if passed else 0.5
    findings = {kernel: replace(finding, padded_error=error) for kernel, finding in RIGHT.items()}
    return plan_training(facts, full_size_footprint(config), config, findings, captions=captions)


def test_captions_are_padded_where_captured_steps_gain_by_it_and_kernels_can() -> None:
    plan = padding_plan()
    assert plan.captures > 0 and plan.text_multiple == LEAST_MULTIPLE
    (reason,) = [reason for reason in plan.reasons if "captions padded" in reason]
    assert f"multiples of {LEAST_MULTIPLE} tokens" in reason
    assert f"2 instead of 100 shapes, and {plan.captures} can be captured" in reason


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": None},
        {"captions": Captions(differ=False)},
        {"passed": False},
        {"facts": CPU},
        {"cuda_graphs": False},
        {"method": "full"},
        {"mixed_precision": "no"},
        {"cuda_features": CudaFeatures(enable_flash_attention_3=True)},
    ],
    ids=str,
)
def test_captions_keep_their_lengths_elsewhere(changes: dict[str, Any]) -> None:
    plan = padding_plan(**changes)
    assert plan.text_multiple == 1 and not any("captions" in reason for reason in plan.reasons)
    assert plan_for().text_multiple == 1, "nothing was tried"


@pytest.mark.parametrize("changes", [{"cuda_features": CudaFeatures(enable_cudnn_sdp=False)}, {"deterministic": True}])
def test_captions_are_padded_for_flash_attention_as_well(changes: dict[str, Any]) -> None:
    plan = padding_plan(**changes)
    assert (plan.attention, plan.text_multiple) == ("flash", LEAST_MULTIPLE)


def test_what_is_counted_with_is_what_is_padded_to_at_least() -> None:
    assert least_multiple(CONFIG, MANY_LENGTHS) == padding_plan().text_multiple
    for changes in ({"cuda_graphs": False}, {"method": "full"}, {"mixed_precision": "no"}):
        assert least_multiple(asking(**changes), MANY_LENGTHS) == 1
    assert least_multiple(CONFIG, Captions(differ=False)) == least_multiple(CONFIG, None) == 1


@pytest.mark.parametrize("targets", [("img_mod.1",), ("all_linear",)])
def test_modulation_stays_where_a_lora_is_on_it(targets: tuple[str, ...]) -> None:
    assert capped(40).modulation_rows > 0
    assert capped(40, lora_targets=targets).modulation_rows == 0


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 300)])
def test_the_table_holds_at_least_one_step_with_a_row_to_spare(batch: int, accumulation: int) -> None:
    plan = capped(47, train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert plan.modulation_rows > batch * accumulation


# ---- refusals


@pytest.mark.parametrize(
    ("card", "changes", "advice"),
    [
        ("RTX 4090", {"disable_gradient_checkpointing": True}, "Without disable_gradient_checkpointing"),
        ("RTX 4060", {"train_batch_size": 64}, "train_batch_size"),
    ],
)
def test_a_refusal_says_what_is_missing_and_what_would_fit(card: str, changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(facts_as(card), **changes)
    message = str(caught.value)
    assert "GiB are missing" in message and facts_as(card).name in message and advice in message


def test_the_named_way_out_is_the_plan_that_one_gets_by_it() -> None:
    facts = facts_as("RTX 4090")
    with pytest.raises(PlanError) as caught:
        plan_for(facts, disable_gradient_checkpointing=True)
    assert f"needs {plan_for(facts).expected_peak_bytes / GIB:.1f} GiB and fits" in str(caught.value)


# ---- what is written down


def test_a_plan_survives_the_checkpoint() -> None:
    plan = capped(15.3)
    assert read_decision(TrainingPlan, plan.to_dict(), "plan") == plan


@pytest.mark.parametrize("change", ["selective", "recompute"])
def test_a_plan_of_another_version_is_refused_by_the_names_that_differ(change: str) -> None:
    values = plan_for().to_dict()
    values.pop(change, None) if change in values else values.update({change: True})
    with pytest.raises(CheckpointError, match=rf"differs.*{change}"):
        read_decision(TrainingPlan, values, "plan")


@pytest.mark.parametrize(
    ("limit_gib", "words"),
    [
        (79, ["no block is recomputed"]),
        (40, ["modulations are computed", "6.8 billion weights"]),
        (23.3, ["8 bits (fp8)", "queries, keys and values are recomputed in", "the fastest way would need"]),
        (20, ["of 60 blocks are recomputed", "gates are recomputed"]),
        (15.3, ["wait in host memory"]),
        (7.4, ["4 bits (nf4)", "come from host memory"]),
    ],
)
def test_a_plan_says_why(limit_gib: float, words: list[str]) -> None:
    told = " ".join(capped(limit_gib).reasons)
    assert "GiB are usable" in told and all(word in told for word in words), told


def test_deciding_needs_no_torch() -> None:
    import subprocess

    modules = "pixtune.plan.training, pixtune.plan.phases, pixtune.plan.sampling"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the host


def in_a_pc(card: str, host_gb: float, **changes: Any) -> TrainingPlan:
    """A card in a machine with so much memory, of which an eighth is in use."""
    return plan_for(facts_as(card, host_bytes=round(host_gb * 1e9)), **changes)


@pytest.mark.parametrize(
    ("card", "host_gb", "changes", "weights_format", "on_host_gib"),
    [
        ("RTX 4060", 16, {}, "nf4", 5),
        ("RTX 4090", 32, {}, "fp8", 1.3),
        ("RTX 4090", 32, {"quantize": False}, "bf16", 9),
        ("H100", 1024, {}, "bf16", 0),
        ("H100", 1024, {"train_batch_size": 8, "quantize": False}, "bf16", 9),
    ],
)
def test_a_plan_fits_its_host(
    card: str, host_gb: int, changes: dict[str, object], weights_format: str, on_host_gib: float
) -> None:
    plan = in_a_pc(card, host_gb, **changes)
    assert plan.weights_format == weights_format and plan.expected_host_bytes <= on_host_gib * GIB
    assert not any("faster ways" in reason for reason in plan.reasons)


def test_what_does_not_fit_the_host_is_passed_over_with_a_reason() -> None:
    roomy, scarce = in_a_pc("RTX 4080", 32), in_a_pc("RTX 4080", 2.4)
    assert (roomy.weights_format, roomy.offload_inputs, scarce.weights_format) == ("fp8", True, "nf4")
    assert (roomy.modulation_rows, scarce.modulation_rows) == (128, 32)
    assert scarce.expected_host_bytes < 0.5 * GIB < roomy.expected_host_bytes
    pattern = r"faster ways would keep up to ([\d.]+) GiB in host memory, ([\d.]+) GiB more"
    (words,) = filter(None, (re.search(pattern, reason) for reason in scarce.reasons))
    most, missing = (float(number) for number in words.groups())
    smaller_tables = 2 * TABLES * (128 - 32) * modulation_row(full_size_footprint(CONFIG))
    assert most >= round((roomy.expected_host_bytes - smaller_tables) / GIB, 1)  # the leanest keeps the most there
    assert most - missing == pytest.approx(2.4e9 * 7 / 8 / GIB - 1, abs=0.11)


def test_processes_on_one_host_share_its_memory() -> None:
    """Each has tables of its own."""
    facts, footprint = facts_as("RTX 4090", host_bytes=8 * 10**9), full_size_footprint(CONFIG)
    rows = [plan_training(facts, footprint, CONFIG, num_processes=number).modulation_rows for number in (1, 8)]
    assert rows == [128, 32]


@pytest.mark.parametrize(
    ("card", "host_gb", "changes", "way_out"),
    [
        ("RTX 4060", 16, {"disable_quantization": True}, "Without disable_quantization it fits"),
        ("RTX 4060", 4, {}, "Close other programs, or lower data_config.img_size"),
    ],
)
def test_a_host_that_is_too_small_is_named_with_what_is_missing(
    card: str, host_gb: int, changes: dict[str, object], way_out: str
) -> None:
    with pytest.raises(PlanError, match=rf"host memory beside {facts_as(card).name}, .* GiB are missing\. {way_out}"):
        in_a_pc(card, host_gb, **changes)


def test_one_pool_and_an_unknown_host_bound_nothing() -> None:
    assert host_room_bytes(facts_as("DGX Spark")) is None
    unknown = replace(facts_as("RTX 4060"), host_total_bytes=0, host_available_bytes=0)
    assert plan_for(unknown) == plan_for(facts_as("RTX 4060")) and missing_on_host(unknown, 10**12) == 0
