"""Samples pictures from a transformer, in Euler steps along the same `predict_velocity` that training uses."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixtune.engine.capture import Capture, GraphCapturer, ReplayedPass, drop_workspaces
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation_ahead import SigmasAhead
from pixtune.engine.relief import drop_frames, first_line, free_bytes, free_unused, lacks_memory
from pixtune.engine.tiling import decode_latents
from pixtune.family import Conditioning, ModelFamily, Placement
from pixtune.plan.passes import PLAIN_PASSES, PassPlan
from pixtune.plan.text_padding import LEAST_MULTIPLE
from pixtune.sizes import Size
from pixtune.storage.files import write_atomically
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def starting_noise(shape_CHW: tuple[int, int, int], seed: int) -> Tensor:
    """Draws the same noise as the stock pipelines with `torch.Generator("cpu").manual_seed(seed)`; shape 1CHW."""
    channels, height, width = shape_CHW
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, channels, height, width, generator=generator)[:, 0]


@dataclass(frozen=True)
class PassInputs:
    """Inputs of one pass of the transformer: everything of it that changes from pass to pass."""

    latents_BCHW: Tensor
    sigma_B: Tensor
    conditioning: Conditioning
    controls: tuple[Tensor, ...]

    @property
    def shapes(self) -> Hashable:
        conditioning = tuple((name, tensor.shape) for name, tensor in self.conditioning.items())
        return self.latents_BCHW.shape, conditioning, tuple(control.shape for control in self.controls)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.latents_BCHW, self.sigma_B, *self.conditioning.values(), *self.controls

    def map(self, change: Callable[[Tensor], Tensor]) -> PassInputs:
        conditioning = {name: change(tensor) for name, tensor in self.conditioning.items()}
        controls = tuple(change(control) for control in self.controls)
        return PassInputs(change(self.latents_BCHW), change(self.sigma_B), conditioning, controls)


Predict = Callable[[PassInputs], Tensor]
"""Function from a pass's inputs to its velocity, which is valid until the next call."""


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
    predict: Predict | None = None,
    together: bool = False,
) -> Tensor:
    """Integrates the velocity from noise to normalized latents; shape BCHW.

    Args:
        positive, negative: stacked conditioning on the noise's device. Without `negative` a step is one pass, and
            `guidance_scale` goes to models that take it as an input.
        controls: latents of control pictures on the noise's device, each of shape BCHW.
        on_step: called after each step.
        predict: computes a pass; None: the transformer as it is.
        together: guidance's two passes are one batch, whose rows are stacked in `positive`, the negative ones last.
    """
    predict = predict or partial(predict_velocity, family, transformer, guidance_scale)
    latents_BCHW = noise_BCHW
    num_tokens = family.num_image_tokens(*noise_BCHW.shape[-2:])
    sigmas = family.sigma_schedule(folder, num_steps, num_tokens)
    copies = 2 if together else 1
    controls = tuple(torch.cat([control] * copies) for control in controls)
    ahead = SigmasAhead(transformer, family, sigmas[:-1], positive, guidance_scale, noise_BCHW.device)
    for number, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        ahead.reach(number)
        sigma_B = torch.full((copies * len(latents_BCHW),), sigma, device=latents_BCHW.device)
        inputs = PassInputs(torch.cat([latents_BCHW] * copies), sigma_B, positive, controls)
        velocity_BCHW = predict(inputs)
        if together:
            conditional_BCHW, unconditional_BCHW = velocity_BCHW.chunk(2)
            velocity_BCHW = family.guide(conditional_BCHW, unconditional_BCHW, guidance_scale)
        elif negative is not None:
            conditional_BCHW = velocity_BCHW.clone()  # captured passes write to the same memory
            unconditional_BCHW = predict(replace(inputs, conditioning=negative))
            velocity_BCHW = family.guide(conditional_BCHW, unconditional_BCHW, guidance_scale)
        latents_BCHW = latents_BCHW + (next_sigma - sigma) * velocity_BCHW.float()
        on_step()
    return latents_BCHW


def predict_velocity(
    family: ModelFamily, transformer: LoadedTransformer, guidance_scale: float, inputs: PassInputs
) -> Tensor:
    """Computes a pass of the transformer."""
    return family.predict_velocity(
        transformer.module,
        inputs.latents_BCHW,
        inputs.sigma_B,
        inputs.conditioning,
        inputs.controls,
        guidance_scale,
    )


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
    negative_text: str | None = None
    """Text of the negative prompt; None: the model's own empty one."""
    seeds: tuple[int, ...] = ()
    """Seeds of the starting noise; empty: those of the sampler's settings."""


