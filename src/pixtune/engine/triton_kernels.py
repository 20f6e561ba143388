"""Triton kernels of `kernels.py`, `heads.py`, `lora.py`, `mlp.py` and `quantize.py`, in this order.

Imported at first use: Triton comes with CUDA builds of torch only. The kernels of `kernels.py` work on tiles of rows
and columns of a weight, N by K, and write whole bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transpose_bytes(source, target, num_rows, num_columns, TILE: tl.constexpr):
    """(N, K) -> (K, N)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tile = tl.load(source + row[:, None] * num_columns + column[None, :], mask=inside)
    tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def expand_nf4(
    packed,
    block_scale,
    levels,
    target,
    num_rows,
    num_columns,
    TRANSPOSED: tl.constexpr,
    FLOAT8: tl.constexpr,
    TILE: tl.constexpr,
):
    """4-bit codes (N, K / 2) with scales (N, K / 16) to 8-bit codes, as (N, K) or (K, N)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    half = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    pair = tl.load(
        packed + row[:, None] * (num_columns // 2) + half[None, :],
        mask=(row < num_rows)[:, None] & (half < num_columns // 2)[None, :],
        other=0,
    )
    code = tl.interleave(pair >> 4, pair & 15).to(tl.int32)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    byte = tl.load(block_scale + row[:, None] * (num_columns // 16) + (column // 16)[None, :], mask=inside, other=0).to(
        tl.int32
    )
    # Sign, exponent and mantissa of `kernels.NF4_SCALES`, at their places in fp32. The exponent gets fp32's bias, less
    # the scales' own, plus that of `kernels.UNIT_CODE`.
    if FLOAT8:
        exponent_shift: tl.constexpr = 127 - 7 + 7
    else:
        exponent_shift: tl.constexpr = 127 - 7 + 6
    bits = ((byte & 128) << 24) | (((byte & 127) << 19) + (exponent_shift << 23))
    value = tl.load(levels + code) * bits.to(tl.float32, bitcast=True)
    if FLOAT8:
        stored = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        # Adding 1.5 * 2^23 leaves no bits for a fraction, so this rounds as torch does, halves to even.
        stored = ((value + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True)
    if TRANSPOSED:
        tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(stored), mask=tl.trans(inside))
    else:
        tl.store(target + row[:, None] * num_columns + column[None, :], stored, mask=inside)


# ---- heads of an attention (heads.py). One program: some heads of one token, of B examples by S tokens.


@triton.jit
def _find_token(num_first, num_last):
    """Returns the program's token among all, its example, its place there and in its stream, and that stream's row."""
    token = tl.program_id(0).to(tl.int64)
    example, place = token // (num_first + num_last), token % (num_first + num_last)
    is_first = place < num_first
    place_in_stream = tl.where(is_first, place, place - num_first)
    row = example * tl.where(is_first, num_first, num_last) + place_in_stream
    return token, example, place, is_first, place_in_stream, row


@triton.jit
def _find_heads(num_heads, HEADS: tl.constexpr, D: tl.constexpr):
    """Returns the program's heads, their features, where these are in a token's row, and which of them exist."""
    head, feature = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    within, inside = head[:, None] * D + feature[None, :], (head < num_heads)[:, None] & (feature >= 0)[None, :]
    return head, feature, within, inside


@triton.jit
def _read_heads(first, first_weight, last, last_weight, is_first, row, width, within, feature, inside):
    """Reads the features of one token's heads and the weights of their norm, in fp32, from its stream of the two."""
    states = tl.load(first + row * width + within, mask=inside & is_first, other=0.0).to(tl.float32)
    states += tl.load(last + row * width + within, mask=inside & (is_first == 0), other=0.0).to(tl.float32)
    everywhere = feature >= 0
    weight = tl.load(first_weight + feature, mask=everywhere & is_first, other=0.0).to(tl.float32)
    weight += tl.load(last_weight + feature, mask=everywhere & (is_first == 0), other=0.0).to(tl.float32)
    return states, weight


