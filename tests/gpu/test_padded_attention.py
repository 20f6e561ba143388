"""Kernels for padded captions are right on a GPU, and one capture serves many lengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixtune.data.batches import Batch
from pixtune.engine.apply import blocks_of
from pixtune.engine.attention_trial import Shape, measure
from pixtune.engine.capture import GraphCapturer, ReplayedPass
from pixtune.engine.compile import compile_blocks
from pixtune.engine.load import load_transformer
from pixtune.engine.padded_attention import attend_padded
from pixtune.families import family_of
from pixtune.family import ModelFamily, Placement
from pixtune.plan.kernel_choice import CUDNN, FLASH, LARGEST_ERROR
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters
from tests.unit.engine.tiny import ASSETS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BF16 = Placement(DEVICE, torch.bfloat16)
FOLDER = ModelFolder(ASSETS / "tiny-qwen-image")
MULTIPLE = 16
LENGTHS = (5, 9, 16)
"""Lengths of captions in tokens, all within one multiple."""
NUM_STEPS = 12
MOST_ROUNDING = 1.5
"""Largest error of padded steps' gradients against exact ones, in errors of the plain steps, also in bf16."""
CPU = torch.device("cpu")
KERNELS = {"cudnn": False, "flash": True}
"""Sets the kernel, and whether only deterministic ones may be used."""


@pytest.fixture(params=KERNELS)
def _kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.use_deterministic_algorithms(KERNELS[request.param])
    yield
    torch.use_deterministic_algorithms(False)


# ---- the kernels


@pytest.mark.parametrize("shared_offset", [0, 60])
@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
def test_each_kernel_is_right_without_a_mask(kernel: str, shared_offset: float) -> None:
    """All scores of a row may be so negative that exp(0) of a padded key would drown them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    query, key, value, gradient = (torch.randn(2, 600, 3, 128, device=DEVICE, generator=generator) for _ in range(4))
    query[..., 0], key[..., 0] = 128**0.5, -shared_offset
    real_BL = torch.ones(2, 600, dtype=torch.bool, device=DEVICE)
    real_BL[0, 5:42] = False
    inputs = query, key, value = tuple(tensor.bfloat16().requires_grad_() for tensor in (query, key, value))
    attended = attend_padded(query, key, value, real_BL, kernel)
    found = [attended.detach(), *torch.autograd.grad(attended, inputs, gradient.bfloat16())]
    exact = query, key, value = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    attended = masked(query, key, value, real_BL)
    expected = [attended.detach(), *torch.autograd.grad(attended, exact, gradient.bfloat16().double())]
    for what, tensor, wanted in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = float((tensor.double() - wanted).norm() / wanted.norm())
        assert error < LARGEST_ERROR, f"{what}: {error:.2g}"


def masked(query: Tensor, key: Tensor, value: Tensor, real_BL: Tensor) -> Tensor:
    """Masked attention by separate products, in the format of its inputs."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    shares = scores.masked_fill(~real_BL[:, None, None, :], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", shares, value)


@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
def test_the_trial_measures_it(kernel: str) -> None:
    *_, (_, _, finding) = measure(Shape(640, 3, 128), [kernel], DEVICE)
    assert finding is not None and finding.padded_error < LARGEST_ERROR


# ---- steps


def model(folder: ModelFolder, placement: Placement) -> tuple[ModelFamily, nn.Module, list[nn.Parameter]]:
    """The small model with a LoRA that changes something, and the LoRA's weights."""
    family = family_of(folder)
    transformer = load_transformer(family, folder, placement).module
    adapters.attach_lora(transformer, family.lora_targets, 4, 4, 0, family.lora_presets)
    with torch.no_grad():
        for number, (path, weight) in enumerate(adapters.lora_weights(transformer).items()):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.copy_(drawn * (0.05 if "lora_B" in path else 0.25))
    return family, transformer, list(adapters.trainable_parameters(transformer).values())


