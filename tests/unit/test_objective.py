"""The objective is diffusers': its densities of sigma, loss weights, shifts and noising, number for number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from pixtune.objective import (
    add_noise,
    example_losses,
    fit_into_range,
    huber,
    loss_weights,
    shift_sigmas,
    sigmas_from_uniform,
    velocity_target,
)

UNIFORM = torch.linspace(0.001, 0.999, 999)


def diffusers_density(monkeypatch: pytest.MonkeyPatch, scheme: str, **settings: float) -> Tensor:
    """diffusers' numbers, when its generator returns `UNIFORM`, or the normal numbers at those quantiles."""
    normal = torch.distributions.Normal(torch.zeros(1, dtype=torch.float64), 1.0).icdf(UNIFORM.double()).float()

    def fake_normal(*, mean: float, std: float, **_: Any) -> Tensor:
        return mean + std * normal

    with monkeypatch.context() as patched:
        patched.setattr(torch, "rand", lambda **_: UNIFORM.clone())
        patched.setattr(torch, "normal", fake_normal)
        return compute_density_for_timestep_sampling(scheme, len(UNIFORM), **settings)


@pytest.mark.parametrize("scale", [1.29, 0.5, -0.7])
def test_mode_is_diffusers(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    expected = diffusers_density(monkeypatch, "mode", mode_scale=scale)
    assert torch.equal(sigmas_from_uniform("mode", UNIFORM, mode_scale=scale), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.3), (0.8, 0.4)])
def test_logit_normal_is_diffusers(monkeypatch: pytest.MonkeyPatch, mean: float, std: float) -> None:
    expected = diffusers_density(monkeypatch, "logit_normal", logit_mean=mean, logit_std=std)
    given = sigmas_from_uniform("logit_normal", UNIFORM, logit_mean=mean, logit_std=std)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
    assert given[499].item() == pytest.approx(1 / (1 + math.exp(-mean)))  # the median


def test_uniform_and_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(sigmas_from_uniform("uniform", UNIFORM), diffusers_density(monkeypatch, "none"))
    expected = sigmas_from_uniform("logit_normal", UNIFORM, logit_mean=0.0, logit_std=1.0)
    assert torch.equal(sigmas_from_uniform("sigmoid", UNIFORM, logit_mean=3.0, logit_std=9.0), expected)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "sigmoid", "mode"])
def test_sigmas_stay_in_the_unit_interval_to_its_ends(distribution: Any) -> None:
    """A draw of almost 1 is exactly 1 in fp32."""
    ends = torch.tensor([2.0**-54, 1e-9, 0.5, 1 - 2**-24, 1.0])
    sigma_B = sigmas_from_uniform(distribution, ends)
    assert ((sigma_B >= 0) & (sigma_B <= 1)).all() and sigma_B[2].item() == pytest.approx(0.5)
    shifted = shift_sigmas(sigma_B, 1.15)
    assert ((shifted >= 0) & (shifted <= 1)).all()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'beta'"):
        sigmas_from_uniform("beta", UNIFORM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'min_snr'"):
        loss_weights("min_snr", UNIFORM)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_diffusers(scheme: Any) -> None:
    assert torch.equal(loss_weights(scheme, UNIFORM), compute_loss_weighting_for_sd3(scheme, UNIFORM))


# ---- shift


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.15, -0.4])
def test_shift_is_the_schedulers_exponential_shift(mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=UNIFORM.flip(0).tolist(), mu=mu)
    torch.testing.assert_close(shift_sigmas(UNIFORM.flip(0), mu), scheduler.sigmas[:-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.7])
def test_its_logarithm_is_the_schedulers_constant_shift(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=UNIFORM.flip(0).tolist())
    expected = scheduler.sigmas[:-1]
    torch.testing.assert_close(shift_sigmas(UNIFORM.flip(0), math.log(shift)), expected, rtol=1e-6, atol=1e-7)


def test_no_shift_leaves_sigmas_as_they_are_and_ends_stay() -> None:
    torch.testing.assert_close(shift_sigmas(UNIFORM, 0.0), UNIFORM, rtol=1e-6, atol=0)
    assert torch.equal(shift_sigmas(torch.tensor([0.0, 1.0]), 1.0), torch.tensor([0.0, 1.0]))
    assert (shift_sigmas(UNIFORM, 0.5) > UNIFORM).all(), "towards noise"


# ---- the path


