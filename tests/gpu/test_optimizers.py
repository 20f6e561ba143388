"""Steps of the optimizers on a GPU: none waits for it after the first, and they are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixtune.trained.optimizers import BUILDERS

pytestmark = pytest.mark.gpu

SETTINGS = {"adamw": 1e-2, "adamw_schedule_free": 1e-2, "prodigy": 1.0, "adafactor": 1e-2, "muon": 1e-2}
"""Optimizers whose steps do not wait, with a learning rate."""


def train(name: str, device: str, num_steps: int = 12) -> list[torch.Tensor]:
    """Takes steps towards 0.3; on a GPU all but the first are refused if they wait."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter((0.1 * torch.randn(64, side, generator=generator)).to(device)) for side in (96, 40, 64)]
    optimizer = BUILDERS[name](weights, lr=SETTINGS[name], weight_decay=0.01)
    for step in range(num_steps):
        noise = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = 1e-2 * (weight.detach() - 0.3 + torch.randn(weight.shape, generator=noise).to(device))
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        if device == "cuda" and step > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return [weight.detach().cpu() for weight in weights]


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_do_not_wait_and_are_those_of_the_cpu(name: str) -> None:
    if name == "adamw_schedule_free":
        pytest.importorskip("schedulefree")
    tolerance = 2e-2 if name in ("prodigy", "muon") else 1e-4  # an estimate feeds back; products in bf16
    for ours, theirs in zip(train(name, "cuda"), train(name, "cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)
