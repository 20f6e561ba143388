"""All problems of a data set in one report, before training starts.

Every picture is decoded to its last pixel and every caption read, so that no damaged file ends a run hours later.
Needs no torch. `validate_folder` returns a report, `validate_dataset` prints it for scripts.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings, filterwarnings

import numpy as np
from PIL import Image, ImageChops

from pixtune.data.buckets import Buckets, build_buckets, frame_picture
from pixtune.data.caption_tokens import CaptionCounter, cut_captions
from pixtune.data.controls import same_shape
from pixtune.data.images import decoded
from pixtune.data.pairs import Pair, Pairs, find_pairs, shorten
from pixtune.errors import DataError
from pixtune.inputs.printing import one_line
from pixtune.sizes import Size
from pixtune.storage.files import file_digest

MIN_SIDE_PIXELS = 16
"""Shortest usable side, in pixels, where the model is not known: the smallest `multiple` of the supported families."""

MANY_WORDS = 512
"""Captions of more words are named where the model is not known. The text-to-image families read 512 tokens, and each
word is at least one."""

NOTABLE_SHARE_LOST = 0.1
"""Share of a picture whose loss to cropping is worth a warning; a bucket near its shape costs about 0.02. It is also
the share of `img_size` squared pixels that a picture may lack without one."""

THUMBNAIL_PIXELS = 32
"""Side in pixels of the thumbnails that targets and controls are compared by: 3 KB each."""

NEARLY_UNCHANGED = 16
"""Largest difference of a thumbnail's colours, of 255, below which a control counts as nearly its target.

The largest difference serves, not the mean, since an edit may be small. Measured on the 96 drawings of
`assets/demo-edit` at 256 pixels and on 24 pictures of 1/f noise at 512, as smallest / median / largest over the
pictures:

    change                       mean                     largest
    JPEG quality 75, drawings     0.15 /  0.79 /  1.49      4 /   9 /  15
    JPEG quality 50, drawings     0.25 /  1.15 /  1.89      6 /  13 /  19
    JPEG quality 50, noise        0.70 /  0.73 /  0.75      3 /   3 /   5
    half the size, drawings       0.06 /  0.20 /  0.50      2 /   4 /   6
    3% brighter, drawings         0.41 /  1.68 /  3.07      5 /   7 /   7
    a box on 0.25%, drawings      0.06 /  0.26 /  0.53     33 / 150 / 246
    a box on 1%, drawings         0.25 /  1.04 /  2.21     46 / 182 / 255
    a box on 1%, noise            0.35 /  0.76 /  1.25     75 / 138 / 189
    demo-edit's own pairs        14.01 / 37.51 / 73.18    143 / 228 / 255

