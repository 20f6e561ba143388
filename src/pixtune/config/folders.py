"""The folders of a data set, each with everything that holds for it: its own keys, and `data_config`'s for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pixtune.config.sections import DataConfig, FolderConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """One folder of pictures, with the settings that hold for it."""

    place: str
    """Place of its keys in the config: "data_config", or "data_config.folders[2]"."""
    label: str
    """Text before the names of its pictures: "" where it is the only one of `img_dir`, else "NAME/"."""
    img_dir: Path
    control_dirs: tuple[Path, ...]
    metadata_file: Path | None
    allow_missing_controls: bool
    caption_type: str
    img_size: int
    random_ratio: bool
    upscale: bool
    repeats: float = 1.0
    """Number of times that an epoch uses each of its pictures, on average."""

    @property
    def has_controls(self) -> bool:
        """Whether its pictures may have control pictures."""
        return bool(self.control_dirs) or self.metadata_file is not None


def folders_of(data: DataConfig) -> tuple[Folder, ...]:
    """Returns the folders of a data set in their order; the one of `img_dir` where it names no others."""
    if not data.folders:
        assert data.img_dir is not None, "DataConfig requires one or the other"
        own = FolderConfig(img_dir=data.img_dir, control_dir=data.control_dir, metadata_file=data.metadata_file)
        return (_resolved(own, data, "data_config", ""),)
    labels = _labels(data.folders)
    return tuple(
        _resolved(each, data, f"data_config.folders[{number}]", f"{label}/")
        for number, (each, label) in enumerate(zip(data.folders, labels, strict=True))
    )


def largest_size(data: DataConfig) -> int:
    """Returns the largest training size of all folders, in pixels: samples have it unless they have their own."""
    return max(each.img_size for each in folders_of(data))


def folder_beside(data: DataConfig, img_dir: Path) -> Folder:
    """Returns a folder of held-out pictures, with the settings of the first folder to train on.

    Its control pictures lie beside it, in folders of the same names as those of the pictures to train on. Each picture
    has its own ratio.
    """
    first = folders_of(data)[0]
    controls = next((each.control_dirs for each in folders_of(data) if each.control_dirs), ())
    beside = tuple(img_dir.parent / control.name for control in controls)
    return replace(
        first, place="validation", label="", img_dir=img_dir, control_dirs=beside, metadata_file=None,
        random_ratio=False, repeats=1.0,
    )  # fmt: skip


def _resolved(own: FolderConfig, data: DataConfig, place: str, label: str) -> Folder:
    controls = own.control_dir
    return Folder(
        place=place,
        label=label,
        img_dir=own.img_dir,
        control_dirs=() if controls is None else (controls,) if isinstance(controls, Path) else controls,
        metadata_file=own.metadata_file,
        allow_missing_controls=_first(own.allow_missing_controls, data.allow_missing_controls),
        caption_type=_first(own.caption_type, data.caption_type),
        img_size=_first(own.img_size, data.img_size),
        random_ratio=_first(own.random_ratio, data.random_ratio),
        upscale=_first(own.upscale, data.upscale),
        repeats=own.repeats,
    )


def _first(own: T | None, common: T) -> T:
    return common if own is None else own


def _labels(folders: Sequence[FolderConfig]) -> list[str]:
    """Returns a name for each folder, unlike all others: the shortest end of its path that tells it from them.

    One folder that is named twice, for other settings, gets a number the second time.
    """
    paths = [Path(os.path.abspath(each.img_dir)).parts for each in folders]
    labels: list[str] = []
    for own, each in zip(paths, folders, strict=True):
        others = [other for other in paths if other != own]
        length = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        label = unlike = each.name or "/".join(own[-length:]).strip("/")
        number = 2
        while unlike in labels:
            unlike, number = f"{label}#{number}", number + 1
        labels.append(unlike)
    return labels
