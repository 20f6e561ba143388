"""Joined LoRAs add what all of them add, and a comparison says what was done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune.deltas.adapter_file import AdapterFile, read_adapter
from pixtune.deltas.comparing import compare_adapters
from pixtune.deltas.delta import Dora, dense
from pixtune.deltas.joining import Joined, common_dtype, join_adapters
from pixtune.deltas.svd import Wanted
from pixtune.errors import WeightsError
from pixtune.trained.fused_layers import LowRank
from tests.unit.deltas.loras import lora_tensors, write_lora

Q, K, V = (f"transformer_blocks.30.attn.to_{each}" for each in "qkv")


def lora(path: Path, layers: tuple[str, ...], rank: int, alpha: float, seed: int, dtype: torch.dtype) -> AdapterFile:
    tensors = lora_tensors(dict.fromkeys(layers, (12, 9)), rank, seed)
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    return read_adapter(write_lora(path, {name: each.to(dtype) for name, each in tensors.items()}, **config))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[AdapterFile, AdapterFile]:
    one = lora(tmp_path / "one.safetensors", (Q, K), 4, 4, 0, torch.float32)
    return one, lora(tmp_path / "other.safetensors", (K, V), 3, 4.5, 1, torch.float32)


def whole(adapter: AdapterFile, layer: str) -> Tensor:
    change = adapter.changes.get(layer)
    assert not isinstance(change, Dora)
    return torch.zeros(12, 9) if change is None else dense(change)


def made(joined: Joined) -> Tensor:
    return dense(joined.cut.delta)


def test_without_a_rank_nothing_is_lost(pair: tuple[AdapterFile, AdapterFile]) -> None:
    joined = join_adapters([(pair[0], 1.0), (pair[1], -0.7)], Wanted(), torch.float32)
    assert {layer: each.cut.delta.rank for layer, each in joined.items()} == {Q: 4, K: 7, V: 3}
    for layer, each in joined.items():
        torch.testing.assert_close(made(each), whole(pair[0], layer) - 0.7 * whole(pair[1], layer))
        assert each.cut.error <= 1e-6 * each.cut.norm


def test_of_equal_scales_no_number_changes(tmp_path: Path) -> None:
    files = [lora(tmp_path / f"{n}.safetensors", (Q,), 4, 7, n, torch.bfloat16) for n in range(2)]
    joined = join_adapters([(file, 1.0) for file in files], Wanted(), common_dtype(files))[Q]
    ups = [file.layers[Q].tensors["lora_B.weight"] for file in files]
    assert joined.cut.delta.up.equal(torch.cat(ups, dim=1)) and joined.cut.delta.up.dtype == torch.bfloat16
    assert joined.cut.error == 0 and joined.cut.delta.scale == 7 / 4


def test_the_rounding_of_other_scales_is_stated(tmp_path: Path) -> None:
    files = [lora(tmp_path / f"{n}.safetensors", (Q,), 4, 4 + n, n, torch.bfloat16) for n in range(2)]
    cut = join_adapters([(file, 1.0) for file in files], Wanted(), torch.bfloat16)[Q].cut
    exact = torch.stack([whole(file, Q) for file in files]).sum(dim=0).double()
    assert cut.error == pytest.approx(float((dense(cut.delta).double() - exact).norm()), rel=1e-3)
    assert cut.error > 1e-4 * cut.norm


def test_to_a_rank_the_sum_is_cut_by_hand(pair: tuple[AdapterFile, AdapterFile]) -> None:
    joined = join_adapters([(pair[0], 1.0), (pair[1], 2.0)], Wanted(3), torch.float32)
    for layer, each in joined.items():
        exact = (whole(pair[0], layer) + 2 * whole(pair[1], layer)).double()
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        torch.testing.assert_close(made(each).double(), left[:, :3] * values[:3] @ right[:3], rtol=0, atol=1e-5)
        assert each.cut.error == pytest.approx(float(values[3:].norm()), rel=1e-4, abs=1e-5)
    assert join_adapters([(pair[0], 1.0)], Wanted(9), torch.float32)[Q].cut.delta.up.equal(
        pair[0].layers[Q].tensors["lora_B.weight"]
    ), "a LoRA of a lower rank stays as it is"


def test_a_lokr_needs_a_rank(tmp_path: Path, pair: tuple[AdapterFile, AdapterFile]) -> None:
    factors = {f"{Q}.lokr_w1": torch.randn(3, 3), f"{Q}.lokr_w2": torch.randn(4, 3)}
    lokr = read_adapter(write_lora(tmp_path / "lokr.safetensors", factors))
    both = [(pair[0], 1.0), (lokr, 0.5)]
    with pytest.raises(WeightsError, match=r"LoKr.*--rank"):
        join_adapters(both, Wanted(), torch.float32)
    joined = join_adapters(both, Wanted(5), torch.float32)[Q]
    exact = (whole(pair[0], Q) + 0.5 * torch.kron(*factors.values())).double()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(made(joined).double(), left[:, :5] * values[:5] @ right[:5], rtol=0, atol=1e-5)


def test_different_models_are_refused(tmp_path: Path, pair: tuple[AdapterFile, AdapterFile]) -> None:
    tensors = lora_tensors({"single_transformer_blocks.0.attn.to_q": (12, 9)})
    flux = read_adapter(write_lora(tmp_path / "flux.safetensors", tensors))
    small = read_adapter(write_lora(tmp_path / "small.safetensors", lora_tensors({Q: (6, 9)})))
    for other, words in ((flux, "which have different layers"), (small, "models of different sizes: .*to_q")):
        with pytest.raises(WeightsError, match=words):
            join_adapters([(pair[0], 1.0), (other, 1.0)], Wanted(), torch.float32)
        with pytest.raises(WeightsError, match=words):
            compare_adapters(pair[0], other)


def test_a_comparison_is_that_of_the_whole_matrices(pair: tuple[AdapterFile, AdapterFile]) -> None:
    found = compare_adapters(*pair)
    one, other = (torch.cat([whole(file, layer).flatten() for layer in (Q, K, V)]).double() for file in pair)
    assert found.layers.keys() == {K} and found.only_first.keys() == {Q} and found.only_second.keys() == {V}
    assert found.whole.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(one, other, dim=0)), abs=1e-6
    )
    assert found.whole.first_norm == pytest.approx(float(one.norm()), rel=1e-6)
    assert found.whole.distance == pytest.approx(float((one - other).norm()), rel=1e-6)


def test_a_lora_and_its_double_point_the_same_way(tmp_path: Path) -> None:
    one = lora(tmp_path / "one.safetensors", (Q, K), 4, 4, 0, torch.float32)
    double = lora(tmp_path / "double.safetensors", (Q, K), 4, -8, 0, torch.float32)
    whole_angle = compare_adapters(one, double).whole
    assert whole_angle.cosine == pytest.approx(-1, abs=1e-12)
    assert whole_angle.second_norm == pytest.approx(2 * whole_angle.first_norm)
    assert isinstance(one.changes[Q], LowRank)


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    files = [lora(tmp_path / f"{n}.safetensors", (layer,), 4, 4, n, torch.float32) for n, layer in enumerate((Q, K))]
    with pytest.raises(WeightsError, match="no layer in common"):
        compare_adapters(*files)
