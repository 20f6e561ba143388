"""Each way of saving memory trains as the plain way does: the loss and all LoRA gradients of the small models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune.engine.apply import apply_to_activations, load_planned
from pixtune.engine.modulation_ahead import announce
from pixtune.plan.training import TrainingPlan
from pixtune.trained import adapters
from tests.unit.engine.test_load import model

CPU = torch.device("cpu")
PLAIN = TrainingPlan(
    compute_format="fp32", weights_format="fp32", modulation_rows=0, selective=False, recomputed_blocks=0,
    reprojected_blocks=0, kept_transposes=False, offload_inputs=False, streamed_blocks=0, compile=False, captures=0,
    pin_memory=False,
    encoders_stay=False, tf32=False,
    deterministic=False, loading_threads=1, fast_loading=False,
    expandable_segments=False,
    optimizer="adamw", expected_peak_bytes=0, expected_host_bytes=0, usable_bytes=0, reasons=(),
)  # fmt: skip
EXACT = 1.0
WAYS: dict[str, tuple[dict[str, Any], float]] = {  # what the plan changes, and the least cosine of the gradients
    "recomputed": ({"recomputed_blocks": 2}, EXACT),
    "reprojected": ({"recomputed_blocks": 1, "reprojected_blocks": 2}, EXACT),
    "inputs on the host": ({"recomputed_blocks": 99, "offload_inputs": True}, EXACT),
    "streamed": ({"recomputed_blocks": 99, "streamed_blocks": 4}, EXACT),
    "captured, so without gaps": ({"captures": 1}, EXACT),
    "captured and streamed": ({"captures": 1, "recomputed_blocks": 99, "streamed_blocks": 4}, EXACT),
    "modulation ahead": ({"modulation_rows": 8}, 0.999999),
    "selective": ({"selective": True}, 0.9999),
    "fp8": ({"weights_format": "fp8"}, 0.985),
    "int8": ({"weights_format": "int8"}, 0.997),
    "int8, transposes kept": ({"weights_format": "int8", "kept_transposes": True}, 0.997),
    "nf4": ({"weights_format": "nf4"}, 0.87),
    "all at once": (
        {
            "weights_format": "int8", "modulation_rows": 8, "selective": True, "recomputed_blocks": 99,
            "offload_inputs": True, "streamed_blocks": 4,
        },
        0.997,
    ),
}  # fmt: skip


def loss_and_gradients(name: str, plan: TrainingPlan) -> tuple[float, Tensor]:
    """Loss and gradients of one step with two examples and a LoRA that already changes the output."""
    family, folder = model(name)
    loaded = load_planned(family, folder, plan, CPU)
    transformer = loaded.module
    adapters.attach_lora(transformer, family.lora_targets, 4, 4.0, 0, family.lora_presets)
    generator = torch.Generator().manual_seed(3)
    parameters = adapters.trainable_parameters(transformer)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 40
    apply_to_activations(transformer, family, plan)
    channels, height, width = family.latent_shape(folder, 128, 192)
    noisy_BCHW, target_BCHW = torch.randn(2, 2, channels, height, width, generator=generator)
    text = family.stack_conditioning([family.random_text(folder, 11, seed) for seed in range(2)])
    sigmas = torch.tensor([0.3, 0.8])
    announce(loaded, family, sigmas, text)
    loss = (family.predict_velocity(transformer, noisy_BCHW, sigmas, text) - target_BCHW).square().mean()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])


@pytest.mark.parametrize("name", ["tiny-qwen-image", "tiny-flux"])
def test_every_way_trains_as_the_plain_way(name: str) -> None:
    loss, gradients = loss_and_gradients(name, PLAIN)
    for way, (changes, least_cosine) in WAYS.items():
        own_loss, own = loss_and_gradients(name, replace(PLAIN, **changes))
        assert own.shape == gradients.shape, f"{way}: other parameters have a gradient"
        if least_cosine == EXACT:
            assert own.equal(gradients) and own_loss == loss, way
            continue
        cosine = float(torch.cosine_similarity(own.double(), gradients.double(), dim=0))
        assert least_cosine <= cosine, (way, cosine)
        assert not own.equal(gradients) or way == "modulation ahead", f"{way}: not applied"
        assert own_loss == pytest.approx(loss, rel=0.05), way
