"""Measures `assets/tiny-qwen-image/`: does it know its pictures, and is there a new style left to learn?

python scripts/check_tiny_qwen_image.py recall        # the nearest training picture of 200 samples
python scripts/check_tiny_qwen_image.py pictures      # the autoencoder's PSNR, and a sheet of samples
python scripts/check_tiny_qwen_image.py styles        # a LoRA on base-style pictures and one on the new style
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from demo_style import STYLE_SET, demo_names
from emoji_pictures import BASE_SETS, Icon, read_base_icons, read_named_icons
from PIL import Image
from torch import Tensor, nn
from train_tiny_models import as_pictures, encode_pictures, load_pixels, psnr, rebuild

from pixtune.engine.load import load_transformer
from pixtune.families.qwen_image import QWEN_IMAGE, QwenImage
from pixtune.family import Conditioning, Placement, Prompt, TextEncoder
from pixtune.objective import add_noise, example_losses, velocity_target
from pixtune.storage.model_folder import ModelFolder, open_model_folder

MODEL_DIR = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen-image"
NUM_CAPTIONS = 200
PICTURE_PIXELS = 128
NUM_SIGMAS = 8
"""Number of fixed sigmas at which a held-out picture is judged."""


# ---- encoding and sampling


def encode_captions(family: QwenImage, encoder: TextEncoder, captions: Sequence[str]) -> Conditioning:
    """Encodes all captions, padded to one length, always with a mask."""
    rows = [
        row
        for start in range(0, len(captions), 256)
        for row in family.encode_text(encoder, [Prompt(text) for text in captions[start : start + 256]])
    ]
    stacked = family.stack_conditioning(rows)
    stacked.setdefault("prompt_embeds_mask", torch.ones_like(stacked["prompt_embeds"][..., 0], dtype=torch.bool))
    return stacked


@torch.no_grad()
def sample_latents(
    family: QwenImage,
    transformer: nn.Module,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise_BCHW: Tensor,
    sigmas: Sequence[float],
    guidance: float,
) -> Tensor:
    """Takes Euler steps from noise along `sigmas`, as the stock pipeline does."""
    latents = noise_BCHW
    for sigma, next_sigma in pairwise(sigmas):
        sigma_B = torch.full((len(latents),), sigma, device=latents.device)
        velocity = family.predict_velocity(transformer, latents, sigma_B, conditioning).float()
        if guidance != 1:
            other = family.predict_velocity(transformer, latents, sigma_B, unconditional).float()
            velocity = family.guide(velocity, other, guidance)
        latents = latents + (next_sigma - sigma) * velocity
    return latents


class TinyModel:
    """All parts of a model folder on one device, in fp32."""

    def __init__(self, path: Path, device: torch.device) -> None:
        placement = Placement(device, torch.float32)
        self.family, self.device = QWEN_IMAGE, device
        self.folder: ModelFolder = open_model_folder(str(path))
        self.encoder = self.family.load_text_encoder(self.folder, placement)
        self.autoencoder = self.family.load_autoencoder(self.folder, placement)
        self.transformer = load_transformer(self.family, self.folder, placement).module

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        return encode_captions(self.family, self.encoder, captions)

    def pixels(self, icons: Sequence[Icon]) -> Tensor:
        return load_pixels(icons, PICTURE_PIXELS, self.device)

    @torch.no_grad()
    def sample(self, captions: Sequence[str], num_steps: int, guidance: float, seed: int = 0) -> Tensor:
        """Samples a picture for each caption; uint8, shape (N, 3, H, W)."""
        channels, *size = self.family.latent_shape(self.folder, PICTURE_PIXELS, PICTURE_PIXELS)
        tokens = self.family.num_image_tokens(*size)
        sigmas = self.family.sigma_schedule(self.folder, num_steps, tokens)
        generator = torch.Generator().manual_seed(seed)
        pictures = []
        for start in range(0, len(captions), 50):
            part = captions[start : start + 50]
            noise = torch.randn(len(part), channels, *size, generator=generator).to(self.device)
            latents = sample_latents(
                self.family,
                self.transformer,
                self.conditioning(part),
                self.conditioning([self.family.dropped_caption] * len(part)),
                noise,
                sigmas,
                guidance,
            )
            pictures.append(self.family.decode_latents(self.autoencoder, latents))
        return as_pictures(torch.cat(pictures))


# ---- recall


def nearest_rows(queries: Tensor, references: Tensor) -> Tensor:
    """Finds for each picture the row of the reference with the least squared pixel distance."""
    flat_queries = queries.flatten(1).float() / 255
    distances = []
    for chunk in references.split(512):
        flat = chunk.flatten(1).float() / 255
        distances.append(flat.square().sum(1) - 2 * flat_queries @ flat.T)
    return torch.cat(distances, 1).argmin(1)


def check_recall(model: TinyModel, num_steps: int, guidance: float) -> float:
    """Measures the share of captions whose sample is nearest to the right training picture, variants grouped."""
    icons = read_base_icons()
    references = model.pixels(icons)
    chosen = random.Random(0).sample(icons, NUM_CAPTIONS)
    samples = model.sample([icon.caption for icon in chosen], num_steps, guidance)
    nearest = [icons[row] for row in nearest_rows(samples, references).tolist()]
    hits = sum(found.group == wanted.group for found, wanted in zip(nearest, chosen, strict=True))
    exact = sum(found.caption == wanted.caption for found, wanted in zip(nearest, chosen, strict=True))
    print(
        f"recall: {hits / NUM_CAPTIONS:.1%} of {NUM_CAPTIONS} captions find the right picture among {len(icons)} "
        f"(exact variant {exact / NUM_CAPTIONS:.1%}), {num_steps} steps, guidance {guidance}",
        flush=True,
    )
    misses = [(w.caption, f.caption) for f, w in zip(nearest, chosen, strict=True) if f.group != w.group]
    for wanted, found in misses[:10]:
        print(f"  {wanted} -> {found}")
    return hits / NUM_CAPTIONS


# ---- pictures


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Joins rows of pictures to one image."""
    lines = [torch.cat(list(row.cpu()), 2) for row in rows]
    return Image.fromarray(numpy.ascontiguousarray(torch.cat(lines, 1).permute(1, 2, 0).numpy()))