def steps(
    multiple: int,
    capture: bool = False,
    change: Callable[[list[nn.Module]], object] = lambda blocks: None,
    placement: Placement = BF16,
    folder: ModelFolder = FOLDER,
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Loss and gradients of each step, captions of `LENGTHS` alternating; and how many shapes were captured."""
    family, transformer, parameters = model(folder, placement)
    device = placement.device
    change(blocks_of(transformer, family))

    def compute(batch: Batch) -> Tensor:
        noisy_BCHW = torch.lerp(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B.view(-1, 1, 1, 1))
        velocity = family.predict_velocity(transformer, noisy_BCHW, batch.sigma_B, batch.conditioning, batch.controls)
        loss = (velocity - batch.noise_BCHW + batch.latents_BCHW).square().mean()
        loss.backward()
        return loss.detach()

    replayed = ReplayedPass(compute, parameters, GraphCapturer() if capture else None, max_captures=4)
    channels, height, width = family.latent_shape(folder, 128, 128)
    found = []
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        latents, noise, control = torch.randn(3, 1, channels, height, width, generator=generator).to(device)
        sigma_B = torch.tensor([0.1 + 0.07 * step], device=device)
        controls = (control,) if family.max_controls else ()
        row = family.random_text(folder, LENGTHS[step % len(LENGTHS)], step)
        text = {name: tensor.to(device) for name, tensor in family.stack_conditioning([row], multiple).items()}
        loss = replayed(Batch(latents, noise, sigma_B, text, controls, ["picture"])).clone()
        gradients = [p.grad.flatten().clone() for p in parameters if p.grad is not None]
        found.append((loss.cpu(), torch.cat(gradients).cpu()))
        replayed.zero_gradients()
    return found, len(replayed._captures)


def selective(blocks: list[nn.Module]) -> None:
    compile_blocks(blocks, selective=True)


@pytest.mark.usefixtures("_kernel", "own_graphs")
@pytest.mark.parametrize("change", [lambda blocks: None, selective], ids=["eager", "compiled"])
def test_captions_of_three_lengths_share_a_capture_and_train_as_unpadded_ones(
    change: Callable[[list[nn.Module]], object],
) -> None:
    exact, _ = steps(1, placement=Placement(CPU, torch.float32))
    plain, _ = steps(1)
    padded, num_captured = steps(MULTIPLE, capture=True, change=change)
    assert num_captured == 1, "one multiple is one shape"
    for (loss, _), (own_loss, _) in zip(exact, padded, strict=True):
        torch.testing.assert_close(own_loss, loss, rtol=0.01, atol=1e-3)
    rounding, own_rounding = distance(plain, exact), distance(padded, exact)
    assert rounding < 0.1 and own_rounding < MOST_ROUNDING * rounding, (own_rounding, rounding)


def distance(found: list[tuple[Tensor, Tensor]], exact: list[tuple[Tensor, Tensor]]) -> float:
    """Relative distance between the gradients of all steps; the root of a mean square."""
    shares = [(own - wanted).norm() / wanted.norm() for (_, own), (_, wanted) in zip(found, exact, strict=True)]
    return float(torch.stack(shares).square().mean().sqrt())


@pytest.mark.usefixtures("_kernel")
def test_a_replay_of_padded_steps_is_the_plain_pass() -> None:
    plain, _ = steps(MULTIPLE)
    replayed, num_captured = steps(MULTIPLE, capture=True)
    assert num_captured == 1
    is_exact = torch.are_deterministic_algorithms_enabled()
    for (loss, gradients), (again, gradients_again) in zip(plain, replayed, strict=True):
        if is_exact:
            assert torch.equal(again, loss) and torch.equal(gradients_again, gradients)
        else:  # cuDNN adds up gradients of queries in any order
            torch.testing.assert_close(again, loss, rtol=1e-3, atol=1e-4)
            assert (gradients_again - gradients).norm() < 0.01 * gradients.norm()


@pytest.fixture(params=[False, True], ids=["controls as noisy", "controls as clean"])
def edit_folder(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFolder:
    """`zero_cond_t`: the stock model copies to the device, in each step, which tokens are modulated as clean."""
    path = shutil.copytree(ASSETS / "tiny-qwen-image-edit", tmp_path / "model")
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "zero_cond_t": request.param}))
    return ModelFolder(path)


def test_steps_of_edit_models_are_captured(edit_folder: ModelFolder) -> None:
    plain, _ = steps(MULTIPLE, folder=edit_folder)
    replayed, num_captured = steps(MULTIPLE, capture=True, folder=edit_folder)
    assert num_captured == 1
    for (loss, gradients), (again, gradients_again) in zip(plain, replayed, strict=True):
        torch.testing.assert_close(again, loss, rtol=1e-3, atol=1e-4)
        assert (gradients_again - gradients).norm() < 0.01 * gradients.norm()
