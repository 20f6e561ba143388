"""A resumed run keeps its plan as long as its micro-batches are those that it was made for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixtune import assembly
from pixtune.config import TrainConfig, load_config
from pixtune.plan.training import TrainingPlan
from tests.unit.plan.test_processes import plan_for

DEMO = Path("train_configs/demo.yaml")


def decided(
    monkeypatch: pytest.MonkeyPatch, plan: TrainingPlan, before: TrainConfig, now: TrainConfig, num: int
) -> Any:
    """Returns the plan of a run that goes on from a checkpoint, and the configs of which it was planned anew."""
    planned: list[TrainConfig] = []

    def plan_anew(config: TrainConfig, *rest: Any) -> TrainingPlan:
        planned.append(config)
        return plan

    monkeypatch.setattr(assembly, "plan_on_this_machine", plan_anew)
    checkpoint: Any = SimpleNamespace(record={"plan": plan.to_dict(), "config": before.model_dump(mode="json")})
    parts: Any = SimpleNamespace(pads_text=False, micro_batch_tokens=lambda size: [], device="cpu", num_processes=num)
    return assembly.decide_plan(now, parts, parts, parts, parts, checkpoint), planned


def test_other_micro_batches_are_planned_anew_in_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for("RTX 4090", 2, quantize=True)
    two = load_config(DEMO, ["train_batch_size=2"])
    assert decided(monkeypatch, plan, two, load_config(DEMO, ["train_batch_size=2", "rank=3"]), 2) == (plan, [])
    for words in (["train_batch_size=4"], ["data_config.train_batch_size=4", "train_batch_size=null"]):
        _, (config,) = decided(monkeypatch, plan, two, load_config(DEMO, words), 1)
        assert config.batch_size == 4 and config.quantize, "the checkpoint's format, which no key asked for"
