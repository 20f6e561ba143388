"""Matrices are cut as `torch.linalg.svd` cuts them by hand, and the error that is stated is the one that is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixtune.deltas import svd
from pixtune.deltas.delta import Kronecker, dense
from pixtune.deltas.svd import Cut, Wanted, cut_dense, cut_kronecker, cut_sum
from pixtune.trained.fused_layers import LowRank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def closest(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def check(cut: Cut, whole: Tensor, rank: int, rel: float = 1e-5) -> None:
    """The cut is the closest matrix, and its error and norm are stated."""
    made = cut.delta.scale * (cut.delta.up.double() @ cut.delta.down.double())
    assert cut.delta.rank == rank
    torch.testing.assert_close(made, closest(whole, rank), rtol=0, atol=rel * float(whole.norm()))
    assert cut.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert cut.error == pytest.approx(float((made - whole).norm()), rel=1e-4, abs=1e-6 * cut.norm)


ONE = LowRank(drawn(6, 20), drawn(30, 6, seed=1), 0.5)
OTHER = LowRank(drawn(4, 20, seed=2), drawn(30, 4, seed=3), -2.0)


def whole_of(*deltas: LowRank) -> Tensor:
    return torch.stack([delta.scale * (delta.up.double() @ delta.down.double()) for delta in deltas]).sum(dim=0)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lora_is_cut_by_hand(rank: int) -> None:
    check(cut_sum([ONE], Wanted(rank), torch.float32), whole_of(ONE), rank)


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_a_sum_of_loras_is_cut_by_hand(rank: int) -> None:
    check(cut_sum([ONE, OTHER], Wanted(rank), torch.float32), whole_of(ONE, OTHER), rank)


def test_the_error_counts_the_number_format() -> None:
    cut = cut_sum([ONE], Wanted(6), torch.bfloat16)
    made = cut.delta.up.double() @ cut.delta.down.double()
    assert cut.error == pytest.approx(float((made - whole_of(ONE)).norm()), rel=1e-6)
    assert 1e-4 < cut.error / cut.norm < 1e-2  # bf16 has 8 bits


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_a_share_of_energy_takes_the_least_rank_that_holds_it(energy: float) -> None:
    squares = torch.linalg.svdvals(whole_of(ONE, OTHER)).square()
    held = squares.cumsum(0) / squares.sum()
    rank = int((held < energy - 1e-12).sum()) + 1
    assert cut_sum([ONE, OTHER], Wanted(energy=energy), torch.float32).delta.rank == rank
    assert cut_sum([ONE, OTHER], Wanted(2, energy), torch.float32).delta.rank == min(2, rank)
    assert cut_dense(whole_of(ONE, OTHER).float(), Wanted(energy=min(energy, 0.99)), torch.float32, "x").delta.rank == (
        int((held < min(energy, 0.99)).sum()) + 1
    )


def test_a_delta_of_zeros_has_one_rank_of_zeros() -> None:
    zero = LowRank(drawn(4, 20), torch.zeros(30, 4), 1.0)
    for wanted in (Wanted(2), Wanted(energy=0.9)):
        cut = cut_sum([zero], wanted, torch.float32)
        assert not dense(cut.delta).any() and cut.error == cut.norm == 0
        assert cut.delta.up.isfinite().all() and cut.delta.down.isfinite().all()
    assert not dense(cut_dense(torch.zeros(5, 6), Wanted(energy=0.9), torch.float32, "x").delta).any()


@pytest.mark.parametrize("wanted", [Wanted(1), Wanted(7), Wanted(energy=0.9)])
def test_a_lokr_is_cut_by_hand(wanted: Wanted) -> None:
    delta = Kronecker(drawn(4, 5), drawn(6, 3, seed=1), -1.5)
    whole = delta.scale * torch.kron(delta.left.double(), delta.right.double())
    squares = torch.linalg.svdvals(whole).square()
    rank = wanted.rank or int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    check(cut_kronecker(delta, wanted, torch.float32), whole, rank)


def slow_spectrum(rows: int, columns: int) -> Tensor:
    """Singular values that fall as 1 / sqrt(n), slower than those of trained differences do."""
    left, right = torch.linalg.qr(drawn(rows, columns))[0], torch.linalg.qr(drawn(columns, columns, seed=1))[0]
    return left * torch.arange(1, columns + 1).rsqrt() @ right


def test_a_large_matrix_is_cut_nearly_as_well_by_drawn_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = slow_spectrum(200, 150)
    monkeypatch.setattr(svd, "EXACT_SIDE", 8)
    cut = cut_dense(matrix, Wanted(12), torch.float32, "layer")
    best = float((matrix - closest(matrix, 12)).norm())
    assert best <= cut.error < 1.0005 * best
    again = cut_dense(matrix, Wanted(12), torch.float32, "layer")
    assert again.delta.up.equal(cut.delta.up)
    made = cut.delta.up.double() @ cut.delta.down.double()
    assert cut.error == pytest.approx(float((matrix - made).norm()), rel=1e-6)


def test_a_share_of_energy_is_found_however_many_directions_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = slow_spectrum(220, 180)
    monkeypatch.setattr(svd, "EXACT_SIDE", 8)
    monkeypatch.setattr(svd, "FIRST_RANK", 4)
    squares = torch.linalg.svdvals(matrix.double()).square()
    rank = int((squares.cumsum(0) < 0.7 * squares.sum()).sum()) + 1
    assert abs(cut_dense(matrix, Wanted(energy=0.7), torch.float32, "x").delta.rank - rank) <= 1
