"""Flow matching in pure tensors: drawing sigmas, adding noise, the target and the weighted loss.

With `sigma` 0 for clean and 1 for noise, the path is `noisy = (1 - sigma) * latents + sigma * noise` and the model
learns its derivative, `velocity = noise - latents` (Lipman et al. 2023, "Flow Matching for Generative Modeling",
section 4.1; the rectified form and the densities of sigma: Esser et al. 2024, "Scaling Rectified Flow Transformers",
sections 2 and 3.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixtune.config.sections import SIGMA_DISTRIBUTIONS, WEIGHTING_SCHEMES


def sigmas_from_uniform(
    distribution: SIGMA_DISTRIBUTIONS,
    uniform_B: Tensor,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Turns uniform numbers into sigmas in [0, 1], before any shift, so that a draw is a function of its key alone.

    Args:
        distribution: "uniform"; "logit_normal" (Esser et al. 2024, eq. 19) with `logit_mean` and `logit_std`;
            "sigmoid", which is that with mean 0 and deviation 1; "mode" (eq. 20) with `mode_scale`.
        uniform_B: numbers in (0, 1), shape (B,).
    """
    if distribution == "uniform":
        return uniform_B
    if distribution == "mode":
        return 1 - uniform_B - mode_scale * (torch.cos(math.pi * uniform_B / 2) ** 2 - 1 + uniform_B)
    normal_B = torch.special.ndtri(uniform_B.double()).to(uniform_B.dtype)
    if distribution == "sigmoid":
        return torch.sigmoid(normal_B)
    if distribution == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * normal_B)
    raise ValueError(f"unknown sigma distribution {distribution!r}")


def shift_sigmas(sigma_B: Tensor, mu: float) -> Tensor:
    """Moves sigmas towards noise as larger pictures need it: `e^mu s / (e^mu s + 1 - s)` (Esser et al. 2024, eq. 23).

    It is the curve of both the exponential and the constant shift of diffusers' `FlowMatchEulerDiscreteScheduler`, with
    `mu` the log of the constant one. 0 leaves sigmas as they are.
    """
    return math.exp(mu) * sigma_B / (math.exp(mu) * sigma_B + (1 - sigma_B))  # grouped so that 1 stays exactly 1


def fit_into_range(sigma_B: Tensor, least: float, most: float) -> Tensor:
    """Maps sigmas from [0, 1] evenly into a range: `least + (most - least) sigma`. The whole range leaves them alone.

    The distribution keeps its form, and is squeezed. A monotonous map of each draw, and not drawing again until one
    falls into the range, keeps a draw a function of its key alone.
    """
    return sigma_B if (least, most) == (0.0, 1.0) else least + (most - least) * sigma_B


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Computes the point at `sigma` on the straight path from latents to noise."""
    sigma_B111 = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma_B111) * latents_BCHW + sigma_B111 * noise_BCHW


def velocity_target(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Computes the velocity that the model is to predict anywhere on that path."""
    return noise_BCHW - latents_BCHW


def loss_weights(scheme: WEIGHTING_SCHEMES, sigma_B: Tensor) -> Tensor:
    """Weighs each example's loss by its sigma, as diffusers' `compute_loss_weighting_for_sd3`; shape (B,)."""
    if scheme == "none":
        return torch.ones_like(sigma_B)
    if scheme == "sigma_sqrt":
        return sigma_B**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    raise ValueError(f"unknown weighting scheme {scheme!r}")


def example_losses(
    velocity_BCHW: Tensor, target_BCHW: Tensor, weights_B1HW: Tensor | None = None, huber_delta: float | None = None
) -> Tensor:
    """Computes the mean loss of each example, in fp32; shape (B,).

    Args:
        weights_B1HW: weights of the latents' positions, of which each example's has a positive sum. The loss is
            `sum(weight * loss) / sum(weight)`, so that examples with small and with large masks weigh the same. None:
            all positions weigh the same.
        huber_delta: see `huber`; None: the squared error.
    """
    losses_BCHW = (velocity_BCHW.float() - target_BCHW.float()).square()
    if huber_delta is not None:
        losses_BCHW = huber(losses_BCHW, huber_delta)
    if weights_B1HW is None:
        return losses_BCHW.flatten(1).mean(1)
    return (losses_BCHW.mean(1, keepdim=True) * weights_B1HW).flatten(1).sum(1) / weights_B1HW.flatten(1).sum(1)


def huber(squares: Tensor, delta: float) -> Tensor:
    """Computes the pseudo-Huber loss from squared errors: `2 delta^2 (sqrt(1 + (error / delta)^2) - 1)`.

    It is the squared error where errors are far below `delta`, and `2 delta |error|` far above (Hartley and Zisserman
    2004, "Multiple View Geometry", section A6.8; for diffusion models: Khrapov et al. 2024, "Improving Diffusion
    Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"). The same is computed in a form that
    subtracts no nearly equal numbers.
    """
    return 2 * squares / (1 + (1 + squares / delta**2).sqrt())