def test_noising_is_the_schedulers() -> None:
    latents_BCHW, noise_BCHW = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.125])
    expected = scheduler.scale_noise(latents_BCHW, scheduler.timesteps, noise_BCHW)
    given = add_noise(latents_BCHW, noise_BCHW, scheduler.sigmas[:-1])
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_the_target_is_the_paths_derivative() -> None:
    latents_BCHW, noise_BCHW = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    derivative = torch.func.jvp(
        lambda sigma_B: add_noise(latents_BCHW, noise_BCHW, sigma_B),
        (torch.tensor([0.2, 0.7]).double(),),
        (torch.ones(2).double(),),
    )[1]
    torch.testing.assert_close(velocity_target(latents_BCHW, noise_BCHW), derivative)
    assert torch.equal(add_noise(latents_BCHW, noise_BCHW, torch.zeros(2)), latents_BCHW)
    assert torch.equal(add_noise(latents_BCHW, noise_BCHW, torch.ones(2)), noise_BCHW)


def test_an_euler_step_along_the_target_reaches_the_latents() -> None:
    """So the sign is the one that the sampler follows."""
    latents_BCHW, noise_BCHW = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    target = velocity_target(latents_BCHW, noise_BCHW)
    reached = scheduler.step(target, scheduler.timesteps[0], noise_BCHW).prev_sample
    torch.testing.assert_close(reached, latents_BCHW, rtol=1e-5, atol=1e-6)


def test_losses_are_per_sample_means_in_fp32() -> None:
    target_BCHW = torch.zeros(2, 3, 4, 5)
    velocity_BCHW = torch.stack([torch.full((3, 4, 5), 2.0), torch.zeros(3, 4, 5)]).bfloat16()
    velocity_BCHW[1, 0] = 3.0
    losses = example_losses(velocity_BCHW, target_BCHW.bfloat16())
    assert losses.dtype == torch.float32 and losses.tolist() == [4.0, 3.0]
    fine = torch.full((1, 1, 64, 64), 1.0078125).bfloat16()  # its square is no bf16 number
    assert example_losses(fine, torch.zeros_like(fine)).item() == pytest.approx(1.0078125**2, rel=1e-6)


def test_a_masked_loss_by_hand() -> None:
    """Two channels of 1x3 positions. Errors are 1, 2, 3 and 1, 2, 5, in the second example 1."""
    velocity_BCHW = torch.tensor([[[[1.0, 2.0, 3.0]], [[1.0, 2.0, 5.0]]], [[[1.0] * 3]] * 2])
    weights_B1HW = torch.tensor([[[[0.0, 1.0, 0.5]]], [[[0.0, 0.0, 1e-3]]]])
    losses = example_losses(velocity_BCHW, torch.zeros_like(velocity_BCHW), weights_B1HW)
    assert losses.tolist() == pytest.approx([(1 * 4 + 0.5 * 17) / 1.5, 1.0]), "a small mask weighs as a large one"
    even = example_losses(velocity_BCHW, torch.zeros_like(velocity_BCHW), torch.full((2, 1, 1, 3), 0.3))
    torch.testing.assert_close(even, example_losses(velocity_BCHW, torch.zeros_like(velocity_BCHW)))


def test_nothing_is_learned_where_the_weight_is_0() -> None:
    velocity_BCHW = torch.randn(1, 2, 3, 4, requires_grad=True)
    weights_B1HW = torch.ones(1, 1, 3, 4)
    weights_B1HW[..., 1, 2] = 0
    example_losses(velocity_BCHW, torch.zeros_like(velocity_BCHW), weights_B1HW).sum().backward()
    assert velocity_BCHW.grad is not None
    assert (velocity_BCHW.grad == 0).nonzero()[:, 2:].tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("delta", [1e-4, 0.1, 1.0, 100.0])
def test_the_pseudo_huber_loss_is_its_formula(delta: float) -> None:
    errors = torch.logspace(-6, 4, 200, dtype=torch.float64)
    expected = 2 * delta**2 * (torch.sqrt(1 + (errors / delta) ** 2) - 1)
    visible = errors > 1e-3 * delta  # below, the formula as it stands loses its digits
    torch.testing.assert_close(huber(errors.square(), delta)[visible], expected[visible], rtol=1e-6, atol=0)


def test_the_pseudo_huber_loss_between_square_and_distance() -> None:
    small, large = torch.tensor([1e-4]), torch.tensor([1e4])
    torch.testing.assert_close(huber(small.square(), 0.1), small.square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(huber(large.square(), 0.1), 0.2 * large, rtol=1e-4, atol=0)
    target_BCHW = torch.zeros(1, 1, 1, 2)
    losses = example_losses(torch.tensor([[[[3.0, 4.0]]]]), target_BCHW, huber_delta=1.0)
    assert losses.item() == pytest.approx(math.sqrt(10) - 1 + math.sqrt(17) - 1)


def test_sigmas_in_a_range() -> None:
    sigma_B = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(fit_into_range(sigma_B, 0.2, 0.6), torch.tensor([0.2, 0.3, 0.6]))
    assert fit_into_range(sigma_B, 0.0, 1.0) is sigma_B, "bit for bit what it was"
    assert fit_into_range(torch.rand(1000), 0.3, 0.31).clamp(0.3, 0.31).sub(0.3).ge(0).all()