def check_pictures(model: TinyModel, num_steps: int, guidance: float, out: Path) -> None:
    """Measures the autoencoder's PSNR on base and on new pictures; writes a sheet: real, rebuilt, sampled."""
    base = random.Random(1).sample(read_base_icons(), NUM_CAPTIONS)
    pixels = model.pixels(base)
    rebuilt = rebuild(model.family, model.autoencoder, pixels)
    print(f"autoencoder: {psnr(rebuilt, pixels):.2f} dB on {len(base)} training pictures")
    new = read_named_icons(STYLE_SET, demo_names()[1])
    new_pixels = model.pixels(new)
    new_rebuilt = rebuild(model.family, model.autoencoder, new_pixels)
    print(f"autoencoder: {psnr(new_rebuilt, new_pixels):.2f} dB on {len(new)} pictures of the style it never saw")
    samples = model.sample([icon.caption for icon in base[:16]], num_steps, guidance)
    new_samples = model.sample([icon.caption for icon in new[:16]], num_steps, guidance)
    rows = [pixels[:16], rebuilt[:16], samples, new_pixels[:16], new_rebuilt[:16], new_samples]
    out.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(out / "pictures.png")


# ---- styles


class Pictures:
    """Latents and conditioning of a few drawings."""

    def __init__(self, model: TinyModel, icons: Sequence[Icon]) -> None:
        self.latents = encode_pictures(model.family, model.autoencoder, model.pixels(icons))
        self.conditioning = model.conditioning([icon.caption for icon in icons])

    def rows(self, index_B: Tensor) -> Conditioning:
        return {name: tensor[index_B] for name, tensor in self.conditioning.items()}


