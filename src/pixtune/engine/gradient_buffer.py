"""Keeps the gradients of a LoRA in one piece of memory, which the processes of a run exchange in one call.

A LoRA has a thousand small gradients. As views of one buffer they are zeroed by one kernel, captured steps write into
it, and what is exchanged at the end of a step is the buffer itself: nothing is gathered into a copy or scattered back.
A step's totals travel behind the gradients, so that a step has one exchange.

The exchange follows the backward pass instead of going on beside it. A captured step is one launch from its first
kernel to its last, and 94 MB of gradients (Qwen-Image at rank 16) take a few tenths of a millisecond over NVLink, of
a step of 300: beside it there is next to nothing to win.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pixtune.engine.exchange import sum_across_processes
from pixtune.plan.exchange_cost import NUM_TOTALS

ALIGNED_BYTES = 16
"""Gradients begin at multiples of this, as the fused kernels of optimizers read them."""


class GradientBuffer:
    """Memory of all gradients of some parameters, which are of one number format and on one device.

    It is made when they are first gathered, has room for each parameter, whether it has a gradient or not, and stays
    where it is: what was captured goes on writing into it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._memory: Tensor | None = None
        self._views: list[Tensor] = []
        self._is_exchanged = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer, which are those of an exchange; 0: it is not made yet."""
        return 0 if self._memory is None else self._memory.nbytes

    def gather(self) -> None:
        """Moves gradients that lie elsewhere into the buffer.

        Gradients of a first backward pass were made one by one between activations, and each would keep 20 MiB of the
        allocator's memory from captured steps.
        """
        if self._memory is None and self._parameters:  # a sample's passes have none
            self._make()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not None and parameter.grad is not view:
                parameter.grad = view.copy_(parameter.grad)

    def _make(self) -> None:
        first = self._parameters[0]
        step = ALIGNED_BYTES // first.element_size()
        lengths = [-(-each.numel() // step) * step for each in self._parameters]
        self._memory = torch.zeros(sum(lengths) + NUM_TOTALS, dtype=first.dtype, device=first.device)
        places = self._memory[:-NUM_TOTALS].split(lengths)
        self._views = [
            place[: each.numel()].view(each.shape) for place, each in zip(places, self._parameters, strict=True)
        ]

    def average(self, accelerator: Accelerator, totals_2: Tensor) -> None:
        """Replaces the gradients, and a step's totals, by their means over all processes, in one exchange.

        From then on gradients stay in the buffer. Each mean is the sum divided by the number of processes.

        Raises:
            ExchangeError: another process is gone. Weights are as before; a GPU finds that out later, and otherwise.
        """
        if accelerator.num_processes == 1:
            return
        self.gather()
        assert self._memory is not None
        self._is_exchanged = True
        totals = self._memory[-NUM_TOTALS:].copy_(totals_2)
        sum_across_processes(accelerator, self._memory)
        self._memory.div_(accelerator.num_processes)
        totals_2.copy_(totals)

    def zero(self, in_place: bool) -> None:
        """Zeroes the gradients in place, or drops them and the buffer where that is allowed and nothing is exchanged.

        Args:
            in_place: they must stay where they are.
        """
        if not in_place and not self._is_exchanged:
            self._memory, self._views = None, []
            for parameter in self._parameters:
                parameter.grad = None
            return
        elsewhere = [each.grad for each in self._parameters if each.grad is not None]
        if self._memory is not None:
            self._memory.zero_()
            views = {id(view) for view in self._views}
            elsewhere = [gradient for gradient in elsewhere if id(gradient) not in views]
        if elsewhere:
            torch._foreach_zero_(elsewhere)
