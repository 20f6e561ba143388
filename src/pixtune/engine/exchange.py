"""Exchanges gradients between the processes of a run."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from pixtune.errors import ExchangeError
from pixtune.storage.grouping import group_neighbours

EXCHANGED_NUMBERS = 1 << 28
"""Number of values that processes exchange at once, at most: 1 GiB in fp32."""


def average_across_processes(accelerator: Accelerator, tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over all processes.

    A LoRA's gradients are one exchange; a copy of all weights' gradients would not fit beside them.

    Raises:
        ExchangeError: another process is gone. Weights are as before; a GPU finds that out later, and otherwise.
    """
    if accelerator.num_processes == 1:
        return
    for group in group_neighbours(tensors, Tensor.numel, EXCHANGED_NUMBERS):
        flat = torch.cat([tensor.flatten() for tensor in group])
        try:
            flat = accelerator.reduce(flat, reduction="mean")
        except RuntimeError as error:
            if accelerator.device.type != "cpu":
                raise
            raise ExchangeError(f"gradients could not be exchanged with the other processes ({error})") from error
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))
