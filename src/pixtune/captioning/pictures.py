"""Finds the pictures of a folder, each with the file that its caption is in or is to be in, and its controls."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pixtune.data.pairs import (
    CONVERT,
    PICTURE_EXTENSIONS,
    UNREAD_EXTENSIONS,
    find_ambiguous,
    list_files,
    of_type,
    shorten,
    stem_of,
)
from pixtune.errors import DataError


@dataclass(frozen=True)
class Picture:
    """A picture that can be captioned."""

    folder: Path
    """Folder of pictures that it is found in."""
    name: str
    """Path below the folder, with forward slashes."""
    label: str
    """Text before the name that tells its folder from others; "" where there is one."""
    path: Path
    caption_path: Path
    has_caption: bool
    """Whether something stands at `caption_path`, be it an empty file."""
    controls: tuple[Path, ...] = ()
    """Control pictures, in their order."""
    lacks_controls: bool = False
    """Whether one of its folder's control folders, or any, is without a control of its name."""

    @property
    def shown(self) -> str:
        """Name by which a person knows it."""
        return f"{self.label}{self.name}"

    @property
    def all_paths(self) -> tuple[Path, ...]:
        """Pictures that a question shows, in their order: controls, then the picture."""
        return (*self.controls, self.path)


def find_pictures(
    folder: Path, extension: str, control_folders: Sequence[Path] = (), apart: Collection[Path] = (), label: str = ""
) -> tuple[list[Picture], list[str]]:
    """Looks through a folder and its subfolders by the rules of `data.pairs.find_pairs`, with or without captions.

    Args:
        extension: the caption files', with or without a dot.
        control_folders: folders with a control picture of the same stem for each picture.
        apart: folders that have a purpose of their own, and are skipped.
        label: text before the names of its pictures.

    Returns:
        Pictures in the order of their names, and sentences on what is passed over.

    Raises:
        DataError: all problems that leave a caption's place in doubt, together.
    """
    extension = extension.lstrip(".").lower()
    faults: list[str] = []
    notes: list[str] = []
    if not extension or extension in PICTURE_EXTENSIONS or not extension.isalnum():
        raise DataError("captions need another extension", [f"{extension!r} is none for text: take txt, for example."])
    skipped = frozenset(str(each.resolve()) for each in (*apart, *control_folders))
    listed = list_files(folder, "image folder", skipped, faults, notes)
    pictures, captions = of_type(listed, PICTURE_EXTENSIONS), of_type(listed, {extension})
    if not faults and not pictures:
        faults.append(f"{folder} holds no picture ({', '.join(sorted(PICTURE_EXTENSIONS))}).")
    faults += find_ambiguous(pictures, "pictures", "share one caption name")
    faults += find_ambiguous(captions, "captions", "belong to one picture")
    controls_of = [_controls(each, faults) for each in control_folders]
    if faults:
        raise DataError(f"the pictures in {folder} cannot be captioned", faults)
    if unread := of_type(listed, UNREAD_EXTENSIONS):
        notes.append(f"{len(unread)} pictures are of a type that is not read: {shorten(unread)}. {CONVERT}")
    caption_of = {stem_of(name): path for name, path in captions.items()}
    found = []
    for name, path in pictures.items():
        stem = stem_of(name)
        controls = tuple(control_of[stem] for control_of in controls_of if stem in control_of)
        place = caption_of.get(stem) or path.with_name(f"{path.stem}.{extension}")
        lacks = len(controls) < max(len(control_folders), 1)
        found.append(Picture(folder, name, label, path, place, stem in caption_of, controls, lacks))
    return found, notes


def _controls(folder: Path, faults: list[str]) -> dict[str, Path]:
    """Lists the control pictures of a folder by their stems."""
    controls = of_type(list_files(folder, "control folder", frozenset(), faults, []), PICTURE_EXTENSIONS)
    faults += find_ambiguous(controls, "control pictures", "belong to one target")
    return {stem_of(name): path for name, path in controls.items()}


def only_named(pictures: Sequence[Picture], names: Sequence[str]) -> list[Picture]:
    """Returns the pictures that are named, by their names below the folder or those without extension or folder.

    Raises:
        DataError: names that no picture has, or that several have.
    """
    wanted: dict[str, Picture] = {}
    faults = []
    for name in dict.fromkeys(names):
        posix = name.replace("\\", "/").removeprefix("./")
        found = [each for each in pictures if posix in (each.shown, stem_of(each.shown), str(each.path))]
        found = found or [each for each in pictures if posix in (each.name, stem_of(each.name))]
        found = found or [each for each in pictures if posix in (each.path.name, PurePosixPath(each.name).stem)]
        if len(found) == 1:
            wanted[found[0].shown] = found[0]
        elif found:
            faults.append(f"{name!r} may be {' or '.join(each.shown for each in found)}: name one with its folder.")
        else:
            near = difflib.get_close_matches(posix, [each.shown for each in pictures], 1)
            faults.append(f"There is no picture {name!r}." + (f" Is {near[0]!r} meant?" if near else ""))
    if faults:
        raise DataError("not all pictures that are named can be found", faults)
    return [each for each in pictures if each.shown in wanted]
