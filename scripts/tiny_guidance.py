"""Teaches FLUX's small model guidance as an input, as FLUX.1-dev was taught it.

FLUX.1-dev is guidance-distilled (Meng et al. 2023, "On Distillation of Guided Diffusion Models"): it predicts with one
pass what two passes and classifier-free guidance of the number it is given would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_training import TrainingSet, draw_sigmas, in_bf16
from torch import Tensor, nn

from pixtune.family import ModelFamily
from pixtune.objective import add_noise

GUIDANCES = (1.0, 5.0)
"""Range of the guidance that is learnt; FLUX.1-dev's usual 3.5 lies inside."""


@dataclass(frozen=True)
class FromTeacher:
    """The lesson of distillation: the guided velocity of a teacher that knows guidance 1 alone."""

    family: ModelFamily
    data: TrainingSet
    teacher: nn.Module

    def __call__(self, transformer: nn.Module) -> tuple[Tensor, Tensor]:
        data, device = self.data, self.data.device
        rows = data.draw_rows()
        latents = data.latents.mean_BCHW[data.targets_N[rows]]
        sigma_B = draw_sigmas(len(latents), device)
        noisy = add_noise(latents, torch.randn_like(latents), sigma_B)
        conditioning = data.features_of(data.texts_N[rows])
        least, most = GUIDANCES
        guidance_B = least + (most - least) * torch.rand(len(latents), device=device)
        with torch.no_grad(), in_bf16(device):
            plain, without = (
                self.family.predict_velocity(self.teacher, noisy, sigma_B, features).float()
                for features in (conditioning, data.features_of(data.dropped_N[rows]))
            )
        target = without + guidance_B.view(-1, 1, 1, 1) * (plain - without)

        def guided(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return inputs, {**named, "guidance": guidance_B}

        hook = transformer.register_forward_pre_hook(guided, with_kwargs=True)
        with in_bf16(device):
            velocity = self.family.predict_velocity(transformer, noisy, sigma_B, conditioning)
        hook.remove()
        return velocity, target
