"""The estimate of a step's time: near what was measured, and no rung with more memory takes longer."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import Rung, allowed_formats, first_that_fits
from pixtune.plan.seconds import CODES_KERNELS, KERNELS, LAYER_KERNELS, SELECTIVE_KERNELS, step_seconds
from pixtune.plan.situation import Situation, situation_of
from tests.full_size import TOKENS_1024, full_size_footprint

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def config_of(*words: str) -> TrainConfig:
    needed = ("pretrained_model_name_or_path=m", "output_dir=o", "data_config.img_dir=p", "max_train_steps=1")
    return load_config(None, [*needed, *words], folders_must_exist=False)


def situation(facts: HardwareFacts, family: str, num_tokens: int, *words: str) -> Situation:
    config = config_of(*words)
    footprint = replace(full_size_footprint(config, family), num_tokens=config.batch_size * num_tokens)
    return situation_of(facts, footprint, demands_of(config))


@pytest.fixture(scope="module")
def measured() -> Iterator[list[Any]]:
    """Every step that was measured, with its rung and situation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS.parent)
        yield list(importlib.import_module("step_times").measured_steps())


def test_it_is_near_what_was_measured(measured: list[Any]) -> None:
    """Equal steps differ by 7% from host to host (0.240 to 0.257 s of Qwen-Image in 8 bits)."""
    assert len(measured) > 85
    assert {(each.card, each.rung.weights_format) for each in measured} == {
        (card, weights_format) for card in ("H100", "H200") for weights_format in ("bf16", "fp8", "nf4")
    }
    assert {each.name: each.error for each in measured if abs(each.error) > 0.08} == {}
    small = [abs(each.error) for each in measured if each.num_tokens <= 2048]
    assert len(small) > 10 and statistics.median(small) < 0.02


def test_it_is_near_what_no_constant_was_fitted_to(measured: list[Any]) -> None:
    """Other calls of Qwen-Image, and all of FLUX.1-dev."""
    errors = sorted(abs(each.error) for each in measured if not each.is_fitted)
    assert len(errors) > 55
    assert statistics.median(errors) < 0.03 and errors[round(0.9 * len(errors)) - 1] < 0.06
    assert sum(each.model == "flux" for each in measured if not each.is_fitted) > 40


def test_rungs_of_a_format_are_ordered_as_they_were_measured(measured: list[Any]) -> None:
    """Those whose times differ by more than 3%; copies of those that are streamed vary by as much."""
    pairs = 0
    for model in ("flux", "qwen-image"):
        rungs = [each for each in measured if each.name.startswith("neighbours") and each.model == model]
        for one, other in combinations(rungs, 2):
            if one.rung.weights_format == other.rung.weights_format and abs(one.seconds / other.seconds - 1) > 0.03:
                pairs += 1
                assert (one.estimate < other.estimate) == (one.seconds < other.seconds), (one.rung, other.rung)
    assert pairs > 50


def test_what_small_pictures_pay_for_saving_memory_is_as_measured(measured: list[Any]) -> None:
    """Qwen-Image at 512 pixels: what does not grow with the tokens, by differences of two rungs."""
    of = {each.rung: each for each in measured if each.name == "neighbours_h200/11-qwen-image"}
    eight, four = Rung("fp8", 128), Rung("nf4", 128)
    selective, again = replace(eight, selective=True), Rung("fp8", 128, True, 1, reprojected_blocks=59)
    most, fewer = (
        Rung("nf4", 128, True, count, offload_inputs=True, reprojected_blocks=60 - count) for count in (54, 48)
    )
    for slower, faster, tolerance in (
        (four, eight, 0.1),  # weights expanded
        (most, four, 0.1),  # blocks recomputed
        (most, fewer, 0.2),  # six of them
        (selective, eight, 0.3),
        (again, selective, 0.1),  # queries, keys and values recomputed
    ):
        seconds = of[slower].seconds - of[faster].seconds
        assert of[slower].estimate - of[faster].estimate == pytest.approx(seconds, rel=tolerance), slower


