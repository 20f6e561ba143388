"""The examples of a run: pictures with their captions and framings, and the choice of those that are held out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

from pixtune import randomness
from pixtune.config.folders import CaptionRules, Folder, folder_beside, folders_of
from pixtune.config.schema import TrainConfig
from pixtune.data.buckets import Buckets, Framing, build_buckets, frame_picture, frame_variants
from pixtune.data.captions import caption_without_file, forms_of, split_lines, with_prefix
from pixtune.data.controls import ControlFraming, ControlRules, frame_control
from pixtune.data.example_table import Example, Examples, chosen_from
from pixtune.data.findings import count
from pixtune.data.images import read_size
from pixtune.data.layouts import find_examples
from pixtune.data.masks import find_masks
from pixtune.data.order import Use
from pixtune.data.pairs import Pair, shorten
from pixtune.data.validate import scan_of, validate_pairs
from pixtune.errors import ConfigError, DataError
from pixtune.launch.crew import ALONE, Crew
from pixtune.sizes import Size

HASH_THREADS = 4
"""Number of threads in which a process reads pictures for their digests: hashing releases the interpreter's lock."""


def folders_apart(config: TrainConfig) -> tuple[Path, ...]:
    """Returns all folders that a config names for one purpose: no other folder's pictures are taken from them."""
    data, held_out = config.data_config, config.validation.held_out_dir
    folders = folders_of(data)
    pictures = [each.img_dir for each in folders]
    controls = [control for each in folders for control in each.control_dirs]
    beside = [] if held_out is None else [folder_beside(data, held_out)]
    of_held_out = [path for each in beside for path in (each.img_dir, *each.control_dirs)]
    own = (config.output_dir, config.output_dir / config.logging_dir, *([data.cache_dir] if data.cache_dir else []))
    masks = [each.masks for each in (*folders, *beside) if isinstance(each.masks, Path)]
    pictures += [] if config.prior_preservation.folder is None else [config.prior_preservation.folder]
    return tuple(dict.fromkeys((*pictures, *controls, *masks, *of_held_out, *own)))


def check_purposes(config: TrainConfig) -> None:
    """Checks that no folder is given for two purposes of which one spoils the other.

    Raises:
        ConfigError: one is; names the keys.
    """
    held_out = config.validation.held_out_dir
    one_purpose = {
        "validation.held_out_dir": () if held_out is None else (held_out,),
        "output_dir": (config.output_dir,),
    }
    faults = []
    for each in folders_of(config.data_config):
        masks = (each.masks,) if isinstance(each.masks, Path) else ()
        own = {"img_dir": (each.img_dir,), "control_dir": each.control_dirs, "mask_dir": masks}
        real = {key: {folder.resolve() for folder in named} for key, named in (own | one_purpose).items()}
        for one, other, reason in _SPOILED:
            if real[one] & real[other]:
                places = [f"{each.place}.{key}" if key in own else key for key in (one, other)]
                faults.append(f"{' and '.join(places)} are one folder: {reason}.")
    faults = list(dict.fromkeys(faults))
    if faults:
        raise ConfigError("each purpose needs a folder of its own", faults)


_SPOILED = (
    ("img_dir", "validation.held_out_dir", "what is measured would be trained on"),
    ("img_dir", "output_dir", "the run's own pictures would be taken for training pictures"),
    ("validation.held_out_dir", "output_dir", "the run's own pictures would be taken for held-out pictures"),
    ("control_dir", "output_dir", "the run's own pictures would be taken for controls"),
    ("img_dir", "mask_dir", "pictures would be taken for masks, and masks be trained on"),
    ("control_dir", "mask_dir", "controls would be taken for masks"),
    ("mask_dir", "validation.held_out_dir", "masks would be measured as pictures"),
    ("mask_dir", "output_dir", "the run's own pictures would be taken for masks"),
)
"""Pairs of keys that must not name one folder, each with what would happen."""


def read_examples(
    folders: Sequence[Folder],
    multiple: int,
    controls: ControlRules | None = None,
    apart: Collection[Path] = (),
    note: Callable[[str], None] = lambda sentence: None,
    seed: int = 0,
    crew: Crew = ALONE,
) -> Examples:
    """Reads all examples of some folders: folder by folder, in the order of their names.

    Only headers of pictures are read; damage behind them is for `check_folder` to find.

    Args:
        multiple: number that picture sides, in pixels, must be divisible by.
        controls: the model's use of control pictures; None: it takes none.
        apart: as for `layouts.find_examples`.
        note: called with each sentence on what was passed over.
        seed: the run's seed, which decides how tags are shuffled and left out.
        crew: processes that divide the reading of headers.

    Raises:
        DataError: all problems of all folders, together.
    """
    examples = Examples()
    errors: list[DataError] = []
    for folder in folders:
        try:
            _read_folder(examples, folder, multiple, controls, apart, note, seed, crew)
        except DataError as error:
            errors.append(error)
    if errors:
        first, *others = errors
        if not others:
            raise first
        faults = [fault for error in errors for fault in error.faults]
        raise DataError(
            f"{len(errors)} folders cannot be trained on, {count(len(faults), 'problem', 'problems')}", faults
        )
    return examples


