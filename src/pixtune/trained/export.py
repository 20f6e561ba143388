"""Writes a LoRA as others load it: a file for diffusers, and one for ComfyUI and for kohya's trainers each.

They differ in names (`lora_names.py`), and in where they have the scale alpha / rank. Diffusers reads it from
`lora_adapter_metadata`; the others have an `.alpha` tensor beside each layer, ComfyUI's for some families the scale
multiplied in. Diffusers would apply two scales one after the other, so each file has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pixtune.errors import CheckpointError, WeightsError
from pixtune.family import ModelFamily
from pixtune.storage.base_reference import BaseReference, without_path
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.safetensors_writer import TensorFile, save_without_digest
from pixtune.trained.lora_formats import AdapterLayer, comfyui_tensors, kohya_tensors
from pixtune.trained.lora_names import DIFFUSERS_PREFIX, DOWN, UP
from pixtune.trained.model_spec import digest_of, model_spec, wishes_of

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
FILES: Mapping[str, str] = {"diffusers": DIFFUSERS_FILE, "comfyui": COMFYUI_FILE, "kohya": KOHYA_FILE}
"""Names of a LoRA's files by the config's `lora_files.formats`."""
DEFAULT_FORMATS = ("diffusers", "comfyui")
RAW_FILE = "raw_lora_weights.safetensors"
"""File, in diffusers' format, of the weights that go on being trained, where the two others hold their average."""
GIBIBYTE = 2**30
LARGEST_LORA_BYTES = 32 * GIBIBYTE
"""Size that no LoRA reaches: one of rank 256 in fp32 on all layers of Qwen-Image has 9 GiB."""


@dataclass(frozen=True)
class LoraDescription:
    """The statements of a LoRA file about itself, besides its weights."""

    rank: int
    alpha: float
    targets: Sequence[str]
    base: BaseReference
    family: str
    step: int
    config_hash: str
    trigger_words: Sequence[str]
    versions: Mapping[str, str]

    def metadata(self) -> dict[str, str]:
        """Builds safetensors metadata, which are texts by text."""
        return {
            "format": "pt",
            **self.base.entries("pixtune."),
            "pixtune.family": self.family,
            "pixtune.step": str(self.step),
            "pixtune.config_hash": self.config_hash,
            "pixtune.trigger_words": json.dumps(list(self.trigger_words)),
            "pixtune.versions": json.dumps(dict(self.versions), sort_keys=True),
            "pixtune.rank": str(self.rank),
            "pixtune.alpha": str(self.alpha),
        }


def diffusers_file(weights: Mapping[str, Tensor], about: LoraDescription) -> TensorFile:
    """Builds the file that diffusers' `load_lora_weights` reads.

    Args:
        weights: `MODULE.lora_A.weight` (rank x in) and `MODULE.lora_B.weight` (out x rank).
    """
    lora_config = {
        "r": about.rank,
        "lora_alpha": about.alpha,
        "target_modules": sorted(about.targets),
        "peft_type": "LORA",
    }
    tensors = {f"{DIFFUSERS_PREFIX}{name}": tensor for name, tensor in weights.items()}
    scale = {f"{DIFFUSERS_PREFIX}{key}": value for key, value in lora_config.items()}
    return TensorFile(tensors, {**about.metadata(), "lora_adapter_metadata": json.dumps(scale, sort_keys=True)})


def weights_by_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the tensors of a diffusers file by module again."""
    return {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()}


def layers_of(weights: Mapping[str, Tensor], alpha: float) -> dict[str, AdapterLayer]:
    """Groups a LoRA's weights, named as by `diffusers_file`, by layer.

    Raises:
        KeyError: a layer has one of the two matrices alone.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer, part = name.rsplit(".lora_", 1)
        tensors.setdefault(layer, {})[f"lora_{part}"] = tensor
    if halves := [layer for layer, own in tensors.items() if (DOWN in own) != (UP in own)]:
        raise KeyError(halves[0])
    return {layer: AdapterLayer(of_layer, alpha) for layer, of_layer in tensors.items()}


def export_lora(
    folder: Path,
    weights: Mapping[str, Tensor],
    about: LoraDescription,
    family: ModelFamily,
    formats: Sequence[str] = DEFAULT_FORMATS,
    spec: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Path, ...]:
    """Writes a file for each format into `folder`, and returns their paths. Stock diffusers loads each of them.

    Weights are renamed, scaled and joined in host memory: at a run's end a full card may have no room for copies.

    Args:
        formats: names of `FILES`.
        spec: further metadata, as `model_spec` builds them.
    """
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    layers, metadata = layers_of(weights, about.alpha), about.metadata()
    contents = {"diffusers": diffusers_file(weights, about)}
    for name, names_of in (("comfyui", comfyui_tensors), ("kohya", kohya_tensors)):
        if name in formats:
            named = names_of(layers, family)
            contents[name] = TensorFile(named.tensors, {**metadata, **named.metadata})
    paths = []
    for name, (tensors, own) in contents.items():
        if name in formats:
            paths.append(folder / FILES[name])
            save_without_digest(paths[-1], tensors, {**own, **spec, **(digest_of(tensors) if spec else {})})
    return tuple(paths)


