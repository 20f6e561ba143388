"""Measures the loss on held-out pictures with fixed noise and sigmas, so that two figures differ only by the weights.

The sigma range is cut into quarters, since a LoRA may gain where pictures are nearly noise (composition, style) and not
where they are nearly clean (texture); the mean over all sigmas hides that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation_ahead import announce
from pixtune.family import Conditioning, ModelFamily
from pixtune.objective import add_noise, example_losses, velocity_target

NUM_QUARTERS = 4
PASSES_PER_STEP = 3
"""Forward passes of an example that take as long as a training step of it, backward pass included."""
AUTO_TIME, AUTO_MULTIPLE = 0.05, 50
"""Share of the steps' time that measuring may add where the config leaves its pace open; what that is rounded to."""


def pace_of(num_pictures: int, num_draws: int, examples_per_step: int) -> int:
    """Returns the number of steps between two validations, at least 100, that keeps them below `AUTO_TIME`."""
    passes = num_pictures * NUM_QUARTERS * num_draws
    steps = passes / PASSES_PER_STEP / examples_per_step / AUTO_TIME
    return max(100, -(-int(steps) // AUTO_MULTIPLE) * AUTO_MULTIPLE)


@dataclass(frozen=True)
class HeldOutPicture:
    """One picture that is held out from training and measured."""

    name: str
    latents_1CHW: Tensor
    """Mean of the autoencoder's distribution, on the CPU."""
    conditioning: Conditioning
    """Text features of one example, on the CPU."""
    controls: tuple[Tensor, ...] = ()
    """Latents of its control pictures, each of shape 1CHW, on the CPU."""
    weights_11HW: Tensor | None = None
    """Weights of its latents' positions, as in training, on the CPU; None: all weigh the same."""


@dataclass(frozen=True)
class ValidationLoss:
    """Mean squared error of the velocity."""

    mean: float
    quarters: tuple[float, ...]
    """Means over each quarter of the sigma range: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]."""
    culprits: tuple[str, ...] = ()
    """Names of pictures whose loss is no number, where others have one."""


@torch.no_grad()
def losses_at(
    family: ModelFamily,
    transformer: LoadedTransformer,
    picture: HeldOutPicture,
    sigmas: Sequence[float],
    seed: int,
    device: torch.device,
    guidance: float,
    batch_size: int | None = None,
    after_pass: Callable[[], None] = lambda: None,
    texts: Sequence[Conditioning] | None = None,
) -> Tensor:
    """Measures one picture's loss at each sigma, shape (len(sigmas),). The noise depends on seed, name and sigma alone.

    Args:
        batch_size: number of sigmas in one forward pass; None: all.
        after_pass: called after each forward pass; may raise to end the measurement.
        texts: text features for each sigma; None: the picture's own.
    """
    velocity_BCHW, target_BCHW = velocities_at(
        family, transformer, picture, sigmas, seed, device, guidance, batch_size, after_pass, texts
    )
    weights = picture.weights_11HW
    weights_B1HW = None if weights is None else weights.to(device).expand(len(sigmas), -1, -1, -1)
    return example_losses(velocity_BCHW, target_BCHW, weights_B1HW)


@torch.no_grad()
def velocities_at(
    family: ModelFamily,
    transformer: LoadedTransformer,
    picture: HeldOutPicture,
    sigmas: Sequence[float],
    seed: int,
    device: torch.device,
    guidance: float,
    batch_size: int | None = None,
    after_pass: Callable[[], None] = lambda: None,
    texts: Sequence[Conditioning] | None = None,
) -> tuple[Tensor, Tensor]:
    """Predicts one picture's velocity at each sigma, and returns it with its target. Arguments as for `losses_at`."""
    sigma_B = torch.tensor(sigmas, device=device)
    shape = picture.latents_1CHW.shape
    noise = [randomness.normal(shape, seed, "validation noise", picture.name, str(sigma)) for sigma in sigmas]
    noise_BCHW = torch.cat(noise).to(device)
    latents_BCHW = picture.latents_1CHW.to(device).expand_as(noise_BCHW)
    rows = [
        {name: tensor.to(device) for name, tensor in text.items()}
        for text in ([picture.conditioning] if texts is None else texts)
    ]
    conditioning = family.stack_conditioning(rows * len(sigmas) if texts is None else rows)
    noisy_BCHW = add_noise(latents_BCHW, noise_BCHW, sigma_B)
    announce(transformer, family, sigma_B, conditioning, guidance)
    velocities = []
    for places in torch.arange(len(sigmas)).split(batch_size or len(sigmas)):
        part = slice(int(places[0]), int(places[-1]) + 1)
        text = {name: tensor[part] for name, tensor in conditioning.items()}
        controls = [control.to(device).expand(len(places), -1, -1, -1) for control in picture.controls]
        velocities.append(
            family.predict_velocity(transformer.module, noisy_BCHW[part], sigma_B[part], text, controls, guidance)
        )
        after_pass()
    return torch.cat(velocities), velocity_target(latents_BCHW, noise_BCHW)


def measure(
    family: ModelFamily,
    transformer: LoadedTransformer,
    pictures: Sequence[HeldOutPicture],
    num_draws: int,
    seed: int,
    device: torch.device,
    guidance: float,
    batch_size: int | None = None,
    after_pass: Callable[[], None] = lambda: None,
) -> ValidationLoss:
    """Measures the held-out loss at sigmas that are spread evenly over (0, 1).

    Draws depend on the seed and the picture's name alone, never on the training step.

    Args:
        num_draws: number of sigmas in each quarter.
        batch_size: number of examples in one forward pass, so that measuring needs no more memory than training; None:
            all of a picture.
        after_pass: see `losses_at`.
    """
    count = NUM_QUARTERS * num_draws
    sigmas = [(index + 0.5) / count for index in range(count)]
    losses = [
        losses_at(family, transformer, picture, sigmas, seed, device, guidance, batch_size, after_pass)
        for picture in pictures
    ]
    per_sigma = torch.stack(losses).double().mean(0).view(NUM_QUARTERS, num_draws)
    spoiled = [picture.name for picture, loss in zip(pictures, losses, strict=True) if not loss.isfinite().all()]
    culprits = tuple(spoiled) if len(spoiled) < len(pictures) else ()
    return ValidationLoss(float(per_sigma.mean()), tuple(per_sigma.mean(1).tolist()), culprits)
