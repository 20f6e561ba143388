"""The folders of a data set, each with everything that holds for it: its own keys, and `data_config`'s for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pixtune.config.sections import DataConfig, FolderConfig, PriorConfig

T = TypeVar("T")
CACHE_FOLDER = ".pixtune_cache"
"""Name of the cache's folder inside the first folder of pictures, where the config names no other."""


@dataclass(frozen=True)
class CaptionRules:
    """Source of a folder's captions, and what is made of them."""

    extension: str
    """Extension of caption files."""
    source: str
    """One of `CAPTION_SOURCES`."""
    text: str | None
    """One caption for all pictures."""
    prefix: str
    shuffle: bool
    keep: int
    """Number of first tags that are neither shuffled nor left out."""
    dropout_rate: float
    """Share of tags that is left out."""
    num_forms: int
    """Number of forms of a caption whose tags are shuffled or left out."""


@dataclass(frozen=True)
class DatasetColumns:
    """A Hugging Face data set, and which of its columns hold what."""

    name: str
    split: str
    image: str
    caption: str
    control: str | None


MaskSource = Path | Literal["alpha"] | None
"""Folder of masks of the pictures' stems; "alpha": the pictures' own alpha channels; None: there are no masks."""


@dataclass(frozen=True)
class Folder:
    """One folder of pictures, with the settings that hold for it."""

    place: str
    """Place of its keys in the config: "data_config", or "data_config.folders[2]"."""
    label: str
    """Text before the names of its pictures: "" where it is the only one of `img_dir`, else "NAME/"."""
    img_dir: Path
    """Folder of its pictures; those of a `dataset` are copied there."""
    control_dirs: tuple[Path, ...]
    metadata_file: Path | None
    allow_missing_controls: bool
    captions: CaptionRules
    img_sizes: tuple[int, ...]
    """Training sizes in pixels; each turn draws one."""
    size_shares: tuple[float, ...]
    """Share of turns of each size; they sum to 1."""
    flip: bool
    random_ratio: bool
    upscale: bool
    repeats: float = 1.0
    """Number of times that an epoch uses each of its pictures, on average."""
    masks: MaskSource = None
    allow_missing_masks: bool = False
    weight_outside_mask: float = 0.02
    loss_weight: float = 1.0
    """Factor of its pictures' losses."""
    caption_dropout_rate: float | None = None
    """Share of turns in which the empty caption replaces its pictures' own; None: the data set's."""
    dataset: DatasetColumns | None = None
    """Hugging Face data set that it is read from; None: its files are."""

    @property
    def rules_place(self) -> str:
        """Place of keys such as `allow_missing_masks`, which folders beside the data set share with it."""
        return self.place if self.place.startswith("data_config") else "data_config"

    @property
    def img_size(self) -> int:
        """Largest training size of its pictures, in pixels."""
        return max(self.img_sizes)

    @property
    def has_controls(self) -> bool:
        """Whether its pictures may have control pictures."""
        of_dataset = self.dataset is not None and self.dataset.control is not None
        return bool(self.control_dirs) or self.metadata_file is not None or of_dataset


def cache_folder(data: DataConfig) -> Path:
    """Returns the folder for encoded pictures and captions: `cache_dir`, or one inside the first folder of pictures."""
    first = data.folders[0].img_dir if data.folders else data.img_dir
    if data.cache_dir is not None:
        return data.cache_dir
    assert first is not None, "DataConfig requires cache_dir where the first pictures come from a data set"
    return first / CACHE_FOLDER