def read_lora_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads weights, named by module, and metadata from a file that `diffusers_file` built.

    Raises:
        WeightsError: see `read_tensors`.
    """
    tensors, metadata = read_tensors(path)
    return weights_by_module(tensors), metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and metadata of a LoRA file.

    Raises:
        WeightsError: there is no such file, or it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    entries = read_entries([path])  # checks the header, and names what is wrong with it
    if (num_bytes := sum(entry.num_bytes for entry in entries)) > LARGEST_LORA_BYTES:
        raise WeightsError(
            f"{path} holds {num_bytes / GIBIBYTE:,.0f} GiB of tensors, more than the "
            f"{LARGEST_LORA_BYTES // GIBIBYTE} that a LoRA may have."
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a LoRA file ({error}).") from error


def export_checkpoint(source: Path, folder: Path, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Writes the files of a run's end from a checkpoint: a LoRA's files, or the model folder of `method: full`.

    Args:
        source: a checkpoint folder, or a LoRA file that `diffusers_file` built.
        formats: names of `FILES`; None: those of the run that saved the checkpoint.

    Raises:
        CheckpointError: there is no LoRA of pixtune at `source`.
        WeightsError: the file is no safetensors file.
    """
    from pixtune.families import FAMILIES
    from pixtune.storage.checkpoint import load_checkpoint
    from pixtune.trained.full_weights import MODEL_FOLDER, WEIGHTS_STEM, export_full_checkpoint

    if any(source.glob(f"{WEIGHTS_STEM}*.safetensors")):
        return (export_full_checkpoint(load_checkpoint(source), folder / MODEL_FOLDER),)
    path = source / DIFFUSERS_FILE if source.is_dir() else source
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint folder or a {DIFFUSERS_FILE}.")
    weights, metadata = read_lora_file(path)
    for key in ("pixtune.family", "lora_adapter_metadata"):
        if key not in metadata:
            raise CheckpointError(f"{path} is no {DIFFUSERS_FILE} of pixtune: its metadata lack {key}.")
    try:
        about = read_description(metadata)
        family = FAMILIES[about.family]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path} is damaged: its metadata cannot be read ({reason}).") from error
    if faulty := [name for name, tensor in weights.items() if tensor.ndim != 2 or not tensor.is_floating_point()]:
        raise CheckpointError(f"{path} holds {faulty[0]}, which is no matrix of a LoRA.")
    config = _config_of(source) if source.is_dir() else {}
    run_folder = source.absolute().parent if source.is_dir() else None
    stated = {**config, "rank": about.rank, "lora_alpha": about.alpha, "trigger_words": about.trigger_words}
    spec = model_spec(stated, family, about.base, about.step, run_folder)
    try:
        return export_lora(folder, weights, about, family, formats or wishes_of(config).formats, spec)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path} holds no whole LoRA of {about.family} ({reason}).") from error


def _config_of(checkpoint: Path) -> Mapping[str, Any]:
    """Returns the config that a checkpoint records; empty where it records none that can be read."""
    from pixtune.storage.checkpoint_state import read_state

    try:
        config = read_state(checkpoint)["record"]["config"]
    except (CheckpointError, KeyError, TypeError):
        return {}
    return config if isinstance(config, Mapping) else {}


def read_description(metadata: Mapping[str, str]) -> LoraDescription:
    """Reads what `LoraDescription.metadata` and `diffusers_file` wrote.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: it is something else.
    """
    scale = json.loads(metadata["lora_adapter_metadata"])
    rank, alpha, targets = (scale[f"{DIFFUSERS_PREFIX}{key}"] for key in ("r", "lora_alpha", "target_modules"))
    words, versions = json.loads(metadata["pixtune.trigger_words"]), json.loads(metadata["pixtune.versions"])
    return LoraDescription(
        rank=of_kind(rank, int),
        alpha=of_kind(alpha, int, float),
        targets=[of_kind(target, str) for target in of_kind(targets, list)],
        base=_read_base(metadata),
        family=metadata["pixtune.family"],
        step=int(metadata["pixtune.step"]),
        config_hash=metadata["pixtune.config_hash"],
        trigger_words=[of_kind(word, str) for word in of_kind(words, list)],
        versions={name: of_kind(version, str) for name, version in of_kind(versions, dict).items()},
    )


def of_kind(value: Any, *kinds: type) -> Any:
    """Returns a value that JSON gave, if it is of one of these kinds.

    Raises:
        TypeError: it is not, or is a number that is none.
    """
    if (
        not isinstance(value, kinds)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise TypeError(f"{value!r:.60} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _read_base(metadata: Mapping[str, str]) -> BaseReference:
    """Reads a LoRA file's base. Version 0.1.0 wrote no fingerprint, and the config's own text, which may be a path."""
    name, fingerprint = metadata["pixtune.base_model"], metadata.get("pixtune.base_model_hash")
    return BaseReference(name if fingerprint else without_path(name), fingerprint)
