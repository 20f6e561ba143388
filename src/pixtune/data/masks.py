"""Masks: pictures that tell which part of a target its loss counts, in white, and which part it does not, in black.

A mask is a file of the target's stem in a folder of masks, or the target's own alpha channel. It is cut and scaled as
the target is, by the average over each position of the latents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pixtune.config.folders import Folder
from pixtune.data.buckets import Box, Framing
from pixtune.data.controls import same_part, same_shape
from pixtune.data.findings import count
from pixtune.data.images import has_alpha, picture_digest, read_levels, read_size, while_unchanged
from pixtune.data.pairs import PICTURE_EXTENSIONS, Pair, find_ambiguous, list_files, of_type, shorten, stem_of
from pixtune.errors import DataError
from pixtune.sizes import Size

STRIP_LEVELS = 1 << 22
"""Number of levels that are summed at a time: a sum takes eight bytes."""
FAINT = 128
"""Brightest level, of 255, below which a mask is told of: those with labels 0 and 1 look black."""


@dataclass(frozen=True)
class MaskFile:
    """The mask of one target."""

    path: Path
    of: Literal["brightness", "alpha"]
    size: Size
    """Upright size of the mask itself, in pixels."""
    target_size: Size
    """Upright size of its target, of the same shape."""
    outside: float = 0.0
    """Weight where it is black; it is 1 where it is white."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file when this was first read."""
        return picture_digest(self.path)

    def framed(self, framing: Framing, height: int, width: int) -> FramedMask:
        """Returns the mask of latents of this height and width, where the target is framed so."""
        box = same_part(framing.crop_box, self.target_size, self.size)
        return FramedMask(self.path, self.digest, self.of, box, height, width, framing.flipped)


