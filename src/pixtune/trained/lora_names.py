"""The names of a LoRA's tensors in the files of diffusers, ComfyUI and kohya's trainers.

| format | a tensor's name | scale |
|---|---|---|
| diffusers | `transformer.LAYER.lora_A.weight` | in the metadata `lora_adapter_metadata`; 1 where that is missing |
| ComfyUI | `diffusion_model.LAYER.lora_A.weight` | `diffusion_model.LAYER.alpha` |
| ComfyUI, where the family's `comfyui_prefix` is that of diffusers | `transformer.LAYER.lora_A.weight` | in `lora_B` |
| kohya | `lora_unet_LAYER.lora_down.weight` | `lora_unet_LAYER.alpha` |

LAYER is diffusers' path; in kohya's files the path as the model's authors name it, with `_` in place of dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from pixtune.errors import WeightsError
from pixtune.family import ModelFamily
from pixtune.storage.model_names import OriginalLayer

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""PEFT's names of a LoRA's down- and up-matrix, and of DoRA's vector of one magnitude for each output."""
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""Names of LoKr's factors, in all formats alike."""
ENDINGS: Mapping[str, str] = {
    "lora_A.weight": DOWN,
    "lora_A.default.weight": DOWN,
    "lora_down.weight": DOWN,
    "lora.down.weight": DOWN,
    "lora_B.weight": UP,
    "lora_B.default.weight": UP,
    "lora_up.weight": UP,
    "lora.up.weight": UP,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
    "dora_scale": MAGNITUDE,
    **{name: name for name in LOKR},
    "alpha": "alpha",
}
"""Endings of names in files, and what they are."""
KOHYA_ENDINGS: Mapping[str, str] = {DOWN: "lora_down.weight", UP: "lora_up.weight", MAGNITUDE: "dora_scale"}
PREFIXES = ("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.", "")
"""Beginnings of names whose layers have dots."""
DIFFUSERS_PREFIX = "transformer."
"""The one that diffusers writes."""
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Beginnings of names whose layers have `_` in place of dots: kohya's, OneTrainer's and LyCORIS'."""
TEXT_PREFIXES = ("lora_te", "text_encoder", "text_encoders.", "te1_", "te2_")
Patterns = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns of names, each with the path that it means, where `{}` stands for the number."""


def format_of(names: Iterable[str]) -> str:
    """Returns "kohya", "comfyui" or "diffusers" by the names of a file's tensors."""
    names = list(names)
    if any(name.startswith(FLAT_PREFIXES) for name in names):
        return "kohya"
    if any(
        name.startswith(("diffusion_model.", "model.diffusion_model.")) or name.endswith(".alpha") for name in names
    ):
        return "comfyui"
    return "diffusers"


def fits(names: Iterable[str], family: ModelFamily) -> bool:
    """Returns whether all names of a file's tensors are of layers that this family's models have."""
    return all(place_of(name, family) is not None for name in names)


def place_of(name: str, family: ModelFamily) -> tuple[str, str] | None:
    """Returns the layer of a tensor, as the authors or diffusers name it, and what it is; None: no such layer."""
    found = re.fullmatch(r"(.*?)\.(" + "|".join(map(re.escape, ENDINGS)) + ")", name)
    if found is None:
        return None
    path, part = found[1], ENDINGS[found[2]]
    dotted, flat = _layer_patterns(family.original_layers)
    for prefix in FLAT_PREFIXES:
        if path.startswith(prefix):
            return _matched(path.removeprefix(prefix), flat, part)
    for prefix in PREFIXES:
        if path.startswith(prefix) and (place := _matched(path.removeprefix(prefix), dotted, part)):
            return place
    return None


def _matched(path: str, patterns: Sequence[tuple[re.Pattern[str], str]], part: str) -> tuple[str, str] | None:
    for pattern, layer in patterns:
        if found := pattern.fullmatch(path):
            return layer.replace("{}", found[1] if found.groups() else ""), part
    return None


@cache
def _layer_patterns(layers: tuple[OriginalLayer, ...]) -> tuple[Patterns, Patterns]:
    """Returns patterns of all layers' names, with dots and flat, each with the layer's path."""
    paths = dict.fromkeys(path for layer in layers for path in (layer.path, *layer.parts))
    dotted = tuple((_pattern(path), path) for path in paths)
    return dotted, tuple((_pattern(path.replace(".", "_")), path) for path in paths)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(re.escape("{}"), r"(0|[1-9]\d{0,3})"))


def original_of(layer: str, family: ModelFamily) -> tuple[OriginalLayer, str]:
    """Returns the layer that a file's path means, and the number of its block; a part alone is a layer of its own."""
    for original in family.original_layers:
        if found := _pattern(original.path).fullmatch(layer):
            return original, "".join(found.groups())
    original, number = original_of_part(layer, family)
    return OriginalLayer(layer, (general_path(layer, original.parts, number),)), number


def original_of_part(path: str, family: ModelFamily) -> tuple[OriginalLayer, str]:
    for original in family.original_layers:
        for part in original.parts:
            if found := _pattern(part).fullmatch(path):
                return original, "".join(found.groups())
    raise WeightsError(f"{path} has no name in other trainers' files.")


def general_path(path: str, parts: Sequence[str], number: str) -> str:
    return next(part for part in parts if part.replace("{}", number) == path)


def describe_strange(names: Sequence[str], every: Sequence[str], family: ModelFamily) -> str:
    """Says what a file is that is no LoRA of a family.

    Args:
        names: its tensors that are no part of one.
        every: all of its tensors.
    """
    from pixtune.families import FAMILIES

    more = f" and {len(names) - 1} more such tensors" if len(names) > 1 else ""
    if all(name.startswith(TEXT_PREFIXES) for name in names):
        return (
            f"it holds {names[0]}{more} of a text encoder, whose LoRA pixtune does not apply. Leave these tensors out "
            "of the file to use the transformer's."
        )
    if not any(re.search(r"lora|lokr|hada|diff|\.alpha$", name) for name in every):
        return f"it holds {names[0]}{more}, so it is no LoRA, but other weights."
    if any(re.search(r"(input|output|down|up|mid|middle)_blocks?[_.]", name) for name in every):
        return f"it holds {names[0]}{more}: a LoRA of a U-Net, as Stable Diffusion has, and not of {family.name}."
    others = [each.name for each in FAMILIES.values() if fits(every, each)]
    what = f" It is a LoRA of {' or '.join(others)}." if others else ""
    return f"it holds {names[0]}{more}, which is no part of a LoRA of {family.name}.{what}"
