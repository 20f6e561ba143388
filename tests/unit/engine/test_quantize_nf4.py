"""Four-bit weights: what is stored is the best that the format can hold, and no worse wherever weights are unusual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pixtune.engine import kernels, quantize

LEVELS, SCALES = torch.tensor(kernels.NF4_LEVELS), torch.tensor(kernels.NF4_SCALES)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Student's t with 5 degrees of freedom."""
    chi2 = gaussian(5, *shape, seed=seed).square().sum(dim=0)
    return gaussian(*shape, seed=seed + 1) / (chi2 / 5).sqrt()


def stored(weight: Tensor, codes: torch.dtype | None = None) -> Tensor:
    """The weight that a packed one stands for."""
    packed, block_scale, scale = quantize.pack_nf4(weight, codes)
    if codes is None:
        return kernels.unpack_nf4(packed, block_scale) * scale
    expanded, row_scale = quantize.row_codes(packed, block_scale, scale, codes, transposed=False)
    return expanded.float() * row_scale


def error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def plain_nf4(weight: Tensor) -> Tensor:
    """NormalFloat with one scale, the peak, for 64 neighbours, as everybody has it.

    The levels are computed as Dettmers et al. 2023 do: means of neighbouring quantiles of the normal distribution, 8
    for its upper half and 7 for the lower one, divided by the largest.
    """
    edge = 0.5 * (1 / 32 + 1 / 30)
    quantiles = [
        *(-torch.special.ndtri(torch.linspace(1 - edge, 0.5, 8)[:-1])),
        torch.tensor(0.0),
        *torch.special.ndtri(torch.linspace(0.5, 1 - edge, 9)[1:]),
    ]
    levels = torch.stack(quantiles) / torch.special.ndtri(torch.tensor(1 - edge))
    blocks = weight.view(-1, 64)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[(blocks / peak).unsqueeze(-1).sub(levels).abs().argmin(-1)] * peak).view_as(weight)


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("draw", [gaussian, heavy_tailed])
def test_half_the_squared_error_of_plain_nf4(draw: Callable[..., Tensor], codes: torch.dtype | None) -> None:
    weight = draw(64, 1024)
    plain = plain_nf4(weight)
    assert 0.085 < error(plain, weight) < 0.11, "the published levels have this error"
    assert error(stored(weight, codes), weight) ** 2 < 0.55 * error(plain, weight) ** 2


@pytest.mark.parametrize("draw", [gaussian, heavy_tailed])
def test_few_scales_are_tried_and_hardly_a_better_one_is_missed(draw: Callable[..., Tensor]) -> None:
    weight = draw(32, 256)
    unit = weight.abs().amax(dim=1, keepdim=True) / SCALES.max()
    blocks = (weight / unit).view(-1, 16)
    least = torch.full((len(blocks),), torch.inf)
    for scale in SCALES:
        nearest = (blocks / scale).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
        least = least.minimum((LEVELS[nearest] * scale - blocks).square().sum(dim=1))
    found = ((stored(weight) - weight) / unit).view(-1, 16).square().sum(dim=1)
    assert (found >= least * 0.999).all(), "better than the best is a mistake of the test"
    assert found.sum() < 1.03 * least.sum()


def test_codes_are_the_nearest_levels() -> None:
    weight = gaussian(8, 128)
    packed, block_scale, scale = quantize.pack_nf4(weight)
    factor = SCALES[block_scale.int()].unsqueeze(-1) * scale.unsqueeze(-1)
    blocks = weight.view(8, 8, 16)
    nearest = LEVELS[(blocks / factor).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)] * factor
    torch.testing.assert_close(kernels.unpack_nf4(packed, block_scale) * scale, nearest.flatten(1))


def test_levels_are_where_lloyds_algorithm_leaves_them() -> None:
    """Each is the mean of the weights that take it, weighted by what an error there costs: its scale squared."""
    weight = gaussian(512, 1024, seed=3)
    packed, block_scale, scale = quantize.pack_nf4(weight)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()
    factor = (SCALES[block_scale.int()] * scale).repeat_interleave(16, dim=1).flatten().double()
    products = torch.zeros(16).double().index_add_(0, codes, weight.flatten() * factor)
    squares = torch.zeros(16).double().index_add_(0, codes, factor.square())
    moved = (products / squares - LEVELS).abs()
    moved[7] = 0  # held at zero
    assert moved.max() < 2e-3


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_scales_are_chosen_for_what_the_products_see(codes: torch.dtype) -> None:
    weight = gaussian(64, 1024)
    packed, block_scale, scale = quantize.pack_nf4(weight)  # as if nothing were rounded afterwards
    unaware, row_scale = quantize.row_codes(packed, block_scale, scale, codes, transposed=False)
    aware, exact = error(stored(weight, codes), weight), error(stored(weight), weight)
    assert aware < error(unaware.float() * row_scale, weight)
    assert aware < 1.03 * exact


def test_unusual_rows() -> None:
    """Zeros, equal weights, tiny and huge rows, a mirrored row, and an outlier of 1000 beside ordinary weights."""
    row = gaussian(128)
    outlier = row.clone()
    outlier[5] = 1000.0
    weight = torch.stack([torch.zeros(128), torch.full((128,), 0.3), row * 1e-6, row * 1e6, row, -row, outlier])
    found = stored(weight)
    assert found[0].equal(weight[0])
    torch.testing.assert_close(found[1], weight[1], rtol=0.01, atol=0)
    torch.testing.assert_close(found[2], found[4] * 1e-6)
    torch.testing.assert_close(found[3], found[4] * 1e6)
    torch.testing.assert_close(found[5], -found[4])
    assert found[6, 5] == pytest.approx(1000, rel=0.02)
    # The smallest scale is a 248th of the largest: the others keep their size, and half of their digits.
    assert error(found[6, 16:], outlier[16:]) < 0.3


def test_pieces_are_packed_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(50, 64)
    whole = quantize.pack_nf4(weight)
    monkeypatch.setattr(quantize, "MAX_WEIGHTS_AT_ONCE", 7 * 64)
    assert all(map(torch.equal, quantize.pack_nf4(weight), whole))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_a_unit_is_as_large_as_8_bits_allow(codes: torch.dtype) -> None:
    largest = LEVELS.abs().max() * SCALES.max() * kernels.UNIT_CODE[codes]
    assert quantize.LARGEST_CODE[codes] / 2 < largest <= quantize.LARGEST_CODE[codes]
