"""Finds what a plan reads of a model, configs and sizes: in a folder, in the hub's cache, or shipped with pixtune."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixtune.errors import WeightsError
from pixtune.storage.model_folder import MODEL_KEY, ModelFolder, download_command, open_model_folder
from pixtune.storage.shipped import FILE, read_shipped, shipped_names, spelling_hint

CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json")
"""Files of a model that a plan cannot do without."""
CONFIG_PATTERNS = ("model_index.json", "*/config.json", "*.index.json")
"""Patterns of these files and of the indexes of weights, which tell the sizes of encoders that are not there yet."""


@dataclass(frozen=True)
class ShippedModel(ModelFolder):
    """A published model of which only the architecture is here: configs and sizes that pixtune ships, and no files.

    It serves a plan and nothing else: `open_model_folder` never returns one.
    """

    name: str
    """Hub name."""

    @cached_property
    def index(self) -> dict[str, Any]:
        return {"_class_name": self._parts["pipeline"]}

    def component_config(self, component: str) -> dict[str, Any]:
        if (component == "transformer" and self.file is not None) or component in self.parts:
            return super().component_config(component)
        return read_shipped()["configs"][component][self._parts[component]]

    def has_weights(self, component: str) -> bool:
        is_elsewhere = (component == "transformer" and self.file is not None) or component in self.parts
        return is_elsewhere and super().has_weights(component)

    def count_parameters(self, component: str) -> int | None:
        """Returns the number of a component's parameters that reach a device; None for one without weights."""
        if component in self.parts:
            return super().count_parameters(component)
        return read_shipped()["parameters"].get(component, {}).get(self._parts.get(component))

    @property
    def _parts(self) -> dict[str, str]:
        return read_shipped()["models"][self.name]


def find_shipped(name: str) -> ShippedModel | None:
    """Returns the shipped architecture of a model of the hub, if there is one."""
    return ShippedModel(FILE, name) if name in shipped_names() else None


def find_architecture(name_or_path: str, key: str = MODEL_KEY) -> ModelFolder:
    """Finds the best source of a model's sizes: a local folder, the hub's cache, or the architecture that is shipped.

    In this order: files on this machine are what a run would train, changed ones included. The network is not asked: no
    plan waits for it, and of a published model it could only repeat what is shipped.

    Raises:
        WeightsError: none of them has it; says which files suffice for a plan, and how they are fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return ModelFolder(path) if (path / CONFIGS[0]).is_file() else open_model_folder(name_or_path, key=key)
    cached, shipped = find_cached(name_or_path, key), find_shipped(name_or_path)
    if shipped and (cached is None or missing_configs(cached)):
        return shipped
    if cached is None:
        raise WeightsError(
            f"{key}: {name_or_path!r} is no folder here ({path.absolute()}) and not in the "
            f"hub's cache, and a plan downloads nothing.{spelling_hint(name_or_path)} {how_to_fetch(name_or_path)}"
        )
    if not (cached.path / CONFIGS[0]).is_file():  # else its pipeline's class can be named, which says more
        require_configs(cached, name_or_path)
    return cached


def find_cached(name: str, key: str = MODEL_KEY) -> ModelFolder | None:
    """Finds what the hub's cache has of a model, without the network.

    Raises:
        WeightsError: no model of the hub can have this name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return ModelFolder(Path(snapshot_download(name, local_files_only=True)))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise WeightsError(
            f"{key}: {name!r} is no folder here ({Path(name).absolute()}) and no name of the "
            f"hub.{spelling_hint(name)} Give a folder in diffusers' layout, or a name like Qwen/Qwen-Image."
        ) from error


def missing_configs(folder: ModelFolder) -> list[str]:
    """Lists which of `CONFIGS` a model lacks, apart from parts that lie elsewhere."""
    elsewhere = {*folder.parts, *([] if folder.file is None else ["transformer"])}
    lacking = [file for file in CONFIGS if not (folder.path / file).is_file() and folder.given_index is None]
    return [file for file in lacking if file.split("/")[0] not in elsewhere]


def require_configs(folder: ModelFolder, name: str) -> None:
    """Checks that a plan can be made from a folder's files.

    Raises:
        WeightsError: some of `CONFIGS` are missing; names them all, and how they are fetched.
    """
    if missing := missing_configs(folder):
        raise WeightsError(f"{folder.path} lacks {' and '.join(missing)}. {how_to_fetch(name)}")


def how_to_fetch(name: str) -> str:
    """Returns sentences on which files a plan needs of a model of the hub, and the command that fetches them."""
    name = "OWNER/MODEL" if Path(name).expanduser().exists() else name
    return (
        f"It needs {', '.join(CONFIGS)}, and the *.index.json of weights in several files tell encoders' sizes: less "
        f"than a megabyte in all, no weights. Fetch them with `{download_command(name, CONFIG_PATTERNS)}`; a model "
        "behind a licence asks for `hf auth login` before."
    )
