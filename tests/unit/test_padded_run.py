"""A run that pads its captions to a multiple learns what a run learns that does not, and plans with what it pads to."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune import train as training
from pixtune.config import load_config
from pixtune.data.batches import Batch, read_ahead
from pixtune.data.prepare import PreparedData
from pixtune.fit.plan import MemoryPlan
from tests.runs import DEMO_TRAIN, ROOT

STEPS = 4


def train(
    folder: Path, text_multiple: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Tensor, list[Batch]]:
    """Losses, the LoRA after the last step, and the batches; captions of many lengths, some dropped."""
    words = [
        f"pretrained_model_name_or_path={ROOT / 'assets' / 'tiny-qwen-image'}",
        f"output_dir={folder / str(text_multiple)}",
        f"max_train_steps={STEPS}",
        f"data_config.img_dir={DEMO_TRAIN}",
        f"data_config.cache_dir={folder / 'cache'}",
        "data_config.img_size=64",
        "data_config.caption_dropout_rate=0.3",
        "train_batch_size=3",
        "learning_rate=1e-3",
        "rank=4",
        "mixed_precision='no'",
    ]
    right = training.decide_plan

    def decide(*arguments: Any) -> MemoryPlan:
        return replace(right(*arguments), text_multiple=text_multiple)

    monkeypatch.setattr(training, "decide_plan", decide)
    run, _ = training.assemble(load_config(None, words))
    monkeypatch.setattr(training, "decide_plan", right)
    seen: list[Batch] = []
    batches = read_ahead(run.source, 0, STEPS, 0, pin_memory=False)
    losses = [training.train_step(run, islice(batches, 1), step, seen.append)[0] for step in range(STEPS)]
    return losses, torch.cat([weight.detach().flatten() for weight in run.trained.parameters.values()]), seen


def test_a_run_with_padded_captions_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights, batches = train(tmp_path, 1, monkeypatch)
    padded_losses, padded_weights, padded_batches = train(tmp_path, 64, monkeypatch)
    torch.testing.assert_close(padded_losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_weights, weights, rtol=1e-3, atol=1e-5)
    assert len({batch.shapes for batch in batches}) > 1, "captions of one length would prove nothing"
    assert len({batch.shapes for batch in padded_batches}) == 1


@pytest.mark.parametrize(("words", "counted"), [([], 64), (["cuda_graphs=false"], 7), (["mixed_precision='no'"], 7)])
def test_a_plan_counts_the_tokens_that_captions_are_padded_to(
    words: list[str], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is told whether padding is of use; how that is decided is in test_plan.py."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(training, "plan_on_this_machine", lambda *arguments: given.append(arguments))
    required = [
        "pretrained_model_name_or_path=x",
        "output_dir=x",
        "max_train_steps=1",
        f"data_config.img_dir={DEMO_TRAIN}",
    ]
    config = load_config(None, [*required, "mixed_precision=bf16", "train_batch_size=2", *words])
    accelerator: Any = type("Accelerator", (), {"device": torch.device("cpu"), "num_processes": 1})
    for pads_text in (True, False):
        for differ in (True, False):
            data: Any = PreparedData(None, [], [], [], [], 100, 7, differ, "", None)  # type: ignore[arg-type]
            family: Any = type("Family", (), {"pads_text": pads_text})
            training.decide_plan(config, family, None, data, accelerator, None)  # type: ignore[arg-type]
            _, _, _, num_tokens, told, *_ = given.pop()
            assert told == (pads_text and differ)
            assert num_tokens == 2 * (100 + (counted if told else 7))
