"""Trains `assets/tiny-*/` on Noto and Fluent emoji: the autoencoder first, then the transformer.

    python scripts/train_tiny_models.py flux --stage vae --minutes 2 --out runs/tiny-flux
    python scripts/train_tiny_models.py flux --stage transformer --minutes 6 --out runs/tiny-flux

Made for one H100, where both stages of a model take about ten minutes; on a CPU only `--limit 64 --minutes 0.5` makes
sense, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_flux
import tiny_qwen_image
import tiny_qwen_image_edit
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from emoji_pictures import Icon, read_base_icons, render_all
from PIL import Image
from tiny_autoencoder import AutoencoderTraining, set_latent_statistics, train_autoencoder
from tiny_training import TrainingSet, TransformerTraining, cumulative, train_transformer, weights_by_group
from torch import Tensor, nn
from vary_pictures import vary

from pixtune.engine.load import load_transformer
from pixtune.families import family_of
from pixtune.families.qwen_image_edit import NUM_TEMPLATE_TOKENS, EditReader
from pixtune.family import LatentDistribution, ModelFamily, Placement, Prompt
from pixtune.storage.model_folder import ModelFolder

NUM_VARIATIONS = 4
FLUX_TEXT_TOKENS = 48
"""Tokens of a caption; no caption here is longer. The pipelines' 512 would be mostly padding, which FLUX attends to."""
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror it": lambda pixels: pixels.flip(-1),
    "turn it upside down": lambda pixels: pixels.flip(-2),
    "make it black and white": lambda pixels: pixels.float().mean(1, keepdim=True).expand(-1, 3, -1, -1).byte(),
    "make it red": lambda pixels: _tinted(pixels, (0.15, 1.0, 1.0)),
    "make it green": lambda pixels: _tinted(pixels, (1.0, 0.3, 1.0)),
    "make it blue": lambda pixels: _tinted(pixels, (1.0, 0.6, 0.1)),
    "change nothing": lambda pixels: pixels,
}
"""Edits of uint8 pictures by their instruction."""


def _tinted(pixels_B3HW: Tensor, ink: tuple[float, float, float]) -> Tensor:
    """Turns grey levels into ink of one colour, given as how much of red, green and blue it takes from white."""
    darkness = 1 - pixels_B3HW.float().mean(1, keepdim=True) / 255
    taken = torch.tensor(ink, device=pixels_B3HW.device).view(1, 3, 1, 1)
    return ((1 - (0.3 * (darkness > 0.03) + 0.7 * darkness) * taken) * 255).round().byte()


@dataclass(frozen=True)
class Recipe:
    """Everything in which the small models differ."""

    pixels: int
    build_pipeline: Callable[[Sequence[str]], DiffusionPipeline]
    build_transformer: Callable[[], nn.Module]
    save: Callable[[DiffusionPipeline, Path], None]
    training_set: Callable[[ModelFolder, list[Icon], Tensor], TrainingSet]


# ---- what is learnt


def encode_pictures(family: ModelFamily, autoencoder: nn.Module, pixels: Tensor) -> LatentDistribution:
    """Encodes pictures given as uint8, shape (N, 3, H, W)."""
    parts = [family.encode_images(autoencoder, chunk.float() / 127.5 - 1) for chunk in pixels.split(64)]
    return LatentDistribution(torch.cat([p.mean_BCHW for p in parts]), torch.cat([p.std_BCHW for p in parts]))


