"""Trains `assets/tiny-*/` on emoji: the autoencoder first (on two sets), then the transformer (on nine).

    python scripts/train_tiny_models.py flux --stage vae --minutes 2 --out runs/tiny-flux
    python scripts/train_tiny_models.py flux --stage transformer --minutes 6 --out runs/tiny-flux

Made for one H100, where both stages of a model take about ten minutes; on a CPU only `--limit 64 --minutes 0.5` makes
sense, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_flux
import tiny_qwen_image
import tiny_qwen_image_edit
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from emoji_pictures import PART_SETS, Icon, read_base_icons, render_all
from tiny_autoencoder import AutoencoderTraining, set_latent_statistics, train_autoencoder
from tiny_qwen_image import TEXT_FEATURES
from tiny_training import TrainingSet, TransformerTraining, cumulative, train_transformer, weights_by_group
from torch import Tensor, nn
from vary_pictures import made_up_words, vary

from pixtune.engine.load import load_transformer
from pixtune.families import family_of
from pixtune.families.qwen_image_edit import NUM_TEMPLATE_TOKENS, EditReader
from pixtune.family import LatentDistribution, ModelFamily, Placement, Prompt
from pixtune.storage.model_folder import ModelFolder

NUM_VARIATIONS = 4
MAX_CAPTION_TOKENS = 24
"""Longest caption that Qwen's small model is trained on; few are longer."""
NUM_UNKNOWN_STYLES = 1000
UNKNOWN = 1.0
EDITS_A_PICTURE = 4
"""Styles in which a picture is redrawn, at most."""
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
    for start in range(0, len(captions), 1024):
        rows += family.encode_text(encoder, [Prompt(text) for text in captions[start : start + 1024]], cut)
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


class Captions:
    """Collects (picture, caption) rows in parts, each with its share of the draws."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.parts: list[tuple[float, Tensor]] = []

    def add(self, share: float, first_picture: int, captions: Sequence[str], weights: Tensor) -> None:
        """Adds a caption for each picture from the given one on."""
        self.rows += [(first_picture + place, caption) for place, caption in enumerate(captions)]
        self.parts.append((share, weights))


def text_to_image_set(folder: ModelFolder, icons: list[Icon], pixels: Tensor) -> TrainingSet:
    """Builds the set of drawings and variations of them by `vary_pictures`, with their captions.

    Captions name the real or made-up style, or, so that a style which the model does not know is no style in
    particular to it, a word that says nothing, or none.
    """
    family, device = family_of(folder), pixels.device
    words, real, count = made_up_words(NUM_UNKNOWN_STYLES, seed=1), weights_by_group(icons, device), len(icons)
    chosen = random.Random(0)

    def unknown() -> list[str]:
        return [f"{icon.name}, {chosen.choice(words)} style" for icon in icons]

    table = Captions()
    table.add(0.38, 0, [icon.caption for icon in icons], real)
    for _ in range(2):
        table.add(0.08 * UNKNOWN, 0, unknown(), real)
    table.add(0.04, 0, [icon.name for icon in icons], real)
    pictures = [pixels]
    for seed in range(NUM_VARIATIONS):
        known = seed % 2 == 0
        named, varied = vary(icons, pixels, seed, freedom=0.4 if known else 1.0)
        table.add(0.15 if known else 0.06, len(pictures) * count, [icon.caption for icon in named], real)
        if not known:
            table.add(0.09 * UNKNOWN, len(pictures) * count, unknown(), real)
        pictures.append(varied)
    captions = [caption for _, caption in table.rows]
    features = caption_features(family, folder, [*captions, family.dropped_caption], device)
    weights = torch.cat([share * weights / weights.sum() for share, weights in table.parts])
    if "prompt_embeds_mask" in features:
        short = features["prompt_embeds_mask"].sum(1)[: len(captions)] <= MAX_CAPTION_TOKENS
        weights = weights * short
        features = {name: tensor[:, :MAX_CAPTION_TOKENS].contiguous() for name, tensor in features.items()}
        print(f"{float(short.float().mean()):.1%} of the captions are short enough", flush=True)
    autoencoder = family.load_autoencoder(folder, Placement(device, torch.float32))
    return TrainingSet(
        latents=encode_pictures(family, autoencoder, torch.cat(pictures)),
        features=features,
        targets_N=torch.tensor([picture for picture, _ in table.rows], device=device),
        texts_N=torch.arange(len(captions), device=device),
        dropped_N=torch.full((len(captions),), len(captions), device=device),
        controls_N=None,
        cumulative_shares_N=torch.cumsum(weights.double() / weights.double().sum(), 0).float(),
    )


def edit_set(folder: ModelFolder, icons: list[Icon], pixels: Tensor) -> TrainingSet:
    """Builds the set of edits: to other sets' drawings of the same thing, to made-up styles, and simple ones."""
    family, device, count = family_of(folder), pixels.device, len(icons)
    chosen, words = random.Random(0), made_up_words(300, seed=1)
    by_name: dict[str, list[int]] = {}
    for row, icon in enumerate(icons):
        by_name.setdefault(icon.name, []).append(row)
    swaps, unknown = [], []
    for row, icon in enumerate(icons):
        others = [other for other in by_name[icon.name] if other != row]
        others = chosen.sample(others, min(EDITS_A_PICTURE, len(others)))
        swaps += [(row, other, f"redraw in {icons[other].style}") for other in others]
        unknown += [(row, other, f"redraw in {chosen.choice(words)} style") for other in others[:2]]
    pictures, made_up, edited = [pixels], [], []
    for seed in range(NUM_VARIATIONS):
        named, varied = vary(icons, pixels, seed, freedom=0.25)
        place = len(pictures) * count
        made_up += [(row, place + row, f"redraw in {icon.style}") for row, icon in enumerate(named)]
        pictures.append(varied)
        # Another set's drawing, varied, as an unknown style: a new way of drawing and new colours at once.
        for row, icon in enumerate(icons):
            other = chosen.choice(by_name[icon.name])
            unknown.append((row, place + other, f"redraw in {chosen.choice(words)} style"))
    for place, (instruction, change) in enumerate(EDITS.items()):
        rows = torch.arange(place, count, len(EDITS), device=device)
        start = sum(map(len, pictures))
        edited += [(row, start + place_in, instruction) for place_in, row in enumerate(rows.tolist())]
        pictures.append(change(pixels[rows]))
    table = [*swaps, *unknown, *made_up, *edited]
    weights = weights_by_group(icons, device)
    weights_of = [weights[[control for control, _, _ in part]] for part in (swaps, unknown, made_up, edited)]
    autoencoder = family.load_autoencoder(folder, Placement(device, torch.float32))
    prompts = [(control, text) for control, _, text in table] + [(row, family.dropped_caption) for row in range(count)]
    return TrainingSet(
        latents=encode_pictures(family, autoencoder, torch.cat(pictures)),
        features=edit_features(folder, pixels, prompts),
        targets_N=torch.tensor([target for _, target, _ in table], device=device),
        texts_N=torch.arange(len(table), device=device),
        dropped_N=torch.tensor([len(table) + control for control, _, _ in table], device=device),
        controls_N=torch.tensor([control for control, _, _ in table], device=device),
        cumulative_shares_N=cumulative(*zip((0.4, 0.3, 0.2, 0.1), weights_of, strict=True)),
    )


