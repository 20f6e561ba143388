"""Files that belong together: a picture, its caption and, for editing, its control pictures.

Nothing stops at the first problem: `find_pairs` returns what it found with all problems, so that a person fixes them in
one go. Needs neither torch nor Pillow.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtune.data.captions import read_caption
from pixtune.inputs.misspelt import did_you_mean

PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tiff", "tif"})
"""Extensions of the pictures that are read, in lower case; file names may have any letter case."""

UNREAD_EXTENSIONS = frozenset({"avif", "cr2", "dng", "gif", "heic", "heif", "jfif", "jxl", "nef", "psd", "svg"})
"""Extensions of pictures that are not read. A person may expect them to be, so a warning names them."""

IGNORED_FOLDERS = frozenset({"__MACOSX", "__pycache__"})
"""Folders that are skipped, like every folder and file whose name begins with a dot, the cache's among them."""

MARK_OF_A_RUN = "metrics.jsonl"
"""File by which the folder of an earlier run is recognized, whose pictures are not taken for pictures to train on."""

_NAMES_SHOWN = 5
"""Number of names that a message lists."""


CONVERT = "Convert them to PNG, for example with ImageMagick: magick mogrify -format png FILES"
"""Remedy for pictures that cannot be read."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One training example on disk."""

    image_path: Path
    name: str
    """Path of the picture below the folder, with forward slashes and composed accents: the example's identity, equal on
    every machine."""
    caption_path: Path | None = None
    """File of the caption, unless that stands in a metadata file."""
    caption: str | None = None
    """Caption that stands in no file of its own, without which it is in `caption_path`."""
    other_captions: tuple[str, ...] = ()
    """Further captions of the picture beside `caption`."""
    control_paths: tuple[Path, ...] = ()
    """Control pictures for editing, in their order; none in a text-to-image data set."""

    @property
    def caption_place(self) -> Path:
        """File to name in a message about the caption."""
        return self.caption_path or self.image_path

    def read_caption(self) -> str:
        """Reads the caption; see `read_caption`."""
        if self.caption is not None:
            return self.caption
        assert self.caption_path is not None, "a pair has one or the other"
        return read_caption(self.caption_path)


@dataclass(frozen=True)
class Pairs:
    """Files that belong together below a folder, in the order of names, and the folder's problems."""

    folder: Path
    pairs: tuple[Pair, ...]
    lone_pictures: tuple[Path, ...]
    """Pictures without a caption, each also among `faults`: to be checked for other problems, not to be trained on."""
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def find_pairs(
    image_folder: Path,
    caption_extension: str = "txt",
    control_folders: Sequence[Path] = (),
    allow_missing_controls: bool = False,
    apart: Collection[Path] = (),
    caption_for: Callable[[Path], str] | None = None,
) -> Pairs:
    """Looks through a folder and its subfolders, without reading a file. Problems are returned, not raised.

    A picture `sub/a.b.png` goes with the caption `sub/a.b.txt`: the stem ends at the last dot and is matched letter by
    letter, the extension in any letter case. An accent matches whether it is composed or decomposed: archives of macOS
    change that unseen. Names that differ only in letter case are a problem, since they are one file on Windows and
    macOS.

    Args:
        image_folder: the pictures and captions.
        caption_extension: the contract's `caption_type`, with or without a leading dot.
        control_folders: control pictures of the same stems, for editing; one folder for each control of an example.
        allow_missing_controls: accept pictures without a control of their stem.
        apart: folders that have a purpose of their own, such as the run's output, and are skipped within others.
        caption_for: makes the caption of a picture, where none stands in a file; None: caption files are needed.
    """
    extension = caption_extension.lstrip(".").lower()
    if not extension or extension in PICTURE_EXTENSIONS:
        return Pairs(image_folder, (), (), (f"caption_type is {caption_extension!r}; it must be like 'txt'.",), ())
    faults: list[str] = []
    warnings: list[str] = []
    purposes = frozenset(os.path.realpath(folder) for folder in apart)
    listed = list_files(image_folder, "image folder", purposes, faults, warnings)
    pictures = of_type(listed, PICTURE_EXTENSIONS)
    captions = of_type(listed, {extension}) if caption_for is None else {}
    if not faults and not pictures:
        faults.append(f"The image folder {image_folder} holds no picture ({', '.join(sorted(PICTURE_EXTENSIONS))}).")
    faults += find_ambiguous(pictures, "pictures", "share one caption name")
    faults += find_ambiguous(captions, "captions", "belong to one picture")
    unread = of_type(listed, UNREAD_EXTENSIONS)
    partners = _Partners("caption", image_folder, captions, f".{extension}")
    caption_of = _match(image_folder, pictures, partners, faults, unread) if caption_for is None else {}
    captioned_pictures = {
        name: path for name, path in pictures.items() if caption_for is not None or name in caption_of
    }
    controls_of = [
        _find_controls(image_folder, pictures, folder, purposes, allow_missing_controls, faults)
        for folder in control_folders
    ]
    captioned = {stem_of(name) for name in captions}
    if left_out := [name for name in unread if stem_of(name) not in captioned]:
        warnings.append(
            f"{len(left_out)} pictures in {image_folder} are of a type that is not read: {shorten(left_out)}. {CONVERT}"
        )
    return Pairs(
        folder=image_folder,
        pairs=tuple(
            Pair(
                path,
                name,
                caption_path=caption_of.get(name),
                caption=caption_for(path) if caption_for else None,
                control_paths=tuple(control_of[name] for control_of in controls_of if name in control_of),
            )
            for name, path in captioned_pictures.items()
        ),
        lone_pictures=tuple(path for name, path in pictures.items() if name not in captioned_pictures),
        faults=tuple(faults),
        warnings=tuple(warnings),
    )