def caption_features(
    family: ModelFamily, folder: ModelFolder, captions: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Encodes all captions, padded to one length; with a mask where a family pads with nothing."""
    encoder = family.load_text_encoder(folder, Placement(device, torch.float32))
    cut = FLUX_TEXT_TOKENS if family.embedded_guidance else None
    rows = []
    for start in range(0, len(captions), 256):
        rows += family.encode_text(encoder, [Prompt(text) for text in captions[start : start + 256]], cut)
    return pad_to_eight(family.stack_conditioning(rows))


def pad_to_eight(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pads features to a multiple of eight tokens, at which attention with a mask is fastest."""
    if "prompt_embeds_mask" not in features:
        return features
    spare = -features["prompt_embeds"].shape[1] % 8
    return {
        "prompt_embeds": F.pad(features["prompt_embeds"], (0, 0, 0, spare)),
        "prompt_embeds_mask": F.pad(features["prompt_embeds_mask"], (0, spare)),
    }


def text_to_image_set(folder: ModelFolder, icons: list[Icon], pixels: Tensor) -> TrainingSet:
    """Builds the set of drawings with their captions; half of the draws go to variations by `vary_pictures`."""
    family, device = family_of(folder), pixels.device
    real, num_real = weights_by_group(icons, device), len(icons)
    for seed in range(NUM_VARIATIONS):
        varied_icons, varied_pixels = vary(icons[:num_real], pixels[:num_real], seed)
        icons, pixels = icons + varied_icons, torch.cat([pixels, varied_pixels])
    rows = torch.arange(len(icons), device=device)
    captions = [icon.caption for icon in icons] + [family.dropped_caption]
    autoencoder = family.load_autoencoder(folder, Placement(device, torch.float32))
    return TrainingSet(
        latents=encode_pictures(family, autoencoder, pixels),
        features=caption_features(family, folder, captions, device),
        targets_N=rows,
        texts_N=rows,
        dropped_N=torch.full_like(rows, len(icons)),
        controls_N=None,
        cumulative_shares_N=cumulative((0.5, real), (0.5, torch.ones(len(icons) - num_real, device=device))),
    )


def edit_set(folder: ModelFolder, icons: list[Icon], pixels: Tensor) -> TrainingSet:
    """Builds the set of edits: to the other set's drawing of the same thing, to made-up styles, and simple ones."""
    family, device, count = family_of(folder), pixels.device, len(icons)
    number = {(icon.name, icon.style): row for row, icon in enumerate(icons)}
    styles = sorted({icon.style for icon in icons})
    swaps = [
        (row, number[icon.name, style], f"redraw in {style}")
        for row, icon in enumerate(icons)
        for style in styles
        if style != icon.style and (icon.name, style) in number
    ]
    pictures, made_up, edited = [pixels], [], []
    for seed in range(NUM_VARIATIONS):
        named, varied = vary(icons, pixels, seed, freedom=0.25)
        made_up += [(row, len(pictures) * count + row, f"redraw in {icon.style}") for row, icon in enumerate(named)]
        pictures.append(varied)
    for place, (instruction, change) in enumerate(EDITS.items()):
        rows = torch.arange(place, count, len(EDITS), device=device)
        start = sum(map(len, pictures))
        edited += [(row, start + place_in, instruction) for place_in, row in enumerate(rows.tolist())]
        pictures.append(change(pixels[rows]))
    table = [*swaps, *made_up, *edited]
    autoencoder = family.load_autoencoder(folder, Placement(device, torch.float32))
    prompts = [(control, text) for control, _, text in table] + [(row, family.dropped_caption) for row in range(count)]
    ones = torch.ones(len(table), device=device)
    return TrainingSet(
        latents=encode_pictures(family, autoencoder, torch.cat(pictures)),
        features=edit_features(folder, pixels, prompts),
        targets_N=torch.tensor([target for _, target, _ in table], device=device),
        texts_N=torch.arange(len(table), device=device),
        dropped_N=torch.tensor([len(table) + control for control, _, _ in table], device=device),
        controls_N=torch.tensor([control for control, _, _ in table], device=device),
        cumulative_shares_N=cumulative(
            (0.4, ones[: len(swaps)]), (0.4, ones[: len(made_up)]), (0.2, ones[: len(edited)])
        ),
    )


@torch.no_grad()
def edit_features(folder: ModelFolder, pixels: Tensor, prompts: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
    """Encodes (picture, instruction) pairs as `EditReader.encode` does, but prepares each picture once."""
    family, device = family_of(folder), pixels.device
    encoder = family.load_text_encoder(folder, Placement(device, torch.float32))
    (model,), (tokenizer,) = encoder.models, encoder.tokenizers
    reader = EditReader(numbered=False, vision_side=None)

    def prepare(picture_HW3: Tensor) -> Tensor:
        image = Image.fromarray(picture_HW3.numpy())
        return tokenizer.image_processor(images=[image], return_tensors="pt")["pixel_values"].half()

    with ThreadPoolExecutor(8) as pool:
        seen_NPD = torch.stack(list(pool.map(prepare, pixels.permute(0, 2, 3, 1).cpu().unbind()))).to(device)
    side = round(seen_NPD.shape[1] ** 0.5)
    num_features = seen_NPD.shape[1] // tokenizer.image_processor.merge_size**2
    rows, masks = [], []
    ordered = sorted(range(len(prompts)), key=lambda row: len(prompts[row][1]))
    for start in range(0, len(prompts), 128):
        chunk = [prompts[row] for row in ordered[start : start + 128]]
        texts = [reader.template.format(reader.user_part(text, num_pictures=1)) for _, text in chunk]
        tokens = tokenizer.tokens(texts, iter([num_features] * len(chunk)))
        inputs = {name: tensor.to(device) for name, tensor in tokens.items()}
        inputs["pixel_values"] = seen_NPD[[picture for picture, _ in chunk]].float().flatten(0, 1)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(chunk), device=device)
        features_BTD = model(**inputs).last_hidden_state[:, NUM_TEMPLATE_TOKENS:]
        rows += features_BTD.bfloat16().unbind()
        masks += inputs["attention_mask"].bool()[:, NUM_TEMPLATE_TOKENS:].unbind()
    places = torch.empty(len(prompts), dtype=torch.long)
    places[torch.tensor(ordered)] = torch.arange(len(prompts))
    stacked = {
        "prompt_embeds": nn.utils.rnn.pad_sequence(rows, batch_first=True)[places.to(device)],
        "prompt_embeds_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True)[places.to(device)],
    }
    return pad_to_eight(stacked)


RECIPES = {
    "qwen_image": Recipe(
        tiny_qwen_image.PICTURE_PIXELS,
        tiny_qwen_image.build_pipeline,
        tiny_qwen_image.build_transformer,
        tiny_qwen_image.save_pipeline,
        text_to_image_set,
    ),
    "flux": Recipe(
        tiny_qwen_image.PICTURE_PIXELS,
        tiny_flux.build_pipeline,
        tiny_flux.build_transformer,
        tiny_qwen_image.save_pipeline,
        text_to_image_set,
    ),
    "qwen_image_edit": Recipe(
        tiny_qwen_image_edit.PICTURE_PIXELS,
        tiny_qwen_image_edit.build_pipeline,
        tiny_qwen_image_edit.build_transformer,
        tiny_qwen_image_edit.save_edit_pipeline,
        edit_set,
    ),
}


# ---- pictures


def load_pixels(icons: Sequence[Icon], size: int, device: torch.device) -> Tensor:
    """Renders all pictures as uint8, shape (N, 3, H, W), on the device."""
    return torch.from_numpy(render_all(icons, size)).permute(0, 3, 1, 2).contiguous().to(device)


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
    family = family_of(folder)
    data = recipe.training_set(folder, icons, pixels)
    placement = Placement(pixels.device, torch.float32)
    start = load_transformer(family, folder, placement).module if arguments.resume else recipe.build_transformer()
    training = TransformerTraining(family, start.to(pixels.device), data, arguments.batch_size)

    def save(model: nn.Module) -> None:
        stored: Any = copy.deepcopy(model).to(torch.bfloat16)
        stored.save_pretrained(folder.path / "transformer")

    train_transformer(training, arguments.minutes, arguments.rate, save, compiled=not arguments.eager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="the pipeline folder, which the second stage completes")
    parser.add_argument("--stage", choices=("vae", "transformer"), required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="start from the folder's transformer, not from scratch")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks: slower steps, quicker start")
    parser.add_argument("--limit", type=int, help="only about this many pictures, spread over both styles")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 32  # one small function serves all sizes inside the autoencoder
    torch.manual_seed(0)
    icons = read_base_icons()
    captions = [icon.caption for icon in icons]
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
