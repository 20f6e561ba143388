"""Steps with masks, flips, regularization pictures, an average and a training adapter are captured on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune import assembly
from pixtune.config import load_config
from tests.runs import DEMO_TRAIN, ROOT, overrides
from tests.soak.draws import write_adapter

pytestmark = pytest.mark.gpu

training = import_module("pixtune.train")  # the package has a function of that name

NUM_STEPS = 12
FEATURES = {
    "data_config__img_dir": ROOT / "assets" / "demo-character" / "images",
    "data_config__mask_dir": ROOT / "assets" / "demo-character" / "masks",
    "data_config__weight_outside_mask": 0.05,
    "data_config__flip": "true",
    "data_config__num_workers": 0,
    "prior_preservation__folder": DEMO_TRAIN,
    "prior_preservation__loss_weight": 0.5,
    "objective__loss": "huber",
    "objective__min_sigma": 0.2,
    "ema__decay": 0.9,
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def taken(folder: Path, **changes: object) -> tuple[Tensor, dict[str, Tensor], int]:
    """Figures of each step, the weights after them, and how many captures were made."""
    words = overrides(folder / "run", folder.parent / "cache", max_train_steps=NUM_STEPS, **{**FEATURES, **changes})
    run, _ = assembly.assemble(load_config(None, words), training.forward_backward)
    figures = []
    for step in range(NUM_STEPS):
        micro_batch = run.source.order.micro_batch(step)
        figures.append(training.take_step(run, [run.source.parts(step, micro_batch)], step).figures_3.float().cpu())
    weights = {path: parameter.detach().clone() for path, parameter in run.trained.parameters.items()}
    return torch.stack(figures), weights, run.forward_backward.history.made


@pytest.mark.parametrize("format_words", [{"quantize": "true"}, {"disable_quantization": "true"}])
def test_captured_steps_are_those_launched_kernel_by_kernel(tmp_path: Path, format_words: dict[str, str]) -> None:
    adapter = write_adapter(tmp_path / "adapter.safetensors")
    settings = {"training_adapter__path": adapter, "mixed_precision": "bf16", **format_words}
    plain, weights, none = taken(tmp_path / "plain", cuda_graphs="false", **settings)
    captured, same_weights, made = taken(tmp_path / "captured", cuda_graphs="true", **settings)
    assert (none, made > 0) == (0, True)
    torch.testing.assert_close(captured, plain, rtol=5e-3, atol=1e-5)
    moved = sum(float((weights[path] - same_weights[path]).norm() ** 2) for path in weights) ** 0.5
    assert moved < 0.02 * sum(float(weight.norm() ** 2) for weight in weights.values()) ** 0.5
