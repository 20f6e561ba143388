"""A run that pads its captions to a multiple learns what a run learns that does not, and plans with what it pads to."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune import assembly, planning
from pixtune import train as training
from pixtune.config import load_config
from pixtune.data.batches import Batch, observed, read_ahead
from pixtune.data.prepared import PreparedData
from pixtune.engine import attention_trial
from pixtune.engine import compile as engine_compile
from pixtune.engine.attention_trial import Shape
from pixtune.hardware.cards import facts_as
from pixtune.plan import rungs
from pixtune.plan.kernel_choice import Finding
from pixtune.plan.text_padding import CaptionedSize, Captions
from pixtune.plan.training import TrainingPlan
from tests.full_size import full_size_footprint
from tests.runs import DEMO_TRAIN, ROOT

STEPS = 4


def train(
    folder: Path, cache: Path, text_multiple: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Tensor, list[Batch]]:
    """Losses, the LoRA after the last step, and the batches; captions of many lengths, some dropped."""
    words = [
        f"pretrained_model_name_or_path={ROOT / 'assets' / 'tiny-qwen-image'}",
        f"output_dir={folder / str(text_multiple)}",
        f"max_train_steps={STEPS}",
        f"data_config.img_dir={DEMO_TRAIN}",
        f"data_config.cache_dir={cache}",
        "data_config.img_size=64",
        "data_config.caption_dropout_rate=0.3",
        "train_batch_size=3",
        "learning_rate=1e-3",
        "rank=4",
        "mixed_precision='no'",
    ]
    right = assembly.decide_plan

    def decide(*arguments: Any) -> TrainingPlan:
        return replace(right(*arguments), text_multiple=text_multiple)

    monkeypatch.setattr(assembly, "decide_plan", decide)
    run, _ = assembly.assemble(load_config(None, words), training.forward_backward)
    monkeypatch.setattr(assembly, "decide_plan", right)
    seen: list[Batch] = []
    batches = observed(read_ahead(run.source, 0, STEPS, 0, pin_memory=False), seen.append)
    losses = [training.train_step(run, islice(batches, 1), step).totals_2[0] for step in range(STEPS)]
    return losses, torch.cat([weight.detach().flatten() for weight in run.trained.parameters.values()]), seen


def test_a_run_with_padded_captions_learns_the_same(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights, batches = train(tmp_path, warm_cache, 1, monkeypatch)
    padded_losses, padded_weights, padded_batches = train(tmp_path, warm_cache, 64, monkeypatch)
    torch.testing.assert_close(padded_losses, losses, rtol=1e-5, atol=1e-6)
    # Adam takes a whole step by the sign of a gradient that is next to nothing: a few weights may part, not many.
    apart = ~torch.isclose(padded_weights, weights, rtol=1e-3, atol=1e-5)
    assert apart.float().mean() < 1e-3, f"{int(apart.sum())} of {len(weights)} weights differ"
    assert len({batch.shapes for batch in batches}) > 1, "captions of one length would prove nothing"
    assert len({batch.shapes for batch in padded_batches}) == 1


H100 = facts_as("H100")
REQUIRED = [
    "pretrained_model_name_or_path=x", "output_dir=x", "max_train_steps=1", f"data_config.img_dir={DEMO_TRAIN}",
]  # fmt: skip
SHORT, LONG = {7: 1.0, 9: 1.0}, dict.fromkeys(range(10, 300), 1.0)


def planned(
    words: list[str], monkeypatch: pytest.MonkeyPatch, draws_by_length: dict[int, float], pads_text: bool = True,
    most_recordings: int = 64, trial: Any = None,
) -> tuple[TrainingPlan, list[int]]:  # fmt: skip
    """The plan of a run on an H100 whose kernels pass every trial, and the tokens that memory was counted for."""
    config = load_config(None, [*REQUIRED, "mixed_precision=bf16", *words])
    counted: list[int] = []

    def footprint_of(config: Any, family: Any, folder: Any, num_tokens: int) -> Any:
        counted.append(num_tokens)
        return replace(full_size_footprint(config), num_tokens=num_tokens)

    monkeypatch.setattr(planning, "footprint_of", footprint_of)
    monkeypatch.setattr(planning, "read_facts", lambda *arguments: H100)
    monkeypatch.setattr(engine_compile, "compile_obstacle", lambda device: None)
    right = Finding(error=0.003, milliseconds=1.5, padded_error=0.003)
    trial = trial or (lambda shape, kernels: dict.fromkeys(kernels, right))
    monkeypatch.setattr(attention_trial, "try_attention", trial)
    monkeypatch.setattr(rungs, "MOST_CAPTURES", most_recordings)
    sizes = (CaptionedSize(10_000, draws_by_length),)
    captions = Captions(len(draws_by_length) > 1, sizes)
    data: Any = PreparedData(None, [], [], [], [], 10_000, max(draws_by_length), captions, "", None)  # type: ignore[arg-type]
    accelerator: Any = type("Accelerator", (), {"device": torch.device("cuda"), "num_processes": 1})
    family: Any = type("Family", (), {"pads_text": pads_text})
    heads = {"num_attention_heads": 24, "attention_head_dim": 128}
    folder: Any = type("Folder", (), {"component_config": lambda self, name: heads})()
    return assembly.decide_plan(config, family, folder, data, accelerator, None), counted


@pytest.mark.parametrize(("word", "text_tokens"), [("", 64), ("cuda_graphs=false", 9), ("mixed_precision='no'", 9)])
def test_a_plan_counts_the_tokens_that_captions_may_be_padded_to(
    word: str, text_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pads_text in (True, False):
        for lengths in (SHORT, {9: 2.0}):
            _, counted = planned([word] if word else [], monkeypatch, lengths, pads_text)
            assert counted == [10_000 + (text_tokens if pads_text and len(lengths) > 1 else 9)]


def test_a_plan_that_pads_further_counts_its_memory_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest caption has 299 tokens: 320 in multiples of 64, 384 in those of 128."""
    plan, counted = planned([], monkeypatch, LONG)
    assert plan.text_multiple == 64 and counted == [10_320]
    few, counted = planned([], monkeypatch, LONG, most_recordings=3)
    assert few.text_multiple == 128 and counted == [10_320, 10_384]
    assert few.expected_peak_bytes > plan.expected_peak_bytes


