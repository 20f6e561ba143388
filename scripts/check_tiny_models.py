"""Measures the small models in `assets/`: what does a demo's LoRA teach them?

    python scripts/check_tiny_models.py qwen_image      # after `make demo`; also: flux, qwen_image_edit
    python scripts/check_tiny_models.py flux --lora runs/other/pytorch_lora_weights.safetensors

Prints, before and after the LoRA and for each seed: how often the nearest of the 48 held-out pictures is the right one,
by pixels and by latents; how often the nearest drawing of the same thing in all sets is the demo's, and how often a
classifier says so; for edits the shift of the drawing; the loss on held-out pictures and on pictures in a style of the
base. Writes a sheet of the pictures.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from demo_edit import CONTROL_SET
from demo_sticker import INSTRUCTION
from demo_style import STYLE_SET, demo_names
from emoji_pictures import BASE_SETS, ICON_SETS, read_icons, read_named_icons
from PIL import Image
from safetensors.torch import load_file
from style_classifier import StyleClassifier
from tiny_sets import FLUX_TEXT_TOKENS, encode_pictures, load_pixels, pad_to_eight
from torch import Tensor, nn
from train_tiny_models import as_pictures

from pixtune.engine.load import load_transformer
from pixtune.families import family_of
from pixtune.family import Conditioning, LatentDistribution, Placement, Prompt
from pixtune.objective import add_noise, example_losses, velocity_target
from pixtune.storage.model_folder import open_model_folder

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2, 3)
NUM_SIGMAS = 8
"""Number of fixed sigmas at which a held-out picture is judged."""
MAX_SHIFT_PIXELS = 6


@dataclass(frozen=True)
class Demo:
    """What a demo trains on: `assets/NAME`, its pictures' size, and how its samples are drawn."""

    model: str
    run: str
    data: str
    pixels: int
    guidance: float

    @property
    def edits(self) -> bool:
        return self.data == "demo-sticker"


DEMOS = {
    "qwen_image": Demo("tiny-qwen-image", "demo", "demo-style", 128, 3.5),
    "flux": Demo("tiny-flux", "demo-flux", "demo-style", 128, 3.5),
    "qwen_image_edit": Demo("tiny-qwen-image-edit", "demo-edit", "demo-sticker", 256, 2.0),
}
BASE_STYLE = {"demo-style": "noto", "demo-sticker": "fluent"}
"""A set that the base knows: its loss shows whether a LoRA leaves other styles alone."""


@dataclass(frozen=True)
class Examples:
    """Pictures with what the model is given for them, on one device."""

    pixels: Tensor
    """uint8, shape (N, 3, H, W)."""
    latents: LatentDistribution
    conditioning: Conditioning
    controls: Tensor | None
    """Latents of the control pictures, or None."""
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, index: Tensor) -> tuple[Tensor, Conditioning, list[Tensor]]:
        """Returns latents' means, conditioning and controls of the given rows."""
        controls = [] if self.controls is None else [self.controls[index]]
        return self.latents.mean_BCHW[index], {name: t[index] for name, t in self.conditioning.items()}, controls