@torch.no_grad()
def held_out_loss(model: TinyModel, transformer: nn.Module, pictures: Pictures) -> float:
    """Computes the mean loss with fixed noise at fixed sigmas."""
    latents = pictures.latents.mean_BCHW
    generator = torch.Generator().manual_seed(1)
    losses = []
    index = torch.arange(len(latents))
    for i in range(NUM_SIGMAS):
        sigma_B = torch.full((len(latents),), (i + 0.5) / NUM_SIGMAS, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = add_noise(latents, noise, sigma_B)
        velocity = model.family.predict_velocity(transformer, noisy, sigma_B, pictures.rows(index))
        losses.append(example_losses(velocity, velocity_target(latents, noise)).mean())
    return float(torch.stack(losses).mean())


def train_lora(model: TinyModel, pictures: Pictures, arguments: argparse.Namespace) -> nn.Module:
    """Trains a LoRA on the attention's projections, and returns the adapted transformer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=list(arguments.targets.split(",")))
    base = load_transformer(model.family, model.folder, Placement(model.device, torch.float32)).module
    adapted = get_peft_model(base, config).base_model.model
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    count, size = len(pictures.latents.mean_BCHW), arguments.batch_size
    for step in range(arguments.steps):
        index = torch.randperm(count, generator=generator)[:size]
        latents = pictures.latents.mean_BCHW[index]
        latents = latents + pictures.latents.std_BCHW[index] * torch.randn_like(latents)
        noise = torch.randn_like(latents)
        sigma_B = torch.rand(size, generator=generator).to(model.device)
        velocity = model.family.predict_velocity(
            adapted, add_noise(latents, noise, sigma_B), sigma_B, pictures.rows(index)
        )
        example_losses(velocity, velocity_target(latents, noise)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        warm, cooling = min(1, (step + 1) / 20), 0.5 + 0.5 * math.cos(math.pi * step / arguments.steps)
        optimizer.param_groups[0]["lr"] = arguments.rate * warm * cooling
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def check_styles(model: TinyModel, arguments: argparse.Namespace) -> None:
    """Trains a LoRA on known pictures and one on the new style, and judges both on held-out names of the new style."""
    train_names, held_out_names = demo_names()
    held_out = Pictures(model, read_named_icons(STYLE_SET, held_out_names))
    known = [
        icon for i, base in enumerate(BASE_SETS) for icon in read_named_icons(base, train_names[i :: len(BASE_SETS)])
    ]
    before = held_out_loss(model, model.transformer, held_out)
    sheets = []
    shown = read_named_icons(STYLE_SET, held_out_names[::3])
    captions = [icon.caption for icon in shown]
    sheets.append(model.sample(captions, arguments.sample_steps, arguments.guidance))
    plain = model.transformer
    for title, icons in (("base-style", known), ("new-style", read_named_icons(STYLE_SET, train_names))):
        start = time.monotonic()
        adapted = train_lora(model, Pictures(model, icons), arguments)
        seconds = time.monotonic() - start
        after = held_out_loss(model, adapted, held_out)
        print(
            f"{arguments.steps} steps on {len(icons)} {title} pictures: held-out loss {before:.4f} -> {after:.4f} "
            f"({after / before - 1:+.1%}) in {seconds:.0f} s, rate {arguments.rate:g}, batch {arguments.batch_size}",
            flush=True,
        )
        model.transformer = adapted
        sheets.append(model.sample(captions, arguments.sample_steps, arguments.guidance))
        model.transformer = plain
    arguments.out.mkdir(parents=True, exist_ok=True)
    sheet([*sheets, model.pixels(shown)]).save(arguments.out / "styles.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("recall", "pictures", "styles"))
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=Path("runs/check"), help="folder for picture sheets")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=400, help="LoRA steps")
    parser.add_argument("--rate", type=float, default=2e-3, help="LoRA learning rate")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="to_q,to_k,to_v,to_out.0")
    arguments = parser.parse_args()
    model = TinyModel(arguments.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.check == "recall":
        check_recall(model, arguments.sample_steps, arguments.guidance)
    elif arguments.check == "pictures":
        check_pictures(model, arguments.sample_steps, arguments.guidance, arguments.out)
    else:
        check_styles(model, arguments)


if __name__ == "__main__":
    main()
