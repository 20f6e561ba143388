"""Tries the kernels of `adamw_step.py` on this machine before a run relies on them, against the steps they replace."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import TRITON, try_triton
from pixtune.plan.optimizers import EXACT, KERNEL, SEPARATE, SMALL
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.weight_update import WeightUpdate

SHAPES = {"matrix": (24, 512), "bias": (5000,)}
"""Weights that are stepped: one of whole programs of the kernel, and one whose last blocks have gaps."""
NUM_STEPS = 3
LARGEST_ERROR = 0.02
"""Largest difference of weights relative to how far they moved. A moment that another kernel rounds to a neighbouring
level of 8 bits, and what follows from it, account for 0.003."""

WHAT_TRITON_RAISES = (
    RuntimeError, ImportError, OSError, SubprocessError, TypeError, ValueError, AttributeError, LookupError,
)  # fmt: skip
"""Errors by which a kernel fails that this machine's Triton, compiler or driver cannot make or run. A run goes on
without it, and reports them."""


@functools.cache
def step_obstacle(device: torch.device) -> str | None:
    """Returns why the kernel cannot step weights on a device; None: it runs there, and is right. Takes seconds."""
    try_triton(device)
    if device.type != "cuda" or not TRITON.works:
        return "Triton does not run here"
    from triton.compiler import CompilationError

    try:
        for optimizer in (EXACT, SMALL) if find_spec("bitsandbytes") else (EXACT,):
            error = largest_error(optimizer, device)
            if not error < LARGEST_ERROR:  # NaN is not
                return f"its steps of {optimizer} are wrong by {error:.2g} times their size"
    except (CompilationError, *WHAT_TRITON_RAISES) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def largest_error(optimizer: str, device: torch.device) -> float:
    """Returns how far the kernel's steps lead from those of separate kernels, relative to how far they lead."""
    weights = {form: _stepped(optimizer, form, device) for form in (KERNEL, SEPARATE)}
    start = {name: _random(name, 0, device).bfloat16().float() for name in SHAPES}
    return max(
        float((weights[KERNEL][name] - weights[SEPARATE][name]).norm() / (weights[SEPARATE][name] - start[name]).norm())
        for name in SHAPES
    )


def _stepped(optimizer: str, form: str, device: torch.device) -> dict[str, Tensor]:
    weights = {name: nn.Parameter(_random(name, 0, device).bfloat16()) for name in SHAPES}
    update = WeightUpdate(
        weights, lambda _, parameters: BUILDERS[optimizer](parameters, lr=1e-3, weight_decay=0.1), 0, 0, form=form
    )
    factor, sound = torch.tensor(0.5, device=device), torch.zeros((), device=device)
    for step in range(1, NUM_STEPS + 1):
        gradients = {name: _random(name, step, device).bfloat16() for name in weights}
        if step % 2:
            update.step_weights(gradients, factor, sound)
        else:
            for name, gradient in gradients.items():
                update.step_weight(name, gradient, factor, sound)
        update.end_step()
    return {name: weight.detach().float() for name, weight in weights.items()}


def _random(name: str, step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name))
    return (0.02 * torch.randn(SHAPES[name], generator=generator)).to(device)
