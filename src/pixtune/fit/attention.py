"""Whether cuDNN's attention can be trusted with a model on this machine: tried in a process of its own.

With torch 2.11 on an H100 its backward pass gives FLUX.1-dev gradients that are thousands of times too large, and at
times ends with an illegal memory access, which no process survives. So one block of each kind runs forward and backward
there first, with the run's own shapes and strides.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtune.families import family_of
from pixtune.families.base import Placement
from pixtune.fit.load import random_transformer
from pixtune.weights import ModelFolder

TRIAL_SECONDS = 180
LARGEST_ERROR = 0.05
"""Relative, of the gradients in bf16 against PyTorch's other attention kernels."""


@dataclass(frozen=True)
class Trial:
    """How it went."""

    passed: bool
    finding: str
    """For people: what happened."""


def try_cudnn_attention(folder: ModelFolder, latent_height: int, latent_width: int, num_text_tokens: int) -> Trial:
    """Runs this module on the first CUDA GPU; 10 to 20 seconds.

    Args:
        latent_height, latent_width: of the run's largest picture.
    """
    words = [str(folder.path), str(latent_height), str(latent_width), str(num_text_tokens)]
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", "pixtune.fit.attention", *words],
            capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Trial(False, f"did not end within {TRIAL_SECONDS} s")
    if outcome.returncode == 0:
        return Trial(True, outcome.stdout.strip())
    lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]  # the last one is the cause; what follows are hints
    return Trial(False, (errors or lines or [f"it ended with exit code {outcome.returncode}"])[-1][:200])


def gradients_of_one_block(folder: ModelFolder, latent_height: int, latent_width: int, num_text_tokens: int) -> Tensor:
    """All gradients of a transformer of one block of each kind, with the same random weights and inputs every time."""
    family = family_of(folder)
    config = folder.component_config("transformer")
    shallow: dict[str, Any] = {key: 1 for key in ("num_layers", "num_single_layers") if key in config}
    torch.manual_seed(0)
    placement = Placement(torch.device("cuda"), torch.bfloat16)
    transformer = random_transformer(family, {**config, **shallow}, placement)
    transformer.requires_grad_(True)
    channels, _, _ = family.latent_shape(folder, *[family.pixel_multiple(folder)] * 2)
    noisy_BCHW = torch.randn(1, channels, latent_height, latent_width, device="cuda")
    row = family.random_text(folder, num_text_tokens, seed=0)
    text = family.stack_conditioning([{name: tensor.cuda() for name, tensor in row.items()}])
    velocity_BCHW = family.predict_velocity(transformer, noisy_BCHW, torch.full((1,), 0.5, device="cuda"), text)
    velocity_BCHW.float().square().mean().backward()
    torch.cuda.synchronize()
    return torch.cat([p.grad.float().flatten() for p in transformer.parameters() if p.grad is not None])


def main() -> None:
    """Ends with an error, or by a crash, where cuDNN's attention cannot be used."""
    folder, shape = ModelFolder(Path(sys.argv[1])), [int(word) for word in sys.argv[2:]]
    torch.backends.cuda.enable_cudnn_sdp(False)
    expected = gradients_of_one_block(folder, *shape)
    torch.backends.cuda.enable_cudnn_sdp(True)
    error = float((gradients_of_one_block(folder, *shape) - expected).norm() / expected.norm())
    if not error < LARGEST_ERROR:
        raise SystemExit(f"Error: its gradients are {error:.2g} times their size away from those of other kernels")
    print(f"its gradients agree with those of other kernels within {error:.2%}")


if __name__ == "__main__":
    main()