@dataclass(frozen=True)
class PromptPicture:
    """One sampled picture."""

    prompt: EncodedPrompt
    seed: int
    image: Image
    strength: float = 1.0
    """Strength of the LoRA."""

    def write(self, path: Path) -> None:
        """Writes the picture as a PNG, whole or not at all.

        Raises:
            WriteError: it could not be written.
        """
        stream = io.BytesIO()
        self.image.save(stream, "png")
        write_atomically(path, stream.getvalue())


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler."""

    seeds: tuple[int, ...]
    num_steps: int
    guidance_scale: float


class PromptSampler:
    """Samples pictures of encoded prompts.

    The autoencoder is loaded at first use. Passes are captured anew each time that pictures are sampled, and nothing of
    them stays: between those times the memory belongs to others.

    Args:
        keep_autoencoder: it stays on the device between pictures, and does not wait on the CPU.
        tile_pixels: side of the tiles in which pictures are decoded; None: they are decoded whole.
        passes: how the transformer's passes run.
        build_capture: makes the function that captures a transformer's passes.
        is_wanted: returns whether a prompt's text is sampled with a seed.
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
        passes: PassPlan = PLAIN_PASSES,
        build_capture: Callable[[LoadedTransformer], Capture] = lambda transformer: GraphCapturer(transformer.stream),
        is_wanted: Callable[[str, int], bool] = lambda text, seed: True,
    ) -> None:
        self.family, self.folder, self.prompts, self.settings = family, folder, prompts, settings
        self.placement, self.keep_autoencoder, self.tile_pixels = placement, keep_autoencoder, tile_pixels
        self.passes, self._build_capture, self._is_wanted = passes, build_capture, is_wanted
        self._autoencoder: nn.Module | None = None
        self._captured: ReplayedPass[PassInputs] | None = None
        """Passes of the pictures that are being sampled."""

    @property
    def num_pictures(self) -> int:
        """Number of pictures that it samples."""
        return sum(self._is_wanted(prompt.text, seed) for prompt in self.prompts for seed in self._seeds_of(prompt))

    def _seeds_of(self, prompt: EncodedPrompt) -> tuple[int, ...]:
        return prompt.seeds or self.settings.seeds

    @property
    def sizes_vary(self) -> bool:
        """Whether passes have several shapes."""
        shapes = {
            (prompt.size, *((name, tensor.shape) for name, tensor in text.items()), *(c.shape for c in prompt.controls))
            for prompt in self.prompts
            for text in self._text_of_passes(prompt)
        }
        return len(shapes) > 1

    def sample(
        self, transformer: LoadedTransformer, on_step: Callable[[], None] = lambda: None
    ) -> Iterator[PromptPicture]:
        """Yields one picture for each prompt and seed.

        Args:
            on_step: called after each sampler step; may raise to end the work.
        """
        for prompt, seed, latents_BCHW in self.latents(transformer, on_step):
            yield PromptPicture(prompt, seed, self.decode(latents_BCHW))

    def latents(
        self, transformer: LoadedTransformer, on_step: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[EncodedPrompt, int, Tensor]]:
        """Yields each prompt with each seed and the latents of their picture, shape 1CHW, on the device.

        Args:
            on_step: called after each sampler step.
        """
        try:
            for prompt in self.prompts:
                for seed in filter(partial(self._is_wanted, prompt.text), self._seeds_of(prompt)):
                    yield prompt, seed, self._sample_in_memory(transformer, prompt, seed, on_step)
        finally:
            self._release()

    def _sample_in_memory(
        self, transformer: LoadedTransformer, prompt: EncodedPrompt, seed: int, on_step: Callable[[], None]
    ) -> Tensor:
        """Samples one picture's latents; where memory is short, once more in a leaner way."""
        while True:
            try:
                return self._sample_latents(transformer, prompt, seed, on_step)
            except RuntimeError as error:  # out of memory is one, too
                if not lacks_memory(error) or self.passes.leaner is None:
                    raise
                obstacle, leaner = first_line(error), self.passes.leaner
                drop_frames(error)
            words = ", ".join(leaner.in_words) or "each pass by itself, kernel by kernel"
            log.warning("samples lack memory (%s) and go on in another way: %s", obstacle, words)
            self.passes = leaner
            self._release()
            free_unused()

    def _sample_latents(
        self, transformer: LoadedTransformer, prompt: EncodedPrompt, seed: int, on_step: Callable[[], None]
    ) -> Tensor:
        settings, device = self.settings, self.placement.device
        predict: Predict = partial(predict_velocity, self.family, transformer, settings.guidance_scale)
        if self.passes.captures and self._captured is None:
            self._captured = ReplayedPass(
                predict, (), self._build_capture(transformer), self.passes.captures,
                partial(free_bytes, self.passes.usable_bytes),
            )  # fmt: skip
        shape_CHW = self.family.latent_shape(self.folder, *prompt.size)
        positive, *negative = (_to(device, text) for text in self._text_of_passes(prompt))
        return sample_latents(
            self.family,
            self.folder,
            transformer,
            starting_noise(shape_CHW, seed).to(device),
            positive,
            negative[0] if negative else None,
            settings.num_steps,
            settings.guidance_scale,
            [control.to(device) for control in prompt.controls],
            on_step,
            self._captured or predict,
            together=prompt.negative is not None and self.passes.together,
        )

    def _release(self) -> None:
        """Gives back the memory of captures, their workspaces included."""
        if self._captured is None:
            return
        self._captured.release()
        self._captured = None
        drop_workspaces()
        free_unused()

    def decode(self, latents_BCHW: Tensor) -> Image:
        """Decodes the picture of one prompt and seed, from latents of shape 1CHW."""
        if self._captured is not None and not self.passes.captures_stay:
            self._captured.release()
        if self._autoencoder is None:
            self._autoencoder = self.family.load_autoencoder(self.folder, self.placement)
        try:
            self._autoencoder.to(self.placement.device)
            latents_BCHW = latents_BCHW.to(self.placement.device)
            pixels_B3HW = decode_latents(self.family, self.folder, self._autoencoder, latents_BCHW, self.tile_pixels)
        finally:
            if not self.keep_autoencoder:
                self._autoencoder.to("cpu")
        if self._captured is not None:
            torch.cuda.empty_cache()  # for passes that are not captured yet
        return to_image(pixels_B3HW[0])

    def _text_of_passes(self, prompt: EncodedPrompt) -> list[Conditioning]:
        """Returns the stacked conditioning of each pass of a step, on the CPU."""
        rows = [prompt.positive] if prompt.negative is None else [prompt.positive, prompt.negative]
        if len(rows) > 1 and self.passes.together:
            return [self.family.stack_conditioning(rows, LEAST_MULTIPLE)]
        return [self.family.stack_conditioning([row]) for row in rows]


def _to(device: torch.device, text: Conditioning) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in text.items()}
