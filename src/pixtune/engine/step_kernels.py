"""Triton kernels of an optimizer's step over all weights: `rounding.py` and `trained/adamw_step.py` launch them.

Imported at first use, as `triton_kernels.py` is. One program steps `ROWS` times 256 neighbouring numbers of one weight;
256 of them share the scales of their 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861, sections 2.1 and 2.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(256)
"""Value of `plan.optimizers.BLOCK`."""
LEAST_NORMAL: tl.constexpr = tl.constexpr(1.2e-38)
"""Peak below which a block's moments are zeros: its reciprocal would be infinite."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Triton's names of formats."""

# ---- noise and rounding (rounding.py)


@triton.jit
def _noise(place, key_0, key_1):
    """16 bits for each place, as `rounding.noise_at` makes them, in the upper half of 32."""
    x = place.to(tl.uint32) ^ key_0.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ key_1.to(tl.uint32)
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def _rounded(values, place, key_0, key_1):
    """fp32 to bf16, up or down by chance; infinity stays, since its lower bits are zeros, and so does NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    moved = (bits + (_noise(place, key_0, key_1) >> 16)) & 0xFFFF0000
    return tl.where(values == values, moved.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@triton.jit(do_not_specialize=["key_0", "key_1", "first"])
def round_to_bf16(values, target, numel, first, key_0, key_1, SIZE: tl.constexpr):
    """fp32 (n) -> bf16 (n), which are numbers `first` to `first` + n of a weight."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    place = tl.arange(0, SIZE)
    inside = start + place < numel
    value = tl.load(values + start + place, mask=inside, other=0.0)
    tl.store(target + start + place, _rounded(value, (start + first).to(tl.uint32) + place, key_0, key_1), mask=inside)


# ---- the levels of 8-bit moments. A level's number n counts from its decade's beginning: with k the largest power of
# two that is no larger than n, a decade has k levels in the middles of k equal parts of it, each decade twice as many
# as the one below. Levels of one sign have n from 1 on, unsigned ones from 2; n below that is zero, and the last is 1.
# Decades are found by logarithms and powers: comparing with each would take the kernel's time half as much again.

LOG2_OF_10: tl.constexpr = tl.constexpr(3.321928094887362)
LOG10_OF_2: tl.constexpr = tl.constexpr(0.30102999566398120)
LOG2_OF_PARTS: tl.constexpr = tl.constexpr(0.15200309344504995)
"""Logarithm of 1 / 0.9."""
LARGE: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23, beside which fp32 has no fractions: what is added to it is rounded, and stands in its lowest bits."""
EARLY: tl.constexpr = tl.constexpr(0.0025)
"""Number by which the logarithm in `_nearest` is too large, a little more than its error of 0.0023."""


@triton.jit
def _level(n, FIRST: tl.constexpr):
    """Value of the level |n|, n a whole number in fp32, of those that begin at FIRST; if that is 2, n is not 1."""
    number = tl.abs(n)
    bits = number.to(tl.int32, bitcast=True)
    k = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    log2_of_k = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0  # 2^23 + 127
    if FIRST == 1:  # the decade's end over k
        width = tl.exp2(log2_of_k * (LOG2_OF_10 - 1.0) - 6.0 * LOG2_OF_10)
    else:
        width = tl.exp2(log2_of_k * (LOG2_OF_10 - 1.0) - 7.0 * LOG2_OF_10)
    return tl.minimum(width * (0.9 * number + 0.45 - 0.8 * k), 1.0)


@triton.jit
def _nearest(x, FIRST: tl.constexpr):
    """Number n of the level that is nearest to x, from 0 to 1, in fp32 with a fraction that is to be cut off.

    Two decades meet halfway between the last level of the one and the first of the other: a fifth of a part from the
    beginning of the latter. So a number just below a decade may be taken for one of it.
    """
    bits = x.to(tl.int32, bitcast=True)
    # As a whole number, bits are log2(x) with a straight line in place of the logarithm of the mantissa 1 + rest.
    rest = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    straight = bits.to(tl.float32) * (LOG10_OF_2 / 8388608.0) + (6.5 + EARLY - 127.0 * LOG10_OF_2)
    decade = tl.minimum(tl.maximum(straight + (rest - rest * rest) * (0.3466 * LOG10_OF_2), -0.25), 6.0)
    rounded = decade + LARGE
    power = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    if FIRST == 1:  # parts of a decade over their sum, which is 0.9 times its end
        gain = tl.exp2((rounded - LARGE) * (1.0 - LOG2_OF_10) + (6.0 * LOG2_OF_10 + LOG2_OF_PARTS))
        least = tl.where(power > 1.0, 0.2, 0.19444444)  # below the first level of all lies zero
    else:
        gain = tl.exp2((rounded - LARGE) * (1.0 - LOG2_OF_10) + (6.0 * LOG2_OF_10 + LOG2_OF_PARTS + 1.0))
        least = tl.where(power > 1.0, 0.2, 0.13888889)
    part = gain * x - power * (FIRST / 9.0)
    n = tl.where(part < least, power * FIRST - 1.0, power * FIRST + part)
    return tl.where(x > 1.0 - 0.003515625 / FIRST, 128.0 * FIRST, n)


# ---- the step (trained/adamw_step.py)


@triton.jit
def _with_sign(size, other):
    """A number that is not negative, with the sign of another."""
    bits = size.to(tl.uint32, bitcast=True) | (other.to(tl.uint32, bitcast=True) & 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rest(exponent):
    """1 - exp(exponent), exponent below 0, without the cancellation of a difference near zero."""
    x = exponent
    tail = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0)))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * tail))
    return tl.where(x > -0.25, -series, 1.0 - tl.exp(x))


