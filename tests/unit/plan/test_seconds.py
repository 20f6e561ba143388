"""The estimate of a step's time: near what was measured, and no rung with more memory takes longer."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import Rung, allowed_formats, first_that_fits
from pixtune.plan.seconds import step_seconds
from pixtune.plan.situation import Situation, situation_of
from pixtune.plan.training import with_todays_names
from tests.full_size import TOKENS_1024, full_size_footprint

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
MEASURED = sorted(path for path in RESULTS.glob("card_size_*.json") if "shapes" not in path.name)


def config_of(*words: str) -> TrainConfig:
    needed = ("pretrained_model_name_or_path=m", "output_dir=o", "data_config.img_dir=p", "max_train_steps=1")
    return load_config(None, [*needed, *words], folders_must_exist=False)


def situation(facts: HardwareFacts, family: str, num_tokens: int, *words: str) -> Situation:
    config = config_of(*words)
    footprint = replace(full_size_footprint(config, family), num_tokens=config.batch_size * num_tokens)
    return situation_of(facts, footprint, demands_of(config))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_it_is_near_what_was_measured(path: Path) -> None:
    """H100 and H200, 1024 pixels; those that were launched kernel by kernel took longer."""
    result = json.loads(path.read_text())
    if "not_recorded" in path.name:
        pytest.skip("steps that were not captured took longer")
    family = "flux" if result["model"].startswith("flux") else "qwen_image"
    facts = facts_as("H200" if "h200" in path.name else "H100")
    plan = with_todays_names(result["plan"])
    rung = Rung(**{field.name: plan[field.name] for field in fields(Rung) if field.name in plan})
    estimate = step_seconds(rung, situation(facts, family, TOKENS_1024[family], *result["overrides"]))
    assert 0.85 < estimate / result["seconds_per_step_median"] < 1.05


def test_it_is_near_what_was_measured_at_another_size() -> None:
    """H200, FLUX.1-dev at 896 pixels: plans drawn by lot and their neighbours."""
    found = json.loads((RESULTS / "neighbours_h200" / "11-flux.json").read_text())
    of = situation(facts_as("H200"), "flux", (found["case"]["size"] // 16) ** 2 + 512)
    ratios = [step_seconds(Rung(**each["rung"]), of) / each["seconds"] for each in found["results"]]
    assert len(ratios) > 20 and min(ratios) > 0.8 and max(ratios) < 1.05


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
