"""PEFT's settings of an adapter: its config, what a file says of them, and the scale that they give to a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixtune.config.schema import TrainConfig
from pixtune.plan.adapter import USUAL_FACTOR, Adapter
from pixtune.trained.layer_patterns import as_patterns

PEFT_TYPES = {"lora": "LORA", "dora": "LORA", "lokr": "LOKR"}
"""PEFT's names of the kinds of adapters. A DoRA is a LoRA with `use_dora`."""


@dataclass(frozen=True)
class Scheme:
    """PEFT's settings of an adapter, its layers apart."""

    rank: int
    alpha: float
    kind: str = "lora"
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single layers, by their paths; the others have `rank`."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Alphas of single layers, likewise."""
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    factor: int = USUAL_FACTOR
    """LoKr: PEFT's `decompose_factor`."""
    decompose_both: bool = False
    """LoKr: the smaller matrix is a product of low rank too."""

    def scale_of(self, layer: str) -> float:
        """Returns the factor of what a layer's adapter adds."""
        rank = self.ranks.get(layer, self.rank)
        return self.alphas.get(layer, self.alpha) / (rank**0.5 if self.use_rslora else rank)

    def entries(self, targets: Sequence[str]) -> dict[str, Any]:
        """Returns the keys of PEFT's config that differ from its defaults, as JSON can hold them.

        Args:
            targets: endings of the layers' paths, or whole paths, as PEFT's `target_modules` takes them.
        """
        alpha = "alpha" if self.kind == "lokr" else "lora_alpha"
        found: dict[str, Any] = {"r": self.rank, alpha: self.alpha, "target_modules": sorted(targets)}
        found["peft_type"] = PEFT_TYPES[self.kind]
        if ranks := as_patterns(self.ranks, self.rank):
            found["rank_pattern"] = ranks
        if alphas := as_patterns(self.alphas, self.alpha):
            found["alpha_pattern"] = alphas
        if self.use_rslora:
            found["use_rslora"] = True
        if self.kind == "dora":
            found["use_dora"] = True
        if self.kind == "lokr":
            found |= {"decompose_factor": self.factor, "decompose_both": self.decompose_both}
        return found

    def peft_config(self, targets: Sequence[str]) -> Any:
        """Returns PEFT's config of a new adapter, which changes nothing until it is trained.

        A DoRA's has no `use_dora`: PEFT would measure weights in formats that it does not know. `adapters.py` adds it.
        """
        from peft import LoKrConfig, LoraConfig

        unread = ("peft_type", "use_dora")
        settings = {key: value for key, value in self.entries(targets).items() if key not in unread}
        settings["target_modules"] = list(targets)
        if self.kind == "lokr":
            return LoKrConfig(**settings, init_weights="lycoris")
        return LoraConfig(**settings, init_lora_weights="gaussian")


def scheme_of(config: TrainConfig, adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Scheme:
    """Returns the settings of the adapter that a config asks for.

    Where `lora_alpha` is absent, each layer's alpha is its rank.

    Args:
        shapes: output and input features of the layers that get it, by their paths.
    """
    if adapter.kind == "lokr" and adapter.low_rank == "none":
        # PEFT takes a whole matrix from a rank of half its side on; scaled by alpha / rank, which is 1 here.
        rank = max(max(adapter.lokr_shapes(layer, shape)["lokr_w2"]) for layer, shape in shapes.items())
        return Scheme(rank, float(rank), "lokr", factor=adapter.factor)
    return Scheme(
        adapter.rank,
        config.alpha,
        adapter.kind,
        adapter.ranks,
        {layer: float(rank) for layer, rank in adapter.ranks.items()} if config.lora_alpha is None else {},
        config.adapter.rslora,
        adapter.factor,
        adapter.low_rank == "both",
    )