@dataclass(frozen=True)
class FramedMask:
    """A mask file, the part of it that belongs to a framed target, and the height and width of its latents."""

    path: Path
    digest: str
    """SHA-256 of the file, as hex."""
    of: Literal["brightness", "alpha"]
    box: Box
    """Part of the mask, in its own pixels."""
    height: int
    width: int
    flipped: bool = False
    """Whether it is mirrored left to right afterwards, as its target is."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"mask {self.path.parent.name}/{self.path.name} at {self.width}x{self.height}"

    @property
    def parts(self) -> dict[str, str]:
        """Parts of a cache key that decide the shares."""
        size = f"{self.width}x{self.height}"
        flip = {"flip": "left to right"} if self.flipped else {}
        return {"kind": "mask", "picture": self.digest, "of": self.of, "crop": repr(self.box), "size": size, **flip}

    def read(self, note: Callable[[str], None]) -> np.ndarray:
        """Reads the share of each position of the latents that counts, 0 to 1, in fp32; shape (height, width).

        Args:
            note: called with what a user should know, in words that lack the mask's name at their beginning.

        Raises:
            DataError: it cannot be read, has changed, or counts nothing of the framed target.
        """
        with while_unchanged(self.path, self.digest):
            levels_HW = read_levels(self.path, self.of == "alpha", note)
        brightest = int(levels_HW.max())
        if 0 < brightest < FAINT:
            note(f"is dark: its brightest level is {brightest} of 255. White counts, and black does not")
        shares_HW = average_over_cells(levels_HW, self.box, self.height, self.width) / 255
        if not shares_HW.any():
            what = "transparent" if self.of == "alpha" else "black"
            where = f"is {what} everywhere" if not brightest else f"is {what} where its picture is not cut off"
            raise DataError(
                "a mask cannot be used",
                [f"{self.path} {where}, so that nothing of the picture counts. White counts, and black does not."],
            )
        return np.ascontiguousarray(shares_HW[:, ::-1] if self.flipped else shares_HW, dtype=np.float32)


def average_over_cells(levels_HW: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """Averages levels over the equal cells of a box, of which there are `height` times `width`.

    A level on the border of cells counts in each by the part of its area that lies there.
    """
    left, top, right, bottom = box
    rows_hW = _average_rows(levels_HW, np.linspace(top, bottom, height + 1))
    return _average_rows(rows_hW.T, np.linspace(left, right, width + 1)).T


def _average_rows(levels_NM: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Averages the rows between each two edges, which are fractions of row numbers."""
    num_strips = -(-levels_NM.size // STRIP_LEVELS)
    before = np.minimum(edges.astype(int), len(levels_NM) - 1)
    strips = []
    for strip in np.array_split(levels_NM, min(num_strips, levels_NM.shape[1]), axis=1):
        sums = np.zeros((len(strip) + 1, strip.shape[1]))
        np.cumsum(strip, axis=0, out=sums[1:])
        up_to_edges = sums[before] + (edges - before)[:, None] * strip[before]
        strips.append(np.diff(up_to_edges, axis=0) / np.diff(edges)[:, None])
    return np.concatenate(strips, axis=1)


# ---- which masks there are


@dataclass(frozen=True)
class FoundMasks:
    """Masks of a folder's pictures by the pictures' names, and the problems with them."""

    of_picture: Mapping[str, MaskFile]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def find_masks(pairs: Sequence[Pair], folder: Folder, apart: Collection[Path] = ()) -> FoundMasks:
    """Finds the masks of a folder's pictures, from headers alone. Problems are returned, not raised.

    Args:
        apart: as for `find_pairs`.
    """
    source, outside = folder.masks, folder.weight_outside_mask
    faults, warnings, masks, scaled = list[str](), list[str](), dict[str, MaskFile](), list[str]()
    if source is None:
        return FoundMasks({}, (), ())
    path_of = {pair.name: pair.image_path for pair in pairs}
    if source != "alpha":
        path_of = _match(path_of, source, folder, apart, faults, warnings)
        if faults:
            return FoundMasks({}, tuple(faults), tuple(warnings))
    without = [str(pair.image_path) for pair in pairs if pair.name not in path_of]
    for pair in (pair for pair in pairs if pair.name in path_of):
        path = path_of[pair.name]
        try:
            if source == "alpha" and not has_alpha(path):
                without.append(str(path))
                continue
            target, size = read_size(pair.image_path), read_size(path)
        except DataError as error:
            faults += error.faults
            continue
        if not same_shape(size, target):
            faults.append(
                f"The mask {path} is {size[0]}x{size[1]} pixels and its picture {pair.image_path}, upright, "
                f"{target[0]}x{target[1]}, which is another shape. Make the mask anew, or cut it as the picture was."
            )
            continue
        scaled += [str(path)] if size != target else []
        masks[pair.name] = MaskFile(path, "alpha" if source == "alpha" else "brightness", size, target, outside)
    if without and not folder.allow_missing_masks:
        lack = "alpha channel" if source == "alpha" else f"mask of the same name in {source}"
        faults.append(
            f"{count(len(without), 'picture has', 'pictures have')} no {lack}: {shorten(without)}. Add masks, or let "
            f"pictures without one count as a whole: {folder.rules_place}.allow_missing_masks=true."
        )
    if scaled:
        number = count(
            len(scaled), "mask is of another size than its picture", "masks are of another size than their pictures"
        )
        warnings.append(f"{number}, and scaled: {shorten(scaled)}.")
    return FoundMasks(masks, tuple(faults), tuple(warnings))


def _match(
    pictures: Mapping[str, Path],
    mask_dir: Path,
    folder: Folder,
    apart: Collection[Path],
    faults: list[str],
    warnings: list[str],
) -> dict[str, Path]:
    """Finds the mask of each picture's stem, by the names of the pictures that have one."""
    purposes = frozenset(os.path.realpath(path) for path in apart)
    listed = of_type(list_files(mask_dir, "mask folder", purposes, faults, warnings), PICTURE_EXTENSIONS)
    faults += find_ambiguous(listed, "masks", "belong to one picture")
    by_stem = {stem_of(name): path for name, path in listed.items()}
    found = {name: by_stem[stem_of(name)] for name in pictures if stem_of(name) in by_stem}
    stems = {stem_of(name) for name in pictures}
    lone = [str(path) for stem, path in by_stem.items() if stem not in stems]
    is_beside = folder.place != folder.rules_place  # held-out pictures: these may be the masks of the others alone
    if lone and pictures and not found and not (is_beside and folder.allow_missing_masks):
        # An error even where masks may be missing: the run would be one without any.
        otherwise = (
            f"let those without one count as a whole: {folder.rules_place}.allow_missing_masks=true"
            if is_beside
            else "leave mask_dir out"
        )
        faults.append(
            f"No picture has a mask of its name in {mask_dir}, which holds {shorten(lone)}. Name each mask as its "
            f"picture, such as {stem_of(next(iter(pictures)))}.png, in the same subfolder, or {otherwise}."
        )
    elif lone and not is_beside:
        warnings.append(
            f"{count(len(lone), 'mask has no picture of its', 'masks have no picture of their')} name: {shorten(lone)}."
        )
    return found
