"""LoRA files of diffusers, ComfyUI or kohya's trainers: read, and attached with the scale that each layer has there.

DoRAs and LoKrs are read from diffusers' format alone: other programs' lengths and scales mean other things.

The scale stands in `lora_adapter_metadata`, PEFT's config of the adapter, or in a tensor `alpha` beside each layer; a
file with neither has the scale 1, as in the stock pipeline. What pixtune cannot apply as that pipeline does is refused
by name: ignored, it would give other pictures without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pixtune.engine.streaming import BlockStream
from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.family import ModelFamily, Shapes
from pixtune.plan.adapter import KINDS, NEAR_SQUARE, USUAL_FACTOR, Adapter
from pixtune.storage.files import file_digest
from pixtune.trained import adapters
from pixtune.trained.adapter_config import METADATA_KEY, kind_of, number, read_adapter_config, stated_sizes
from pixtune.trained.export import DIFFUSERS_FILE, read_tensors
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.lokr_file import check_lokr, lokr_sides
from pixtune.trained.lora_formats import AdapterLayer, read_layers
from pixtune.trained.lora_names import DOWN, MAGNITUDE, UP, format_of
from pixtune.trained.scheme import Scheme

ALL_APPLIED = frozenset({"r", "rank_pattern", "alpha_pattern", "target_modules", "peft_type"})
APPLIED: Mapping[str, frozenset[str]] = {
    "lora": ALL_APPLIED | {"lora_alpha", "use_rslora"},
    "dora": ALL_APPLIED | {"lora_alpha", "use_rslora", "use_dora"},
    "lokr": ALL_APPLIED | {"alpha", "decompose_factor", "decompose_both"},
}
"""Keys of PEFT's config of each kind that decide its layers, their matrices and scales."""
PARTS: Mapping[str, frozenset[str]] = {
    "lora": frozenset({DOWN, UP}),
    "dora": frozenset({DOWN, UP, MAGNITUDE}),
    "lokr": frozenset(f"lokr_w{number}{end}" for number in (1, 2) for end in ("", "_a", "_b")),
}
"""Tensors that a layer may have of each kind."""
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
    kind: str = "lora"
    """Kind of adapter, one of `plan.adapter.KINDS`."""
    factor: int = USUAL_FACTOR
    """LoKr: PEFT's `decompose_factor`."""
    decompose_both: bool = False
    """LoKr: see `Scheme`."""

    @property
    def scheme(self) -> Scheme:
        """PEFT's settings of it."""
        return Scheme(
            self.rank, self.alpha, self.kind, self.ranks, self.alphas, self.use_rslora, self.factor,
            self.decompose_both,
        )  # fmt: skip

    @property
    def size(self) -> Adapter:
        """The adapter in what decides its size."""
        low_rank = "both" if self.decompose_both else "larger"
        return Adapter(self.kind, self.rank, self.ranks, self.factor, low_rank)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the layers that it is attached to."""
        return tuple(self.ranks)

    def scaled(self, strength: float) -> Self:
        """Returns it with a scale `strength` times as large."""
        alphas = {layer: strength * alpha for layer, alpha in self.alphas.items()}
        return replace(self, alpha=strength * self.alpha, alphas=alphas)

    def low_ranks(self) -> dict[str, LowRank]:
        """Returns the LoRA of each layer with its scale, by the layer's path; only of a plain LoRA."""
        scheme = self.scheme
        return {
            layer: LowRank(self.weights[f"{layer}.{DOWN}"], self.weights[f"{layer}.{UP}"], scheme.scale_of(layer))
            for layer in self.modules
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
            if self.kind == "lokr":
                sides: tuple[int, ...] = lokr_sides(
                    {name: self.weights.get(f"{layer}.{name}") for name in PARTS["lokr"]}
                )[::-1]
            else:
                sides = tuple(self.weights[f"{layer}.lora_{each}.weight"].shape[1 - n] for n, each in enumerate("AB"))
            if sides != (shape[1], shape[0]) or (rank > max(shape) and self.kind != "lokr"):
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
    _refuse_stated_other(path, metadata, family)
    config = read_adapter_config(path, metadata[METADATA_KEY]) if METADATA_KEY in metadata else {}
    kind = kind_of(config)
    for layer, adapter in layers.items():
        _check_layer(path, layer, adapter, kind)
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
    _refuse_unusual(path, config, kind)
    return _scaled_by_metadata(path, weights, layers, config, kind)


def _refuse_stated_other(path: Path, metadata: Mapping[str, str], family: ModelFamily) -> None:
    """Checks that a file's metadata name no other model: those of two families have layers of equal names and sizes.

    Raises:
        WeightsError: they do.
    """
    own = metadata.get("pixtune.family")
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    for each in FAMILIES.values():
        spec = each.modelspec
        is_stated = each.name == own if own else architecture in (spec.architecture, *spec.variants.values())
        if is_stated and each.original_layers != family.original_layers:
            raise WeightsError(
                f"{path} is a LoRA for another model: for {each.name}, as its metadata state, and this one is "
                f"{family.name}. Layers of the same names do other things there."
            )


def read_lora_of_key(key: str, path: Path, family: ModelFamily) -> SavedLora:
    """Reads the plain LoRA file that a key of the config names.

    Raises:
        WeightsError: it is a folder, of another kind, or see `read_saved_lora`; names the key.
    """
    if path.is_dir():
        raise WeightsError(f"{key} {path} is a folder. Give the LoRA file in it, such as {path / DIFFUSERS_FILE}.")
    try:
        lora = read_saved_lora(path, family)
    except WeightsError as error:
        raise WeightsError(f"{key}: {error}") from error
    if lora.kind != "lora":
        raise WeightsError(f"{key} {path} is a {KINDS[lora.kind]}, and only a plain LoRA can stand there.")
    return lora


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
    path: Path, weights: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], config: Mapping[str, Any], kind: str
) -> SavedLora:
    """Returns the adapter with ranks and alphas by PEFT's config of it."""
    sizes = stated_sizes(path, config, tuple(layers))
    try:
        factor = config.get("decompose_factor", NEAR_SQUARE)
        factor = factor if factor == NEAR_SQUARE else number(factor, int)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a damaged {METADATA_KEY} ({error!r:.300}). Fetch the file again.") from error
    lora = SavedLora(
        path, weights, sizes.rank, sizes.alpha, sizes.ranks, sizes.alphas, bool(config.get("use_rslora")), kind=kind,
        factor=factor, decompose_both=bool(config.get("decompose_both")),
    )  # fmt: skip
    if kind == "lokr":
        for layer, own in layers.items():
            check_lokr(path, layer, own.tensors, lora.size)
        return lora
    if wrong := [layer for layer, own in layers.items() if own.low_rank.rank != sizes.ranks[layer]]:
        raise WeightsError(
            f"{path} has the rank {layers[wrong[0]].low_rank.rank} for {wrong[0]}, and its {METADATA_KEY} gives the "
            f"rank {sizes.ranks[wrong[0]]}. Fetch the file again."
        )
    return lora


