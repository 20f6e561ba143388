"""Builds the sampler of the pictures that a run draws between its steps, in the room that the steps leave."""

from __future__ import annotations

import torch

from pixtune.config.schema import TrainConfig
from pixtune.data.prepared import PreparedData
from pixtune.engine.apply import placement_of
from pixtune.family import ModelFamily
from pixtune.hardware.read import read_facts
from pixtune.plan.training import TrainingPlan
from pixtune.planning import BetweenSteps, SamplesBetween, can_pad, plan_between_steps
from pixtune.sampler import PromptSampler, SamplerSettings
from pixtune.storage.model_folder import ModelFolder


def build_sampler(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    plan: TrainingPlan,
    data: PreparedData,
    device: torch.device,
) -> tuple[PromptSampler, BetweenSteps]:
    """Builds the sampler of a run's prompts, with the plan by which it works."""
    settings = config.samples
    between = plan_between_steps(
        config, family, folder, plan, data.encoders,
        SamplesBetween(data.sample_pixels, len(data.prompts), settings.guidance_scale, can_pad(folder, device)),
        data.micro_batch_tokens(config.batch_size, plan.text_multiple),
        read_facts(device),
    )  # fmt: skip
    sampler = PromptSampler(
        family, folder, data.prompts,
        SamplerSettings(settings.seeds, settings.num_steps, settings.guidance_scale),
        placement_of(plan, device),
        keep_autoencoder=plan.encoders_stay,
        tile_pixels=between.tile_pixels,
        passes=between.passes,
    )  # fmt: skip
    return sampler, between