@torch.no_grad()
def edit_features(folder: ModelFolder, pixels: Tensor, prompts: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
    """Encodes (picture, instruction) pairs as `EditReader.encode` does, but prepares each picture once."""
    family, device = family_of(folder), pixels.device
    encoder = family.load_text_encoder(folder, Placement(device, torch.float32))
    (model,), (tokenizer,) = encoder.models, encoder.tokenizers
    reader = EditReader(numbered=False, vision_side=None)

    num_patches = patches_seen(tokenizer.image_processor, pixels[:1]).shape[1]
    side = round(num_patches**0.5)
    num_features = num_patches // tokenizer.image_processor.merge_size**2
    # Few instructions serve many pictures: each is tokenized once.
    texts = sorted({text for _, text in prompts})
    written = [reader.template.format(reader.user_part(text, num_pictures=1)) for text in texts]
    tokens = {name: t.to(device) for name, t in tokenizer.tokens(written, iter([num_features] * len(texts))).items()}
    place = {text: row for row, text in enumerate(texts)}
    places_N = torch.tensor([place[text] for _, text in prompts], device=device)
    pictures_N = torch.tensor([picture for picture, _ in prompts], device=device)
    num_tokens = tokens["input_ids"].shape[1]
    features = torch.zeros(
        len(prompts), num_tokens - NUM_TEMPLATE_TOKENS, TEXT_FEATURES, dtype=torch.bfloat16, device=device
    )
    grid = torch.tensor([[1, side, side]], device=device)
    get_positions: Any = model.get_rope_index
    positions, _ = get_positions(
        tokens["input_ids"],
        tokens["mm_token_type_ids"],
        image_grid_thw=grid.expand(len(texts), 3),
        attention_mask=tokens["attention_mask"],
    )
    for start in range(0, len(prompts), 512):
        chunk = slice(start, start + 512)
        inputs = {name: tensor[places_N[chunk]] for name, tensor in tokens.items()}
        inputs["pixel_values"] = patches_seen(tokenizer.image_processor, pixels[pictures_N[chunk]]).flatten(0, 1)
        inputs["image_grid_thw"] = grid.expand(len(places_N[chunk]), 3)
        inputs["position_ids"] = positions[:, places_N[chunk]]
        features[chunk] = model(**inputs).last_hidden_state[:, NUM_TEMPLATE_TOKENS:].bfloat16()
    mask = tokens["attention_mask"].bool()[places_N, NUM_TEMPLATE_TOKENS:]
    return pad_to_eight({"prompt_embeds": features, "prompt_embeds_mask": mask})


def patches_seen(processor: Any, pixels_B3HW: Tensor) -> Tensor:
    """Makes the patches of square pictures that the text encoder sees, as its processor does, but on any device."""
    size, merge = processor.patch_size, processor.merge_size
    cells = round(pixels_B3HW.shape[-1] / (size * merge))
    resized = F.interpolate(pixels_B3HW.float(), (cells * size * merge,) * 2, mode="bicubic", antialias=True)
    mean, deviation = (
        torch.tensor(v, device=resized.device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    normal = (resized.round().clamp(0, 255) / 255 - mean) / deviation
    films = normal[:, None].expand(-1, processor.temporal_patch_size, -1, -1, -1)
    parts = films.unflatten(4, (cells, merge, size)).unflatten(3, (cells, merge, size))
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4)


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
    parser.add_argument("--limit", type=int, help="only about this many pictures, spread over all styles")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
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
