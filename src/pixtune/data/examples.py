"""The examples of a run: pictures with their captions and framings, and the choice of those that are held out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pixtune import randomness
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.data.buckets import Buckets, Framing, build_buckets, frame_picture, frame_variants
from pixtune.data.controls import ControlFraming, ControlRules, frame_control
from pixtune.data.images import picture_digest, read_size
from pixtune.data.metadata import read_metadata
from pixtune.data.pairs import Pair, Pairs, find_pairs, shorten
from pixtune.data.validate import validate_pairs
from pixtune.errors import ConfigError, DataError
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


def folders_apart(config: TrainConfig) -> tuple[Path, ...]:
    """Returns all folders that a config names for one purpose: no other folder's pictures are taken from them."""
    data, held_out = config.data_config, config.validation.held_out_dir
    controls = control_folders(data)
    of_held_out = (held_out, *_beside(held_out, controls)) if held_out is not None else ()
    own = (config.output_dir, config.output_dir / config.logging_dir, *([data.cache_dir] if data.cache_dir else []))
    return (data.img_dir, *controls, *of_held_out, *own)


def check_purposes(config: TrainConfig) -> None:
    """Checks that no folder is given for two purposes of which one spoils the other.

    Raises:
        ConfigError: one is; names the keys.
    """
    data, held_out = config.data_config, config.validation.held_out_dir
    held_out_folders = () if held_out is None else (held_out,)
    folders = {
        "data_config.img_dir": (data.img_dir,),
        "data_config.control_dir": control_folders(data),
        "validation.held_out_dir": held_out_folders,
        "output_dir": (config.output_dir,),
    }
    real = {key: {folder.resolve() for folder in named} for key, named in folders.items()}
    faults = [
        f"{one} and {other} are one folder: {reason}." for one, other, reason in _SPOILED if real[one] & real[other]
    ]
    if faults:
        raise ConfigError("each purpose needs a folder of its own", faults)


_SPOILED = (
    ("data_config.img_dir", "validation.held_out_dir", "what is measured would be trained on"),
    ("data_config.img_dir", "output_dir", "the run's own pictures would be taken for training pictures"),
    ("validation.held_out_dir", "output_dir", "the run's own pictures would be taken for held-out pictures"),
    ("data_config.control_dir", "output_dir", "the run's own pictures would be taken for controls"),
)
"""Pairs of keys that must not name one folder, each with what would happen."""


def _beside(held_out: Path, controls: Sequence[Path]) -> tuple[Path, ...]:
    """Returns the control folders of a held-out folder, which lie beside it by the names of the training pictures'."""
    return tuple(held_out.parent / control.name for control in controls)


def find_examples(config: DataConfig, folder: Path, apart: Collection[Path] = ()) -> Pairs:
    """Finds the files that belong together in a folder, by the config's layout.

    Args:
        apart: `folders_apart`, which are skipped within the folder.
    """
    if config.metadata_file is not None and folder == config.img_dir:
        return read_metadata(config.metadata_file, folder)
    controls = control_folders(config)
    if folder != config.img_dir:
        controls = _beside(folder, controls)
    return find_pairs(folder, config.caption_type, controls, config.allow_missing_controls, apart)


def read_examples(
    config: DataConfig,
    folder: Path,
    multiple: int,
    random_ratio: bool,
    controls: ControlRules | None = None,
    apart: Collection[Path] = (),
    note: Callable[[str], None] = lambda sentence: None,
) -> list[Example]:
    """Reads all examples of a folder, in the order of their names.

    Only headers of pictures are read; damage behind them is for `check_folder` to find.

    Args:
        multiple: number that picture sides, in pixels, must be divisible by.
        random_ratio: frame each picture for every ratio instead of its own alone.
        controls: the model's use of control pictures; None: it takes none.
        apart: as for `find_examples`.
        note: called with each sentence on what was passed over.

    Raises:
        DataError: all problems of the folder, together.
    """
    found = find_examples(config, folder, apart)
    for warning in found.warnings:
        note(warning)
    try:
        buckets = build_buckets(config.img_size, multiple)
    except ValueError as error:
        raise DataError("pictures of this size cannot be trained on", [f"data_config.{error}"]) from error
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
        check_folder(
            config, folder, multiple, apart
        )  # finds these and damaged pictures, so that all are reported together
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


def check_folder(config: DataConfig, folder: Path, multiple: int, apart: Collection[Path] = ()) -> tuple[str, ...]:
    """Decodes every picture of a folder to its last pixel and returns warnings, without those on what is passed over.

    Raises:
        DataError: all problems of the folder, together.
    """
    found = find_examples(config, folder, apart)
    report = validate_pairs(found, img_size=config.img_size, multiple=multiple, upscale=config.upscale)
    if not report.ok:
        raise DataError(f"{folder} cannot be trained on, {len(report.faults)} problems", report.faults)
    return tuple(warning for warning in report.warnings if warning not in found.warnings)


def split_held_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits examples into those to train on and those held out, chosen by seed and name.

    Examples of the same picture, byte for byte, go to one side together: no loss is measured on what was trained on.

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
    chosen = {example.image_digest for example in in_random_order[:count]}
    training = [example for example in examples if example.image_digest not in chosen]
    if not training:
        raise DataError(
            "validation.held_out leaves nothing to train on",
            [f"all {len(examples)} pictures are copies of those that are held out; add other pictures"],
        )
    return training, [example for example in examples if example.image_digest in chosen]


def without_held_out(training: list[Example], held_out: list[Example]) -> tuple[list[Example], str | None]:
    """Returns the examples whose pictures are not held out, under whatever name, and a sentence on those left out.

    Raises:
        DataError: nothing is left to train on.
    """
    measured = {example.image_digest: example.image_path for example in held_out}
    copies = [example for example in training if example.image_digest in measured]
    if not copies:
        return training, None
    listed = shorten(f"{example.image_path} ({measured[example.image_digest]})" for example in copies)
    if len(copies) == len(training):
        raise DataError("nothing is left to train on", [f"Every picture is also held out: {listed}."])
    pictures = "1 picture is" if len(copies) == 1 else f"{len(copies)} pictures are"
    sentence = f"{pictures} held out as well, byte for byte, and not trained on: {listed}."
    return [example for example in training if example.image_digest not in measured], sentence
