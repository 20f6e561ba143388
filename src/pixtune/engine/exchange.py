"""Exchanges what the processes of a run have computed: sums, and means in groups of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from pixtune.errors import ExchangeError
from pixtune.storage.grouping import group_neighbours

EXCHANGED_NUMBERS = 1 << 28
"""Number of values that processes exchange at once, at most: 1 GiB in fp32."""


def sum_across_processes(accelerator: Accelerator, tensor: Tensor) -> None:
    """Replaces a tensor by its sum over all processes, the same bits in each of them.

    Raises:
        ExchangeError: another process is gone. Weights are as before; a GPU finds that out later, and otherwise.
    """
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        if accelerator.device.type != "cpu":
            raise
        raise ExchangeError(f"gradients could not be exchanged with the other processes ({error})") from error


def average_across_processes(accelerator: Accelerator, tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over all processes, in groups: a copy of all of them might not fit beside them.

    Raises:
        ExchangeError: see `sum_across_processes`.
    """
    if accelerator.num_processes == 1:
        return
    for group in group_neighbours(tensors, Tensor.numel, EXCHANGED_NUMBERS):
        flat = torch.cat([tensor.flatten() for tensor in group])
        sum_across_processes(accelerator, flat)
        flat /= accelerator.num_processes
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class Exchange:
    """Averaging of a step's totals and gradients over all processes; of one process it changes nothing.

    Args:
        average: averages them in place.
        prepare: takes the memory that this process needs for it. The others need not be there yet.
    """

    def __init__(self, average: Callable[[Tensor], None], prepare: Callable[[], None] = lambda: None) -> None:
        self._average, self._prepare = average, prepare
        self.num_begun = 0
        """Number of exchanges that this process has entered. One that fails before it can still be taken again: the
        others wait for it there."""

    def __call__(self, totals_2: Tensor) -> None:
        self._prepare()
        self.num_begun += 1
        self._average(totals_2)
