"""Writes a LoRA as others load it: a file for diffusers, and one for ComfyUI and for kohya's trainers each.

They differ in names (`lora_names.py`), and in where they have the scale alpha / rank. Diffusers reads it from
`lora_adapter_metadata`; the others have an `.alpha` tensor beside each layer, ComfyUI's for some families the scale
multiplied in. Diffusers would apply two scales one after the other, so each file has one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pixtune.errors import CheckpointError, WeightsError
from pixtune.family import ModelFamily
from pixtune.plan.adapter import USUAL_FACTOR
from pixtune.storage.base_reference import BaseReference, without_path
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.safetensors_writer import TensorFile, save_without_digest
from pixtune.trained.layer_patterns import values_by_layer
from pixtune.trained.lora_formats import AdapterLayer, comfyui_tensors, kohya_tensors
from pixtune.trained.lora_names import DIFFUSERS_PREFIX, DOWN, MAGNITUDE, UP
from pixtune.trained.model_spec import digest_of, model_spec, wishes_of
from pixtune.trained.scheme import PEFT_TYPES, Scheme

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
FILES: Mapping[str, str] = {"diffusers": DIFFUSERS_FILE, "comfyui": COMFYUI_FILE, "kohya": KOHYA_FILE}
"""Names of a LoRA's files by the config's `lora_files.formats`."""
DEFAULT_FORMATS = ("diffusers", "comfyui")
RAW_FILE = "raw_lora_weights.safetensors"
"""File, in diffusers' format, of the weights that go on being trained, where the two others hold their average."""
WEIGHT_NAME = r"\.(?=lo(?:ra|kr)_\w+(?:\.weight)?$)"
"""Place in the name of an adapter's weight where the layer's path ends."""
DORA_SCALES_FILE = "comfyui_dora_scales.safetensors"
"""File of a checkpoint with what ComfyUI's file of a DoRA has beside its weights."""
LOADING_LOKR = (
    "diffusers refuses a LoKr in load_lora_weights and takes it by pipe.transformer.load_lora_adapter(FOLDER, "
    f"weight_name='{DIFFUSERS_FILE}', prefix='transformer')"
)
"""Statement of a LoKr's file on where diffusers loads it."""
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
    scheme: Scheme | None = None
    """PEFT's settings; None: a LoRA of one rank and alpha."""

    @property
    def settings(self) -> Scheme:
        """PEFT's settings of the adapter."""
        return self.scheme or Scheme(self.rank, self.alpha)

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
            **({"pixtune.adapter": self.settings.kind} if self.settings.kind != "lora" else {}),
            **({"pixtune.loading": LOADING_LOKR} if self.settings.kind == "lokr" else {}),
        }


def diffusers_file(weights: Mapping[str, Tensor], about: LoraDescription) -> TensorFile:
    """Builds the file that diffusers' `load_lora_weights` reads; of a LoKr, its `load_lora_adapter`.

    Args:
        weights: as `adapters.lora_weights` names them.
    """
    lora_config = about.settings.entries(about.targets)
    tensors = {f"{DIFFUSERS_PREFIX}{name}": tensor for name, tensor in weights.items()}
    scale = {f"{DIFFUSERS_PREFIX}{key}": value for key, value in lora_config.items()}
    return TensorFile(tensors, {**about.metadata(), "lora_adapter_metadata": json.dumps(scale, sort_keys=True)})


def weights_by_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the tensors of a diffusers file by module again."""
    return {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()}


def layer_of(name: str) -> str:
    """Returns the layer of an adapter's weight."""
    return re.split(WEIGHT_NAME, name)[0]


