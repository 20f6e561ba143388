"""LoRA files of diffusers, ComfyUI or kohya's trainers: read, and attached with the scale that each layer has there.

The scale stands in `lora_adapter_metadata`, PEFT's config of the adapter, or in a tensor `alpha` beside each layer; a
file with neither has the scale 1, as in the stock pipeline. What pixtune cannot apply as that pipeline does is refused
by name: ignored, it would give other pictures without a word.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Shapes
from pixtune.storage.files import file_digest
from pixtune.trained import adapters
from pixtune.trained.export import DIFFUSERS_FILE, read_tensors
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.layer_patterns import as_patterns, values_by_layer
from pixtune.trained.lora_formats import AdapterLayer, read_layers
from pixtune.trained.lora_names import DIFFUSERS_PREFIX, DOWN, UP, format_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

METADATA_KEY = "lora_adapter_metadata"
APPLIED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "peft_type"})
"""Keys of PEFT's `LoraConfig` that decide a LoRA's layers and their scales."""
WITHOUT_EFFECT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core",
        "qalora_group_size", "eva_config",
    }
)  # fmt: skip
"""Keys that change nothing once the layers are known by their tensors, and no longer trained."""
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is. Others, PiSSA for one, subtract the start from it."""


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that was read from a file."""

    path: Path
    weights: Mapping[str, Tensor]
    """`MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """Rank of each layer, by its path."""
    alphas: Mapping[str, float]
    """Alpha of each layer, likewise."""
    use_rslora: bool
    """Whether the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    format: str = "diffusers"
    """Whose names the file has: "diffusers", "comfyui" or "kohya"."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the layers that it is attached to."""
        return tuple(self.ranks)

    def scaled(self, strength: float) -> Self:
        """Returns it with a scale `strength` times as large."""
        alphas = {layer: strength * alpha for layer, alpha in self.alphas.items()}
        return replace(self, alpha=strength * self.alpha, alphas=alphas)

    def low_ranks(self) -> dict[str, LowRank]:
        """Returns the LoRA of each layer with its scale, by the layer's path."""
        scales = {
            layer: alpha / (math.sqrt(self.ranks[layer]) if self.use_rslora else self.ranks[layer])
            for layer, alpha in self.alphas.items()
        }
        return {
            layer: LowRank(self.weights[f"{layer}.{DOWN}"], self.weights[f"{layer}.{UP}"], scale)
            for layer, scale in scales.items()
        }

    @property
    def largest_rank(self) -> int:
        return max(self.ranks.values())

    def refuse_other_model(self, shapes: Shapes) -> None:
        """Checks by headers alone that a transformer has the layers that it is for, and that none outgrows its layer.

        Args:
            shapes: shapes of the transformer's tensors.

        Raises:
            WeightsError: it is for another model; names a layer.
        """
        for layer, rank in self.ranks.items():
            shape = shapes.get(f"{layer}.weight", ())
            if len(shape) != 2:
                raise WeightsError(f"{self.path} does not fit this model, which has no linear layer {layer}.")
            sides = tuple(self.weights[f"{layer}.lora_{matrix}.weight"].shape[1 - n] for n, matrix in enumerate("AB"))
            if sides != (shape[1], shape[0]) or rank > max(shape):
                raise WeightsError(
                    f"{self.path} does not fit this model: it has rank {rank} for {sides[0]} inputs and {sides[1]} "
                    f"outputs of {layer}, which has {shape[1]} and {shape[0]}."
                )

    def refuse_spoiled(self) -> None:
        """Checks that every number is finite; reads all of them.

        Raises:
            WeightsError: one is not; names its tensor.
        """
        for name, weight in self.weights.items():
            if not weight.float().isfinite().all():
                raise WeightsError(
                    f"{self.path} has weights in {name} that are no finite numbers, so nothing that is computed with "
                    "it would be one either. Fetch the file again."
                )


def read_saved_lora(path: Path, family: ModelFamily) -> SavedLora:
    """Reads a LoRA from a file that diffusers, ComfyUI or kohya's trainers load, whoever wrote it.

    Args:
        family: that of the model that the LoRA is for.

    Raises:
        WeightsError: it is none, is damaged, or needs something that pixtune does not do; names it.
    """
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise WeightsError(f"{path} holds no tensor.")
    try:
        layers = read_layers(tensors, family, metadata)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be used: {error}") from error
    for layer, adapter in layers.items():
        _check_layer(path, layer, adapter)
    weights = {f"{layer}.{part}": tensor for layer, own in layers.items() for part, tensor in own.tensors.items()}
    if METADATA_KEY not in metadata:
        ranks = {layer: own.low_rank.rank for layer, own in layers.items()}
        alphas = {layer: ranks[layer] if own.alpha is None else own.alpha for layer, own in layers.items()}
        rank, alpha = _most_common(ranks), float(_most_common(alphas))
        return SavedLora(path, weights, rank, alpha, ranks, alphas, False, format_of(tensors))
    if with_alpha := [layer for layer, own in layers.items() if own.alpha is not None]:
        raise WeightsError(
            f"{path} has two scales: {METADATA_KEY}, and an alpha of {len(with_alpha)} layers, such as "
            f"{with_alpha[0]}. Only one can be meant, and diffusers refuses both together. Remove one of them."
        )
    return _scaled_by_metadata(path, weights, layers, metadata[METADATA_KEY])


def read_lora_of_key(key: str, path: Path, family: ModelFamily) -> SavedLora:
    """Reads the LoRA file that a key of the config names.

    Raises:
        WeightsError: it is a folder, or see `read_saved_lora`; names the key.
    """
    if path.is_dir():
        raise WeightsError(f"{key} {path} is a folder. Give the LoRA file in it, such as {path / DIFFUSERS_FILE}.")
    try:
        return read_saved_lora(path, family)
    except WeightsError as error:
        raise WeightsError(f"{key}: {error}") from error


def lora_fingerprint(key: str, path: Path) -> str:
    """Returns 16 hex digits that identify the LoRA file that a key of the config names by its content.

    Raises:
        WeightsError: it cannot be read; names the key.
    """
    try:
        return file_digest(path)[:16]
    except OSError as error:
        raise WeightsError(f"{key} {path} cannot be read ({error}).") from error


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _scaled_by_metadata(
    path: Path, weights: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], text: str
) -> SavedLora:
    """Returns the LoRA with ranks and alphas by PEFT's config of it."""
    config = _lora_config(path, text)
    try:
        rank, alpha = _number(config["r"], int), _number(config["lora_alpha"], float)
        ranks = _values(config.get("rank_pattern"), tuple(layers), rank, int)
        alphas = _values(config.get("alpha_pattern"), tuple(layers), alpha, float)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged {METADATA_KEY} ({error!r:.300}). Fetch the file again.") from error
    if wrong := [layer for layer, own in layers.items() if own.low_rank.rank != ranks[layer]]:
        raise WeightsError(
            f"{path} has the rank {layers[wrong[0]].low_rank.rank} for {wrong[0]}, and its {METADATA_KEY} gives the "
            f"rank {ranks[wrong[0]]}. Fetch the file again."
        )
    return SavedLora(path, weights, rank, alpha, ranks, alphas, bool(config.get("use_rslora")))


def _values(patterns: Any, layers: Sequence[str], default: Any, kind: type) -> dict[str, Any]:
    """Returns the value of each layer by an adapter's patterns, which map texts to numbers."""
    numbers = {key: _number(value, kind) for key, value in (patterns or {}).items()}
    return values_by_layer(numbers, layers, default)


def _check_layer(path: Path, layer: str, adapter: AdapterLayer) -> None:
    """Checks that a layer has a plain LoRA: two matrices of one rank.

    Raises:
        WeightsError: it has not.
    """
    if other := adapter.tensors.keys() - {DOWN, UP}:
        raise WeightsError(
            f"{path} holds {layer}.{sorted(other)[0]}, and pixtune applies a plain LoRA alone (a down- and an "
            "up-matrix of each layer). Sample with diffusers, which knows more kinds."
        )
    shapes = {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()}
    down, up = shapes.get(DOWN, ()), shapes.get(UP, ())
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise WeightsError(
            f"{path} has matrices of shapes {list(shapes.values())} for {layer}, where (rank, in) and (out, rank) are "
            "needed. Fetch the file again."
        )
    if wrong := [part for part, tensor in adapter.tensors.items() if not tensor.is_floating_point()]:
        raise WeightsError(
            f"{path} has {adapter.tensors[wrong[0]].dtype} in {layer}.{wrong[0]}, where a LoRA has floating-point "
            "numbers. Fetch the file again."
        )


def _lora_config(path: Path, text: str) -> dict[str, Any]:
    """Reads the adapter's config, and refuses what pixtune does not apply."""
    from peft import LoraConfig

    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a {METADATA_KEY} that is not JSON. Fetch the file again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} has a {METADATA_KEY} that is no object. Fetch the file again.")
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}
    usual = LoraConfig().to_dict()
    usual |= {"init_lora_weights": config.get("init_lora_weights", True)}
    unusual = [
        f"{key}={value!r:.60}"
        for key, value in config.items()
        if key not in APPLIED | WITHOUT_EFFECT and value != usual.get(key) and (value or usual.get(key))
    ]
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        unusual.append(f"init_lora_weights={config['init_lora_weights']!r:.60}")
    if str(config.get("peft_type", "LORA")) != "LORA":
        unusual.append(f"peft_type={config['peft_type']!r:.60}")
    if unusual:
        raise WeightsError(
            f"{path} is a LoRA with {', '.join(unusual)}, which pixtune does not apply; without it the pictures would "
            "be others. Sample with diffusers, or fuse it into the weights there."
        )
    return config


def _number(value: Any, kind: type) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value != kind(value)
    ):
        raise ValueError(f"{value!r} is no number that can stand there")
    if kind is int and value < 1:
        raise ValueError(f"{value!r} is no rank")
    return kind(value)


def attach_saved_lora(
    transformer: nn.Module, lora: SavedLora, name: str = adapters.ADAPTER_NAME, dtype: torch.dtype = torch.float32
) -> dict[str, LoraLayer]:
    """Attaches a saved LoRA to a transformer, and returns its layers by their paths.

    Args:
        name: PEFT's name for it. One of another name than the first stands beside that, frozen.
        dtype: number format of its weights.

    Raises:
        WeightsError: it is for another model.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.modules),
        rank_pattern=as_patterns(lora.ranks, lora.rank),
        alpha_pattern=as_patterns(lora.alphas, lora.alpha),
        use_rslora=lora.use_rslora,
    )
    try:
        layers = adapters.attach_config(transformer, config, name, dtype)
        adapters.copy_weights(adapters.weights_of(layers, name), lora.weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{lora.path} does not fit this model: {error}") from error
    return layers
