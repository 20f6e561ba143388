"""Builds the encoder of a run from its config: how it fits the machine, and where its results go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from pixtune.config.folders import cache_folder
from pixtune.config.load import why_not_writable
from pixtune.config.schema import TrainConfig
from pixtune.data.cache import DiskStore, Ledger, MemoryStore
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.filling import missing_keys
from pixtune.family import ModelFamily, Placement
from pixtune.hardware.facts import HardwareFacts
from pixtune.hardware.read import read_facts
from pixtune.hardware.unified import is_unified_memory_system
from pixtune.launch.crew import ALONE, Crew, crew_of_folder
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import PLAINLY, EncoderPlan, count_caption_tokens, more_exact
from pixtune.planning import encoder_sizes, plan_encoders_of
from pixtune.storage.files import check_writable
from pixtune.storage.model_folder import ModelFolder


def build_encoder(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    accelerator: Accelerator,
    items: Sequence[TextItem],
    pictures: Sequence[FramedPicture],
    plan: EncoderPlan | None = None,
    crew: Crew = ALONE,
) -> Encoder:
    """Builds the encoder of a run, with nothing loaded.

    Args:
        items, pictures: captions and pictures that are encoded before training.
        plan: the plan of a run that is resumed; None: made for this machine as it is.
        crew: all processes of the run; those that see one cache divide the encoding.

    Raises:
        PlanError: the config demands an encoder on the GPU where it does not fit.
        WriteError: the cache can be neither read nor made.
    """
    cache_dir = cache_folder(config.data_config)
    on_disk = config.save_cache_on_disk
    may_write = on_disk and why_not_writable(str(cache_dir)) is None
    if on_disk and not may_write and not cache_dir.is_dir():
        check_cache(config)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    encoder = Encoder(
        family=family,
        folder=folder,
        placement=Placement(accelerator.device, dtype),
        plan=plan or _plan_encoders(config, family, folder, accelerator, items, pictures, crew),
        max_text_tokens=config.data_config.max_text_tokens,
        store=DiskStore(cache_dir / "entries") if on_disk else MemoryStore(),
        ledger=Ledger(cache_dir / "ledger.json" if on_disk else None),
        console=Console(quiet=not accelerator.is_main_process),
        memo_dir=cache_dir / "weights" if may_write else None,
        counts_file=cache_dir / "caption_tokens.json" if may_write else None,
        crew=crew_of_folder(crew, cache_dir) if on_disk else ALONE,
        stays=_encoders_stay(config),
    )
    if plan is None and on_disk:
        return prefer_more_exact(encoder, items, pictures, config)
    return encoder


def check_cache(config: TrainConfig) -> None:
    """Checks that encodings can be written, before the first of them is made.

    Raises:
        WriteError: they cannot; names the keys that help.
    """
    if config.save_cache_on_disk:
        check_writable(
            cache_folder(config.data_config),
            "Set data_config.cache_dir to a folder for the encoded pictures and captions, or keep them in memory: "
            "save_cache_on_disk=false.",
        )


def _plan_encoders(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    accelerator: Accelerator,
    items: Sequence[TextItem],
    pictures: Sequence[FramedPicture],
    crew: Crew,
) -> EncoderPlan:
    """Plans how this machine encodes; the first process decides for all, since all must read the same encodings."""
    if accelerator.device.type != "cuda":
        return PLAINLY
    crew.wait("reading the data set")  # that takes each its own time, and a broadcast waits for minutes at most
    decided: list[EncoderPlan | None] = [None]
    if accelerator.is_main_process:
        facts = read_facts(accelerator.device, demands_of(config).memory_fraction)
        decided = [plan_encoders_for(config, family, folder, facts, items, pictures)]
    (plan,) = broadcast_object_list(decided)
    return plan


def plan_encoders_for(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    facts: HardwareFacts,
    items: Sequence[TextItem],
    pictures: Sequence[FramedPicture],
) -> EncoderPlan:
    """Plans how a machine encodes these captions and pictures.

    Raises:
        PlanError: see `plan_encoders`.
    """
    if facts.device != "cuda":
        return PLAINLY
    characters = max((len(item.text) for item in items), default=0)
    vision_pixels = max((sum(math.prod(p.framing.size) for p in item.pictures) for item in items), default=0)
    picture_pixels = max((math.prod(picture.framing.size) for picture in pictures), default=0)
    tokens = count_caption_tokens(characters, vision_pixels)
    return plan_encoders_of(config, facts, encoder_sizes(config, family, folder, tokens, picture_pixels))


def prefer_more_exact(
    encoder: Encoder, items: Sequence[TextItem], pictures: Sequence[FramedPicture], config: TrainConfig
) -> Encoder:
    """Returns an encoder whose more exact encodings are all in the cache, which a larger GPU may have filled; else the
    same one."""
    for plan in more_exact(encoder.plan) if config.precompute_text_embeddings else ():
        better = replace(encoder, plan=plan)
        if not missing_keys(encoder.store, better.text_keys(items), encoder.crew):
            encoder = better
            break
    whole = replace(encoder, plan=replace(encoder.plan, tile_pixels=None))
    tiled = encoder.plan.tile_pixels is not None and config.precompute_image_embeddings
    return whole if tiled and not missing_keys(encoder.store, whole.latent_keys(pictures), encoder.crew) else encoder


def _encoders_stay(config: TrainConfig) -> bool:
    """Returns whether encoders stay on the device. The plan decides the same, but later: when the data are known."""
    demands = demands_of(config)
    return demands.keeps_encoders(is_unified_memory_system() if demands.unified is None else demands.unified)
