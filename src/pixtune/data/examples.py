"""The examples of a run: pictures with their captions and framings, and the choice of those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pixtune import randomness
from pixtune.config.schema import DataConfig
from pixtune.data.buckets import Buckets, Framing, build_buckets, frame_picture, frame_variants
from pixtune.data.controls import ControlFraming, ControlRules, frame_control
from pixtune.data.images import picture_digest, read_size
from pixtune.data.metadata import read_metadata
from pixtune.data.pairs import Pair, Pairs, find_pairs, shorten
from pixtune.data.validate import validate_pairs
from pixtune.errors import DataError
from pixtune.sizes import Size


@dataclass(frozen=True)
class Example:
    """One captioned picture."""

    name: str
    image_path: Path
    caption: str
    framings: tuple[Framing, ...]
    """Crops that it is trained at: its own alone, or one for each ratio of `random_ratio`."""
    control_paths: tuple[Path, ...] = ()
    control_framings: tuple[tuple[ControlFraming, ...], ...] = ()
    """Framings of the control pictures, for each of `framings`."""

    @cached_property
    def image_digest(self) -> str:
        """SHA-256 of the picture's file when this was first read: a run's own, whatever becomes of the file later."""
        return picture_digest(self.image_path)

    @cached_property
    def control_digests(self) -> tuple[str, ...]:
        """SHA-256 of each control picture's file when this was first read."""
        return tuple(picture_digest(path) for path in self.control_paths)

    def signature(self, variant: int) -> tuple[Size, ...]:
        """Returns the sizes of target and controls: only examples that agree in all of them fit into one batch."""
        controls = self.control_framings[variant] if self.control_paths else ()
        return (self.framings[variant].size, *(control.latents.size for control in controls))


def control_folders(config: DataConfig) -> tuple[Path, ...]:
    """Returns `control_dir` as a tuple."""
    folders = config.control_dir
    return () if folders is None else (folders,) if isinstance(folders, Path) else folders


def find_examples(config: DataConfig, folder: Path) -> Pairs:
    """Finds the files that belong together in a folder, by the config's layout."""
    if config.metadata_file is not None and folder == config.img_dir:
        return read_metadata(config.metadata_file, folder)
    controls = control_folders(config)
    if folder != config.img_dir:  # a held-out folder: its control folders lie beside it, by the same names
        controls = tuple(folder.parent / control.name for control in controls)
    return find_pairs(folder, config.caption_type, controls, config.allow_missing_controls)


def read_examples(
    config: DataConfig, folder: Path, multiple: int, random_ratio: bool, controls: ControlRules | None = None
) -> list[Example]:
    """Reads all examples of a folder, in the order of their names.

    Only headers of pictures are read; damage behind them is for `check_folder` to find.

    Args:
        multiple: number that picture sides, in pixels, must be divisible by.
        random_ratio: frame each picture for every ratio instead of its own alone.
        controls: the model's use of control pictures; None: it takes none.

    Raises:
        DataError: all problems of the folder, together.
    """
    found = find_examples(config, folder)
    buckets = build_buckets(config.img_size, multiple)
    faults = [*found.faults, *_control_faults(found.pairs, controls, config.allow_missing_controls)]
    examples = []
    for pair in found.pairs:
        try:
            examples.append(_read_example(pair, buckets, config.upscale, random_ratio, controls))
        except DataError as error:
            faults += error.faults
        except ValueError as error:
            faults.append(f"{pair.image_path} {error}")
    if faults:
        check_folder(config, folder, multiple)  # finds these and damaged pictures, so that all are reported together
        raise DataError(f"{folder} cannot be trained on", faults)
    return examples


def _read_example(
    pair: Pair, buckets: Buckets, upscale: bool, random_ratio: bool, controls: ControlRules | None
) -> Example:
    size = read_size(pair.image_path)
    framings = (
        tuple(frame_variants(*size, buckets, upscale).values())
        if random_ratio
        else (frame_picture(*size, buckets, upscale=upscale),)
    )
    paths = pair.control_paths if controls else ()
    sizes = [read_size(path) for path in paths]
    control_framings = tuple(
        tuple(frame_control(control, size, framing, controls) for control in sizes) for framing in framings if controls
    )
    return Example(pair.name, pair.image_path, pair.read_caption(), framings, paths, control_framings)


def _control_faults(pairs: Sequence[Pair], controls: ControlRules | None, may_be_missing: bool) -> list[str]:
    """Reports examples with more or fewer control pictures than the model can use."""
    most = controls.most if controls else 0
    too_many = [f"{pair.name} ({len(pair.control_paths)})" for pair in pairs if len(pair.control_paths) > most]
    if too_many and most == 0:
        return [
            "This model makes pictures from text alone and takes no control pictures; these have some: "
            f"{shorten(too_many)}."
        ]
    faults = (
        [f"This model takes at most {most} control pictures; these have more: {shorten(too_many)}."] if too_many else []
    )
    missing = [pair.name for pair in pairs if not pair.control_paths] if most else []
    if missing and not may_be_missing:
        faults.append(
            f"This model edits control pictures, and these have none: {shorten(missing)}. Give data_config.control_dir "
            "or a metadata_file with controls, or train on them without: data_config.allow_missing_controls=true."
        )
    return faults


def check_folder(config: DataConfig, folder: Path, multiple: int) -> tuple[str, ...]:
    """Decodes every picture of a folder to its last pixel and returns warnings.

    Raises:
        DataError: all problems of the folder, together.
    """
    report = validate_pairs(
        find_examples(config, folder), img_size=config.img_size, multiple=multiple, upscale=config.upscale
    )
    if not report.ok:
        raise DataError(f"{folder} cannot be trained on, {len(report.faults)} problems", report.faults)
    return report.warnings


def split_held_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits examples into those to train on and those held out, chosen by seed and name.

    Args:
        share: part of the examples to hold out, 0 to 1; at least one if it is not 0.

    Raises:
        DataError: nothing would be left to train on.
    """
    if share == 0:
        return examples, []
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise DataError(
            "validation.held_out leaves nothing to train on",
            [f"{share} of {len(examples)} pictures are {count}; add pictures or lower the share"],
        )
    in_random_order = sorted(examples, key=lambda example: randomness.draw_key(seed, "hold out", example.name))
    chosen = {example.name for example in in_random_order[:count]}
    return (
        [example for example in examples if example.name not in chosen],
        [example for example in examples if example.name in chosen],
    )