def shorten(names: Iterable[str]) -> str:
    """Lists the first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
    return ", ".join(listed[:_NAMES_SHOWN]) + more


def list_files(
    folder: Path, role: str, apart: Collection[str], faults: list[str], warnings: list[str]
) -> dict[str, Path]:
    """Lists all files below a folder by their names, sorted. Follows links to folders, but into no folder twice.

    Args:
        apart: real paths of folders to skip, unless one is `folder` itself.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        faults.append(f"The {role} {folder} {problem}.{did_you_mean(folder)}")
        return {}
    root, visited = os.path.realpath(folder), set[str]()
    found: dict[str, Path] = {}
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in visited or (real in apart and real != root):
            continue
        visited.add(real)
        if real != root and os.path.commonpath([real, root]) == real:
            warnings.append(f"{parent} is a link to a folder that holds {folder} itself; it is skipped.")
            continue
        try:
            with os.scandir(parent) as entries:
                inside = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            faults.append(f"The folder {parent} cannot be read: {error.strerror or error}.")
            continue
        if real != root and (MARK_OF_A_RUN, False) in inside:
            warnings.append(f"{parent} is the output of a run (it holds {MARK_OF_A_RUN}); its pictures are skipped.")
            continue
        waiting += [parent / name for name, is_folder in reversed(inside) if is_folder and name not in IGNORED_FOLDERS]
        for path in (parent / name for name, is_folder in inside if not is_folder):
            try:
                name = _name(path.relative_to(folder))
            except UnicodeDecodeError:
                faults.append(f"The file name {path.name!a} below {folder} is not UTF-8. Rename it.")
                continue
            if name in found:
                faults.append(
                    f"The names of {found[name]!s} and {path} differ only in the way accents are written, composed or "
                    f"decomposed: {found[name].name!a}, {path.name!a}. Rename or remove one."
                )
            found[name] = path
    return dict(sorted(found.items()))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _name(relative: Path) -> str:
    """Returns a file's name as its bytes mean it in UTF-8, whatever the locale takes them for, with composed accents.

    Raises:
        UnicodeDecodeError: the bytes are no UTF-8. Neither a log nor a checkpoint could store the name.
    """
    return unicodedata.normalize("NFC", os.fsencode(relative.as_posix()).decode("utf-8"))


def of_type(listed: Mapping[str, Path], extensions: Iterable[str]) -> dict[str, Path]:
    wanted = set(extensions)
    return {name: path for name, path in listed.items() if name[len(stem_of(name)) + 1 :].lower() in wanted}


def stem_of(name: str) -> str:
    """Returns the name up to its last dot, folders included; one that begins or ends with that dot stays as it is."""
    stem, _, extension = name.rpartition(".")
    return stem if stem and extension and "/" not in extension and not stem.endswith("/") else name


def _by_stem(names: Iterable[str], fold: bool = False) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[stem_of(name).casefold() if fold else stem_of(name)].append(name)
    return groups


def _difference(one: str, other: str) -> str:
    """Describes how two names differ that some file systems take for one."""
    if one.lower() == other.lower():
        return "differ only in letter case"
    return "differ only in what some file systems take for letter case"


def find_ambiguous(files: Mapping[str, Path], kind: str, clash: str) -> list[str]:
    """Reports files of one kind with the same stem, or with one stem on a file system that ignores letter case."""
    faults = []
    for group in _by_stem(files, fold=True).values():
        if len(group) < 2:
            continue
        listed = " and ".join(str(files[name]) for name in group)
        only_case = len({name.casefold() for name in group}) < len(group) or len({stem_of(name) for name in group}) > 1
        problem = f"have names that {_difference(stem_of(group[0]), stem_of(group[1]))}" if only_case else clash
        faults.append(f"The {kind} {listed} {problem}. Rename or remove all but one.")
    return faults


