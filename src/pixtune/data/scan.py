"""Decodes all pictures of a data set, each once and to its last pixel, and keeps a few numbers of each."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixtune.data.controls import same_shape
from pixtune.data.doctor.looks import THUMBNAIL_PIXELS, Look, make_thumbnail, take_look
from pixtune.data.doctor.pair_looks import PairLook, compare_pair, reduce_for_pairs
from pixtune.data.images import decoded, picture_digest, while_unchanged
from pixtune.data.pairs import Pair
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE, Crew
from pixtune.sizes import Size

_MAX_THREADS = 4  # a large picture needs a gigabyte while it is decoded
_MOST_IN_A_ROW = 16
"""Number of targets that are compared with one control in one piece; a control that more share is decoded again."""


@dataclass(frozen=True)
class Checked:
    """Findings on one picture file."""

    path: Path
    size: Size | None
    digest: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    thumbnail_HW3: NDArray[np.uint8] | None = None
    """Thumbnail of a picture that is compared with another."""
    look: Look | None = None
    """Looks of the picture, where they were asked for."""


@dataclass(frozen=True)
class Scan:
    """Findings on all pictures, and on pairs of target and first control by the target's path."""

    pictures: dict[Path, Checked]
    pairs: dict[Path, PairLook]


def scan_pictures(
    paths: Sequence[Path],
    pairs: Sequence[Pair],
    with_looks: bool = False,
    count: Callable[[], object] = lambda: None,
    crew: Crew = ALONE,
) -> Scan:
    """Decodes pictures with threads, because decoders release Python's lock.

    Args:
        paths: all pictures.
        pairs: examples, whose targets and first controls are compared.
        with_looks: also measure what pictures look like, and how targets lie to their controls.
        count: called after each picture, from this thread.
        crew: processes that divide the pictures, where no looks are taken. All of them get all findings.
    """
    compared = {path for pair in pairs if pair.control_paths for path in (pair.image_path, pair.control_paths[0])}
    check = partial(_check_picture, compared=compared, with_look=with_looks)
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with catch_warnings(), ThreadPoolExecutor(num_threads) as pool:
        filterwarnings("ignore", module="PIL")  # the report has the same with the path
        if crew.size > 1:
            what = "checking the pictures"
            rows = crew.map(what, paths, lambda part: [_row(each) for each in pool.map(check, part)])
            return Scan({path: _from_row(path, row) for path, row in zip(paths, rows, strict=True)}, {})
        pictures: dict[Path, Checked] = {}
        looks: dict[Path, PairLook] = {}
        pieces = _divide(paths, pairs if with_looks else ())
        for checked, found in pool.map(lambda piece: _scan_piece(piece[0], piece[1], check), pieces):
            looks |= found
            for picture in checked:
                if picture.path not in pictures:
                    pictures[picture.path] = picture
                    count()
    return Scan({path: pictures[path] for path in paths}, looks)


def _row(checked: Checked) -> list[Any]:
    """Returns findings without looks as another process can be told them."""
    thumbnail = None if checked.thumbnail_HW3 is None else b64encode(checked.thumbnail_HW3.tobytes()).decode()
    return [checked.size, checked.digest, checked.faults, checked.notes, thumbnail]


def _from_row(path: Path, row: Sequence[Any]) -> Checked:
    size, digest, faults, notes, thumbnail = row
    shape = (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS, 3)
    pixels = None if thumbnail is None else np.frombuffer(b64decode(thumbnail), np.uint8).reshape(shape)
    return Checked(path, None if size is None else (size[0], size[1]), digest, tuple(faults), tuple(notes), pixels)


def _divide(paths: Sequence[Path], pairs: Iterable[Pair]) -> list[tuple[Path | None, list[Path]]]:
    """Divides the work: a control with its targets, or one picture alone."""
    targets_of: dict[Path, list[Path]] = defaultdict(list)
    for pair in pairs:
        if pair.control_paths:
            targets_of[pair.control_paths[0]].append(pair.image_path)
    pieces: list[tuple[Path | None, list[Path]]] = [
        (control, targets[start : start + _MOST_IN_A_ROW])
        for control, targets in targets_of.items()
        for start in range(0, len(targets), _MOST_IN_A_ROW)
    ]
    placed = {path for control, targets in pieces for path in (control, *targets)}
    return pieces + [(None, [path]) for path in paths if path not in placed]


CheckPicture = Callable[..., Checked]


def _scan_piece(
    control: Path | None, targets: Sequence[Path], check: CheckPicture
) -> tuple[list[Checked], dict[Path, PairLook]]:
    if control is None:
        return [check(path) for path in targets], {}
    kept: list[Image.Image] = []
    first = check(control, use=lambda picture: kept.append(reduce_for_pairs(picture)))
    checked, looks = [first], {}
    for path in targets:
        found: list[PairLook] = []

        def compare(target: Image.Image, found: list[PairLook] = found) -> None:
            if kept and first.size and same_shape(first.size, target.size):
                found.append(compare_pair(kept[0], first.size, target))

        checked.append(check(path, use=compare))
        if found:
            looks[path] = found[0]
    return checked, looks


def _check_picture(
    path: Path,
    compared: set[Path],
    with_look: bool,
    use: Callable[[Image.Image], object] = lambda picture: None,
) -> Checked:
    try:
        digest = picture_digest(path)
        with while_unchanged(path, digest), decoded(path) as picture:
            size, notes = picture.image.size, picture.notes
            look = take_look(picture.image) if with_look else None
            thumbnail = look.thumbnail_HW3 if look else make_thumbnail(picture.image) if path in compared else None
            use(picture.image)
    except DataError as error:
        return Checked(path, None, "", tuple(error.faults))
    return Checked(path, size, digest, (), notes, thumbnail, look)
