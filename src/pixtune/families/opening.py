"""Opens the model that a config names: a folder, or a transformer in one file, with parts that may lie elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixtune.config.model_parts import NO_PARTS, ModelParts
from pixtune.errors import WeightsError
from pixtune.families.file_names import FileNames, flux_config, names_of_file
from pixtune.families.other_files import LORA_SIGNS, OTHER_MODELS, kind_of_tensors
from pixtune.storage.architecture import ShippedModel, find_architecture
from pixtune.storage.gguf_file import is_gguf, read_gguf_header
from pixtune.storage.model_folder import (
    MODEL_KEY,
    SHARD_NAME,
    ModelFolder,
    is_file_name,
    open_model_folder,
    read_header,
)
from pixtune.storage.shipped import read_shipped
from pixtune.storage.transformer_file import BESIDE_WEIGHTS, MARKS, Place, TransformerFile, check_whole, read_scalings

SCHEDULER, TRANSFORMER, VAE, TEXT_ENCODER, TOKENIZER = "scheduler", "transformer", "vae", "text_encoder", "tokenizer"
QWEN_INDEX: Mapping[str, tuple[str, str]] = {
    SCHEDULER: ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    TEXT_ENCODER: ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    TOKENIZER: ("transformers", "Qwen2Tokenizer"),
    TRANSFORMER: ("diffusers", "QwenImageTransformer2DModel"),
    VAE: ("diffusers", "AutoencoderKLQwenImage"),
}
EDIT_INDEX = {"processor": ("transformers", "Qwen2VLProcessor"), **QWEN_INDEX}
FLUX_INDEX: Mapping[str, tuple[str, str]] = {
    SCHEDULER: ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    TEXT_ENCODER: ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    TOKENIZER: ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    TRANSFORMER: ("diffusers", "FluxTransformer2DModel"),
    VAE: ("diffusers", "AutoencoderKL"),
}
INDEX: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "QwenImagePipeline": QWEN_INDEX,
    "QwenImageEditPipeline": EDIT_INDEX,
    "QwenImageEditPlusPipeline": EDIT_INDEX,
    "FluxPipeline": FLUX_INDEX,
    "FluxKontextPipeline": FLUX_INDEX,
}
"""Parts of a pipeline, each with its library and class, as a `model_index.json` names them."""


def open_model(name_or_path: str, parts: ModelParts = NO_PARTS) -> ModelFolder:
    """Opens a model whose parts may lie in several places. A hub name is downloaded, without the parts named here.

    Raises:
        WeightsError: something is missing, or a file is not what it should be; says what it is.
    """
    return _open(name_or_path, parts, may_download=True)


def find_model(name_or_path: str, parts: ModelParts = NO_PARTS) -> ModelFolder:
    """Finds what a plan reads of a model, as `find_architecture` does. Downloads nothing.

    Raises:
        WeightsError: as `open_model`.
    """
    return _open(name_or_path, parts, may_download=False)


def _open(name_or_path: str, parts: ModelParts, may_download: bool) -> ModelFolder:
    path = Path(name_or_path).expanduser()
    is_file = path.is_file() or (is_file_name(name_or_path) and not path.is_dir())
    _check_together(name_or_path, parts, is_file)
    named = dict(parts.named)
    if is_file:
        named[TRANSFORMER] = path
    if not named:
        return open_model_folder(name_or_path) if may_download else find_architecture(name_or_path)
    for part, place in named.items():
        _check_place(part, place, MODEL_KEY if is_file and part == TRANSFORMER else None)
    others, key = (parts.others, "model_parts.others") if is_file else (name_or_path, MODEL_KEY)
    found = _read_names(named[TRANSFORMER]) if TRANSFORMER in named and named[TRANSFORMER].is_file() else None
    if others is not None:
        folder = open_model_folder(others, named, key) if may_download else find_architecture(others, key)
    elif found is not None:
        folder = _from_parts_alone(found[0], named, parts)
    else:
        raise AssertionError("parts without a folder have a transformer's file")
    _check_parts_of(folder, named)
    file = None
    if found is not None and folder.pipeline_class in INDEX and folder.pipeline_class not in found[0].pipelines:
        raise WeightsError(
            f"{named[TRANSFORMER]} is a {found[0].model} transformer, and {folder.path} is a {folder.pipeline_class}, "
            f"which has another. The other parts of {found[0].example} would fit it."
        )
    if found is not None:
        kind, prefix, header = found
        file = _transformer_file(named.pop(TRANSFORMER), kind, prefix, header, folder)
    return replace(folder, parts=named, file=file)


def _check_together(name_or_path: str, parts: ModelParts, is_file: bool) -> None:
    """Checks that the keys name each part once."""
    if is_file and parts.transformer is not None:
        raise WeightsError(
            f"two transformers are named: pretrained_model_name_or_path, {name_or_path}, and model_parts.transformer, "
            f"{parts.transformer}. Leave one of them."
        )
    for key in ("others", "pipeline"):
        if not is_file and (value := getattr(parts, key)) is not None:
            raise WeightsError(
                f"model_parts.{key} is {value}, and pretrained_model_name_or_path, {name_or_path}, is no file but a "
                f"model that has it. Leave out model_parts.{key}."
            )
    if parts.others is not None and parts.pipeline is not None:
        raise WeightsError(
            f"model_parts.pipeline is {parts.pipeline}, and the folder that model_parts.others names, {parts.others}, "
            "says which it is. Leave out one of them."
        )


def _check_place(part: str, place: Path, key: str | None) -> None:
    """Checks that a part is where it should be, and a folder where it has to be one."""
    key = key or f"model_parts.{part}"
    if not place.exists():
        raise WeightsError(f"{key}: there is no {place.absolute()}.")
    if place.is_dir():
        config = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        has_config = part in (SCHEDULER, VAE, TRANSFORMER) or part.startswith(TEXT_ENCODER)
        if has_config and not (place / config).is_file():
            raise WeightsError(f"{key}: {place} has no {config}. The folder of that part of a model is needed.")
    elif SHARD_NAME.search(place.name):
        raise WeightsError(f"{key}: {place} is one of several files that belong together. Name the folder they are in.")
    elif part != TRANSFORMER:
        raise WeightsError(
            f"{key}: {place} is a file, and a folder with its config is needed, as models in diffusers' layout have "
            "one for each part. Only a transformer may be one file."
        )


Found = tuple[FileNames, str, Mapping[str, Any]]


def _read_names(path: Path) -> Found:
    """Reads a file's header, and finds which transformer it holds.

    Raises:
        WeightsError: it holds none that is trained here; says what it is.
    """
    in_gguf = is_gguf(path)
    header = read_gguf_header(path) if in_gguf else read_header(path)
    names = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = names_of_file(names)
    prefix = found[1] if found else ""
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    others = [sign for _, signs in OTHER_MODELS for sign in signs]
    if found is None or any(sign in name for name in own for sign in (*LORA_SIGNS, *others)):
        raise WeightsError(f"{path} is {kind_of_tensors(own)}.")
    if not in_gguf:
        check_whole(path, header)
    return *found, header


def _transformer_file(
    path: Path, kind: FileNames, prefix: str, header: Mapping[str, Any], folder: ModelFolder
) -> TransformerFile:
    """Finds each tensor of the model in a file, and completes its config.

    Raises:
        WeightsError: the file has tensors that such a transformer lacks, or a form that is not known.
    """
    stored = {
        name.removeprefix(prefix): tuple(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and name.startswith(prefix)
    }
    places: dict[str, Place] = {}
    marked: dict[str, object] = {}
    for name in stored:
        if name in kind.marks:
            key, value = kind.marks[name]
            marked[key] = value
        elif name not in MARKS and name.rpartition(".")[2] not in BESIDE_WEIGHTS:
            parts = dict(kind.names(name, stored))
            if not parts:
                raise WeightsError(f"{path} holds {prefix}{name}, which no {kind.model} transformer has.")
            places |= {own: replace(place, name=f"{prefix}{place.name}") for own, place in parts.items()}
    in_gguf = is_gguf(path)
    scalings = {} if in_gguf else read_scalings(path, header, prefix)
    file = TransformerFile(path, header, places, scalings, {}, in_gguf)
    try:
        told = kind.config(file.shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{path} lacks tensors of a {kind.model} transformer, {error} among them. Was the download interrupted? "
            "Fetch it again."
        ) from error
    beside = _config_beside(folder, kind)
    # What the class assumes anyway is not added, so that a file with the folder's weights has the folder's fingerprint.
    told = {key: value for key, value in told.items() if key in beside or kind.defaults.get(key) != value}
    config = {**beside, **told, **marked}
    _check_config(path, kind, config)
    return replace(file, config=config)


def _check_config(path: Path, kind: FileNames, config: Mapping[str, Any]) -> None:
    """Checks what the tensors alone can show to be another model than the one that is trained."""
    axes, head = config.get("axes_dims_rope"), config.get("attention_head_dim")
    if isinstance(axes, list) and sum(axes) != head:
        raise WeightsError(
            f"{path} has heads of {head} features, and the config beside it tells the positions of {sum(axes)} "
            "(axes_dims_rope). Name a model with this transformer's config as model_parts.others."
        )
    if kind.config is flux_config and config["in_channels"] != (config.get("out_channels") or config["in_channels"]):
        raise WeightsError(
            f"{path} reads {config['in_channels']} channels and makes {config['out_channels']}: it is a FLUX.1 for "
            "filling in, or one that follows edges or depths, which no family here trains."
        )


def _config_beside(folder: ModelFolder, kind: FileNames) -> Mapping[str, Any]:
    """Returns the config of the folder's own transformer, for what shapes do not tell; without one, the usual one."""
    has_none = folder.given_index is not None or not folder.config_file(TRANSFORMER).is_file()
    if has_none and not isinstance(folder, ShippedModel):
        return read_shipped()["configs"][TRANSFORMER][kind.architecture]
    return folder.component_config(TRANSFORMER)


