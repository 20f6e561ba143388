"""Files that belong together: a picture, its caption and, for editing, its control pictures.

Nothing stops at the first problem: `find_pairs` returns what it found with all problems, so that a person fixes them in
one go. Needs neither torch nor Pillow.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pixtune.errors import DataError

PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tiff", "tif"})
"""Extensions of the pictures that are read, in lower case; file names may have any letter case."""

UNREAD_EXTENSIONS = frozenset({"avif", "cr2", "dng", "gif", "heic", "heif", "jfif", "jxl", "nef", "psd", "svg"})
"""Extensions of pictures that are not read. A person may expect them to be, so a warning names them."""

IGNORED_FOLDERS = frozenset({"__MACOSX", "__pycache__"})
"""Folders that are skipped, like every folder and file whose name begins with a dot, the cache's among them."""

_NAMES_SHOWN = 5
"""Number of names that a message lists."""


@dataclass(frozen=True)
class Pair:
    """One training example on disk."""

    image_path: Path
    name: str
    """Path of the picture below the folder, with forward slashes: the example's identity, equal on every machine."""
    caption_path: Path | None = None
    """File of the caption, unless that stands in a metadata file."""
    caption: str | None = None
    """Caption from a metadata file, without which it is in `caption_path`."""
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
) -> Pairs:
    """Looks through a folder and its subfolders, without reading a file. Problems are returned, not raised.

    A picture `sub/a.b.png` goes with the caption `sub/a.b.txt`: the stem ends at the last dot and is matched letter by
    letter, the extension in any letter case. Names that differ only in letter case are a problem, since they are one
    file on Windows and macOS.

    Args:
        image_folder: the pictures and captions.
        caption_extension: the contract's `caption_type`, with or without a leading dot.
        control_folders: control pictures of the same stems, for editing; one folder for each control of an example.
        allow_missing_controls: accept pictures without a control of their stem.
    """
    extension = caption_extension.lstrip(".").lower()
    if not extension or extension in PICTURE_EXTENSIONS:
        return Pairs(image_folder, (), (), (f"caption_type is {caption_extension!r}; it must be like 'txt'.",), ())
    faults: list[str] = []
    names = _list_files(image_folder, "image folder", faults)
    pictures = _of_type(names, PICTURE_EXTENSIONS)
    captions = _of_type(names, {extension})
    if not faults and not pictures:
        faults.append(f"The image folder {image_folder} holds no picture ({', '.join(sorted(PICTURE_EXTENSIONS))}).")
    faults += _ambiguous(image_folder, pictures, "pictures", "share one caption name")
    faults += _ambiguous(image_folder, captions, "captions", "belong to one picture")
    partners = _Partners("caption", image_folder, captions, f".{extension}")
    caption_of = _match(image_folder, pictures, partners, faults)
    controls_of = [
        _find_controls(image_folder, pictures, folder, allow_missing_controls, faults) for folder in control_folders
    ]
    return Pairs(
        folder=image_folder,
        pairs=tuple(
            Pair(
                image_folder / name,
                name,
                caption_path=caption_of[name],
                control_paths=tuple(control_of[name] for control_of in controls_of if name in control_of),
            )
            for name in pictures
            if name in caption_of
        ),
        lone_pictures=tuple(image_folder / name for name in pictures if name not in caption_of),
        faults=tuple(faults),
        warnings=tuple(_unread(image_folder, names)),
    )


def read_caption(path: Path) -> str:
    """Reads a caption as `tidy_caption` gives it. It may be empty or have several lines; UTF-8, BOM or not.

    Raises:
        DataError: one problem, with the file, the position of the bad byte and what to do.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _caption_error(path, f"cannot be read: {error.strerror or error}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        position = max(data.find(b"\0"), 0)
        raise _caption_error(path, f"is UTF-16 or not text (first such byte at position {position}). Save it as UTF-8.")
    try:
        return tidy_caption(data.decode("utf-8"))  # "utf-8-sig" would shift the position of a bad byte
    except UnicodeDecodeError as error:
        raise _caption_error(
            path, f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}. Save it as UTF-8."
        ) from error


def tidy_caption(text: str) -> str:
    """Returns a caption without what an editor or a file system adds: its own line ends, BOMs, white space around it.

    Lines end with a line feed alone, so that a caption from Windows is the same caption: the same tokens and encoding.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").strip()