def _read_folder(
    examples: Examples,
    folder: Folder,
    multiple: int,
    controls: ControlRules | None,
    apart: Collection[Path],
    note: Callable[[str], None],
    seed: int,
    crew: Crew,
) -> None:
    """Reads a folder's examples, and adds them to others."""
    found = find_examples(folder, apart)
    for warning in found.warnings:
        note(warning)
    try:
        buckets = [build_buckets(size, multiple) for size in folder.img_sizes]
    except ValueError as error:
        raise DataError("pictures of this size cannot be trained on", [f"{folder.rules_place}.{error}"]) from error
    masks = find_masks(found.pairs, folder, apart)
    for warning in masks.warnings:
        note(warning)
    faults = [*found.faults, *_control_faults(found.pairs, controls, folder), *masks.faults]
    framed = framer(buckets, folder, controls)

    numbers_of: dict[tuple[int, ...] | str, tuple[int, ...] | str] = {}

    def read(pairs: Sequence[Pair]) -> list[tuple[int, ...] | str]:
        found = (_sizes_of(pair, controls is not None) for pair in pairs)
        return [numbers_of.setdefault(each, each) for each in found]  # equal ones are one object

    for pair, sizes in zip(found.pairs, crew.map("reading the pictures' headers", found.pairs, read), strict=True):
        if isinstance(sizes, str):
            faults.append(sizes)
            continue
        try:
            framings = framed(*zip(sizes[::2], sizes[1::2], strict=True))
            example = _read_example(pair, framings, folder, controls, seed)
            examples.extend([replace(example, mask=masks.of_picture.get(pair.name), loss_weight=folder.loss_weight)])
        except DataError as error:
            faults += error.faults
        except ValueError as error:
            faults.append(f"{pair.image_path} {error}")
    if faults:
        check_folder(
            folder, multiple, apart, crew
        )  # finds these and damaged pictures, so that all are reported together
        crew.wait("checking the pictures")
        raise DataError(f"{folder.img_dir} cannot be trained on", faults)


def _sizes_of(pair: Pair, with_controls: bool) -> tuple[int, ...] | str:
    """Reads width and height of an example's target and controls from their headers; or returns a sentence on one."""
    try:
        paths = (pair.image_path, *(pair.control_paths if with_controls else ()))
        return tuple(chain.from_iterable(map(read_size, paths)))
    except DataError as error:
        return " ".join(error.faults)


@dataclass(frozen=True)
class Framings:
    """Framings of an example, and what its turns draw of them."""

    target: tuple[Framing, ...]
    controls: tuple[tuple[ControlFraming, ...], ...]
    shares: tuple[float, ...]


def framer(buckets: Sequence[Buckets], folder: Folder, rules: ControlRules | None) -> Callable[..., Framings]:
    """Returns the function from the sizes of an example's target and controls to its framings."""

    @lru_cache(maxsize=1 << 16)
    def framed(size: Size, *controls: Size) -> Framings:
        framings: list[Framing] = []
        shares: list[float] = []
        for of_size, share in zip(buckets, folder.size_shares, strict=True):
            ratios = (
                list(frame_variants(*size, of_size, folder.upscale).values())
                if folder.random_ratio
                else [frame_picture(*size, of_size, upscale=folder.upscale)]
            )
            framings += ratios
            shares += [share / len(ratios)] * len(ratios)
        if folder.flip:
            framings += [replace(framing, flipped=True) for framing in framings]
            shares = [share / 2 for share in [*shares, *shares]]
        of_controls = tuple(
            tuple(frame_control(control, size, framing, rules) for control in controls) for framing in framings if rules
        )
        return Framings(tuple(framings), of_controls, tuple(shares) if len(set(shares)) > 1 else ())

    return framed


def _read_example(pair: Pair, framings: Framings, folder: Folder, controls: ControlRules | None, seed: int) -> Example:
    name, rules = f"{folder.label}{pair.name}", folder.captions
    captions = captions_of(pair, rules)
    forms = forms_of(captions, rules, seed, name)
    return Example(
        name=name,
        image_path=pair.image_path,
        caption=with_prefix(captions[0], rules),
        framings=framings.target,
        control_paths=pair.control_paths if controls else (),
        control_framings=framings.controls,
        use=Use(folder.repeats, framings.shares, len(forms), folder.caption_dropout_rate),
        caption_forms=forms,
        folder=folder.label,
    )