def _from_parts_alone(kind: FileNames, named: Mapping[str, Path], parts: ModelParts) -> ModelFolder:
    """Returns the model that the named parts make up, without a folder of which they are parts."""
    pipeline = parts.pipeline or kind.pipelines[0]
    if pipeline not in kind.pipelines:
        raise WeightsError(
            f"model_parts.pipeline is {pipeline}, and a {kind.model} transformer is one of {', '.join(kind.pipelines)}."
        )
    if missing := [part for part in INDEX[pipeline] if part not in named]:
        raise WeightsError(
            f"{named[TRANSFORMER]} is a {kind.model} transformer alone. A {pipeline} needs "
            f"{', '.join(missing)} beside it: name a model that has them as model_parts.others, for example "
            f"{kind.example}, or their folders as {', '.join(f'model_parts.{part}' for part in missing)}."
        )
    index = {"_class_name": pipeline, **{part: list(names) for part, names in INDEX[pipeline].items()}}
    return ModelFolder(named[TRANSFORMER].parent, given_index=index)


def _check_parts_of(folder: ModelFolder, named: Mapping[str, Path]) -> None:
    """Checks that the model has the parts that are named."""
    known = INDEX.get(folder.pipeline_class)
    if known is not None and (foreign := [part for part in named if part not in known]):
        raise WeightsError(
            f"model_parts.{foreign[0]} is named, and a {folder.pipeline_class} has no such part, but "
            f"{', '.join(known)}."
        )