class SmallModel:
    """All parts of a model folder on one device, in fp32."""

    def __init__(self, path: Path, device: torch.device) -> None:
        placement = Placement(device, torch.float32)
        self.device, self.folder = device, open_model_folder(str(path))
        self.family = family_of(self.folder)
        self.encoder = self.family.load_text_encoder(self.folder, placement)
        self.autoencoder = self.family.load_autoencoder(self.folder, placement)
        self.transformer = load_transformer(self.family, self.folder, placement).module

    def conditioning(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encodes prompts, padded to one length."""
        cut = FLUX_TEXT_TOKENS if self.family.embedded_guidance else None
        with torch.no_grad():
            stacked = self.family.stack_conditioning(self.family.encode_text(self.encoder, prompts, cut))
        if not self.family.embedded_guidance:
            stacked.setdefault("prompt_embeds_mask", torch.ones_like(stacked["prompt_embeds"][..., 0]).bool())
        return pad_to_eight(dict(stacked))

    def examples(self, captions: Sequence[str], pixels: Tensor, controls: Tensor | None = None) -> Examples:
        """Encodes pictures given as uint8, shape (N, 3, H, W), with their captions and control pictures."""
        pixels = pixels.to(self.device)
        seen: Sequence[tuple[Image.Image, ...]] = [()] * len(captions)
        if controls is not None:
            seen = [(Image.fromarray(p.permute(1, 2, 0).cpu().numpy()),) for p in controls]
        prompts = tuple(Prompt(text, pictures) for text, pictures in zip(captions, seen, strict=True))
        return Examples(
            pixels,
            encode_pictures(self.family, self.autoencoder, pixels),
            self.conditioning(prompts),
            None
            if controls is None
            else encode_pictures(self.family, self.autoencoder, controls.to(self.device)).mean_BCHW,
            prompts,
        )

    @torch.no_grad()
    def sample(self, examples: Examples, seed: int, guidance: float, num_steps: int = 20) -> Tensor:
        """Draws a picture for each example's prompt by Euler steps; uint8, shape (N, 3, H, W)."""
        height, width = examples.pixels.shape[-2:]
        channels, *size = self.family.latent_shape(self.folder, width, height)
        sigmas = self.family.sigma_schedule(self.folder, num_steps, self.family.num_image_tokens(*size))
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(len(examples), channels, *size, generator=generator).to(self.device)
        _, conditioning, controls = examples.rows(torch.arange(len(examples), device=self.device))
        embedded = self.family.embedded_guidance
        plain, as_input = guidance == 1 or embedded, guidance if embedded else 1.0
        dropped = [Prompt(self.family.dropped_caption, prompt.pictures) for prompt in examples.prompts]
        unconditional = None if plain else self.conditioning(dropped)
        for sigma, next_sigma in pairwise(sigmas):
            sigma_B = torch.full((len(latents),), sigma, device=self.device)
            velocity = self.family.predict_velocity(
                self.transformer, latents, sigma_B, conditioning, controls, as_input
            ).float()
            if unconditional is not None:
                other = self.family.predict_velocity(self.transformer, latents, sigma_B, unconditional, controls)
                velocity = self.family.guide(velocity, other.float(), guidance)
            latents = latents + (next_sigma - sigma) * velocity
        return as_pictures(self.family.decode_latents(self.autoencoder, latents))

    @torch.no_grad()
    def loss(self, examples: Examples) -> float:
        """Computes the mean loss with fixed noise at fixed sigmas."""
        latents, conditioning, controls = examples.rows(torch.arange(len(examples), device=self.device))
        generator = torch.Generator().manual_seed(1)
        losses = []
        for number in range(NUM_SIGMAS):
            sigma_B = torch.full((len(latents),), (number + 0.5) / NUM_SIGMAS, device=self.device)
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            noisy = add_noise(latents, noise, sigma_B)
            velocity = self.family.predict_velocity(self.transformer, noisy, sigma_B, conditioning, controls)
            losses.append(float(example_losses(velocity, velocity_target(latents, noise)).mean()))
        return statistics.fmean(losses)


# ---- the demo's pictures


def read_png(path: Path) -> Tensor:
    """Reads a picture as uint8, shape (3, H, W)."""
    return torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def demo_examples(model: SmallModel, demo: Demo, part: str, names: Sequence[str]) -> Examples:
    """Reads the demo's "train" or "held_out" pictures of the given names."""
    folder = ROOT / "assets" / demo.data / part
    stems = [name.replace(" ", "-") for name in names]
    if not demo.edits:
        pixels = torch.stack([read_png(folder / f"{stem}.png") for stem in stems])
        return model.examples([(folder / f"{stem}.txt").read_text().strip() for stem in stems], pixels)
    targets, controls = (
        torch.stack([read_png(folder / kind / f"{stem}.png") for stem in stems]) for kind in ("images", "control")
    )
    return model.examples([INSTRUCTION] * len(names), targets, controls)


def base_examples(model: SmallModel, demo: Demo, names: Sequence[str]) -> Examples:
    """Renders pictures of a style that the base knows, as it learnt them."""
    style = BASE_STYLE[demo.data]
    pixels = load_pixels(read_named_icons(style, names), demo.pixels, model.device)
    if not demo.edits:
        return model.examples([icon.caption for icon in read_named_icons(style, names)], pixels)
    controls = load_pixels(read_named_icons(CONTROL_SET, names), demo.pixels, model.device)
    return model.examples([f"redraw in {ICON_SETS[style].style}"] * len(names), pixels, controls)


# ---- figures


def nearest_rows(queries: Tensor, references: Tensor) -> Tensor:
    """Finds for each row of numbers the reference with the least squared distance."""
    flat, others = queries.flatten(1).float(), references.flatten(1).float()
    return torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def retrieval(queries: Tensor, references: Tensor) -> float:
    """Computes the share of rows whose nearest reference is the one of the same number."""
    nearest = nearest_rows(queries, references)
    return float((nearest == torch.arange(len(queries), device=nearest.device)).float().mean())


def drift(pictures: Tensor, references: Tensor) -> float:
    """Computes the median over pictures of the shift, in pixels, at which grey levels fit the reference best."""
    edge = MAX_SHIFT_PIXELS
    grey, wanted = pictures.float().mean(1), references.float().mean(1)[:, edge:-edge, edge:-edge]
    shifts = [(down, across) for down in range(-edge, edge + 1) for across in range(-edge, edge + 1)]
    errors = torch.stack(
        [(grey.roll(shift, (1, 2))[:, edge:-edge, edge:-edge] - wanted).square().sum((1, 2)) for shift in shifts]
    )
    return statistics.median((down**2 + across**2) ** 0.5 for down, across in (shifts[i] for i in errors.argmin(0)))


class Styles:
    """The demo's drawings of the held-out names and those of all sets, to tell in whose style a picture is."""

    def __init__(self, names: Sequence[str], demos: Tensor, size: int) -> None:
        self.drawings: list[Tensor] = [demos[number : number + 1] for number in range(len(names))]
        for set_name in BASE_SETS:
            icons = {icon.name: icon for icon in read_icons(set_name)}
            there = [number for number, name in enumerate(names) if name in icons]
            pixels = load_pixels([icons[names[number]] for number in there], size, demos.device)
            for number, drawing in zip(there, pixels, strict=True):
                self.drawings[number] = torch.cat([self.drawings[number], drawing[None]])

    def share_of_the_demos(self, pictures: Tensor) -> float:
        """Computes the share of pictures whose nearest drawing of the same thing is the demo's."""
        found = [int(nearest_rows(p[None], drawings)) == 0 for p, drawings in zip(pictures, self.drawings, strict=True)]
        return statistics.fmean(found)


@dataclass(frozen=True)
class Figures:
    """What is measured of one state of a model; lists have a value for each seed."""

    by_pixels: list[float]
    by_latents: list[float]
    style: list[float]
    called_style: list[float]
    """By `StyleClassifier`; empty for edits, whose style is none of the sets'."""
    drift_pixels: list[float]
    held_out_loss: float
    base_loss: float

    def __str__(self) -> str:
        def percent(values: Sequence[float]) -> str:
            return f"{statistics.fmean(values):.0%} ({', '.join(f'{v:.0%}' for v in values)})"

        called = f", by a classifier {percent(self.called_style)}" if self.called_style else ""
        shift = f", shift {statistics.fmean(self.drift_pixels):.2f} pixels" if self.drift_pixels else ""
        return (
            f"right one nearest by pixels {percent(self.by_pixels)}, by latents {percent(self.by_latents)}; "
            f"the demo's style {percent(self.style)}{called}{shift}; "
            f"loss held out {self.held_out_loss:.4f}, base style {self.base_loss:.4f}"
        )


def measure(
    model: SmallModel,
    demo: Demo,
    held_out: Examples,
    base: Examples,
    styles: Styles,
    classifier: StyleClassifier | None,
) -> tuple[Figures, Tensor]:
    """Measures a model as it is; also returns the first seed's pictures."""
    pictures = [model.sample(held_out, seed, demo.guidance) for seed in SEEDS]
    latents = [encode_pictures(model.family, model.autoencoder, p).mean_BCHW for p in pictures]
    figures = Figures(
        by_pixels=[retrieval(p, held_out.pixels) for p in pictures],
        by_latents=[retrieval(x, held_out.latents.mean_BCHW) for x in latents],
        style=[styles.share_of_the_demos(p) for p in pictures],
        called_style=[statistics.fmean(name == STYLE_SET for name in classifier.sets(p)) for p in pictures]
        if classifier
        else [],
        drift_pixels=[drift(p, held_out.pixels) for p in pictures] if demo.edits else [],
        held_out_loss=model.loss(held_out),
        base_loss=model.loss(base),
    )
    return figures, pictures[0]


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Lays rows of pictures out under each other."""
    lines = [torch.cat(list(row.cpu()), 2) for row in rows if len(row)]
    return Image.fromarray(numpy.ascontiguousarray(torch.cat(lines, 1).permute(1, 2, 0).numpy()))


def load_lora(transformer: nn.Module, path: Path) -> None:
    """Adds a LoRA file's weights as a stock pipeline does."""
    adapters: Any = transformer
    adapters.load_lora_adapter(load_file(path), prefix="transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("--model", type=Path, help="another model folder than the shipped one")
    parser.add_argument("--lora", type=Path, help="another LoRA than the demo's")
    parser.add_argument("--out", type=Path, default=Path("runs/check"), help="folder for the sheet of pictures")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.demo]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SmallModel(arguments.model or ROOT / "assets" / demo.model, device)
    names = demo_names()[1]
    held_out, base = demo_examples(model, demo, "held_out", names), base_examples(model, demo, names)
    styles = Styles(names, held_out.pixels, demo.pixels)
    classifier = None if demo.edits else StyleClassifier(device)
    if classifier:
        every, own = classifier.accuracy(names)
        print(f"classifier of styles: {every:.0%} of real held-out drawings told rightly, {own:.0%} of the demo's")
    before, drawn_before = measure(model, demo, held_out, base, styles, classifier)
    print(f"before: {before}", flush=True)
    rows = [drawn_before]
    lora = arguments.lora or ROOT / "runs" / demo.run / "pytorch_lora_weights.safetensors"
    if lora.exists():
        load_lora(model.transformer, lora)
        after, drawn_after = measure(model, demo, held_out, base, styles, classifier)
        print(f"after:  {after}")
        print(
            f"loss: held out {after.held_out_loss / before.held_out_loss - 1:+.1%}, "
            f"base style {after.base_loss / before.base_loss - 1:+.1%}"
        )
        rows.append(drawn_after)
    arguments.out.mkdir(parents=True, exist_ok=True)
    blocks = [slice(start, start + 16) for start in range(0, len(names), 16)]
    sheet([row[block] for block in blocks for row in (*rows, held_out.pixels)]).save(
        arguments.out / f"{arguments.demo}.png"
    )


if __name__ == "__main__":
    main()