def folders_of(data: DataConfig) -> tuple[Folder, ...]:
    """Returns the folders of a data set in their order; the one of `img_dir` where it names no others."""
    if not data.folders:
        assert data.img_dir is not None, "DataConfig requires one or the other"
        own = FolderConfig(
            img_dir=data.img_dir,
            control_dir=data.control_dir,
            metadata_file=data.metadata_file,
            mask_dir=data.mask_dir,
        )
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

    Its control pictures and masks lie beside it, in folders of the same names as those of the pictures to train on.
    Each picture has its own ratio.
    """
    first = folders_of(data)[0]
    controls = next((each.control_dirs for each in folders_of(data) if each.control_dirs), ())
    beside = tuple(img_dir.parent / control.name for control in controls)
    masks = next((each.masks for each in folders_of(data) if each.masks), None)
    if isinstance(masks, Path):
        masks = img_dir.parent / masks.name
        masks = None if first.allow_missing_masks and not masks.exists() else masks
    return replace(
        first, place="validation", label="", img_dir=img_dir, control_dirs=beside, metadata_file=None,
        dataset=None, random_ratio=False, flip=False, img_sizes=first.img_sizes[:1], size_shares=(1.0,), repeats=1.0,
        masks=masks,
    )  # fmt: skip


def prior_folder(data: DataConfig, prior: PriorConfig, img_dir: Path) -> Folder:
    """Returns a folder of regularization pictures, with the settings of `data_config` for sizes, crops and flips.

    Captions are files and stay as they are: no prefix names the new thing. Control pictures lie beside it, if there are
    any; see `folder_beside`.
    """
    own = FolderConfig(
        img_dir=img_dir,
        repeats=prior.repeats,
        loss_weight=prior.loss_weight,
        caption_source="file",
        caption_type="txt" if prior.prompts else data.caption_type,
        caption_prefix="",
        shuffle_tags=False,
        tag_dropout_rate=0.0,
    )
    controls = tuple(path for path in folder_beside(data, img_dir).control_dirs if path.is_dir())
    of_prior = _resolved(own, data, "prior_preservation", "prior_preservation/")
    return replace(of_prior, control_dirs=controls, masks=None)


def _resolved(own: FolderConfig, data: DataConfig, place: str, label: str) -> Folder:
    controls = own.control_dir
    # A folder's own source of captions wins over a text for all, and its own sizes over shares of others.
    text = own.caption_text if own.caption_source is not None else _first(own.caption_text, data.caption_text)
    source = "file" if text is not None else _first(own.caption_source, data.caption_source)
    given = _first(own.img_size, data.img_size)
    sizes = (given,) if isinstance(given, int) else given
    common = data.img_size_shares if own.img_size is None else None
    shares = _first(own.img_size_shares, common or (1.0,) * len(sizes))
    return Folder(
        place=place,
        label=label,
        img_dir=own.img_dir or cache_folder(data) / "pictures",
        control_dirs=() if controls is None else (controls,) if isinstance(controls, Path) else controls,
        metadata_file=own.metadata_file,
        allow_missing_controls=_first(own.allow_missing_controls, data.allow_missing_controls),
        captions=CaptionRules(
            extension=_first(own.caption_type, data.caption_type),
            source=source,
            text=text,
            prefix=_first(own.caption_prefix, data.caption_prefix),
            shuffle=_first(own.shuffle_tags, data.shuffle_tags),
            keep=_first(own.keep_tags, data.keep_tags),
            dropout_rate=_first(own.tag_dropout_rate, data.tag_dropout_rate),
            num_forms=_first(own.caption_variants, data.caption_variants),
        ),
        img_sizes=tuple(size for size, share in zip(sizes, shares, strict=True) if share),
        size_shares=tuple(share / sum(shares) for share in shares if share),
        flip=_first(own.flip, data.flip),
        random_ratio=_first(own.random_ratio, data.random_ratio),
        upscale=_first(own.upscale, data.upscale),
        repeats=own.repeats,
        caption_dropout_rate=own.caption_dropout_rate,
        dataset=DatasetColumns(own.dataset, own.dataset_split, own.image_column, own.caption_column, own.control_column)
        if own.dataset is not None
        else None,
        masks=own.mask_dir or own.mask or data.mask,
        allow_missing_masks=_first(own.allow_missing_masks, data.allow_missing_masks),
        weight_outside_mask=_first(own.weight_outside_mask, data.weight_outside_mask),
        loss_weight=own.loss_weight,
    )


def _first(own: T | None, common: T) -> T:
    return common if own is None else own


def _labels(folders: Sequence[FolderConfig]) -> list[str]:
    """Returns a name for each folder, unlike all others: the shortest end of its path that tells it from them.

    One folder that is named twice, for other settings, gets a number the second time.
    """
    paths = [Path(os.path.abspath(each.img_dir or each.dataset or ".")).parts for each in folders]
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
