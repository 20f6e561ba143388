"""The samples of a run: which pictures, with which caption and framings, and which of them are held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixtune import draws
from pixtune.config.schema import DataConfig
from pixtune.data.buckets import Buckets, Framing, build_buckets, frame_picture, frame_variants
from pixtune.data.images import read_size
from pixtune.data.pairs import find_pairs, read_caption
from pixtune.data.validate import validate_folder
from pixtune.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One captioned picture."""

    name: str
    image_path: Path
    caption: str
    framings: tuple[Framing, ...]
    """The crops it is drawn at: its own, or one for each ratio of `random_ratio`."""


def read_samples(config: DataConfig, folder: Path, multiple: int, random_ratio: bool) -> list[Sample]:
    """All samples of a folder, in the order of their names.

    Args:
        multiple: picture sides in pixels must be a multiple of this.
        random_ratio: frame each picture for every ratio instead of its own alone.

    Raises:
        DataError: every fault of the folder at once. Reads headers only; damage behind them is for `check_folder`.
    """
    found = find_pairs(folder, config.caption_type)
    buckets = build_buckets(config.img_size, multiple)
    faults = list(found.faults)
    samples = []
    for pair in found.pairs:
        try:
            assert pair.caption_path is not None, "find_pairs reports these as faults"
            framings = _framings(*read_size(pair.image_path), buckets, config.upscale, random_ratio)
            samples.append(Sample(pair.name, pair.image_path, read_caption(pair.caption_path), framings))
        except DataError as error:
            faults += error.faults
        except ValueError as error:
            faults.append(f"{pair.image_path} {error}")
    if faults:
        check_folder(config, folder, multiple)  # finds these and damaged pictures, too, so that all come together
        raise DataError(f"{folder} cannot be trained on", faults)
    return samples


def check_folder(config: DataConfig, folder: Path, multiple: int) -> tuple[str, ...]:
    """Decodes every picture of a folder to its last pixel and returns warnings.

    Raises:
        DataError: all faults of the folder.
    """
    report = validate_folder(
        folder, config.caption_type, img_size=config.img_size, multiple=multiple, upscale=config.upscale
    )
    if not report.ok:
        raise DataError(f"{folder} cannot be trained on, {len(report.faults)} faults", report.faults)
    return report.warnings


def _framings(width: int, height: int, buckets: Buckets, upscale: bool, random_ratio: bool) -> tuple[Framing, ...]:
    if random_ratio:
        return tuple(frame_variants(width, height, buckets, upscale).values())
    return (frame_picture(width, height, buckets, upscale=upscale),)


def split_held_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): about `share` of the samples, at least one if share is not 0, chosen by seed and name.

    Raises:
        DataError: nothing would be left to train on.
    """
    if share == 0:
        return samples, []
    count = max(1, round(share * len(samples)))
    if count >= len(samples):
        raise DataError(
            "validation.held_out leaves nothing to train on",
            [f"{share} of {len(samples)} pictures are {count}; add pictures or lower the share"],
        )
    chosen = {s.name for s in sorted(samples, key=lambda s: draws.draw_key(seed, "hold out", s.name))[:count]}
    return [s for s in samples if s.name not in chosen], [s for s in samples if s.name in chosen]
