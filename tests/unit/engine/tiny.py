"""The shipped small models with a LoRA, one step of them, a pass's inputs, and copy lanes as late as is allowed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.compile import compile_forward
from pixtune.engine.forwards import replace_computation
from pixtune.engine.load import Layout, load_transformer
from pixtune.families import family_of
from pixtune.family import ModelFamily, Placement
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters

ASSETS = Path(__file__).resolve().parents[3] / "assets"
MODELS = ("tiny-qwen-image", "tiny-flux")
LATENT_SIDE, NUM_TEXT_TOKENS, BATCH_SIZE = 16, 12, 2
"""64 image tokens of width 256: 128 KiB in fp32 for the image, 24 KiB for the text."""


@dataclass(frozen=True)
class Numbers:
    """Inputs of a pass that are one tensor."""

    values: Tensor

    @property
    def shapes(self) -> Hashable:
        return self.values.shape

    def map(self, change: Callable[[Tensor], Tensor]) -> Numbers:
        return Numbers(change(self.values))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


def family_named(name: str) -> ModelFamily:
    return family_of(ModelFolder(ASSETS / name))


def load_model(name: str, linear_format: str | None = None) -> nn.Module:
    """A model of the test's own: quantizing one takes seconds, copying it none."""
    return copy.deepcopy(loaded_once(name, linear_format))


@functools.cache
def loaded_once(name: str, linear_format: str | None) -> nn.Module:
    folder = ModelFolder(ASSETS / name)
    placement = Placement(torch.device("cpu"), torch.float32)
    return load_transformer(family_of(folder), folder, placement, Layout(linear_format)).module


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    """All repeated blocks in the order in which they run."""
    family = family_of(ModelFolder(ASSETS / name))
    return [block for path in family.block_paths for block in model.get_submodule(path).children()]


def attach(name: str, model: nn.Module) -> None:
    """A LoRA that changes something: the up-projections are not zero."""
    family = family_of(ModelFolder(ASSETS / name))
    adapters.attach_lora(model, family.lora_targets, 4, 4.0, 1, family.lora_presets)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adapters.lora_weights(model).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def compile_in_one(blocks: Sequence[nn.Module]) -> None:
    """Compiles blocks as runs do, one graph for all of a kind; its code is not made, which takes most of the time."""
    for block in blocks:
        in_one = functools.partial(compile_forward, trained=True, sizes_vary=False, backend="aot_eager")
        replace_computation(block, in_one)


def velocity(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    folder = ModelFolder(ASSETS / name)
    family = family_of(folder)
    channels, _, _ = family.latent_shape(folder, *[family.pixel_multiple(folder)] * 2)
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(BATCH_SIZE, channels, LATENT_SIDE, LATENT_SIDE, generator=generator)
    text = family.stack_conditioning([family.random_text(folder, NUM_TEXT_TOKENS, seed)] * BATCH_SIZE)
    return family.predict_velocity(model, noisy, torch.tensor([0.3, 0.8]), text)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in adapters.trainable_parameters(model).items() if p.grad is not None}
    assert found and any(gradient.abs().max() > 0 for gradient in found.values())
    return found


def step(name: str, model: nn.Module, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and LoRA gradients of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    loss = velocity(name, model, seed).square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


def plain_step(name: str, linear_format: str | None = None, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and LoRA gradients of a step with everything kept and in place."""
    model = load_model(name, linear_format)
    attach(name, model)
    return step(name, model, seed)


def assert_same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Compares two steps bit for bit."""
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    different = [name for name, gradient in actual[1].items() if not torch.equal(gradient, expected[1][name])]
    assert not different


@dataclass
class LateWork:
    """Work of a lane, and what has to be done before it: a mark of that or another lane."""

    lane: LateLane
    after: Any
    work: Callable[[], object]
    is_done: bool = False

    def do(self) -> None:
        self.lane.wait(self.after)
        self.work()
        self.is_done = True
        self.lane.num_done += 1


class LateLane:
    """Copies only when somebody waits for them: what a slow link does at its worst."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pending: list[LateWork] = []
        self.num_done = 0

    def reached(self) -> Any:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        self.pending.append(LateWork(self, after, lambda: target.copy_(source)))
        return self.pending[-1]

    def wait(self, mark: Any) -> None:
        if isinstance(mark, LateWork):
            while not mark.is_done:
                mark.lane.pending.pop(0).do()

    def keep_until_copied(self, memory: Tensor) -> None: ...


def late_lane(device: torch.device) -> Any:
    """Stands for a `CopyLane`, with marks of its own."""
    return LateLane(device)
