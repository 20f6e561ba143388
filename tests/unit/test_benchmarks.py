"""The benchmark of full-size steps, at the size of a toy: it measures, keeps its run and goes on with it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixtune.checkpoint import checkpoint_path, find_checkpoints, joined, load_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIDES = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 128, "joint_attention_dim": 64}
STEPS = 4
"""The benchmark leaves out three to warm up."""


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("full_size")
    toy = module.Architecture("QwenImagePipeline", *module.QWEN, transformer_values=SIDES)
    monkeypatch.setitem(module.ARCHITECTURES, "toy", toy)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return module


def test_all_weights_are_trained_saved_and_gone_on_with(full_size: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["method=full", "mixed_precision=bf16", "learning_rate=0.001", "checkpoints_total_limit=1"]

    def run(steps: int, *more: str) -> dict[str, Any]:
        """As by `main`: model folder and pictures are made anew each time."""
        folder = tmp_path / f"{steps} steps"
        full_size.prepare(folder, "toy", 64)
        result: dict[str, Any] = full_size.measure(folder, output, "toy", 64, steps, [*words, *more])
        return result

    first = run(STEPS)
    before = load_checkpoint(checkpoint_path(output, STEPS))
    longer = run(STEPS + 2, "resume_from_checkpoint=latest")
    assert len(first["losses"]) == STEPS and len(longer["losses"]) == STEPS + 2
    assert longer["losses"][:STEPS] == first["losses"]
    assert [path.name for path in find_checkpoints(output)] == [f"checkpoint-{STEPS + 2:06d}"]
    after = load_checkpoint(checkpoint_path(output, STEPS + 2))
    one, other = joined(before.tensors, "transformer"), joined(after.tensors, "transformer")
    # The base is random anew in each process, so weights that are near to the saved ones have gone on from them.
    steps_apart = {name: (one[name].float() - other[name].float()).abs().max().item() for name in one}
    assert 0 < max(steps_apart.values()) < 0.02
    assert (output / "model" / "transformer" / "config.json").is_file()