def shorten(names: Iterable[str]) -> str:
    """Lists the first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
    return ", ".join(listed[:_NAMES_SHOWN]) + more


def _caption_error(path: Path, sentence: str) -> DataError:
    return DataError("a caption cannot be used", [f"{path} {sentence}"])


def _list_files(folder: Path, role: str, faults: list[str]) -> list[str]:
    """Lists the names of all files below a folder, sorted. Follows links to folders, but into no folder twice."""
    if not folder.is_dir():
        faults.append(f"The {role} {folder} {'is not a folder' if folder.exists() else 'does not exist'}.")
        return []

    def report(error: OSError) -> None:
        faults.append(f"The folder {error.filename} cannot be read: {error.strerror or error}.")

    visited: set[str] = set()
    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=report, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
        found += [Path(parent, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    # Python holds bytes that are not UTF-8 as surrogates, which neither a log nor a checkpoint can store.
    nameless = {name for name in found if any("\ud800" <= mark <= "\udfff" for mark in name)}
    faults += [f"The file name {name!a} below {folder} is not UTF-8. Rename it." for name in sorted(nameless)]
    return sorted(set(found) - nameless)


def _of_type(names: Iterable[str], extensions: Iterable[str]) -> list[str]:
    wanted = set(extensions)
    return [name for name in names if PurePosixPath(name).suffix[1:].lower() in wanted]


def _stem(name: str) -> str:
    """Returns the name up to its last dot, folders included."""
    return str(PurePosixPath(name).with_suffix(""))


def _folded(stem: str) -> str:
    """Maps names that a file system may take for one to one: letter case, composed and decomposed accents."""
    return unicodedata.normalize("NFC", stem.casefold())


def _by_stem(names: Iterable[str], fold: bool = False) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_folded(_stem(name)) if fold else _stem(name)].append(name)
    return groups


def _ambiguous(folder: Path, names: list[str], kind: str, clash: str) -> list[str]:
    """Reports files of one kind with the same stem, or with one stem on a file system that ignores letter case."""
    faults = []
    for group in _by_stem(names, fold=True).values():
        if len(group) < 2:
            continue
        listed = " and ".join(str(folder / name) for name in group)
        only_case = len({_folded(name) for name in group}) < len(group) or len({_stem(name) for name in group}) > 1
        problem = "have names that differ only in letter case" if only_case else clash
        faults.append(f"The {kind} {listed} {problem}. Rename or remove all but one.")
    return faults


@dataclass(frozen=True)
class _Partners:
    """Captions or control pictures that are to be matched to pictures by stem."""

    kind: str
    folder: Path
    names: list[str]
    extension: str


def _match(folder: Path, pictures: list[str], partners: _Partners, faults: list[str]) -> dict[str, Path]:
    """Finds the partner of the same stem for every picture, and reports files without one, on either side."""
    kind, of_stem = partners.kind, _by_stem(partners.names)
    stems = {_stem(name) for name in pictures}
    lone_partners = [name for name in partners.names if _stem(name) not in stems]
    near = _by_stem(lone_partners, fold=True)
    explained: set[str] = set()
    for name in pictures:
        if _stem(name) in of_stem:
            continue
        if others := near.get(_folded(_stem(name))):
            explained.update(others)
            faults.append(
                f"The picture {folder / name} and the {kind} {partners.folder / others[0]} have names that differ only "
                "in letter case. Rename one, so that they are equal."
            )
        else:
            wanted = f"{partners.folder / _stem(name)}{partners.extension}"
            faults.append(f"The picture {folder / name} has no {kind} {wanted}.")
    for name in lone_partners:
        if name not in explained:
            faults.append(f"The {kind} {partners.folder / name} has no picture {folder / _stem(name)}.*.")
    return {name: partners.folder / of_stem[_stem(name)][0] for name in pictures if _stem(name) in of_stem}


def _find_controls(
    folder: Path, pictures: list[str], control_folder: Path, may_be_missing: bool, faults: list[str]
) -> dict[str, Path]:
    """Finds the control picture of every target. A missing folder is one problem, not one for each picture."""
    before = len(faults)
    controls = _of_type(_list_files(control_folder, "control folder", faults), PICTURE_EXTENSIONS)
    if len(faults) > before:
        return {}
    faults += _ambiguous(control_folder, controls, "control pictures", "belong to one target")
    stems = set(_by_stem(controls))
    wanted = [name for name in pictures if _stem(name) in stems] if may_be_missing else pictures
    return _match(folder, wanted, _Partners("control picture", control_folder, controls, ".*"), faults)


def _unread(folder: Path, names: Iterable[str]) -> list[str]:
    unread = _of_type(names, UNREAD_EXTENSIONS)
    if not unread:
        return []
    return [f"{len(unread)} pictures in {folder} are of a type that is not read: {shorten(unread)}. Convert them."]
