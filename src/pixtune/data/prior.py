"""Prior preservation: pictures of what the base model knows already, to be trained on beside the new ones.

They keep a class apart from the one new thing of it that is learned, and the base's own styles as they are (Ruiz et al.
2022, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", section 3.2). A user gives
them, or the base model draws them from prompts before the first step, each from a fixed seed. Drawn pictures lie in a
folder of the run's output whose name tells what decides them, and a run that is started again draws those it lacks.
"""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from pixtune.config.folders import largest_size
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import PriorConfig
from pixtune.data.drawing import SampleRequest, abilities_of, make_plans, open_task, sample_as_planned
from pixtune.data.examples import check_purposes
from pixtune.data.prepare import read_own
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.engine.relief import free_unused
from pixtune.errors import ConfigError
from pixtune.families import family_of
from pixtune.families.opening import open_model
from pixtune.hardware.read import read_facts
from pixtune.launch.crew import ALONE, Crew
from pixtune.plan.demands import demands_of
from pixtune.progress import say
from pixtune.sampler import PromptPicture, SamplerSettings
from pixtune.storage.files import text_digest, write_atomically
from pixtune.storage.loading import check_parts

PRIOR_FOLDER = "prior"
"""Folder in the output folder for what the base model draws."""


def prior_path(config: TrainConfig, base: str | None) -> Path | None:
    """Returns the folder of a run's regularization pictures; None where it has none.

    Args:
        base: fingerprint of the base model, which decides the drawn ones.
    """
    prior = config.prior_preservation
    if not prior.prompts or config.random_weights:
        return prior.folder
    side = _side(config)
    decides = [base, prior.prompts, prior.num_pictures, prior.num_steps, prior.guidance_scale, side]
    decides += [config.data_config.max_text_tokens]
    return config.output_dir / PRIOR_FOLDER / text_digest(json.dumps(decides))[:12]


def draw_prior(config: TrainConfig, base: str | None, accelerator: Accelerator, crew: Crew = ALONE) -> Path | None:
    """Returns `prior_path`, after drawing what is not there yet, each picture with its prompt as its caption.

    The first process draws while the others of the crew wait. Nothing of the models stays in memory.

    Raises:
        ConfigError: the model edits pictures, of which prompts alone give none.
        DataError: the other pictures cannot be trained on.
        PlanError: drawing fits neither the GPU nor the host beside it.
        WriteError: a picture could not be written; those before it are kept.
    """
    prior, folder = config.prior_preservation, prior_path(config, base)
    if folder is not None and prior.prompts and not config.random_weights:
        with crew.sharing("drawing regularization pictures", 0):
            if accelerator.is_main_process:
                _draw(config, prior, folder, accelerator)
    return folder


def _draw(config: TrainConfig, prior: PriorConfig, folder: Path, accelerator: Accelerator) -> None:
    model_folder = open_model(config.pretrained_model_name_or_path, config.model_parts)
    if family_of(model_folder).max_controls and not config.data_config.allow_missing_controls:
        raise ConfigError(
            "the base model cannot draw regularization pictures",
            [
                "prior_preservation.prompts is given, and this model edits control pictures, of which prompts give "
                "none. Give pairs as prior_preservation.folder, or train on pictures without controls as well: "
                "data_config.allow_missing_controls=true."
            ],
        )
    path_of = {
        (prompt, seed): folder / f"{number:03d}-{seed:04d}.png"
        for number, prompt in enumerate(prior.prompts)
        for seed in range(prior.num_pictures)
    }
    missing = [each for each, path in path_of.items() if not (path.exists() and path.with_suffix(".txt").exists())]
    if not missing:
        return
    check_purposes(config)
    read_own(config, family_of(model_folder), model_folder)  # what is wrong with the others, before the long work
    console, device = Console(), accelerator.device
    say(console, f"regularization pictures: the base model draws {len(missing)} of {len(path_of)} into {folder}")
    side, data = _side(config), config.data_config
    multiple = family_of(model_folder).pixel_multiple(model_folder)
    size = (side // multiple * multiple, side // multiple * multiple)
    task = open_task(
        SampleRequest(
            model=config.pretrained_model_name_or_path,
            model_parts=config.model_parts,
            prompts=tuple(AskedPrompt(prompt, size=size) for prompt in dict.fromkeys(prompt for prompt, _ in missing)),
            lora=None,
            weights_format="bf16" if config.mixed_precision == "bf16" else "fp32",
            settings=SamplerSettings(tuple(range(prior.num_pictures)), prior.num_steps, prior.guidance_scale),
            max_text_tokens=data.max_text_tokens,
            control_size=data.control_size,
        )
    )
    check_parts(task.folder, (*task.family.text_components, "vae", "transformer"))
    facts = read_facts(device, demands_of(config).memory_fraction)
    plans = make_plans(task, config, facts, abilities_of(task, device))
    for reason in plans.sampling.reasons:
        say(console, f"regularization pictures: {reason}")
    wanted = frozenset(missing)
    for picture in sample_as_planned(task, plans, device, None, console, lambda *place: place in wanted):
        _write(path_of[picture.prompt.text, picture.seed], picture)
    free_unused()


def _side(config: TrainConfig) -> int:
    """Returns the side in pixels of the square pictures that the base model draws."""
    return largest_size(config.data_config)


def _write(path: Path, picture: PromptPicture) -> None:
    """Writes a picture with its prompt as its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".txt"), picture.prompt.text.encode())
    picture.write(path)