def test_kernels_are_those_that_were_counted() -> None:
    """docs/profile.md: blocks of Qwen-Image, which have 12 layers, and FLUX.1-dev's single-stream ones of 5."""
    page = (RESULTS.parents[1] / "docs" / "profile.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| kernels |"))
    eight, selective, plain, single_selective, single = (int(cell) for cell in row.strip("| ").split("|")[1:])
    for counted, layers, has_codes, recomputes in (
        (eight, 12, True, False), (selective, 12, True, True), (plain, 12, False, False),
        (single_selective, 5, True, True), (single, 5, False, False),
    ):  # fmt: skip
        of_layer = LAYER_KERNELS + CODES_KERNELS * has_codes + SELECTIVE_KERNELS * recomputes
        assert KERNELS + layers * of_layer == pytest.approx(counted, abs=1.5)


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_other_adapters_take_as_much_longer_as_was_measured(kind: str) -> None:
    """Beside a LoRA on the same machine in the same process, in 8 bits; copies take no longer."""
    rows = {row["kind"]: row for row in json.loads((RESULTS / "adapters_h200.json").read_text())["rows"]}
    seconds = {
        each: step_seconds(
            Rung("fp8", 1), situation(facts_as("H200"), "qwen_image", TOKENS_1024["qwen_image"], f"adapter.kind={each}")
        )
        for each in ("lora", kind)
    }
    assert seconds[kind] / seconds["lora"] == pytest.approx(rows[kind]["times_lora"], abs=0.005)
    slow = replace(facts_as("RTX 4090"), link_bandwidth_bytes_per_second=10**9)
    streamed = [
        step_seconds(Rung("nf4", 128, True, 57, True, 57), situation(slow, "flux", 1536, f"adapter.kind={each}"))
        for each in ("lora", kind)
    ]
    assert streamed[0] == pytest.approx(streamed[1])


def test_copies_take_time_where_the_link_is_slow() -> None:
    fast = situation(facts_as("RTX 4090"), "flux", 1536)
    slow = replace(fast, facts=replace(fast.facts, link_bandwidth_bytes_per_second=3 * 10**9))
    streamed, resident = Rung("nf4", 128, True, 57, True, 57), Rung("nf4", 128, True, 57, True)
    assert step_seconds(streamed, fast) < 1.2 * step_seconds(resident, fast)
    # 4.5 bits of 24 squares of the width in each of 19 blocks and 12 in 38, in both passes; each block's input once.
    copied = 2 * (19 * 24 + 38 * 12) * 3072**2 * 0.5625 + 57 * 1536 * 3072 * 2
    assert step_seconds(streamed, slow) == pytest.approx(copied / 3e9, rel=0.06)


CHOICES = {
    "rank": (4, 16, 64, 256),
    "lora_targets": ("[attention]", "[attention_mlp]", "[all_linear]"),
    "train_batch_size": (1, 2, 4),
    "adam8bit": ("true", "false"),
    "mixed_precision": ("bf16", "bf16", "bf16", "no"),
}


@settings(max_examples=12)
@given(
    st.sampled_from(("qwen_image", "flux")),
    st.sampled_from(("H200", "RTX 4090", "RTX 3090", "RTX 5060")),
    st.sampled_from((512, 1536, 4608, 16896)),
    st.tuples(*(st.sampled_from([f"{key}={value}" for value in values]) for key, values in CHOICES.items())),
)
def test_more_memory_is_never_slower_and_never_less_exact(
    family: str, card: str, num_tokens: int, words: tuple[str, ...]
) -> None:
    """More bits may be slower than fewer, which they are taken for."""
    roomy = replace(facts_as(card), total_bytes=400 * GIB, host_available_bytes=900 * GIB, host_total_bytes=1000 * GIB)
    run = situation(roomy, family, num_tokens, *words)
    formats = allowed_formats(run)
    before: tuple[int, float] | None = None
    for usable_gib in (5, 6.5, 8, 10, 12.5, 15, 19, 24, 32, 48, 80, 140, 390):
        rung = first_that_fits(replace(run, facts=replace(roomy, free_bytes=round(usable_gib * GIB))))
        if rung is None:
            assert before is None, "what fits less memory fits more"
            continue
        now = formats.index(rung.weights_format), step_seconds(rung, run)
        assert before is None or now <= before
        before = now
    assert before is not None
