"""Sizes of the adapter that is trained, by its kind: weights, and what a layer holds for it. Imports no torch.

How large LoKr's matrices are is PEFT's decision (`peft.tuners.lokr.layer`); the rule is repeated here in numbers, since
a plan must not wait for PEFT, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KINDS = {"lora": "LoRA", "lokr": "LoKr", "dora": "DoRA"}
"""Kinds of adapters, with their names in messages."""
NEAR_SQUARE = -1
"""PEFT's factor that gives both matrices about the same side."""
COMPILED_KEEP: Mapping[str, float] = {"lora": 0.0, "lokr": 0.91, "dora": 0.59}
"""Share of an adapter's outputs that a compiled block keeps, where none of them is kept for a LoRA: of all layers of a
LoKr, of a DoRA's queries, keys and values. Measured with Qwen-Image in 8 bits on an H200 (benchmarks/RESULTS.md)."""
STEP_TIMES: Mapping[str, float] = {"lora": 1.0, "lokr": 1.11, "dora": 1.06}
"""Time of a step over that of a LoRA's, copies apart. Measured as `COMPILED_KEEP`, with a LoKr of factor 16."""
USUAL_FACTOR = 16
"""Size of LoKr's smaller matrix where a config names none."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of a run, in what decides its size."""

    kind: str = "lora"
    rank: int = 0
    """Rank of the layers that `ranks` does not name."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single layers, by their paths."""
    factor: int = USUAL_FACTOR
    """LoKr: side of the smaller matrix, where it divides a layer's side."""
    low_rank: str = "none"
    """LoKr: which of its matrices are products of low rank: "none", "larger" or "both"."""

    def rank_of(self, layer: str) -> int:
        return self.ranks.get(layer, self.rank)

    def count_weights(self, layer: str, shape: Sequence[int]) -> int:
        """Counts the trained weights of a linear layer.

        Args:
            shape: output and input features.
        """
        return sum(map(math.prod, self.tensor_shapes(layer, shape)))

    def tensor_shapes(self, layer: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the shapes of a linear layer's trained tensors.

        Args:
            shape: output and input features.
        """
        if self.kind == "lokr":
            return list(self.lokr_shapes(layer, shape).values())
        rank, (rows, columns) = self.rank_of(layer), shape
        return [(rank, columns), (rows, rank), *([(rows,)] if self.kind == "dora" else [])]

    def lokr_shapes(self, layer: str, shape: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Returns the shapes of LoKr's matrices by PEFT's names for them."""
        rank, shapes = self.rank_of(layer), dict[str, tuple[int, int]]()
        smaller, larger = zip(*(split(side, self.factor) for side in shape), strict=True)
        of_low_rank = {"lokr_w1": self.low_rank == "both", "lokr_w2": self.low_rank != "none"}
        for (name, is_low), (rows, columns) in zip(of_low_rank.items(), (smaller, larger), strict=True):
            if is_low and rank < max(rows, columns) / 2:
                shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
            else:
                shapes[name] = (rows, columns)
        return shapes

    def count_products(self, layer: str, shape: Sequence[int]) -> int:
        """Counts the products of two numbers that a layer's adapter takes for each token in the forward pass."""
        if self.kind != "lokr":
            return self.rank_of(layer) * sum(shape)
        smaller, larger = split(shape[1], self.factor)[0], split(shape[0], self.factor)[1]
        return larger * shape[1] + smaller * shape[0]

    def low_features(self, layer: str) -> int:
        """Counts the features per token that a layer keeps of its down-projection."""
        return 0 if self.kind == "lokr" else self.rank_of(layer)

    @property
    def compiled_keep(self) -> float:
        return COMPILED_KEEP[self.kind]

    @property
    def step_times(self) -> float:
        return STEP_TIMES[self.kind]

    def features_at_work(self, shape: Sequence[int]) -> int:
        """Counts the features per token that plain kernels hold at a time while they compute a layer's gradients."""
        if self.kind == "lokr":  # the product along the last axis and its gradient, and both by last features
            return 3 * split(shape[1], self.factor)[0] * split(shape[0], self.factor)[1] + shape[0]
        return 3 * shape[0] if self.kind == "dora" else 0  # the gained sum, and gradients in fp32

    def bytes_beside(self, layer: str, shape: Sequence[int]) -> int:
        """Counts bytes that a layer holds beside trained weights, gradients and optimizer states."""
        if self.kind == "lokr":
            return 2 * self.count_weights(layer, shape)  # rounded for the products
        return 4 * shape[0] * (self.kind == "dora")  # lengths of the frozen weight's rows

    @property
    def note(self) -> str | None:
        """A sentence for the plan on what this kind costs; None for a LoRA."""
        if self.kind == "lokr":
            return "LoKr: its products run by plain kernels, layer by layer, beside the frozen ones"
        if self.kind == "dora":
            return "DoRA: each pass measures its layers' rows anew, and keeps each layer's sum before its gain"
        return None


def split(side: int, factor: int) -> tuple[int, int]:
    """Splits a layer's side into the sides of LoKr's smaller and larger matrix, as PEFT's `factorization` does."""
    if factor != NEAR_SQUARE and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor == NEAR_SQUARE else min(factor, math.isqrt(side))
    smaller = next(each for each in range(most, 0, -1) if side % each == 0)
    return smaller, side // smaller
