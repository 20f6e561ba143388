"""Trains the autoencoders of the small models for a number of minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
    QwenImageUpsample,
)
from tiny_training import build_optimizers, captured, schedule
from torch import Tensor, nn

KL_WEIGHT = 2e-4


def single_frame_convolution(self: QwenImageCausalConv3d, frames: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Computes the causal 3D convolution of one frame in 2D: its earlier time slices see only padding."""
    padding = (self._padding[2], self._padding[0])
    return F.conv2d(frames[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)


def normalize(x: Tensor, gamma: Tensor) -> Tensor:
    """Scales channels to a root mean square of `gamma`; the compiler makes it one kernel."""
    return (x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12) * gamma).to(x.dtype)


@contextmanager
def fast_autoencoder(on_gpu: bool) -> Iterator[None]:
    """Swaps the autoencoder's parts for equal ones that are fast on single pictures."""
    function = torch.compile(normalize, dynamic=False) if on_gpu else normalize
    with (
        patch.object(QwenImageCausalConv3d, "forward", single_frame_convolution),
        patch.object(QwenImageRMS_norm, "forward", lambda self, x: function(x, self.gamma)),
        patch.object(QwenImageUpsample, "forward", nn.Upsample.forward),  # nearest neighbours need no fp32
    ):
        yield


def draw_augmented(pixels_N3HW: Tensor, batch_size: int) -> Tensor:
    """Draws pictures in [-1, 1], mirrored, shifted round the edges, a third in other colours. Never waits for the GPU.

    The changes make other drawings fit the autoencoder as well.
    """
    device, size = pixels_N3HW.device, pixels_N3HW.shape[-1]

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(batch_size, *shape, device=device) < share

    index = torch.arange(size, device=device)
    rows = torch.randint(len(pixels_N3HW), (batch_size, 1, 1, 1), device=device)
    down, across = torch.randint(-24, 25, (2, batch_size, 1), device=device)
    y = ((index + down) % size).view(batch_size, 1, size, 1)
    x = torch.where(chance(0.5, 1), index, size - 1 - index)
    x = ((x + across) % size).view(batch_size, 1, 1, size)
    plain = torch.arange(3, device=device).expand(batch_size, 3)
    channels = torch.where(chance(0.35, 1), torch.rand(batch_size, 3, device=device).argsort(1), plain)
    drawn = pixels_N3HW[rows, channels.view(batch_size, 3, 1, 1), y, x].float() / 127.5 - 1
    drawn = torch.where(chance(0.1, 1, 1, 1), -drawn, drawn)
    return drawn.contiguous(memory_format=torch.channels_last)


def edge_error(a: Tensor, b: Tensor) -> Tensor:
    """Computes the mean error of differences between neighbouring pixels."""
    difference = a - b
    return difference.diff(dim=-2).abs().mean() + difference.diff(dim=-1).abs().mean()


Moments = tuple[Tensor, Tensor]


def film_moments(vae: AutoencoderKLQwenImage, pixels_B3HW: Tensor) -> Moments:
    """Computes mean and log-variance with Qwen's autoencoder, whose pictures are films of one frame."""
    return vae.quant_conv(vae.encoder(pixels_B3HW.unsqueeze(2)))[:, :, 0].float().chunk(2, dim=1)


def film_pixels(vae: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(latents_BCHW.unsqueeze(2)))[:, :, 0]


def picture_moments(vae: AutoencoderKL, pixels_B3HW: Tensor) -> Moments:
    """Computes mean and log-variance with FLUX's autoencoder."""
    return vae.encoder(pixels_B3HW).float().chunk(2, dim=1)


def picture_pixels(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    return vae.decoder(latents_BCHW)


class AutoencoderTraining:
    """One training step of the autoencoder, without a wait for the GPU. `pixels` are uint8, shape (N, 3, H, W)."""

    def __init__(self, vae: AutoencoderKLQwenImage | AutoencoderKL, pixels: Tensor, batch_size: int) -> None:
        film = isinstance(vae, AutoencoderKLQwenImage)
        self.moments, self.rebuild = (film_moments, film_pixels) if film else (picture_moments, picture_pixels)
        self.vae, self.pixels, self.batch_size = vae.to(pixels.device).train().requires_grad_(True), pixels, batch_size
        self.on_gpu = pixels.device.type == "cuda"
        self.rate = torch.zeros((), device=pixels.device)
        self.squared_error = torch.ones((), device=pixels.device)
        self.parameters = list(vae.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        inner = [vae.encoder.down_blocks, vae.encoder.mid_block, vae.decoder.mid_block, vae.decoder.up_blocks]
        matrices = [
            p for part in inner for name, p in part.named_parameters() if name.endswith("weight") and p.ndim > 1
        ]
        self.optimizers = build_optimizers(self.parameters, matrices, self.rate)

    def step(self) -> None:
        """Takes a step on the errors of pixels and edges, and a weak pull of the latents to a unit Gaussian."""
        pixels = draw_augmented(self.pixels, self.batch_size)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False):
            mean, log_variance = self.moments(self.vae, pixels)
            log_variance = log_variance.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            rebuilt = self.rebuild(self.vae, latents).float()
        error = rebuilt - pixels
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edge_error(rebuilt, pixels) + KL_WEIGHT * divergence
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        self.squared_error.lerp_((rebuilt.detach().clamp(-1, 1) - pixels).square().mean(), 0.01)


def train_autoencoder(training: AutoencoderTraining, minutes: float, peak: float) -> None:
    """Trains for the given time."""

    def log(step: int, fraction: float) -> None:
        psnr = 10 * math.log10(4 / float(training.squared_error))
        print(f"vae step {step}, {fraction:.0%} of the time, {psnr:.2f} dB", flush=True)

    with fast_autoencoder(training.on_gpu):
        step = captured(training.step) if training.on_gpu else training.step
        for rate in schedule(minutes, peak, 200, log):
            training.rate.fill_(rate)
            step()
    training.vae.eval().requires_grad_(False)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLQwenImage | AutoencoderKL, pixels: Tensor) -> None:
    """Writes the latents' mean and deviation over the pictures into the config: by channel, or one for all (FLUX)."""
    film = isinstance(vae, AutoencoderKLQwenImage)
    means, variances = [], []
    for chunk in pixels.split(64):
        mean, log_variance = (film_moments if film else picture_moments)(vae, chunk.float() / 127.5 - 1)
        means.append(mean)
        variances.append(log_variance.exp().mean((2, 3)))
    latents = torch.cat(means)
    own_variance = torch.cat(variances).mean(0)
    if film:
        deviation = (latents.var((0, 2, 3)) + own_variance).sqrt()
        vae.register_to_config(
            latents_mean=[round(x, 4) for x in latents.mean((0, 2, 3)).tolist()],
            latents_std=[round(x, 4) for x in deviation.tolist()],
        )
    else:
        deviation = (latents.var() + own_variance.mean()).sqrt()
        vae.register_to_config(
            shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(deviation), 4)
        )
    print(f"latents: {float((own_variance.sqrt() / deviation).mean()):.3f} of their deviation is the posterior's own")