def _check_layer(path: Path, layer: str, adapter: AdapterLayer, kind: str) -> None:
    """Checks that a layer has floating-point tensors of its kind alone; of a LoRA two matrices of one rank.

    Raises:
        WeightsError: it has not.
    """
    if other := adapter.tensors.keys() - PARTS[kind]:
        of_a_lora = (
            "pixtune applies a plain LoRA alone (a down- and an up-matrix of each layer), and in diffusers' format"
        )
        why = f"{of_a_lora} a DoRA or LoKr" if kind == "lora" else f"its {METADATA_KEY} state a {KINDS[kind]}"
        raise WeightsError(
            f"{path} holds {layer}.{sorted(other)[0]}, and {why}. Sample with diffusers, which knows more kinds."
        )
    if wrong := [part for part, tensor in adapter.tensors.items() if not tensor.is_floating_point()]:
        raise WeightsError(
            f"{path} has {adapter.tensors[wrong[0]].dtype} in {layer}.{wrong[0]}, where a {KINDS[kind]} has "
            "floating-point numbers. Fetch the file again."
        )
    if kind == "lokr":
        return
    shapes = {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()}
    down, up = shapes.get(DOWN, ()), shapes.get(UP, ())
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise WeightsError(
            f"{path} has matrices of shapes {list(shapes.values())} for {layer}, where (rank, in) and (out, rank) are "
            "needed. Fetch the file again."
        )
    if kind == "dora" and shapes.get(MAGNITUDE) != (up[0],):
        raise WeightsError(
            f"{path} is a DoRA and has lengths of shape {shapes.get(MAGNITUDE)} for {layer}, where {(up[0],)} is "
            "needed. Fetch the file again."
        )


def _refuse_unusual(path: Path, config: Mapping[str, Any], kind: str) -> None:
    """Refuses what pixtune does not apply of an adapter's config.

    Raises:
        WeightsError: there is something; names it.
    """
    from peft import LoKrConfig, LoraConfig

    usual = (LoKrConfig() if kind == "lokr" else LoraConfig()).to_dict()
    usual |= {"init_lora_weights": config.get("init_lora_weights", True)}
    unusual = [
        f"{key}={value!r:.60}"
        for key, value in config.items()
        if key not in APPLIED[kind] | WITHOUT_EFFECT and value != usual.get(key) and (value or usual.get(key))
    ]
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        unusual.append(f"init_lora_weights={config['init_lora_weights']!r:.60}")
    if str(config.get("peft_type", "LORA")) not in ("LORA", "LOKR"):
        unusual.append(f"peft_type={config['peft_type']!r:.60}")
    if unusual:
        raise WeightsError(
            f"{path} is a {KINDS[kind]} with {', '.join(unusual)}, which pixtune does not apply; without it the "
            "pictures would be others. Sample with diffusers, or fuse it into the weights there."
        )


def attach_saved_lora(
    transformer: nn.Module,
    lora: SavedLora,
    name: str = adapters.ADAPTER_NAME,
    dtype: torch.dtype = torch.float32,
    stream: BlockStream | None = None,
) -> dict[str, Any]:
    """Attaches a saved LoRA to a transformer, and returns its layers by their paths.

    Args:
        name: PEFT's name for it. One of another name than the first stands beside that, frozen.
        dtype: number format of its weights.
        stream: supplier of streamed blocks' weights, whose rows a DoRA measures.

    Raises:
        WeightsError: it is for another model.
    """
    try:
        layers = adapters.attach_config(transformer, lora.modules, lora.scheme, name, dtype, stream)
        adapters.copy_weights(adapters.weights_of(layers, name), lora.weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{lora.path} does not fit this model: {error}") from error
    return layers
