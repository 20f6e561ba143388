"""Finds the LoRA that a path means: a file, a run's output folder or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pixtune.config.model_parts import NO_PARTS, ModelParts
from pixtune.errors import CheckpointError, WeightsError
from pixtune.inputs.misspelt import did_you_mean
from pixtune.storage.checkpoint import read_folder
from pixtune.storage.checkpoint_state import read_state
from pixtune.storage.model_folder import read_header
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.model_spec import largest_size


@dataclass(frozen=True)
class FoundLora:
    """A LoRA's file, with what its run was trained on."""

    path: Path | None = None
    """Path of the file; None where no LoRA is asked for."""
    model: str | None = None
    """The base model as its run's config names it; None where no run is known."""
    side: int | None = None
    """Largest training size of its run in pixels; None where no run is known."""
    model_parts: ModelParts = NO_PARTS
    """Parts of the base model that lie elsewhere, as its run's config names them."""
    max_text_tokens: int | None = None
    """Value of its run's `data_config.max_text_tokens`: FLUX attends to padding, so others give other pictures."""
    control_size: int | None = None
    """Value of its run's `data_config.control_size`; None where no run is known."""


def find_lora(path: Path) -> FoundLora:
    """Finds the LoRA that a path means.

    Args:
        path: a LoRA file; an output folder, whose newest LoRA is meant; or a checkpoint.

    Raises:
        WeightsError: there is none; says what is there.
    """
    if path.is_file():
        read_header(path)  # a picture or a report of the run is told as such before its model is loaded
        return _with_run(path, path.parent)
    if not path.is_dir():
        raise WeightsError(f"there is no LoRA at {path}.{did_you_mean(path)} Give a LoRA file, or a run's output_dir.")
    if (path / DIFFUSERS_FILE).is_file():
        return _with_run(path / DIFFUSERS_FILE, path)
    for saved in read_folder(path).order.course:
        if (saved.path / DIFFUSERS_FILE).is_file():
            return _with_run(saved.path / DIFFUSERS_FILE, saved.path)
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if len(others) == 1:
        return FoundLora(path / others[0])
    runs = sorted(str(file.parent) for file in path.glob(f"*/{DIFFUSERS_FILE}"))
    if others:
        advice = f"it holds {', '.join(others)}: name one of them"
    elif runs:
        advice = f"name one of the runs in it: {', '.join(runs)}"
    else:
        advice = "a run writes one with its first checkpoint"
    raise WeightsError(f"{path} has no {DIFFUSERS_FILE}: {advice}.")


def _with_run(file: Path, folder: Path) -> FoundLora:
    """Adds what the run in the file's folder says; a file that was moved elsewhere has none."""
    config = _config_of(folder) or _config_of(folder.parent)  # its best weights lie in a folder of their own
    model, recorded = config.get("pretrained_model_name_or_path"), config.get("data_config")
    data: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    try:
        parts = ModelParts.model_validate(config.get("model_parts", {}))
    except ValidationError as error:
        raise WeightsError(
            f"{folder} records model_parts that cannot be read. Name the model: --model, and its parts: --part."
        ) from error
    tokens, control = (
        value if isinstance(value, int) else None
        for value in (data.get(key) for key in ("max_text_tokens", "control_size"))
    )
    model = _from_here(model, config.get("output_dir"), folder) if isinstance(model, str) else None
    return FoundLora(file, model, largest_size(data), parts, tokens, control)


def _from_here(model: str, output_dir: object, folder: Path) -> str:
    """Returns a run's model as it is named from here, where the run names it from the folder in which it was started.

    That folder is known where the run's own output folder is named from it, too.

    Args:
        folder: the output folder, or one of its checkpoints.
    """
    if Path(model).is_absolute() or Path(model).exists() or not isinstance(output_dir, str):
        return model
    own = Path(output_dir).parts
    for place in (folder.absolute(), *folder.absolute().parents):
        if own and place.parts[-len(own) :] == own:
            there = Path(*place.parts[: -len(own)], model)
            return str(there) if there.is_dir() else model
    return model


def _config_of(folder: Path) -> Mapping[str, Any]:
    """Reads the config that a checkpoint, or the newest one of an output folder, records; empty where there is none."""
    try:
        found = [saved.path for saved in read_folder(folder).order.course[:1]] or [folder]
        config = read_state(found[0])["record"]["config"]
    except (CheckpointError, KeyError, TypeError):
        return {}
    return config if isinstance(config, Mapping) else {}
