"""Trains `assets/tiny-*/` on emoji: the autoencoder (on two sets), then the transformer (on nine).

    python scripts/train_tiny_models.py flux --stage vae --minutes 2 --out runs/tiny-flux
    python scripts/train_tiny_models.py flux --stage transformer --minutes 6 --guidance-minutes 3 --out runs/tiny-flux

Made for one H100, where both stages of a model take about ten minutes; on a CPU only `--limit 64 --minutes 0.5` makes
sense, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_flux
import tiny_qwen_image
import tiny_qwen_image_edit
import torch
from diffusers import DiffusionPipeline
from emoji_pictures import PART_SETS, Icon, read_base_icons
from safetensors.torch import load_file
from tiny_autoencoder import AutoencoderTraining, set_latent_statistics, train_autoencoder
from tiny_edits import edit_sets
from tiny_guidance import FromTeacher
from tiny_sets import encode_pictures, load_pixels, text_to_image_sets
from tiny_training import (
    FromPictures,
    Lesson,
    TrainingSet,
    TransformerTraining,
    train_transformer,
)
from torch import Tensor, nn

from pixtune.families import family_of
from pixtune.family import ModelFamily, Placement
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class Recipe:
    """Everything in which the small models differ."""

    pixels: int
    build_pipeline: Callable[[Sequence[str]], DiffusionPipeline]
    build_transformer: Callable[[], nn.Module]
    save: Callable[[DiffusionPipeline, Path], None]
    training_sets: Callable[[ModelFolder, list[Icon], Tensor, int], list[tuple[TrainingSet, int]]]
    """Builds the sets from a batch size, each with how many steps in a row draw from it."""


RECIPES = {
    "qwen_image": Recipe(
        tiny_qwen_image.PICTURE_PIXELS,
        tiny_qwen_image.build_pipeline,
        tiny_qwen_image.build_transformer,
        tiny_qwen_image.save_pipeline,
        text_to_image_sets,
    ),
    "flux": Recipe(
        tiny_qwen_image.PICTURE_PIXELS,
        tiny_flux.build_pipeline,
        tiny_flux.build_transformer,
        tiny_qwen_image.save_pipeline,
        text_to_image_sets,
    ),
    "qwen_image_edit": Recipe(
        tiny_qwen_image_edit.PICTURE_PIXELS,
        tiny_qwen_image_edit.build_pipeline,
        tiny_qwen_image_edit.build_transformer,
        tiny_qwen_image_edit.save_edit_pipeline,
        edit_sets,
    ),
}


# ---- pictures


@torch.no_grad()
def rebuild(family: ModelFamily, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
    """Passes pictures through the autoencoder and back; uint8."""
    rebuilt = []
    for chunk in pixels.split(64):
        latents = encode_pictures(family, autoencoder, chunk).mean_BCHW
        rebuilt.append(family.decode_latents(autoencoder, latents))
    return as_pictures(torch.cat(rebuilt))


def as_pictures(pixels_B3HW: Tensor) -> Tensor:
    """Rounds pixels in [-1, 1] to uint8."""
    return ((pixels_B3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(pictures: Tensor, references: Tensor) -> float:
    """Computes the mean over pictures of the peak signal-to-noise ratio, in dB."""
    errors = (pictures.float() - references.float()).div(255).square().flatten(1).mean(1)
    return float((-10 * torch.log10(errors.clamp_min(1e-10))).mean())


# ---- command line


def run_vae_stage(recipe: Recipe, captions: list[str], pixels: Tensor, arguments: argparse.Namespace) -> None:
    pipeline = recipe.build_pipeline(captions)
    if arguments.resume:
        stored = load_file(arguments.out / "vae" / "diffusion_pytorch_model.safetensors")
        pipeline.vae.load_state_dict({name: weight.float() for name, weight in stored.items()})
    training = AutoencoderTraining(pipeline.vae, pixels, arguments.batch_size)
    train_autoencoder(training, arguments.minutes, arguments.rate)
    for parameter in pipeline.vae.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()  # as it will be stored
    set_latent_statistics(pipeline.vae, pixels)
    recipe.save(pipeline.to("cpu"), arguments.out)
    folder = ModelFolder(arguments.out)
    family = family_of(folder)
    autoencoder = family.load_autoencoder(folder, Placement(pixels.device, torch.float32))  # as it is stored
    some = pixels[:: max(1, len(pixels) // 256)]
    rebuilt = rebuild(family, autoencoder, some)
    print(f"autoencoder: {psnr(rebuilt, some):.2f} dB on training pictures", flush=True)


def run_transformer_stage(recipe: Recipe, icons: list[Icon], pixels: Tensor, arguments: argparse.Namespace) -> None:
    folder = ModelFolder(arguments.out)
    family, device = family_of(folder), pixels.device
    sets = recipe.training_sets(folder, icons, pixels, arguments.batch_size)
    started = recipe.build_transformer()
    if arguments.resume:
        stored = load_file(folder.part("transformer") / "diffusion_pytorch_model.safetensors")
        started.load_state_dict({name: weight.float() for name, weight in stored.items()})
    config: Any = started.config
    start = family.build_transformer(config)
    start.load_state_dict(started.state_dict(), assign=True)

    def save(model: nn.Module) -> None:
        stored: Any = copy.deepcopy(model).to(torch.bfloat16)
        stored.save_pretrained(folder.path / "transformer")

    def train(start: nn.Module, lessons: list[tuple[Lesson, int]], minutes: float, rate: float) -> nn.Module:
        training = TransformerTraining(family, start, device)
        return train_transformer(training, lessons, minutes, rate, save, compiled=not arguments.eager)

    from_pictures: list[tuple[Lesson, int]] = [(FromPictures(family, data), turns) for data, turns in sets]
    trained = train(start, from_pictures, arguments.minutes, arguments.rate)
    if arguments.guidance_minutes:
        teacher = copy.deepcopy(trained).to(device)
        guided: list[tuple[Lesson, int]] = [(FromTeacher(family, data, teacher), turns) for data, turns in sets]
        train(trained, [*from_pictures, *guided], arguments.guidance_minutes, arguments.rate / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="the pipeline folder, which the second stage completes")
    parser.add_argument("--stage", choices=("vae", "transformer"), required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument(
        "--guidance-minutes", type=float, default=0, help="FLUX: minutes after these, see tiny_guidance"
    )
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="start from the folder's weights, not from scratch")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks: slower steps, quicker start")
    parser.add_argument("--limit", type=int, help="only about this many pictures, spread over all styles")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.automatic_dynamic_shapes = False  # each text length gets kernels of its own
    torch._dynamo.config.recompile_limit = 32  # one small function serves all sizes inside the autoencoder
    torch.manual_seed(0)
    captions = [icon.caption for icon in read_base_icons(PART_SETS)]
    if arguments.stage == "vae":
        icons = read_base_icons(PART_SETS)
    else:  # skin tones would take up draws and teach little
        icons = [icon for icon in read_base_icons() if "skin tone" not in icon.name]
    if arguments.limit:
        names = sorted({icon.name for icon in icons})[:: len(icons) // arguments.limit]
        icons = [icon for icon in icons if icon.name in names]
    recipe = RECIPES[arguments.model]
    pixels = load_pixels(icons, recipe.pixels, device)
    print(f"{len(icons)} pictures on {device}", flush=True)
    if arguments.stage == "vae":
        run_vae_stage(recipe, captions, pixels, arguments)
    else:
        run_transformer_stage(recipe, icons, pixels, arguments)


if __name__ == "__main__":
    main()
