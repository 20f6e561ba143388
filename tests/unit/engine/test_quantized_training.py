"""A LoRA that was trained on a quantized base is about as good as one that was trained on the plain base.

Improvement is measured on the plain base, where people use the file: held-out loss of the base minus held-out loss of
the base with the exported LoRA on it. A quantized base of its own has another loss to begin with, so a difference to
that would mix the damage of quantizing with what was learnt. A run's share is its improvement over the improvement of
the run in full precision with the same seed, batches and noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pixtune import assembly
from pixtune import train as training
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import read_ahead
from pixtune.engine.load import load_transformer
from pixtune.engine.quantize import QuantizedLinear
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.judging.validation import HeldOutPicture, measure
from pixtune.plan.training import TrainingPlan
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.saved_lora import attach_saved_lora, read_saved_lora
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, ROOT

NUM_STEPS = {"tiny-qwen-image": 16, "tiny-flux": 18}
"""A step of the small FLUX takes longer and teaches more. Few, since 4 formats of both are to fit into a minute."""
NUM_MEASURED = 8
"""Held-out pictures; names that training has not seen, in the style that it teaches."""
LEAST_SHARE = {"int8": 0.95, "fp8": 0.95, "nf4": 0.90}
DEMANDS: dict[str, list[str]] = {
    "plain": [],
    "int8": ["quantize=true"],
    "fp8": ["quantize=true", "cuda_features.enable_fp8_training=true"],
    "nf4": ["quantize=true"],
}
"""Config words that ask for a format on a CPU. None asks for 4 bits, which the planner takes where 8 do not fit: that
plan is changed by hand."""


@dataclass(frozen=True)
class Scene:
    """One model, and the loss of its plain base with what each format's run exported."""

    base_loss: float
    losses: dict[str, float]

    def share(self, linear_format: str) -> float:
        return (self.base_loss - self.losses[linear_format]) / (self.base_loss - self.losses["plain"])


@pytest.fixture(scope="module", params=NUM_STEPS)
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_cache: Path
) -> Iterator[Scene]:
    name, folder = request.param, tmp_path_factory.mktemp("quantized")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to gain from more
    losses = {}
    for linear_format in DEMANDS:
        config = read_config(name, folder, warm_cache, linear_format)
        pictures = train_and_export(config, linear_format)
        losses[linear_format] = loss_with(name, config, pictures, config.output_dir / DIFFUSERS_FILE)
    yield Scene(loss_with(name, config, pictures, None), losses)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("linear_format", LEAST_SHARE)
def test_a_quantized_base_keeps_the_improvement(scene: Scene, linear_format: str) -> None:
    assert scene.losses["plain"] < 0.85 * scene.base_loss, "too little was learnt to compare anything"
    share = scene.share(linear_format)
    assert share >= LEAST_SHARE[linear_format], f"{share:.3f} of the plain run's improvement: {scene}"
    assert scene.losses[linear_format] != scene.losses["plain"], "was it quantized at all?"


def read_config(name: str, folder: Path, cache: Path, linear_format: str, batch_size: int = 4) -> TrainConfig:
    words = [
        f"pretrained_model_name_or_path={ROOT / 'assets' / name}",
        f"output_dir={folder / linear_format}",
        f"max_train_steps={NUM_STEPS[name]}",
        f"data_config.img_dir={DEMO_TRAIN}",
        f"data_config.cache_dir={cache}",
        f"validation.held_out_dir={DEMO_HELD_OUT}",
        "data_config.img_size=64",
        "data_config.max_text_tokens=24",
        f"train_batch_size={batch_size}",
        "learning_rate=1e-3",
        "lr_warmup_steps=3",
        "rank=16",
        "mixed_precision='no'",
        *DEMANDS[linear_format],
    ]
    return load_config(None, words)


def train_and_export(config: TrainConfig, linear_format: str) -> list[HeldOutPicture]:
    """All steps of a run, without what services do around them, and its files; the pictures to measure on."""
    with pytest.MonkeyPatch.context() as patch:
        if linear_format == "nf4":
            patch.setattr(assembly, "decide_plan", decide_four_bits)
        run, services = assembly.assemble(config, training.forward_backward)
    formats = {m.linear_format for m in run.transformer.module.modules() if isinstance(m, QuantizedLinear)}
    assert formats == ({linear_format} if linear_format != "plain" else set())
    batches = read_ahead(run.source, 0, run.num_steps, 0, pin_memory=False)
    for step in range(run.num_steps):
        training.train_step(run, islice(batches, 1), step)
    config.output_dir.mkdir()
    run.trained.export(config.output_dir, run.num_steps)
    return list(services.data.held_out)[:NUM_MEASURED]


def decide_four_bits(*arguments: object, decide: object = assembly.decide_plan) -> TrainingPlan:
    assert callable(decide)
    return replace(decide(*arguments), weights_format="nf4")


def loss_with(name: str, config: TrainConfig, pictures: list[HeldOutPicture], lora: Path | None) -> float:
    """The plain base's held-out loss, with a LoRA file on it or without."""
    folder = ModelFolder(ROOT / "assets" / name)
    family, device = family_of(folder), torch.device("cpu")
    transformer = load_transformer(family, folder, Placement(device, torch.float32))
    if lora is not None:
        attach_saved_lora(transformer.module, read_saved_lora(lora, family))
    return measure(family, transformer, pictures, 1, config.seed, device, config.objective.guidance, 16).mean
