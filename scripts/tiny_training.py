"""Trains the transformers of the small models in `assets/` for a number of minutes.

Schedules follow the clock, steps are captured as CUDA graphs, and conditioning, latents and objective are pixtune's.
`train_tiny_models.py` says what each model learns, `tiny_guidance.py` how FLUX's learns guidance; `tiny_autoencoder.py`
trains the autoencoder before.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from emoji_pictures import Icon
from torch import Tensor, nn

from pixtune.family import LatentDistribution, ModelFamily
from pixtune.objective import add_noise, example_losses, shift_sigmas, sigmas_from_uniform, velocity_target

CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
SIGMA_SHIFT = 0.5
"""Shift `mu` of the noise levels: more of the training goes to noisy pictures, where the caption decides."""


# ---- the clock


def schedule(minutes: float, peak: float, warmup_steps: int, log: Callable[[int, float], None]) -> Iterator[float]:
    """Yields learning rates: a linear warm-up, then a cosine to zero that ends with the minutes."""
    start, step, fraction = time.monotonic(), 0, 0.0
    while fraction < 1:
        if step % 20 == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            fraction = (time.monotonic() - start) / (60 * minutes)
        if step % 500 == 0:
            log(step, fraction)
        yield peak * min(1, (step + 1) / warmup_steps) * max(0.0, 0.5 + 0.5 * math.cos(math.pi * min(fraction, 1)))
        step += 1
    log(step, fraction)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures the step as a CUDA graph: thousands of small launches become one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---- optimizers


class Muon:
    """Momentum whose step for a matrix is its nearest orthogonal one (Jordan et al. 2024), all of a shape at once.

    The step is scaled to the size of Adam's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so
    that one learning rate, a tensor on the device, serves both.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: Tensor, momentum: float = 0.95) -> None:
        self.rate, self.momentum = rate, momentum
        shapes = sorted({tuple(m.shape) for m in matrices})
        self.groups = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.velocities = [torch.zeros_like(self._as_matrices([m.data for m in group])) for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            gradient = self._as_matrices([m.grad for m in group if m.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            step = orthogonalize(gradient.lerp(velocity, self.momentum))
            scale = -0.2 * math.sqrt(max(step.shape[-2:])) * self.rate
            used = [last_slice(m.data) for m in group]
            torch._foreach_add_(
                used, [s.view_as(m) for s, m in zip((step.float() * scale).unbind(), used, strict=True)]
            )

    @staticmethod
    def _as_matrices(weights: list[Tensor]) -> Tensor:
        return torch.stack([last_slice(weight).flatten(1) for weight in weights])


def last_slice(weight: Tensor) -> Tensor:
    """Returns the part of a causal 3D kernel that sees a single picture; other weights as they are."""
    return weight[:, :, -1] if weight.ndim == 5 else weight


def orthogonalize(matrices: Tensor) -> Tensor:
    """Brings singular values to about 1, by five Newton-Schulz steps in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def build_optimizers(parameters: list[nn.Parameter], matrices: list[nn.Parameter], rate: Tensor) -> list[Any]:
    """Builds Muon for the inner matrices and Adam for the rest."""
    chosen = {id(matrix) for matrix in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, capturable=rate.is_cuda)
    return [adam, Muon(matrices, rate)]


# ---- transformer


@dataclass(frozen=True)
class TrainingSet:
    """Targets as latents, captions as features and control pictures as latents, all on the training device.

    `targets_N`, `texts_N` and `controls_N` hold the index of each row's parts; `dropped_N` that of the features which
    stand for its dropped caption. `turns` is how many steps in a row draw from this set where there are several.
    """

    latents: LatentDistribution
    features: dict[str, Tensor]
    targets_N: Tensor
    texts_N: Tensor
    dropped_N: Tensor
    controls_N: Tensor | None
    cumulative_shares_N: Tensor
    batch_size: int
    turns: int = 1

    @property
    def device(self) -> torch.device:
        return self.targets_N.device

    def draw_rows(self) -> Tensor:
        """Draws the rows of a batch. Never waits for the GPU."""
        rows = torch.searchsorted(self.cumulative_shares_N, torch.rand(self.batch_size, device=self.device))
        return rows.clamp_max(len(self.targets_N) - 1)

    def draw(self) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Draws latents, conditioning and controls of a batch, some captions dropped."""
        rows = self.draw_rows()
        mean_BCHW = self.latents.mean_BCHW[self.targets_N[rows]]
        noise_BCHW = torch.randn_like(mean_BCHW)
        latents_BCHW = mean_BCHW + self.latents.std_BCHW[self.targets_N[rows]] * noise_BCHW
        dropped = torch.rand(self.batch_size, device=self.device) < CAPTION_DROPOUT
        features = self.features_of(torch.where(dropped, self.dropped_N[rows], self.texts_N[rows]))
        if self.controls_N is None:
            return latents_BCHW, features, []
        return latents_BCHW, features, [self.latents.mean_BCHW[self.controls_N[rows]]]

    def features_of(self, texts: Tensor) -> dict[str, Tensor]:
        """Returns the features of the captions with these numbers."""
        return {name: tensor[texts] for name, tensor in self.features.items()}


def cumulative(*parts: tuple[float, Tensor]) -> Tensor:
    """Returns running sums of draw probabilities: each part gets its share, spread over its rows by their weights."""
    return torch.cumsum(torch.cat([share * weights / weights.sum() for share, weights in parts]), 0)


SILHOUETTES = ("high contrast style", "monotone style")
"""Styles without colours, which have less to teach."""


def weights_by_group(icons: Sequence[Icon], device: torch.device) -> Tensor:
    """Returns weights by which a group of n variants is drawn as often as the square root of n single pictures.

    Flags and silhouettes are drawn less often.
    """
    sizes = Counter(icon.group for icon in icons)
    return torch.tensor(
        [
            sizes[icon.group] ** -0.5
            * (0.2 if icon.name.startswith("flag") else 1)
            * (0.4 if icon.style in SILHOUETTES else 1)
            for icon in icons
        ],
        device=device,
    )


Lesson = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""What a step learns: computes the transformer's velocities for a batch, and those that they should be."""


@dataclass(frozen=True)
class FromPictures:
    """The lesson of flow matching: from pictures with noise to the velocity between the two."""

    family: ModelFamily
    data: TrainingSet

    def __call__(self, transformer: nn.Module) -> tuple[Tensor, Tensor]:
        latents, conditioning, controls = self.data.draw()
        noise = torch.randn_like(latents)
        sigma_B = draw_sigmas(len(latents), self.data.device)
        noisy = add_noise(latents, noise, sigma_B)
        with in_bf16(self.data.device):
            velocity = self.family.predict_velocity(transformer, noisy, sigma_B, conditioning, controls)
        return velocity, velocity_target(latents, noise)


def draw_sigmas(count: int, device: torch.device) -> Tensor:
    """Draws noise levels of pictures."""
    return shift_sigmas(sigmas_from_uniform("uniform", torch.rand(count, device=device)), SIGMA_SHIFT)


def in_bf16(device: torch.device) -> AbstractContextManager[Any]:
    """Computes in bf16; without a cache of cast weights, since a captured step must cast them anew each time."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


class TransformerTraining:
    """Weights in training: steps without a single wait for the GPU, so that each can be captured once and replayed."""

    def __init__(self, family: ModelFamily, transformer: nn.Module, device: torch.device) -> None:
        self.family, self.device = family, device
        self.transformer = transformer.to(device).train().requires_grad_(True)
        self.parameters = list(transformer.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)  # in place of None where the last block's text goes nowhere
        self.snapshot = copy.deepcopy(transformer).cpu()
        self.average = [p.detach().clone() for p in self.parameters]
        self.rate = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)
        blocks = [transformer.get_submodule(path) for path in family.block_paths]
        matrices = [p for part in blocks for p in part.parameters() if p.ndim == 2]
        self.optimizers = build_optimizers(self.parameters, matrices, self.rate)

    def step(self, lesson: Lesson) -> None:
        velocity, target = lesson(self.transformer)
        loss = example_losses(velocity, target).mean()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - EMA_DECAY)
        self.loss.lerp_(loss.detach(), 0.01)

    def averaged(self) -> nn.Module:
        """Returns the transformer with the averaged weights, on the CPU."""
        for parameter, value in zip(self.snapshot.parameters(), self.average, strict=True):
            parameter.data = value.cpu()
        return self.snapshot.eval().requires_grad_(False)


def train_transformer(
    training: TransformerTraining,
    lessons: Sequence[tuple[Lesson, int]],
    minutes: float,
    peak: float,
    save: Callable[[nn.Module], None],
    compiled: bool,
) -> nn.Module:
    """Trains for the given time, saving the averaged weights on the way, and returns the model with them, on the CPU.

    Args:
        lessons: what is learnt, each with how many steps in a row it gets.
    """
    last_save = time.monotonic()

    def log(step: int, fraction: float) -> None:
        nonlocal last_save
        print(f"transformer step {step}, {fraction:.0%} of the time, loss {float(training.loss):.4f}", flush=True)
        if time.monotonic() - last_save > 120:
            save(training.averaged())
            last_save = time.monotonic()

    steps: list[tuple[Callable[[], None], int]]
    steps = [(partial(training.step, lesson), turns) for lesson, turns in lessons]
    if training.device.type == "cuda":
        # Its backward writes out of bounds in FLUX's attention with torch 2.11 on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
        for path in training.family.block_paths if compiled else ():
            for block in training.transformer.get_submodule(path).children():
                block.compile(fullgraph=True)
        steps = [(captured(step), turns) for step, turns in steps]
    in_turn = cycle([step for step, turns in steps for _ in range(turns)])
    for rate in schedule(minutes, peak, 500, log):
        training.rate.fill_(rate)
        next(in_turn)()
    averaged = training.averaged()
    save(averaged)
    return averaged
