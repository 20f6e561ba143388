"""Samples pictures from a transformer, in Euler steps along the same `predict_velocity` that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation_ahead import announce, max_announced
from pixtune.engine.tiling import decode_latents
from pixtune.family import Conditioning, ModelFamily, Placement
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    from PIL.Image import Image


def starting_noise(shape_CHW: tuple[int, int, int], seed: int) -> Tensor:
    """Draws the same noise as the stock pipelines with `torch.Generator("cpu").manual_seed(seed)`; shape 1CHW."""
    channels, height, width = shape_CHW
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, channels, height, width, generator=generator)[:, 0]


@torch.no_grad()
def sample_latents(
    family: ModelFamily,
    folder: ModelFolder,
    transformer: LoadedTransformer,
    noise_BCHW: Tensor,
    positive: Conditioning,
    negative: Conditioning | None,
    num_steps: int,
    guidance_scale: float,
    controls: Sequence[Tensor] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Integrates the velocity from noise to normalized latents; shape BCHW.

    Args:
        positive, negative: stacked conditioning on the noise's device. Without `negative` a step is one pass, and
            `guidance_scale` goes to models that take it as an input.
        controls: latents of control pictures on the noise's device, each of shape BCHW.
        on_step: called after each step.
    """
    latents_BCHW = noise_BCHW
    num_tokens = family.num_image_tokens(*noise_BCHW.shape[-2:])
    sigmas = family.sigma_schedule(folder, num_steps, num_tokens)
    stretch = max_announced(transformer) // (len(latents_BCHW) * (1 if negative is None else 2))
    for number, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        if number % stretch == 0:
            _announce(family, transformer, sigmas[number:-1][:stretch], positive, negative, guidance_scale)
        sigma_B = torch.full((len(latents_BCHW),), sigma, device=latents_BCHW.device)
        velocity_BCHW = family.predict_velocity(
            transformer.module, latents_BCHW, sigma_B, positive, controls, guidance_scale
        )
        if negative is not None:
            unconditional_BCHW = family.predict_velocity(transformer.module, latents_BCHW, sigma_B, negative, controls)
            velocity_BCHW = family.guide(velocity_BCHW, unconditional_BCHW, guidance_scale)
        latents_BCHW = latents_BCHW + (next_sigma - sigma) * velocity_BCHW.float()
        on_step()
    return latents_BCHW


def _announce(
    family: ModelFamily,
    transformer: LoadedTransformer,
    sigmas: Sequence[float],
    positive: Conditioning,
    negative: Conditioning | None,
    guidance_scale: float,
) -> None:
    """Announces the passes of the next steps: each sigma with each row of both conditionings."""
    conditionings = [positive] if negative is None else [positive, negative]
    features = {name: torch.cat([c[name] for c in conditionings]) for name in family.time_features}
    text = next(iter(positive.values()))
    num_rows = len(text) * len(conditionings)
    sigma_N = torch.tensor(sigmas, device=text.device).repeat_interleave(num_rows)
    repeated = {name: tensor.repeat(len(sigmas), *[1] * (tensor.ndim - 1)) for name, tensor in features.items()}
    announce(transformer, family, sigma_N, repeated, guidance_scale)


def to_image(pixels_3HW: Tensor) -> Image:
    """Converts pixels in [-1, 1] to an 8-bit RGB picture."""
    from PIL import Image

    levels = ((pixels_3HW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its features, on the CPU."""

    text: str
    positive: Conditioning
    negative: Conditioning | None
    """Features of the empty prompt; None where guidance needs no second pass."""
    controls: tuple[Tensor, ...]
    """Latents of its control pictures, each of shape 1CHW."""
    size: Size
    """Size of the picture, (width, height) in pixels."""
    control_paths: tuple[Path, ...] = ()


def needs_negative(family: ModelFamily, guidance_scale: float) -> bool:
    """Returns whether each step takes a second pass, with the empty prompt."""
    return guidance_scale > 1 and not family.embedded_guidance


@dataclass(frozen=True)
class PromptPicture:
    """One sampled picture."""

    prompt: EncodedPrompt
    seed: int
    image: Image


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler."""

    seeds: tuple[int, ...]
    num_steps: int
    guidance_scale: float


class PromptSampler:
    """Samples pictures of encoded prompts.

    The autoencoder is loaded at first use.

    Args:
        keep_autoencoder: it stays on the device between pictures, and does not wait on the CPU.
        tile_pixels: side of the tiles in which pictures are decoded; None: they are decoded whole.
    """

    def __init__(
        self,
        family: ModelFamily,
        folder: ModelFolder,
        prompts: Sequence[EncodedPrompt],
        settings: SamplerSettings,
        placement: Placement,
        keep_autoencoder: bool,
        tile_pixels: int | None = None,
    ) -> None:
        self.family, self.folder, self.prompts, self.settings = family, folder, prompts, settings
        self.placement, self.keep_autoencoder, self.tile_pixels = placement, keep_autoencoder, tile_pixels
        self._autoencoder: nn.Module | None = None

    def sample(self, transformer: LoadedTransformer) -> Iterator[PromptPicture]:
        """Yields one picture for each prompt and seed."""
        for prompt, seed, latents_BCHW in self.latents(transformer):
            yield PromptPicture(prompt, seed, self.decode(latents_BCHW))

    def latents(self, transformer: LoadedTransformer) -> Iterator[tuple[EncodedPrompt, int, Tensor]]:
        """Yields each prompt with each seed and the latents of their picture, shape 1CHW, on the device."""
        settings, device = self.settings, self.placement.device
        for prompt in self.prompts:
            shape_CHW = self.family.latent_shape(self.folder, *prompt.size)
            for seed in settings.seeds:
                latents_BCHW = sample_latents(
                    self.family,
                    self.folder,
                    transformer,
                    starting_noise(shape_CHW, seed).to(device),
                    self._on_device(prompt.positive),
                    self._on_device(prompt.negative) if prompt.negative else None,
                    settings.num_steps,
                    settings.guidance_scale,
                    [control.to(device) for control in prompt.controls],
                )
                yield prompt, seed, latents_BCHW

    def decode(self, latents_BCHW: Tensor) -> Image:
        """Decodes the picture of one prompt and seed, from latents of shape 1CHW."""
        if self._autoencoder is None:
            self._autoencoder = self.family.load_autoencoder(self.folder, self.placement)
        self._autoencoder.to(self.placement.device)
        latents_BCHW = latents_BCHW.to(self.placement.device)
        pixels_B3HW = decode_latents(self.family, self.folder, self._autoencoder, latents_BCHW, self.tile_pixels)
        if not self.keep_autoencoder:
            self._autoencoder.to("cpu")
        return to_image(pixels_B3HW[0])

    def _on_device(self, row: Conditioning) -> Conditioning:
        return self.family.stack_conditioning([{name: t.to(self.placement.device) for name, t in row.items()}])