@triton.jit
def _read_rotary(first_rotary, last_rotary, is_first, place, D: tl.constexpr):
    """Reads cosine and sine of one token's angles, (1, D / 2) each."""
    pair = tl.arange(0, D // 2)[None, :]
    here = pair >= 0
    rotary = place * D + 2 * pair
    cosine = tl.load(first_rotary + rotary, mask=here & is_first, other=0.0).to(tl.float32)
    cosine += tl.load(last_rotary + rotary, mask=here & (is_first == 0), other=0.0).to(tl.float32)
    sine = tl.load(first_rotary + rotary + 1, mask=here & is_first, other=0.0).to(tl.float32)
    sine += tl.load(last_rotary + rotary + 1, mask=here & (is_first == 0), other=0.0).to(tl.float32)
    return cosine, sine


@triton.jit
def rotate_heads(
    first,
    first_weight,
    first_rotary,
    last,
    last_weight,
    last_rotary,
    joined,
    num_first,
    num_last,
    num_heads,
    epsilon,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """(B, L, H * D) of one stream and of another -> (B, S, H, D): a norm over D, then pairs rotated by their angles."""
    token, _, _, is_first, place_in_stream, row = _find_token(num_first, num_last)
    _, feature, within, inside = _find_heads(num_heads, HEADS, D)

    states, weight = _read_heads(
        first, first_weight, last, last_weight, is_first, row, num_heads * D, within, feature, inside
    )
    normed = states * tl.rsqrt(tl.sum(states * states, 1) / D + epsilon)[:, None] * weight[None, :]
    cosine, sine = _read_rotary(first_rotary, last_rotary, is_first, place_in_stream, D)
    left, right = tl.split(tl.reshape(normed, (HEADS, D // 2, 2)))
    rotated = tl.reshape(tl.join(left * cosine - right * sine, left * sine + right * cosine), (HEADS, D))
    tl.store(joined + token * num_heads * D + within, rotated, mask=inside)


@triton.jit
def rotate_heads_backward(
    first,
    first_weight,
    first_rotary,
    last,
    last_weight,
    last_rotary,
    gradient,
    example_stride,
    token_stride,
    head_stride,
    first_gradient,
    last_gradient,
    num_first,
    num_last,
    num_heads,
    epsilon,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """Gradient (B, S, H, D), with any strides, of the result of `rotate_heads` -> gradients of its two streams."""
    _, example, place, is_first, place_in_stream, row = _find_token(num_first, num_last)
    head, feature, within, inside = _find_heads(num_heads, HEADS, D)
    width = num_heads * D

    states, weight = _read_heads(first, first_weight, last, last_weight, is_first, row, width, within, feature, inside)
    cosine, sine = _read_rotary(first_rotary, last_rotary, is_first, place_in_stream, D)
    rotated = tl.load(
        gradient + example * example_stride + place * token_stride + head[:, None] * head_stride + feature[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    left, right = tl.split(tl.reshape(rotated, (HEADS, D // 2, 2)))
    normed = tl.reshape(tl.join(left * cosine + right * sine, right * cosine - left * sine), (HEADS, D))
    # y = w * x * r with r = (mean(x^2) + e)^(-1/2): dx = r * (w * dy - x * r^2 * mean(w * dy * x))
    root = tl.rsqrt(tl.sum(states * states, 1) / D + epsilon)[:, None]
    weighted, unit = normed * weight[None, :], states * root
    result = root * (weighted - unit * (tl.sum(weighted * unit, 1) / D)[:, None])
    tl.store(first_gradient + row * width + within, result, mask=inside & is_first)
    tl.store(last_gradient + row * width + within, result, mask=inside & (is_first == 0))


# ---- LoRA (lora.py)


@triton.jit
def plus_product(
    base,
    bias,
    low,
    up,
    result,
    num_rows,
    num_columns,
    low_stride,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """base (M, N) + bias (N) + low (M, r) @ up (N, r).T, accumulated in fp32; rows of `low` are `low_stride` apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = row < num_rows
    inside = here[:, None] & (column < num_columns)[None, :]
    place = row[:, None] * num_columns + column[None, :]
    total = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    for start in range(0, RANK, RANKS):
        number = start + tl.arange(0, RANKS)
        left = tl.load(
            low + row[:, None] * low_stride + number[None, :], mask=here[:, None] & (number < RANK)[None, :], other=0.0
        )
        right = tl.load(
            up + column[None, :] * RANK + number[:, None],
            mask=(column < num_columns)[None, :] & (number < RANK)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    tl.store(result + place, total, mask=inside)


# ---- MLP (mlp.py). One program: one row, read once.

SMALLEST_PEAK: tl.constexpr = tl.constexpr(1e-12)
"""Value of `quantize.SMALLEST_PEAK`."""


@triton.jit
def _store_codes(target, scale_target, values, peak, place, inside, largest):
    """Stores values as bytes of float8_e4m3fn in units of the scale that their row's peak gives."""
    tl.store(target + place, (values * (largest / peak)).to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
    tl.store(scale_target, peak / largest)


@triton.jit
def _gelu(x):
    """Returns GELU in its tanh form, and its slope: x * s(2u), s the logistic function, u as below.

    u = sqrt(2 / pi) (x + 0.044715 x^3)
    """
    logistic = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    slope = logistic + x * logistic * (1.0 - logistic) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return x * logistic, slope


@triton.jit
def gelu_codes(
    hidden,
    bias,
    beside,
    codes,
    scale,
    kept,
    kept_scale,
    width,
    num_beside,
    largest,
    HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """Row [beside (P), gelu(hidden + bias) (H)] -> its codes, and the codes of its hidden + bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(hidden + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _gelu(x)
    peak = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST_PEAK)
    target = codes + row * (num_beside + width)
    if BESIDE > 1:
        place = tl.arange(0, BESIDE)
        other = tl.load(beside + row * num_beside + place, mask=place < num_beside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(other), 0))
        _store_codes(target, scale + row, other, peak, place, place < num_beside, largest)
    _store_codes(target + num_beside, scale + row, value, peak, column, inside, largest)
    if KEEPS:
        input_peak = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST_PEAK)
        _store_codes(kept + row * width, kept_scale + row, x, input_peak, column, inside, largest)


@triton.jit
def gelu_gradient_codes(
    gradient,
    gradient_stride,
    kept,
    kept_scale,
    bias,
    column_scale,
    codes,
    scale,
    width,
    largest,
    HAS_BIAS: tl.constexpr,
    KEPT_CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row gradient * slope(input) * column_scale (H) -> its codes; the input comes as codes, or plain with a bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    if KEPT_CODES:
        byte = tl.load(kept + row * width + column, mask=inside, other=0)
        x = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32) * tl.load(kept_scale + row)
    else:
        x = tl.load(kept + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    _, slope = _gelu(x)
    value = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32) * slope
    value *= tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST_PEAK)
    _store_codes(codes + row * width, scale + row, value, peak, column, inside, largest)


# ---- rows of 8-bit codes (quantize.py). One program: one row, read once.


@triton.jit
def quantize_row(values, stride, codes, scale, width, largest, WIDTH: tl.constexpr):
    """(M, K) with rows `stride` apart -> bytes of float8_e4m3fn (M, K), and the scale of each row (M)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(values + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST_PEAK)
    # torch divides a number by a tensor through its reciprocal; done otherwise, values halfway between codes differ.
    byte = (value * (tl.div_rn(1.0, peak) * largest)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + row * width + column, byte, mask=inside)
    tl.store(scale + row, tl.div_rn(peak, largest))
