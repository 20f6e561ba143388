"""Sizes of adapters, against what PEFT attaches."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pixtune.plan.adapter import NEAR_SQUARE, Adapter, split


def test_a_side_is_split_as_by_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    sides = (*range(1, 40), 97, 192, 256, 1024, 3072, 3584, 9216, 12288, 18432, 3072 * 7)
    for side, factor in itertools.product(sides, (NEAR_SQUARE, 2, 3, 4, 8, 16, 37, 64, 100, 4096, 65536)):
        assert split(side, factor) == factorization(side, factor), (side, factor)


@pytest.mark.parametrize("low_rank", ["none", "larger", "both"])
@pytest.mark.parametrize("factor", [NEAR_SQUARE, 4, 16])
@pytest.mark.parametrize("rank", [1, 3, 8, 64])
def test_sizes_of_a_lokr_are_those_of_peft(low_rank: str, factor: int, rank: int) -> None:
    from peft import LoKrConfig, inject_adapter_in_model

    adapter = Adapter("lokr", rank, {}, factor, low_rank)
    model: Any = nn.ModuleDict({"wide": nn.Linear(48, 192), "deep": nn.Linear(192, 48), "odd": nn.Linear(15, 7)})
    whole = 192 if low_rank == "none" else rank
    config = LoKrConfig(
        r=whole, decompose_factor=factor, decompose_both=low_rank == "both", target_modules=["wide", "deep", "odd"]
    )
    with torch.device("meta"), warnings.catch_warnings():
        inject_adapter_in_model(config, model)
    for name in ("wide", "deep", "odd"):
        layer = model[name]
        shape = (layer.base_layer.out_features, layer.base_layer.in_features)
        found = {key.split(".")[0]: tuple(p.shape) for key, p in layer.named_parameters() if "lokr" in key}
        assert adapter.lokr_shapes(name, shape) == found
        assert adapter.count_weights(name, shape) == sum(p.numel() for n, p in layer.named_parameters() if "lokr" in n)


def test_ranks_of_single_layers_count() -> None:
    adapter = Adapter("dora", 4, {"a": 8})
    assert adapter.count_weights("a", (10, 20)) == 8 * 30 + 10
    assert adapter.count_weights("b", (10, 20)) == 4 * 30 + 10
    assert Adapter("lora", 4).count_weights("b", (10, 20)) == 4 * 30
    assert [Adapter(kind, 4).note is None for kind in ("lora", "dora", "lokr")] == [True, False, False]
