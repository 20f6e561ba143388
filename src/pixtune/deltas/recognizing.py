"""Finds out for which model an adapter's file is, by the names of its tensors, or what it is instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.families.other_files import kind_of_tensors
from pixtune.families.other_loras import other_kind, other_model
from pixtune.family import ModelFamily
from pixtune.trained.lora_formats import AdapterLayer, read_layers
from pixtune.trained.lora_names import DOWN, ENDINGS, TEXT_PREFIXES, fits

MOST_TENSORS = 20_000
"""Number of tensors that no LoRA reaches: on each layer of Qwen-Image, with magnitudes and alphas, it has 3,384."""
LEAST_SHARE = 0.5
"""Share of a file's tensors that a family has to know for the others to count as unknown names, not another model."""
BASES = ("pixtune.base_model", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
"""Metadata by which programs name the base, the surest first."""


def recognize(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[tuple[ModelFamily, ...], dict[str, AdapterLayer]]:
    """Finds the families whose published models have all layers that a file's tensors are of, and reads these layers.

    Attention layers have the same names in several families. Then the number of blocks decides, and what the file
    states; families of one transformer count as one.

    Raises:
        WeightsError: there is none; says what the file is instead.
    """
    if not any(name.endswith(tuple(f".{ending}" for ending in ENDINGS)) for name in tensors):
        raise WeightsError(f"{path} holds no LoRA: it is {_kind_of(tensors)}. Give a LoRA, LoKr or DoRA.")
    if len(tensors) > MOST_TENSORS:
        raise WeightsError(
            f"{path} holds {len(tensors):,} tensors, and no LoRA of a model that pixtune knows has more than "
            f"{MOST_TENSORS:,}."
        )
    known = {family.name: [name for name in tensors if fits([name], family)] for family in FAMILIES.values()}
    best = max(FAMILIES.values(), key=lambda family: len(known[family.name]))
    if len(known[best.name]) < LEAST_SHARE * len(tensors):
        if all(name.startswith(TEXT_PREFIXES) for name in tensors):
            raise WeightsError(
                f"{path} is a LoRA of a text encoder alone ({next(iter(tensors))}), and pixtune knows the layers of "
                "transformers. Give the LoRA of the transformer."
            )
        model = other_model(tensors)
        by = f", by its names for {model}" if model else ""
        raise WeightsError(
            f"{path} is a LoRA for another model{by}: it has {next(iter(tensors))}. pixtune knows the layers of "
            f"{', '.join(FAMILIES)}."
        )
    whole = [family for family in FAMILIES.values() if len(known[family.name]) == len(tensors)] or [best]
    read: list[tuple[ModelFamily, dict[str, AdapterLayer]]] = []
    for family in whole:
        same = next((layers for other, layers in read if other.original_layers == family.original_layers), None)
        try:
            read.append((family, same or read_layers(tensors, family, metadata)))
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
    fitting = [(family, layers) for family, layers in read if _has_blocks(family, layers)]
    if not fitting:
        raise WeightsError(
            f"{path} is a LoRA for another model: {best.name} has layers of these names, but not as many blocks."
        )
    first, layers = min(
        fitting, key=lambda each: (-_stated(each[0], metadata), not _has_blocks(*each, all_of_them=True))
    )
    others = [each for each, _ in fitting if each is not first and each.original_layers == first.original_layers]
    return (first, *others), layers


def _kind_of(names: Collection[str]) -> str:
    """Returns what a file is that has no tensor of an adapter that is read."""
    if kind := other_kind(names):
        return f"{kind}, which pixtune does not read"
    layers = [f"{name.removesuffix('.weight')}.{DOWN}" for name in names if name.endswith(".weight")]
    if found := [family.name for family in FAMILIES.values() if any(fits([layer], family) for layer in layers)]:
        return f"the weights of a transformer ({found[0]}), a base checkpoint"
    return kind_of_tensors(names).split(". ")[0]


def _has_blocks(family: ModelFamily, layers: Mapping[str, AdapterLayer], *, all_of_them: bool = False) -> bool:
    """Returns whether a family's published models have blocks of all numbers that some layers are of.

    Args:
        all_of_them: and no others, in the lists of blocks that the layers are of.
    """
    shapes = family.transformer_shapes({})
    there = {block for name in shapes if (block := _block_of(name))}
    own = {block for layer in layers if (block := _block_of(f"{layer}."))}
    lists = {block.rpartition(".")[0] for block in own}
    return own == {block for block in there if block.rpartition(".")[0] in lists} if all_of_them else own <= there


def _block_of(name: str) -> str:
    """Returns the list and number of the block that a tensor is in; empty for one outside of blocks."""
    found = re.match(r"([^.]+\.\d+)\.", name)
    return found[1] if found else ""


def _stated(family: ModelFamily, metadata: Mapping[str, str]) -> int:
    """Returns how surely metadata name a family: 3 by its own name, 2 by its architecture's, 1 by a model's, or 0."""
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    if metadata.get("pixtune.family", "") == family.name:
        return 3
    if architecture in (family.modelspec.architecture, *family.modelspec.variants.values()):
        return 2
    stated = "".join(metadata.get(key, "") for key in BASES).lower()
    return int(re.sub(r"\W|_", "", family.name) in re.sub(r"\W|_", "", stated))