def captions_of(pair: Pair, rules: CaptionRules) -> tuple[str, ...]:
    """Returns a pair's captions, from wherever its folder's rules have them.

    Raises:
        DataError: they cannot be read.
    """
    if without_file := caption_without_file(rules):
        return (without_file(pair.image_path),)
    return (*split_lines(pair.read_caption(), rules, pair.caption_place), *pair.other_captions)


def _control_faults(pairs: Sequence[Pair], controls: ControlRules | None, folder: Folder) -> list[str]:
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
    where = f"{folder.place}.control_dir or a metadata_file with controls"
    if folder.place != folder.rules_place:
        where = "them beside it, in a folder of the same name as those of the pictures to train on"
    if missing and not folder.allow_missing_controls:
        faults.append(
            f"This model edits control pictures, and these have none: {shorten(missing)}. Give "
            f"{where}, or train on them without: {folder.rules_place}.allow_missing_controls=true."
        )
    return faults


def check_folder(folder: Folder, multiple: int, apart: Collection[Path] = (), crew: Crew = ALONE) -> tuple[str, ...]:
    """Decodes every picture of a folder to its last pixel and returns warnings, without those on what is passed over.

    Args:
        crew: the processes that divide the decoding. The first one returns the warnings.

    Raises:
        DataError: all problems of the folder, together.
        TrainingError: in the other processes of the crew, then.
    """
    found = find_examples(folder, apart)
    with crew.sharing("checking the pictures", 0):
        scan = scan_of(found, crew=crew)
        if not crew.is_first:
            return ()
        report = validate_pairs(found, folder.img_size, multiple, folder.upscale, scan=scan)
        faults = list(dict.fromkeys((*report.faults, *find_masks(found.pairs, folder, apart).faults)))
        if faults:
            problems = count(len(faults), "problem", "problems")
            raise DataError(f"{folder.img_dir} cannot be trained on, {problems}", faults)
    return tuple(warning for warning in report.warnings if warning not in found.warnings)


def take_digests(examples: Examples, crew: Crew) -> None:
    """Has a crew read all pictures and controls for their digests, each in one process, and keeps these.

    Raises:
        DataError: a file cannot be read.
        TrainingError: in the other processes of the crew, then.
    """

    def digests(part: Sequence[int]) -> list[list[str]]:
        with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="digests") as pool:
            return [*pool.map(lambda number: [*examples[number].digests_of_pictures], part)]

    with crew.sharing("reading the pictures", 0):
        found = crew.map("reading the pictures", range(len(examples)), digests)
    examples.know_digests(chain.from_iterable(found))


def shared_pictures(examples: Sequence[Example]) -> str | None:
    """Returns a sentence on pictures that lie in several folders, byte for byte; None where there are none."""
    folder_of: dict[str, str] = {}
    several = {
        digest
        for digest, folder in ((example.image_digest, example.folder) for example in examples)
        if folder_of.setdefault(digest, folder) != folder
    }
    places: dict[str, dict[str, str]] = {}
    for example in examples if several else ():
        if example.image_digest in several:
            places.setdefault(example.image_digest, {}).setdefault(example.folder, example.name)
    shared = [" = ".join(names.values()) for names in places.values()]
    if not shared:
        return None
    pictures = "1 picture lies" if len(shared) == 1 else f"{len(shared)} pictures lie"
    return f"{pictures} in several folders, byte for byte, and each folder's repeats count: {shorten(shared)}."


def used_examples(examples: Sequence[Example]) -> Sequence[Example]:
    """Returns the examples that epochs use: those whose folder's repeats and loss weight are not 0.

    A step of pictures without weight would change nothing, and look like one that does not learn.

    Raises:
        DataError: an epoch would use less than one picture.
    """
    used = chosen_from(examples, lambda example: example.is_used)
    if examples and sum(example.use.repeats for example in used) < 1:
        total = sum(example.use.repeats for example in used)
        raise DataError(
            "the folders' repeats and loss weights leave nothing to train on",
            [
                f"An epoch would use {total:g} pictures: the repeats of data_config.folders times their pictures, "
                "without folders whose loss_weight is 0. Raise the repeats or the loss_weight of one at least."
            ],
        )
    return used


def split_held_out(examples: Sequence[Example], share: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
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
    keys = [randomness.draw_key(seed, "hold out", example.name) for example in examples]
    in_random_order = sorted(range(len(examples)), key=keys.__getitem__)
    chosen = {examples[number].image_digest for number in in_random_order[:count]}
    training = chosen_from(examples, lambda example: example.image_digest not in chosen)
    if not training:
        raise DataError(
            "validation.held_out leaves nothing to train on",
            [f"all {len(examples)} pictures are copies of those that are held out; add other pictures"],
        )
    return training, [example for example in examples if example.image_digest in chosen]


def without_held_out(training: Sequence[Example], held_out: Sequence[Example]) -> tuple[Sequence[Example], str | None]:
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
    return chosen_from(training, lambda example: example.image_digest not in measured), sentence
