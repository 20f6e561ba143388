"""Noise levels of the stock flow-matching pipelines, from the model folder's own scheduler config."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pixtune.errors import WeightsError
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor


LARGEST_SHIFT = 100.0
"""Shift beyond which every noise level is 0 or 1; models have about 1."""


def model_time_shift(folder: ModelFolder, num_image_tokens: int) -> float:
    """Returns `mu` of the resolution-dependent shift; see `ModelFamily.time_shift`.

    Raises:
        WeightsError: the scheduler's config gives none.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = folder.component_config("scheduler")
    try:
        if not config.get("use_dynamic_shifting", False):
            shift = math.log(config.get("shift", 1.0))  # shift * s / (1 + (shift - 1) s) is the same curve
        else:
            shift = calculate_shift(
                num_image_tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
        if not abs(shift) <= LARGEST_SHIFT:  # true for NaN as well
            raise ValueError(f"a shift of {shift}")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder.part('scheduler') / 'scheduler_config.json'} describes no noise levels ({error}). Fetch "
            "the model again."
        ) from error
    return shift


def rounded_timestep(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds sigmas as the stock pipelines do: times 1000, to the model's number format, and divided by 1000."""
    return (sigma_B * 1000).to(dtype) / 1000


def model_sigmas(folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
    """Returns the sigmas of the stock sampler; see `ModelFamily.sigma_schedule`."""
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler

    from pixtune.storage.loading.parts import naming_part

    shift = model_time_shift(folder, num_image_tokens)
    with naming_part(folder.part("scheduler")):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(folder.component_config("scheduler"))
        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / num_steps, num_steps), mu=shift)
        return scheduler.sigmas.tolist()
