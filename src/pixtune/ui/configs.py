"""Configs on the page: YAML files, each of which is one run, with the text that a person wrote kept as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.config.yaml_tree import BoundsError, ConfigDumper, ConfigLoader, compose
from pixtune.errors import PixtuneError
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.storage.files import write_atomically
from pixtune.ui.answers import BadRequestError
from pixtune.ui.workplace import CONFIGS, Workplace

LARGEST_BYTES = MEBIBYTE


@dataclass(frozen=True)
class ConfigFile:
    """A config that is shown: its file and text, and its values where it is right."""

    place: str
    path: Path
    text: str
    config: TrainConfig | None
    problem: PixtuneError | None
    """Why it has no values."""

    @property
    def name(self) -> str:
        return self.path.stem

    def required(self) -> TrainConfig:
        """Returns its values.

        Raises:
            PixtuneError: it has problems; lists them.
        """
        if self.config is None:
            assert self.problem is not None, "a config has values or a problem"
            raise self.problem
        return self.config


def open_config(work: Workplace, place: str) -> ConfigFile:
    """Opens a config of a place.

    Raises:
        OutsideError: the place leads out of the chosen folders.
        BadRequestError: there is no YAML file.
    """
    path = work.roots.find(place)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise BadRequestError(f"there is no config {place!r}: it was moved or deleted, or is no YAML file")
    return read_config(work, place, path)


def read_config(work: Workplace, place: str, path: Path) -> ConfigFile:
    """Reads a config's text and values; relative paths in it mean the home folder, as for the runs."""
    try:
        text = read_bounded(path, LARGEST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"{place} cannot be read ({error})") from error
    try:
        return ConfigFile(place, path, text, load_config(path, folders_must_exist=False), None)
    except PixtuneError as error:
        return ConfigFile(place, path, text, None, error)


def list_configs(work: Workplace) -> list[ConfigFile]:
    """Lists the configs of the page's own folder, the newest first."""
    folder = work.home / CONFIGS
    paths = sorted(folder.glob("*.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [read_config(work, work.roots.place_of(path), path) for path in paths if path.is_file()]


def to_yaml(values: dict[str, Any]) -> str:
    """Returns values as YAML text."""
    text: str = yaml.dump(values, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def write_config(path: Path, text: str) -> None:
    """Writes a config's text, whatever it says: a draft may have problems, and they are shown.

    Raises:
        BadRequestError: it is too long.
        WriteError: it cannot be written.
    """
    data = text.replace("\r\n", "\n").encode("utf-8", errors="replace")
    if len(data) > LARGEST_BYTES:
        raise BadRequestError("a config has at most 1 MiB")
    write_atomically(path, data)


def given_values(text: str) -> dict[str, Any]:
    """Returns the keys that a config's text gives, dotted, with their values; what cannot be read has none."""
    try:
        compose(text)  # within bounds
        tree = yaml.load(text, ConfigLoader)
    except (yaml.YAMLError, BoundsError):
        return {}
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    if isinstance(tree, dict):
        walk("", tree)
    return flat