@triton.jit
def _step_numbers(
    start,
    weight,
    master,
    gradient,
    moment_1,
    moment_2,
    scale_1,
    scale_2,
    num_steps,
    factor,
    spoiled,
    rate,
    kept_share,
    beta_1,
    rest_1,
    bias_1,
    log_1,
    beta_2,
    rest_2,
    bias_2,
    log_2,
    epsilon,
    numel,
    first,
    key_0,
    key_1,
    HAS_FACTOR: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUNDS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Steps `ROWS` blocks of a weight from number `start` on, which is their beginning; see `step_adamw`."""
    place = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = start // BLOCK + tl.arange(0, ROWS)
    inside = place < numel - start
    has_row = row * BLOCK < numel
    is_sound = tl.load(spoiled).to(tl.int32) == 0
    slope = tl.load(gradient + start + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        slope = slope * tl.load(factor)
    if HAS_MASTER:
        value = tl.load(master + start + place, mask=inside, other=0.0)
    else:
        value = tl.load(weight + start + place, mask=inside, other=0.0).to(tl.float32)

    if EIGHT_BIT:
        byte_1 = tl.load(moment_1 + start + place, mask=inside, other=127).to(tl.int32)
        byte_2 = tl.load(moment_2 + start + place, mask=inside, other=0).to(tl.int32)
        peak_1 = tl.load(scale_1 + row, mask=has_row, other=0.0)
        peak_2 = tl.load(scale_2 + row, mask=has_row, other=0.0)
        number = (byte_1 - 127).to(tl.float32)
        first_moment = _with_sign(_level(number, 1), number) * peak_1[:, None]
        second_moment = tl.where(byte_2 > 0, _level((byte_2 + 1).to(tl.float32), 2), 0.0) * peak_2[:, None]
    else:
        first_moment = tl.load(moment_1 + start + place, mask=inside, other=0.0)
        second_moment = tl.load(moment_2 + start + place, mask=inside, other=0.0)

    first_moment = first_moment * beta_1 + rest_1 * slope
    second_moment = second_moment * beta_2 + rest_2 * slope * slope
    if COUNTED:
        count = tl.load(num_steps)
        bias_1 = _rest(count * log_1)
        bias_2 = _rest(count * log_2)
    over_root = 1.0 / tl.sqrt(bias_2)
    away = tl.sqrt(second_moment) * over_root + epsilon
    value = value * kept_share - (rate / bias_1) * (first_moment / away)

    stored = inside & is_sound
    if HAS_MASTER:
        tl.store(master + start + place, value, mask=stored)
        tl.store(weight + start + place, value.to(weight.dtype.element_ty), mask=stored)
    elif ROUNDS:
        whole_place = (start + first).to(tl.uint32) + place.to(tl.uint32)
        tl.store(weight + start + place, _rounded(value, whole_place, key_0, key_1), mask=stored)
    else:
        tl.store(weight + start + place, value, mask=stored)

    if EIGHT_BIT:
        peak_1 = tl.max(tl.abs(first_moment), 1)
        peak_2 = tl.max(second_moment, 1)
        over_1 = tl.where(peak_1 > LEAST_NORMAL, 1.0 / peak_1, 0.0)
        over_2 = tl.where(peak_2 > LEAST_NORMAL, 1.0 / peak_2, 0.0)
        n = _with_sign(_nearest(tl.abs(first_moment) * over_1[:, None], 1), first_moment)
        code_1 = tl.maximum(n.to(tl.int32) + 127, 0)
        code_2 = _nearest(second_moment * over_2[:, None], 2).to(tl.int32) - 1
        tl.store(moment_1 + start + place, code_1.to(tl.uint8), mask=stored)
        tl.store(moment_2 + start + place, code_2.to(tl.uint8), mask=stored)
        tl.store(scale_1 + row, peak_1, mask=has_row & is_sound)
        tl.store(scale_2 + row, peak_2, mask=has_row & is_sound)
    else:
        tl.store(moment_1 + start + place, first_moment, mask=stored)
        tl.store(moment_2 + start + place, second_moment, mask=stored)


@triton.jit(do_not_specialize=["key_0", "key_1", "first"])
def step_adamw(
    weight,
    master,
    gradient,
    moment_1,
    moment_2,
    scale_1,
    scale_2,
    num_steps,
    factor,
    spoiled,
    rate,
    kept_share,
    beta_1,
    rest_1,
    bias_1,
    log_1,
    beta_2,
    rest_2,
    bias_2,
    log_2,
    epsilon,
    numel,
    first,
    key_0,
    key_1,
    HAS_FACTOR: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUNDS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Steps numbers `first` to `first` + numel of a weight; where `spoiled` is not 0, stores nothing.

    Biases of the moments, 1 - beta^steps, are given, or if COUNTED follow from the logarithms of the betas and
    `num_steps` on the device.
    """
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    _step_numbers(
        start, weight, master, gradient, moment_1, moment_2, scale_1, scale_2, num_steps, factor, spoiled, rate,
        kept_share, beta_1, rest_1, bias_1, log_1, beta_2, rest_2, bias_2, log_2, epsilon, numel, first, key_0,
        key_1, HAS_FACTOR, HAS_MASTER, ROUNDS, EIGHT_BIT, COUNTED, ROWS,
    )  # fmt: skip


@triton.jit
def step_adamw_of_all(
    table,
    numbers,
    weight_of,
    chunk_of,
    factor,
    spoiled,
    HAS_FACTOR: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ROUNDS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    COUNTED: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Steps many weights of one kind; a program does `TURNS` times `ROWS` blocks of the weight that `weight_of` names.

    Args:
        table: int64 (weights, 12): addresses of `adamw_step.Prepared.tensors`, then its `places`.
        numbers: fp32 (weights, 11): its `numbers`.
        weight_of, chunk_of: int32, for each program; `chunk_of` counts within the weight.
        EVEN: every address, and every count of numbers, is a multiple of 16.
    """
    program = tl.program_id(0)
    own = tl.load(weight_of + program)
    entry, number = table + own * 12, numbers + own * 11
    MOMENT: tl.constexpr = tl.uint8 if EIGHT_BIT else tl.float32
    weight = tl.load(entry).to(tl.pointer_type(WEIGHT))
    master = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    gradient = tl.load(entry + 2).to(tl.pointer_type(GRADIENT))
    moment_1 = tl.load(entry + 3).to(tl.pointer_type(MOMENT))
    moment_2 = tl.load(entry + 4).to(tl.pointer_type(MOMENT))
    scale_1 = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    scale_2 = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    num_steps = tl.load(entry + 7).to(tl.pointer_type(tl.float32))
    numel, first = tl.load(entry + 8), tl.load(entry + 9)
    if EVEN:
        weight, master, gradient = tl.multiple_of(weight, 16), tl.multiple_of(master, 16), tl.multiple_of(gradient, 16)
        moment_1, moment_2 = tl.multiple_of(moment_1, 16), tl.multiple_of(moment_2, 16)
        numel = tl.multiple_of(numel, 16)
    begin = tl.load(chunk_of + program).to(tl.int64) * (TURNS * ROWS * BLOCK)
    for turn in range(TURNS):  # beyond the end of the weight nothing is read or stored
        _step_numbers(
            begin + turn * (ROWS * BLOCK), weight, master, gradient, moment_1, moment_2, scale_1, scale_2, num_steps,
            factor, spoiled, tl.load(number), tl.load(number + 1), tl.load(number + 2), tl.load(number + 3),
            tl.load(number + 4), tl.load(number + 5), tl.load(number + 6), tl.load(number + 7), tl.load(number + 8),
            tl.load(number + 9), tl.load(number + 10), numel, first, tl.load(entry + 10), tl.load(entry + 11),
            HAS_FACTOR, HAS_MASTER, ROUNDS, EIGHT_BIT, COUNTED, ROWS,
        )  # fmt: skip
