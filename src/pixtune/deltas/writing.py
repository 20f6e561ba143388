"""Writes adapters in the format of diffusers, ComfyUI or kohya's trainers, with the metadata that may go with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixtune.deltas.adapter_file import AdapterFile, rank_of
from pixtune.deltas.delta import Kronecker
from pixtune.errors import WeightsError, WriteError
from pixtune.family import ModelFamily
from pixtune.storage.base_reference import without_path
from pixtune.storage.loading.shards import FORMAT
from pixtune.storage.safetensors_writer import save_without_digest
from pixtune.trained.adapter_config import METADATA_KEY
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.layer_patterns import as_patterns
from pixtune.trained.lora_formats import (
    RANKS_KEY,
    AdapterLayer,
    NamedTensors,
    comfyui_tensors,
    diffusers_tensors,
    kohya_tensors,
    shortest,
)
from pixtune.trained.lora_names import DIFFUSERS_PREFIX, DOWN, MAGNITUDE, UP
from pixtune.trained.model_spec import digest_of

CARRIED = ("pixtune.", "modelspec.", "ss_base_model_version", "ss_network_module", "ss_steps")
"""Beginnings of metadata that go into a new file. Others may hold paths and captions of whoever trained it."""
BASE = "pixtune.base_model"
TRIGGER_WORDS = "pixtune.trigger_words"
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_word", "trigger_word", "trigger")
"""Metadata by which other programs name a trigger."""
OF_TENSORS = ("modelspec.hash_sha256", "pixtune.rank", "pixtune.alpha", "ss_network_dim", "ss_network_alpha")
"""Metadata that are true of the old file's tensors alone."""


def check_target(target: Path, sources: Iterable[Path]) -> None:
    """Checks that a new file or folder takes nothing's place.

    Raises:
        WriteError: it would; says what stands there.
    """
    try:
        _check_free(target, sources)
    except WriteError:
        raise
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise WriteError(f"{target} could not be written ({error.strerror or error}). Give another name.") from error


