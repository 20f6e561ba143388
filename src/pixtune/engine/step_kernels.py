"""Triton kernels of an optimizer's step over all weights: `rounding.py` and `trained/adamw_step.py` launch them.

Imported at first use, as `triton_kernels.py` is. One program steps `ROWS` times 256 neighbouring numbers of one weight;
256 of them share the scales of their 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861, sections 2.1 and 2.2).
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(256)
"""Value of `plan.optimizers.BLOCK`."""
LEAST_NORMAL: tl.constexpr = tl.constexpr(1.2e-38)
"""Peak below which a block's moments are zeros: its reciprocal would be infinite."""

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
    """fp32 to bf16, up or down by chance; what is no finite number stays as it is."""
    bits = values.to(tl.uint32, bitcast=True)
    moved = (bits + (_noise(place, key_0, key_1) >> 16)) & 0xFFFF0000
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, moved, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


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


@triton.jit
def _level(n, FIRST: tl.constexpr):
    """Value of level n, of those that begin at n = FIRST, which is 1 or 2."""
    top = tl.where(n >= 2 * FIRST, 1e-5, 1e-6)
    top = tl.where(n >= 4 * FIRST, 1e-4, top)
    top = tl.where(n >= 8 * FIRST, 1e-3, top)
    top = tl.where(n >= 16 * FIRST, 1e-2, top)
    top = tl.where(n >= 32 * FIRST, 1e-1, top)
    top = tl.where(n >= 64 * FIRST, 1.0, top)
    number = n.to(tl.float32)
    reciprocal = (0x7F000000 - (number.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
    value = top * (0.1 + 0.9 * ((number + 0.5) * reciprocal - 1.0))  # the reciprocal is that of k
    return tl.where(n < FIRST, 0.0, tl.where(n >= 128 * FIRST, 1.0, value))


@triton.jit
def _nearest(x, FIRST: tl.constexpr):
    """Number n of the level that is nearest to x, from 0 to 1; `_level` gives its value.

    Two decades meet halfway between the last level of the one and the first of the other.
    """
    k = tl.where(x > 1e-5 * (0.1 + 0.09 / FIRST), 2.0 * FIRST, 1.0 * FIRST)
    gain = tl.where(x > 1e-5 * (0.1 + 0.09 / FIRST), 2e5 * FIRST, 1e6 * FIRST)
    k = tl.where(x > 1e-4 * (0.1 + 0.045 / FIRST), 4.0 * FIRST, k)
    gain = tl.where(x > 1e-4 * (0.1 + 0.045 / FIRST), 4e4 * FIRST, gain)
    k = tl.where(x > 1e-3 * (0.1 + 0.0225 / FIRST), 8.0 * FIRST, k)
    gain = tl.where(x > 1e-3 * (0.1 + 0.0225 / FIRST), 8e3 * FIRST, gain)
    k = tl.where(x > 1e-2 * (0.1 + 0.01125 / FIRST), 16.0 * FIRST, k)
    gain = tl.where(x > 1e-2 * (0.1 + 0.01125 / FIRST), 1.6e3 * FIRST, gain)
    k = tl.where(x > 1e-1 * (0.1 + 0.005625 / FIRST), 32.0 * FIRST, k)
    gain = tl.where(x > 1e-1 * (0.1 + 0.005625 / FIRST), 3.2e2 * FIRST, gain)
    k = tl.where(x > 0.1 + 0.0028125 / FIRST, 64.0 * FIRST, k)
    gain = tl.where(x > 0.1 + 0.0028125 / FIRST, 64.0 * FIRST, gain)
    # Part of the decade: k + k (x / top - 0.1) / 0.9, in which `gain` is k / top. The end of a decade is its last part.
    part = tl.minimum((gain * x + 0.8 * k) * 1.1111111111111112, 2.0 * k - 0.5)
    n = tl.where(x > 1.0 - 0.003515625 / FIRST, 128 * FIRST, part.to(tl.int32))
    return tl.where(x > 1e-6 * (0.05 + 0.225 / FIRST), n, FIRST - 1)


# ---- the step (trained/adamw_step.py)


@triton.jit
def _rest(exponent):
    """1 - exp(exponent), exponent below 0, without the cancellation of a difference near zero."""
    x = exponent
    tail = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0)))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * tail))
    return tl.where(x > -0.25, -series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["key_0", "key_1", "first"])
def step_adamw(
    weight,
    master,
    gradient,
    moment_1,
    moment_2,
    scale_1,
    scale_2,
    levels_1,
    levels_2,
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
    LOOKS_UP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Steps numbers `first` to `first` + numel of a weight; where `spoiled` is not 0, stores nothing.

    Biases of the moments, 1 - beta^steps, are given, or if COUNTED follow from the logarithms of the betas and
    `num_steps` on the device.
    """
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    place = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if EVEN:
        inside = place >= 0
        has_row = row >= 0
    else:
        inside = start + place < numel
        has_row = row.to(tl.int64) * BLOCK < numel
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
        if LOOKS_UP:
            first_moment = tl.load(levels_1 + byte_1) * peak_1[:, None]
            second_moment = tl.load(levels_2 + byte_2) * peak_2[:, None]
        else:
            size = _level(tl.abs(byte_1 - 127), 1)
            first_moment = tl.where(byte_1 < 127, -size, size) * peak_1[:, None]
            second_moment = _level(byte_2 + 1, 2) * peak_2[:, None]
    else:
        first_moment = tl.load(moment_1 + start + place, mask=inside, other=0.0)
        second_moment = tl.load(moment_2 + start + place, mask=inside, other=0.0)

    first_moment = first_moment * beta_1 + rest_1 * slope
    second_moment = second_moment * beta_2 + rest_2 * slope * slope
    if COUNTED:
        count = tl.load(num_steps)
        bias_1 = _rest(count * log_1)
        bias_2 = _rest(count * log_2)
    away = tl.sqrt(second_moment) / tl.sqrt(bias_2) + epsilon
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
        n = _nearest(tl.abs(first_moment) * over_1[:, None], 1)
        code_1 = tl.where(first_moment < 0.0, 127 - tl.minimum(n, 127), 127 + n)
        code_2 = _nearest(second_moment * over_2[:, None], 2) - 1
        tl.store(moment_1 + start + place, code_1.to(tl.uint8), mask=stored)
        tl.store(moment_2 + start + place, code_2.to(tl.uint8), mask=stored)
        tl.store(scale_1 + row, peak_1, mask=has_row & is_sound)
        tl.store(scale_2 + row, peak_2, mask=has_row & is_sound)
    else:
        tl.store(moment_1 + start + place, first_moment, mask=stored)
        tl.store(moment_2 + start + place, second_moment, mask=stored)