def layers_of(weights: Mapping[str, Tensor], scheme: Scheme) -> dict[str, AdapterLayer]:
    """Groups an adapter's weights, named as by `diffusers_file`, by layer.

    Each layer's alpha stands for its scale where other programs scale by alpha / rank alone. LoKr's whole matrices have
    no rank there: the scale is multiplied into the smaller one.

    Raises:
        KeyError: a layer has one of the two matrices alone.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer = layer_of(name)
        part = name.removeprefix(f"{layer}.")
        tensors.setdefault(layer, {})[part] = tensor
    if halves := [layer for layer, own in tensors.items() if (DOWN in own) != (UP in own)]:
        raise KeyError(halves[0])
    layers = {}
    for layer, parts in tensors.items():
        scale, rank = scheme.scale_of(layer), scheme.ranks.get(layer, scheme.rank)
        alpha: float | None = scale * rank if scheme.use_rslora else scheme.alphas.get(layer, scheme.alpha)
        if {"lokr_w1", "lokr_w2"} <= parts.keys():
            parts["lokr_w1"], alpha = parts["lokr_w1"] * scale if scale != 1 else parts["lokr_w1"], None
        layers[layer] = AdapterLayer(parts, alpha)
    return layers


def export_lora(
    folder: Path,
    weights: Mapping[str, Tensor],
    about: LoraDescription,
    family: ModelFamily,
    formats: Sequence[str] = DEFAULT_FORMATS,
    spec: Mapping[str, str] = MappingProxyType({}),
    dora_scales: Mapping[str, Tensor] | None = None,
) -> tuple[Path, ...]:
    """Writes a file for each format into `folder`, and returns their paths. Stock diffusers loads each of them.

    Weights are renamed, scaled and joined in host memory: at a run's end a full card may have no room for copies.

    Args:
        formats: names of `FILES`.
        spec: further metadata, as `model_spec` builds them.
        dora_scales: of a DoRA, what `adapters.dora_scales` returns.

    Raises:
        CheckpointError: these are needed and missing.
    """
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    layers, metadata = layers_of(weights, about.settings), about.metadata()
    if about.settings.kind == "dora" and set(formats) - {"diffusers"}:
        layers = {name: _with_dora_scale(layer, (dora_scales or {}).get(name)) for name, layer in layers.items()}
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


def _with_dora_scale(layer: AdapterLayer, scale_N: Tensor | None) -> AdapterLayer:
    """Returns a DoRA's layer with ComfyUI's form of its lengths."""
    if scale_N is None:
        raise CheckpointError(
            "a DoRA for ComfyUI needs the lengths of the base's rows, which stand in the checkpoint beside its LoRA "
            "file. Give the checkpoint's folder."
        )
    return AdapterLayer({**layer.tensors, MAGNITUDE: scale_N.cpu()}, layer.alpha)


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
        about = read_description(metadata, list(dict.fromkeys(map(layer_of, weights))))
        family = FAMILIES[about.family]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path} is damaged: its metadata cannot be read ({reason}).") from error
    if faulty := [
        name
        for name, tensor in weights.items()
        if tensor.ndim != (1 if name.endswith(MAGNITUDE) else 2) or not tensor.is_floating_point()
    ]:
        raise CheckpointError(f"{path} holds {faulty[0]}, which is no matrix of a LoRA.")
    config = _config_of(source) if source.is_dir() else {}
    run_folder = source.absolute().parent if source.is_dir() else None
    stated = {**config, "rank": about.rank, "lora_alpha": about.alpha, "trigger_words": about.trigger_words}
    spec = model_spec(stated, family, about.base, about.step, run_folder)
    scales_path = path.with_name(DORA_SCALES_FILE)
    try:
        scales = read_tensors(scales_path)[0] if about.settings.kind == "dora" and scales_path.is_file() else None
        return export_lora(folder, weights, about, family, formats or wishes_of(config).formats, spec, scales)
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


def read_description(metadata: Mapping[str, str], layers: Sequence[str]) -> LoraDescription:
    """Reads what `LoraDescription.metadata` and `diffusers_file` wrote.

    Args:
        layers: paths of the layers that the file has an adapter for.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: it is something else.
    """
    scale = json.loads(metadata["lora_adapter_metadata"])
    scheme = read_scheme({key.removeprefix(DIFFUSERS_PREFIX): value for key, value in scale.items()}, layers)
    targets = scale[f"{DIFFUSERS_PREFIX}target_modules"]
    words, versions = json.loads(metadata["pixtune.trigger_words"]), json.loads(metadata["pixtune.versions"])
    return LoraDescription(
        rank=scheme.rank,
        alpha=scheme.alpha,
        targets=[of_kind(target, str) for target in of_kind(targets, list)],
        base=_read_base(metadata),
        family=metadata["pixtune.family"],
        step=int(metadata["pixtune.step"]),
        config_hash=metadata["pixtune.config_hash"],
        trigger_words=[of_kind(word, str) for word in of_kind(words, list)],
        versions={name: of_kind(version, str) for name, version in of_kind(versions, dict).items()},
        scheme=scheme,
    )


def read_scheme(config: Mapping[str, Any], layers: Sequence[str]) -> Scheme:
    """Reads what `Scheme.entries` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    kind = "lokr" if config.get("peft_type") == PEFT_TYPES["lokr"] else "dora" if config.get("use_dora") else "lora"
    rank, alpha = config["r"], config["alpha" if kind == "lokr" else "lora_alpha"]
    ranks, alphas = (of_kind(config.get(f"{name}_pattern", {}), dict) for name in ("rank", "alpha"))
    return Scheme(
        of_kind(rank, int),
        of_kind(alpha, int, float),
        kind,
        values_by_layer({name: of_kind(each, int) for name, each in ranks.items()}, layers, rank),
        values_by_layer({name: of_kind(each, int, float) for name, each in alphas.items()}, layers, alpha),
        config.get("use_rslora") is True,
        of_kind(config.get("decompose_factor", USUAL_FACTOR), int),
        config.get("decompose_both") is True,
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