def _check_free(target: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        if target.absolute() == source.absolute() or (target.exists() and source.exists() and target.samefile(source)):
            raise WriteError(f"{target} is what is read, and would be written over. Give another name.")
        if source.is_dir() and target.absolute().is_relative_to(source.resolve()):
            raise WriteError(f"{target} lies in {source}, which is read. Give a path outside of it.")
    if target.is_dir():
        raise WriteError(f"{target} is a folder that exists. Give a name that is not taken.")
    if target.exists() or target.is_symlink():
        raise WriteError(f"{target} exists already. Give another name, or delete it first.")


def check_file_target(target: Path, sources: Iterable[Path]) -> None:
    """Checks the same of a LoRA's file, and that its name ends as programs look for it."""
    check_target(target, sources)
    if target.suffix != ".safetensors":
        raise WriteError(f"{target} must end in .safetensors, or no program finds it. Give such a name.")


def settled(adapter: AdapterFile) -> dict[str, AdapterLayer]:
    """Returns an adapter's layers with each scale as its alpha, wherever the file had it.

    Raises:
        WeightsError: it is a DoRA in a form that only ComfyUI applies.
    """
    adapter.refuse_other_lengths()
    return {layer: _settle(adapter.layers[layer], change) for layer, change in adapter.changes.items()}


def _settle(layer: AdapterLayer, change: object) -> AdapterLayer:
    scale = change.scale if isinstance(change, LowRank | Kronecker) else change.direction.scale  # type: ignore[attr-defined]
    rank = rank_of(layer)
    if rank is not None:
        return replace(layer, alpha=shortest(scale * rank))
    # Programs ignore the alpha of a LoKr of two whole factors.
    name = "lokr_w1"
    tensors = layer.tensors if scale == 1 else {**layer.tensors, name: layer.tensors[name] * scale}
    return AdapterLayer(tensors, None)


def as_layers(loras: Mapping[str, LowRank]) -> dict[str, AdapterLayer]:
    """Returns LoRAs as layers of a file."""
    return {
        layer: AdapterLayer({DOWN: lora.down, UP: lora.up}, shortest(lora.scale * lora.rank))
        for layer, lora in loras.items()
    }


def named_tensors(layers: Mapping[str, AdapterLayer], file_format: str, family: ModelFamily) -> NamedTensors:
    """Names an adapter's tensors as a format does.

    Raises:
        WeightsError: the format has no place for it.
    """
    if file_format != "diffusers" and any(MAGNITUDE in layer.tensors for layer in layers.values()):
        raise WeightsError(
            "it is a DoRA, whose rows ComfyUI scales by the base's lengths, which are not in the file. `pixtune "
            "export` writes that file from a checkpoint."
        )
    if file_format == "kohya":
        return kohya_tensors(layers, family)
    if file_format == "comfyui":
        return comfyui_tensors(layers, family, keep_alpha=True)
    named = diffusers_tensors(layers)
    return replace(named, metadata={METADATA_KEY: json.dumps(diffusers_config(layers), sort_keys=True)})


def diffusers_config(layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    """Builds PEFT's config of an adapter, as diffusers reads it from a file's metadata.

    Raises:
        WeightsError: its layers are of different kinds, which PEFT has no config for.
    """
    kinds = {"LORA" if DOWN in layer.tensors else "LOKR" for layer in layers.values()}
    with_magnitudes = {MAGNITUDE in layer.tensors for layer in layers.values()}
    if len(kinds) > 1 or len(with_magnitudes) > 1:
        raise WeightsError("its layers are of different kinds of adapter, which diffusers has no format for.")
    ranks = {path: rank_of(layer) or 1 for path, layer in layers.items()}
    alphas = {path: float(ranks[path]) if layer.alpha is None else float(layer.alpha) for path, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": kinds.pop(),
        "r": rank,
        "target_modules": sorted(layers),
        "rank_pattern": as_patterns(ranks, rank),
        "alpha_pattern": as_patterns(alphas, alpha),
    }
    config["lora_alpha" if config["peft_type"] == "LORA" else "alpha"] = alpha
    if with_magnitudes.pop():
        config["use_dora"] = True
    return {f"{DIFFUSERS_PREFIX}{key}": value for key, value in config.items() if value != {}}


def carried_metadata(metadata: Mapping[str, str], *, keep_all: bool = False) -> dict[str, str]:
    """Returns the metadata of an old file that a new one of other tensors may have."""
    own = (METADATA_KEY, RANKS_KEY, *OF_TENSORS)
    kept = {key: value for key, value in metadata.items() if key not in own and (keep_all or key.startswith(CARRIED))}
    if BASE in kept and f"{BASE}_hash" not in kept and not keep_all:  # version 0.1.0 wrote the path
        kept[BASE] = without_path(kept[BASE])
    return kept


def joined_metadata(adapters: Sequence[AdapterFile]) -> dict[str, str]:
    """Returns the metadata of a LoRA that stands for some others: the one's own, or what all of them share.

    Trigger words are those of all, since each still works.
    """
    found = [carried_metadata(adapter.metadata) for adapter in adapters]
    if len(found) == 1:
        return found[0]
    shared = dict(set.intersection(*(set(metadata.items()) for metadata in found)))
    words = dict.fromkeys(word for adapter in adapters for word in trigger_words(adapter.metadata))
    return {**shared, TRIGGER_WORDS: json.dumps([*words]), TRIGGERS[0]: ", ".join(words)} if words else shared


def with_model(metadata: Mapping[str, str], family: ModelFamily, title: str) -> dict[str, str]:
    """Adds what LoRA managers show of a file that nothing is stated of: its model, and a title."""
    spec = family.modelspec
    own = {
        "pixtune.family": family.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{spec.architecture}/lora",
        "modelspec.implementation": spec.implementation,
        "modelspec.title": title,
        "ss_base_model_version": spec.version,
    }
    return {**own, **metadata}


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Returns the trigger words that a file states, whichever program wrote it; none where they cannot be read."""
    try:
        words = json.loads(metadata.get(TRIGGER_WORDS, "[]"))
    except (ValueError, RecursionError):
        words = []
    if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
        return words
    return [metadata[key] for key in TRIGGERS if metadata.get(key)][:1]


def write_adapter(
    path: Path, layers: Mapping[str, AdapterLayer], file_format: str, family: ModelFamily, metadata: Mapping[str, str]
) -> tuple[str, ...]:
    """Writes an adapter's file, atomically.

    Returns:
        Layers whose numbers had to be rounded for the format.

    Raises:
        WeightsError: the format has no place for it.
        WriteError: it could not be written.
    """
    try:
        named = named_tensors(layers, file_format, family)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be written in the format of {file_format}: {error}") from error
    for name, tensor in named.tensors.items():
        if tensor.element_size() > 1 and not tensor.isfinite().all():
            raise WeightsError(
                f"{path} would hold infinity in {name}: its numbers are beyond "
                f"{str(tensor.dtype).removeprefix('torch.')}. Give another --dtype, or a smaller --weight."
            )
    digest = digest_of(named.tensors) if any(key.startswith("modelspec.") for key in metadata) else {}
    save_without_digest(path, named.tensors, {**FORMAT, **metadata, **named.metadata, **digest})
    return named.rounded