@dataclass(frozen=True)
class _Partners:
    """Captions or control pictures that are to be matched to pictures by stem."""

    kind: str
    folder: Path
    files: Mapping[str, Path]
    extension: str


def _match(
    folder: Path,
    pictures: Mapping[str, Path],
    partners: _Partners,
    faults: list[str],
    unread: Mapping[str, Path] | None = None,
) -> dict[str, Path]:
    """Finds the partner of the same stem for every picture, and reports files without one, on either side.

    Args:
        unread: pictures of types that are not read, which explain why a partner has none.
    """
    kind, of_stem = partners.kind, _by_stem(partners.files)
    stems, unread_of_stem = {stem_of(name) for name in pictures}, _by_stem(unread or ())
    lone_partners = [name for name in partners.files if stem_of(name) not in stems]
    near = _by_stem(lone_partners, fold=True)
    explained: set[str] = set()
    without: dict[str, Path] = {}
    for name, path in pictures.items():
        if stem_of(name) in of_stem:
            continue
        if others := near.get(stem_of(name).casefold()):
            explained.update(others)
            faults.append(
                f"The picture {path} and the {kind} {partners.files[others[0]]} have names that "
                f"{_difference(stem_of(name), stem_of(others[0]))}. Rename one, so that they are equal."
            )
        else:
            without[name] = path
    faults += _without_partner(folder, pictures, without, partners)
    alone = [name for name in lone_partners if name not in explained]
    of_unread = [folder / others[0] for name in alone if (others := unread_of_stem.get(stem_of(name)))]
    if of_unread:
        faults.append(
            f"Pictures with a {kind} are of a type that is not read: {shorten(map(str, of_unread))}. {CONVERT}"
        )
    lone = [name for name in alone if stem_of(name) not in unread_of_stem]
    if len(lone) <= _NAMES_SHOWN:
        faults += [f"The {kind} {partners.files[name]} has no picture {folder / stem_of(name)}.*." for name in lone]
    else:
        listed = shorten(str(partners.files[name]) for name in lone)
        faults.append(f"{len(lone)} {kind}s have no picture of their name in {folder}: {listed}.")
    return {name: partners.files[of_stem[stem_of(name)][0]] for name in pictures if stem_of(name) in of_stem}


def _without_partner(
    folder: Path, pictures: Mapping[str, Path], without: Mapping[str, Path], partners: _Partners
) -> list[str]:
    """Reports pictures that lack a partner: one by one where they are few, else as the one mistake that they are."""
    kind = partners.kind
    parents = Counter(path.parent for path in pictures.values())
    whole = [
        each for each, count in Counter(path.parent for path in without.values()).items() if count == parents[each] > 1
    ]
    faults = []
    if kind == "caption" and len(parents) > len(whole):
        for each in whole:
            faults.append(
                f"None of the {parents[each]} pictures in {each} has a caption. If they are control pictures or masks, "
                f"name the folders apart: data_config.img_dir=TARGETS with data_config.control_dir={each}, or with "
                f"data_config.mask_dir, in training; pixtune validate TARGETS --control-dir {each}."
            )
        without = {name: path for name, path in without.items() if path.parent not in whole}
    if len(without) <= _NAMES_SHOWN:
        faults += [
            f"The picture {path} has no {kind} {partners.folder / stem_of(name)}{partners.extension}."
            for name, path in without.items()
        ]
    else:
        listed = shorten(map(str, without.values()))
        faults.append(f"{len(without)} pictures have no {kind} of their name ({partners.extension}): {listed}.")
    return faults


def _find_controls(
    folder: Path,
    pictures: Mapping[str, Path],
    control_folder: Path,
    apart: Collection[str],
    may_be_missing: bool,
    faults: list[str],
) -> dict[str, Path]:
    """Finds the control picture of every target. A missing folder is one problem, not one for each picture."""
    before = len(faults)
    listed = list_files(control_folder, "control folder", apart, faults, [])
    if len(faults) > before:
        return {}
    controls = of_type(listed, PICTURE_EXTENSIONS)
    faults += find_ambiguous(controls, "control pictures", "belong to one target")
    stems = set(_by_stem(controls))
    wanted = {name: path for name, path in pictures.items() if stem_of(name) in stems} if may_be_missing else pictures
    unread = of_type(listed, UNREAD_EXTENSIONS)
    found = _match(folder, wanted, _Partners("control picture", control_folder, controls, ".*"), faults)
    if unread and len(found) < len(pictures):
        faults.append(
            f"{len(unread)} control pictures in {control_folder} are of a type that is not read: {shorten(unread)}. "
            f"{CONVERT}"
        )
    return found
