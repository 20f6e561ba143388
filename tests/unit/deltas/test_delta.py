"""Deltas by their factors are what PEFT's own layers add, and angles and norms are those of the whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from pixtune.deltas.delta import Change, Dora, Kronecker, angle_between, changed_weight, dense, kronecker_svd, norm
from pixtune.trained.fused_layers import LowRank

INPUTS, OUTPUTS = 24, 40


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def peft_layer(config: Any) -> tuple[Any, Tensor]:
    """One linear layer with an adapter of PEFT's, all of whose numbers are drawn; and the layer's own weight."""
    model: Any = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    weight = drawn(OUTPUTS, INPUTS, seed=1)
    model[0].weight.data.copy_(weight)
    adapted = get_peft_model(model, config)
    for number, parameter in enumerate(each for each in adapted.parameters() if each.requires_grad):
        parameter.data.copy_(drawn(*parameter.shape, seed=10 + number))
    return adapted.base_model.model[0], weight


def merged(layer: Any) -> Tensor:
    layer.merge()
    return layer.get_base_layer().weight.detach()


def test_a_lora_changes_a_weight_as_peft_does() -> None:
    layer, weight = peft_layer(LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    ours = LowRank(layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach(), 7 / 3)
    torch.testing.assert_close(changed_weight(weight, [ours])[0], merged(layer))


def test_a_dora_changes_a_weight_as_peft_does() -> None:
    layer, weight = peft_layer(LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["0"]))
    low_rank = LowRank(layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach(), 7 / 3)
    magnitude = layer.lora_magnitude_vector.default.weight.detach()
    torch.testing.assert_close(changed_weight(weight, [Dora(low_rank, magnitude)])[0], merged(layer))


def test_a_lokr_changes_a_weight_as_peft_does() -> None:
    layer, weight = peft_layer(LoKrConfig(r=2, alpha=5, target_modules=["0"]))
    left = layer.lokr_w1.default.detach()
    right = (layer.lokr_w2_a.default @ layer.lokr_w2_b.default).detach()
    torch.testing.assert_close(changed_weight(weight, [Kronecker(left, right, 5 / 2)])[0], merged(layer))


def test_rows_of_zeros_stay_zero_in_a_dora() -> None:
    low_rank = LowRank(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    result = changed_weight(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), [Dora(low_rank, torch.tensor([2.0, 10.0]))])[0]
    assert result.tolist() == [[0.0, 0.0], [6.0, 8.0]]


LOW_RANK = LowRank(drawn(3, 12), drawn(10, 3, seed=1), -0.7)
DELTAS: dict[str, LowRank | Kronecker] = {
    "LoRA": LOW_RANK,
    "LoRA of a higher rank": LowRank(drawn(5, 12, seed=2), drawn(10, 5, seed=3), 2.0),
    "LoRA of more ranks than the layer has": LowRank(drawn(20, 12, seed=4), drawn(10, 20, seed=5), 0.3),
    "LoRA that is nearly the first": LowRank(LOW_RANK.down * (1 + 1e-6), LOW_RANK.up, -0.7),
    "LoRA of zeros": LowRank(drawn(2, 12), torch.zeros(10, 2), 1.0),
    "LoKr": Kronecker(drawn(2, 3, seed=6), drawn(5, 4, seed=7), 1.5),
    "LoKr of the same shapes": Kronecker(drawn(2, 3, seed=8), drawn(5, 4, seed=9), -1.0),
    "LoKr of other shapes": Kronecker(drawn(5, 4, seed=10), drawn(2, 3, seed=11), 1.0),
    "LoRA in bf16": LowRank(drawn(3, 12).bfloat16(), drawn(10, 3, seed=1).bfloat16(), 1.0),
}


def whole(change: Change) -> Tensor:
    """The matrix in fp64, by the definition."""
    assert not isinstance(change, Dora)
    if isinstance(change, LowRank):
        return change.scale * (change.up.double() @ change.down.double())
    return change.scale * torch.kron(change.left.double(), change.right.double())


@pytest.mark.parametrize("name", DELTAS)
def test_norms_are_those_of_the_whole_matrices(name: str) -> None:
    delta = DELTAS[name]
    torch.testing.assert_close(dense(delta).double(), whole(delta), rtol=1e-5, atol=1e-5)
    assert norm(delta) == pytest.approx(float(whole(delta).norm()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("first", DELTAS)
@pytest.mark.parametrize("second", DELTAS)
def test_angles_are_those_of_the_whole_matrices(first: str, second: str) -> None:
    one, other = whole(DELTAS[first]), whole(DELTAS[second])
    found = angle_between(DELTAS[first], DELTAS[second])
    kinds = {name if name == "LoKr of other shapes" else name[:4] for name in (first, second)}
    near = 1e-12 if len(kinds) == 1 else 1e-5  # of different kinds, the matrices are formed in fp32
    scale = max(float(one.norm() * other.norm()), 1e-30)
    assert found.product / scale == pytest.approx(float((one * other).sum()) / scale, abs=near)
    assert found.first_norm == pytest.approx(float(one.norm()), rel=near)
    # Far below both norms, so that it is lost where squares are subtracted. LoKrs do subtract them.
    floor = 1e-6 if "LoKr" in first + second else 1e-12
    assert found.distance == pytest.approx(float((one - other).norm()), rel=1e-5, abs=floor * float(one.norm() + 1))
    if (length := float(one.norm() * other.norm())) > 0:
        assert found.cosine == pytest.approx(float((one * other).sum()) / length, abs=near)
    else:
        assert found.cosine is None


@pytest.mark.parametrize("scale", [1.5, -2.0])
def test_singular_values_of_a_kronecker_product_are_those_of_the_whole_matrix(scale: float) -> None:
    delta = Kronecker(drawn(4, 3), drawn(5, 6, seed=1), scale)
    found, values = kronecker_svd(delta, 4)
    expected = torch.linalg.svdvals(whole(delta))
    torch.testing.assert_close(values, expected[: len(values)])
    left, sizes, right = torch.linalg.svd(whole(delta), full_matrices=False)
    closest = left[:, :4] @ torch.diag(sizes[:4]) @ right[:4]
    torch.testing.assert_close(found.left_OK @ torch.diag(found.values_K) @ found.right_KI, closest)