So no mean tells a small edit from another JPEG, and with 64 pixels a side the largest difference fails as well: along
lines JPEG 50 reaches 56. Edits that restore pictures (noise of deviation 5: 3 / 4 / 4) lie below, which the warning
mentions.
"""

_MAX_THREADS = 4  # a large picture needs a gigabyte while it is decoded


@dataclass(frozen=True)
class LongestCaption:
    """The longest caption, for the user to compare with what the text encoder reads."""

    path: Path
    num_characters: int


@dataclass(frozen=True)
class DatasetReport:
    """A folder's content and its problems."""

    image_folder: Path
    control_folders: tuple[Path, ...]
    num_pictures: int
    """Number of pictures, those with problems included and control pictures excluded."""
    faults: tuple[str, ...]
    """Problems as whole sentences; without any, training can start."""
    warnings: tuple[str, ...]
    """Sentences on what a person should know and training copes with."""
    bucket_counts: dict[Size, int]
    """Number of pictures by size; empty unless `img_size` was given."""
    longest_caption: LongestCaption | None
    wordy_captions: tuple[str, ...] | None
    """Captions of more than `MANY_WORDS` words; None where their tokens were counted as a model does."""

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return not self.faults

    def render(self) -> str:
        """Formats the report as plain text whose lines no name can forge, problems last, where a terminal is read."""
        lines = [f"Data set {one_line(str(self.image_folder))}: {_count(self.num_pictures, 'picture', 'pictures')}"]
        if self.control_folders:
            lines.append(f"Control pictures: {one_line(', '.join(map(str, self.control_folders)))}")
        if self.longest_caption is not None:
            longest = self.longest_caption
            lines.append(f"Longest caption: {longest.num_characters} characters ({one_line(str(longest.path))})")
        if self.wordy_captions is not None:
            lines.append(
                "Not checked without a model: whether it reads every caption to the end (pixtune validate DIR "
                "--model MODEL)"
            )
        if self.wordy_captions:
            lines.append(
                f"  More than {MANY_WORDS} words, so cut by models that read {MANY_WORDS} tokens: "
                f"{one_line(shorten(self.wordy_captions))}"
            )
        if self.bucket_counts:
            lines.append("Sizes in training (width x height: pictures):")
            lines += [f"  {width} x {height}: {count}" for (width, height), count in sorted(self.bucket_counts.items())]
        for title, sentences in (("Warnings", self.warnings), ("Problems", self.faults)):
            if sentences:
                lines.append(f"{title} ({len(sentences)}):")
                lines += [f"  - {one_line(sentence)}" for sentence in sentences]
        lines.append(
            "The data set is fine." if self.ok else "The data set cannot be trained on: fix the problems above."
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Checked:
    """Findings on one picture file."""

    path: Path
    size: Size | None
    digest: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    thumbnail: Image.Image | None = None
    """Thumbnail of a picture that is compared with another."""


def validate_folder(
    image_folder: Path,
    caption_extension: str = "txt",
    img_size: int | None = None,
    multiple: int | None = None,
    control_folders: Sequence[Path] = (),
    allow_missing_controls: bool = False,
    upscale: bool = False,
    counter: CaptionCounter | None = None,
) -> DatasetReport:
    """Checks all pictures, captions and control pictures of a data set. Problems are reported, not raised.

    Args:
        image_folder: pictures with captions beside them, or a folder with `images/` and `control/` in it.
        caption_extension: the contract's `caption_type`.
        control_folders: control pictures, where they are not in `image_folder / "control"`.
        img_size, multiple, upscale, counter: as for `validate_pairs`.
    """
    image_folder, control_folders = _find_layout(Path(image_folder), control_folders)
    found = find_pairs(image_folder, caption_extension, control_folders, allow_missing_controls)
    return validate_pairs(found, img_size, multiple, upscale, control_folders, counter)


def validate_pairs(
    found: Pairs,
    img_size: int | None = None,
    multiple: int | None = None,
    upscale: bool = False,
    control_folders: Sequence[Path] = (),
    counter: CaptionCounter | None = None,
) -> DatasetReport:
    """Checks the files that `find_pairs` or `read_metadata` found.

    Args:
        img_size: training size in pixels, to report buckets, crops and small pictures for; None: they are not reported.
        multiple: number that the model's picture sides, in pixels, must be divisible by; None: `MIN_SIDE_PIXELS`.
        upscale: small pictures will be enlarged, as in `buckets.frame_picture`.
        counter: counts captions' tokens as the model does, to report those that it cuts; None: no model is known.
    """
    multiple = multiple or MIN_SIDE_PIXELS
    faults, warnings = list(found.faults), list(found.warnings)
    targets = sorted({pair.image_path for pair in found.pairs} | set(found.lone_pictures))
    controls = sorted({path for pair in found.pairs for path in pair.control_paths} - set(targets))
    compared = {path for pair in found.pairs if pair.control_paths for path in (pair.image_path, pair.control_paths[0])}
    checked = _check_pictures([*targets, *controls], multiple, compared)
    for picture in checked:
        faults += picture.faults
        warnings += [f"{picture.path} {note}." for note in picture.notes]
    captions = _read_captions(found.pairs, faults)
    longest = _check_captions(captions, warnings)
    wordy = None
    if counter is None:
        wordy = tuple(
            f"{pair.caption_place} ({num_words} words)"
            for pair, text in captions
            if (num_words := len(text.split())) > MANY_WORDS
        )
    else:
        warnings += _cut_captions(captions, {picture.path: picture for picture in checked}, counter)
    bucket_counts: Counter[Size] = Counter()
    if img_size is not None and img_size < multiple:
        faults.append(f"img_size is {img_size}; it must be at least {multiple}.")
    elif img_size is not None:
        usable = [picture for picture in checked[: len(targets)] if not picture.faults]
        bucket_counts = _fill_buckets(usable, build_buckets(img_size, multiple), upscale, warnings)
    warnings += _duplicates(checked[: len(targets)])
    warnings += _unchanged(found.pairs, {picture.path: picture for picture in checked})
    return DatasetReport(
        found.folder, tuple(control_folders), len(targets), tuple(faults), tuple(warnings), dict(bucket_counts),
        longest, wordy,
    )  # fmt: skip


def validate_dataset(path: str | Path, caption_extension: str = "txt", img_size: int | None = None) -> bool:
    """Prints the report on a data set, and returns whether training can start."""
    report = validate_folder(Path(path), caption_extension, img_size)
    print(report.render())
    return report.ok


def _find_layout(folder: Path, control_folders: Sequence[Path]) -> tuple[Path, tuple[Path, ...]]:
    """Finds image and control folders: a folder with both `images` and `control` in it is an editing data set."""
    if not control_folders and (folder / "images").is_dir() and (folder / "control").is_dir():
        return folder / "images", (folder / "control",)
    return folder, tuple(control_folders)


def _unchanged(pairs: Sequence[Pair], checked: Mapping[Path, _Checked]) -> list[str]:
    """Warns of controls that are their target: the very file, or, in most examples, nearly the same picture.

    A few examples that change nothing may be intended: an edit model learns from them what to leave alone.
    """

    def holds_target(pair: Pair) -> bool:
        digest = checked[pair.image_path].digest
        return bool(digest) and any(checked[path].digest == digest for path in pair.control_paths)

    with_control = [pair for pair in pairs if pair.control_paths]
    same = [pair.name for pair in with_control if holds_target(pair)]
    near = [
        pair.name
        for pair in with_control
        if not holds_target(pair) and _nearly_same(checked[pair.image_path], checked[pair.control_paths[0]])
    ]
    warnings = []
    if same:
        count = _count(len(same), "control picture is", "control pictures are")
        warnings.append(f"{count} the target itself: {shorten(same)}.")
    if near and len(same) + len(near) > len(with_control) / 2:
        count = _count(len(near), "control picture is", "control pictures are")
        warnings.append(
            f"{count} nearly the target, of {len(with_control)}: {shorten(near)}. Such rows teach the model to change "
            "nothing; right only where restoring pictures (sharper, less noise) is what it is to learn."
        )
    return warnings


def _nearly_same(target: _Checked, control: _Checked) -> bool:
    """Returns whether a control is nearly its target, by `NEARLY_UNCHANGED`.

    A control of another shape is a reference, not the picture before the edit.
    """
    if target.thumbnail is None or control.thumbnail is None or target.size is None or control.size is None:
        return False
    difference = ImageChops.difference(target.thumbnail, control.thumbnail)
    return same_shape(target.size, control.size) and np.asarray(difference).max() < NEARLY_UNCHANGED


def _check_pictures(paths: Sequence[Path], multiple: int, compared: AbstractSet[Path]) -> list[_Checked]:
    """Decodes each picture, in the order given. Threads serve, because decoders release Python's lock."""
    with catch_warnings(), ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        filterwarnings("ignore", module="PIL")  # the report has the same with the path
        return list(pool.map(lambda path: _check_picture(path, multiple, path in compared), paths))


def _check_picture(path: Path, multiple: int, compared: bool) -> _Checked:
    try:
        with decoded(path) as picture:
            size, notes = picture.image.size, picture.notes
            thumbnail = picture.image.resize((THUMBNAIL_PIXELS,) * 2, Image.Resampling.BOX) if compared else None
        digest = file_digest(path)
    except DataError as error:
        return _Checked(path, None, "", tuple(error.faults))
    except OSError as error:
        return _Checked(path, None, "", (f"{path} cannot be read: {error.strerror or error}.",))
    too_small = f"{path} is {size[0]}x{size[1]} pixels; each side must have at least {multiple}. Remove or replace it."
    return _Checked(path, size, digest, (too_small,) if min(size) < multiple else (), notes, thumbnail)


def _read_captions(pairs: Sequence[Pair], faults: list[str]) -> list[tuple[Pair, str]]:
    """Reads the captions, and returns those that can be read, each with its pair."""
    captions = []
    for pair in pairs:
        try:
            captions.append((pair, pair.read_caption()))
        except DataError as error:
            faults += error.faults
    return captions


def _check_captions(captions: Sequence[tuple[Pair, str]], warnings: list[str]) -> LongestCaption | None:
    """Warns of empty captions, and returns the longest.

    An empty caption is no problem: it trains like a dropped caption, which some styles want.
    """
    longest: LongestCaption | None = None
    for pair, text in captions:
        if text and (longest is None or len(text) > longest.num_characters):
            longest = LongestCaption(pair.caption_place, len(text))
    if empty := [str(pair.caption_place) for pair, text in captions if not text]:
        warnings.append(
            f"{_count(len(empty), 'caption is', 'captions are')} empty, to be trained without words: {shorten(empty)}."
        )
    return longest


def _cut_captions(
    captions: Sequence[tuple[Pair, str]], checked: Mapping[Path, _Checked], counter: CaptionCounter
) -> list[str]:
    """Warns of captions that the counter's model cuts. Control pictures that cannot be read take no tokens here."""
    lengths = counter.count(
        [(text, [size for path in pair.control_paths if (size := checked[path].size)]) for pair, text in captions]
    )
    return cut_captions([(str(pair.caption_place), row) for (pair, _), row in zip(captions, lengths, strict=True)])


def _fill_buckets(pictures: Sequence[_Checked], buckets: Buckets, upscale: bool, warnings: list[str]) -> Counter[Size]:
    """Counts the pictures of each size; warns of small, enlarged and heavily cropped ones."""
    framings = [(each.path, frame_picture(*each.size, buckets, upscale=upscale)) for each in pictures if each.size]
    enlarged = [f"{path} ({framing.scale:.2f}x)" for path, framing in framings if framing.upscaled]
    small = [
        f"{path} ({framing.width}x{framing.height})"
        for path, framing in framings
        if framing.size not in buckets.sizes
        and framing.width * framing.height < (1 - NOTABLE_SHARE_LOST) * buckets.img_size**2
    ]
    cropped = [
        f"{path} ({framing.share_lost:.0%})" for path, framing in framings if framing.share_lost > NOTABLE_SHARE_LOST
    ]
    if enlarged:
        warnings.append(
            f"{_count(len(enlarged), 'picture is', 'pictures are')} enlarged to reach img_size {buckets.img_size}: "
            f"{shorten(enlarged)}."
        )
    if small:
        warnings.append(
            f"{_count(len(small), 'picture has', 'pictures have')} fewer pixels than img_size {buckets.img_size} asks "
            f"for and train at the size in brackets, not enlarged: {shorten(small)}."
        )
    if cropped:
        warnings.append(
            f"{_count(len(cropped), 'picture loses', 'pictures lose')} more than {NOTABLE_SHARE_LOST:.0%} to cropping: "
            f"{shorten(cropped)}."
        )
    return Counter(framing.size for _, framing in framings)


def _duplicates(pictures: Sequence[_Checked]) -> list[str]:
    """Warns of every set of files with the same bytes: they count twice in training."""
    groups: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        if picture.digest:
            groups[picture.digest].append(str(picture.path))
    return [f"These pictures are the same file: {shorten(group)}." for group in groups.values() if len(group) > 1]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