def test_a_resumed_run_keeps_its_plan_also_under_the_names_of_version_0_1_0(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned([], monkeypatch, SHORT)[0]
    older_names = {"selective": "lean", "captures": "recordings"}
    values = {older_names.get(name, name): value for name, value in plan.to_dict().items()}
    older: Any = type("Checkpoint", (), {"record": {"plan": values, "config": {"train_batch_size": 1}}})
    nothing: Any = None
    alone: Any = type("Accelerator", (), {"num_processes": 1})
    config = load_config(None, REQUIRED)
    assert assembly.decide_plan(config, nothing, nothing, nothing, alone, older) == plan


@pytest.mark.parametrize(
    ("word", "tried", "kernel"),
    [
        ("", ("cudnn", "flash", "efficient"), "cudnn"),
        ("deterministic=true", ("flash", "efficient"), "flash"),
        ("cuda_features.enable_cudnn_sdp=false", ("flash", "efficient"), "flash"),
    ],
)
def test_a_run_tries_its_kernels_at_its_own_shape(
    word: str, tried: tuple[str, ...], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Shape, tuple[str, ...]]] = []

    def try_attention(shape: Shape, kernels: tuple[str, ...]) -> dict[str, Finding]:
        asked.append((shape, kernels))
        return {name: Finding(error=0.003, milliseconds=place) for place, name in enumerate(kernels)}

    plan, _ = planned([word] if word else [], monkeypatch, SHORT, trial=try_attention)
    assert asked == [(Shape(10_064, 24, 128, "bf16", word.startswith("deterministic")), tried)]
    assert plan.attention == kernel and plan.text_multiple == 1, "it was not found right for padded captions"
