"""Noise levels of the stock flow-matching pipelines, from the model folder's own scheduler config."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def model_time_shift(folder: ModelFolder, num_image_tokens: int) -> float:
    """Returns `mu` of the resolution-dependent shift; see `ModelFamily.time_shift`."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = folder.component_config("scheduler")
    if not config.get("use_dynamic_shifting", False):
        return math.log(config.get("shift", 1.0))  # shift * s / (1 + (shift - 1) s) is the same curve
    return calculate_shift(
        num_image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def rounded_timestep(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds sigmas as the stock pipelines do: times 1000, to the model's number format, and divided by 1000."""
    return (sigma_B * 1000).to(dtype) / 1000


def model_sigmas(folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
    """Returns the sigmas of the stock sampler; see `ModelFamily.sigma_schedule`."""
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(folder.component_config("scheduler"))
    sigmas = numpy.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=model_time_shift(folder, num_image_tokens))
    return scheduler.sigmas.tolist()
