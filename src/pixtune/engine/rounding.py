"""Rounds fp32 to bf16 up or down by chance, so that it is right on average (Gupta et al. 2015, arXiv 1502.02551).

What is drawn for a number of a weight is a function of a key and of the number's place in that weight. It depends
neither on the device nor on which processes hold which rows, and a kernel that does other work as well draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixtune.engine.kernels import has_triton

SIZE = 1024
"""Numbers that one program of the kernel rounds."""
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Factors of the mixing function `lowbias32` of C. Wellons' hash-prospector, as signed 32-bit numbers. Of all functions
of its form that were tried there, a change of any input bit changes each output bit most nearly half of the time."""


@dataclass(frozen=True)
class Draw:
    """Everything that decides what is drawn for the numbers of a weight in one step."""

    key: int
    """Draw key (`randomness.draw_key`) of weight and step, of 63 bits."""
    first: int = 0
    """Place in the whole weight of the first number that this process holds."""

    @property
    def words(self) -> tuple[int, int]:
        """The key as two signed 32-bit numbers."""
        return _signed(self.key), _signed(self.key >> 32)

    @property
    def first_word(self) -> int:
        """The lowest 32 bits of `first`, as a signed number."""
        return _signed(self.first)


def noise_at(draw: Draw, count: int, device: torch.device) -> Tensor:
    """Draws 16 bits for each of some neighbouring numbers; int32. Places count modulo 2^32."""
    key_0, key_1 = draw.words
    x = torch.arange(count, dtype=torch.int32, device=device).add_(draw.first_word).bitwise_xor_(key_0)
    x.bitwise_xor_(_upper(x, 16)).mul_(FIRST_FACTOR).bitwise_xor_(key_1)
    return _upper(x.bitwise_xor_(_upper(x, 15)).mul_(SECOND_FACTOR), 16)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 to bf16, up or down by chance; exact bf16 values and values that are not finite stay as they are.

    Args:
        noise: 16 bits for each value, int32 of the same shape. Is overwritten.
    """
    bits = values.contiguous().view(torch.int32)  # bf16 is the upper half of fp32's bits
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_into(target: Tensor, values: Tensor, draw: Draw) -> None:
    """Rounds fp32 values by chance into a bf16 tensor of the same shape, in one pass where Triton runs."""
    if not (has_triton(target) and target.is_contiguous() and values.is_contiguous()):
        target.copy_(round_stochastically(values, noise_at(draw, values.numel(), values.device).view(values.shape)))
        return
    from pixtune.engine import step_kernels

    count = values.numel()
    programs = (-(-count // SIZE),)
    step_kernels.round_to_bf16[programs](values, target, count, draw.first_word, *draw.words, SIZE)


def _upper(x: Tensor, shift: int) -> Tensor:
    """Shifts 32 bits to the right, with zeros from the left."""
    return (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _signed(number: int) -> int:
    """Returns the lowest 32 bits of a number as a signed one."""
    low = number & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
