"""The pictures of a config beside their captions: shown, edited, searched, dropped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from pixtune.config.folders import Folder, folders_of
from pixtune.data.examples import folders_apart
from pixtune.data.layouts import find_examples
from pixtune.data.pairs import Pairs
from pixtune.errors import PixtuneError
from pixtune.ui import checks, edits, runs
from pixtune.ui.answers import BadRequestError, ConflictError, answer, done, field, read_form
from pixtune.ui.choices import is_small_model
from pixtune.ui.configs import ConfigFile, open_config
from pixtune.ui.roots import OutsideError, Roots
from pixtune.ui.workplace import Workplace, place_in, workplace_of


@dataclass(frozen=True)
class Tile:
    """A picture on the page."""

    name: str
    """Path below its folder."""
    place: str
    """Place of its file; "" where that lies outside the chosen folders."""
    version: int
    """Time of its last change, so that browsers keep no older one."""
    caption: str
    caption_file: str
    """Path of the caption file below the folder; "" where captions cannot be edited here."""
    has_file: bool
    controls: tuple[str, ...] = ()
    """Places of its control pictures."""
    marks: tuple[checks.Mark, ...] = ()


@dataclass(frozen=True)
class Shelf:
    """One folder of a config with its tiles."""

    number: int
    place: str
    tiles: tuple[Tile, ...]
    problems: tuple[str, ...]
    can_edit: bool
    why_not: str
    undo_words: str


def folder_of(file: ConfigFile, number: int) -> Folder:
    """Returns one of a config's folders.

    Raises:
        BadRequestError: it has no such folder.
    """
    folders = folders_of(file.required().data_config)
    if not 0 <= number < len(folders):
        raise BadRequestError("the config has no such folder any more: load the page again")
    return folders[number]


def build_shelf(roots: Roots, file: ConfigFile, number: int, marks: Mapping[str, Sequence[checks.Mark]]) -> Shelf:
    """Finds the pictures and captions of a folder, by the rules of training. Opens no picture."""
    folder = folder_of(file, number)
    place = roots.place_of(folder.img_dir)
    found = find_examples(folder, folders_apart(file.required())) if folder.img_dir.is_dir() else _nothing(folder)
    why_not = why_not_edited(folder)
    prefix = f"{folder.img_dir}/"
    items: list[tuple[str, Path, str, str, bool, tuple[Path, ...]]] = []
    for pair in found.pairs:
        text = pair.caption if pair.caption_path is None else edits.text_of(pair.caption_path)
        caption_file = "" if why_not or pair.caption_path is None else str(pair.caption_path).removeprefix(prefix)
        items.append((pair.name, pair.image_path, text or "", caption_file, True, pair.control_paths))
    for path in found.lone_pictures:
        caption_path = path.with_name(f"{path.stem}.{folder.captions.extension.lstrip('.')}")
        caption_file = "" if why_not else str(caption_path).removeprefix(prefix)
        items.append((str(path).removeprefix(prefix), path, "", caption_file, False, ()))
    items.sort()
    places = roots.places_of(path for _, path, *_ in items)
    marked = tuple(
        Tile(
            name, own_place, _version(path) if own_place else 0, text, caption_file, has_file,
            tuple(each for each in roots.places_of(controls) if each),
            (*(() if has_file else (NO_CAPTION,)), *_marks_of(name, caption_file, folder.img_dir, marks)),
        )
        for (name, path, text, caption_file, has_file, controls), own_place in zip(items, places, strict=True)
    )  # fmt: skip
    lone = {str(path) for path in found.lone_pictures}
    problems = [each for each in (*found.faults, *found.warnings) if not any(path in each for path in lone)]
    last = edits.last_to_undo(edits.read_batches(folder.img_dir))
    return Shelf(number, place, marked, tuple(problems), not why_not, why_not, last.words if last else "")


def _nothing(folder: Folder) -> Pairs:
    return Pairs(folder.img_dir, (), (), (), ())


NO_CAPTION = checks.Mark("error", "missing", "no caption yet")


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except OSError:
        return 0


def _marks_of(
    name: str, caption_file: str, folder: Path, marks: Mapping[str, Sequence[checks.Mark]]
) -> list[checks.Mark]:
    if not marks:
        return []
    paths = [name, *([caption_file] if caption_file else [])]
    return [mark for each in paths for mark in marks.get(os.path.abspath(folder / each), ())]


def why_not_edited(folder: Folder) -> str:
    """Returns why a folder's captions cannot be edited here; "" where they can."""
    if folder.dataset is not None:
        return "The captions of a Hugging Face data set are read only."
    if folder.metadata_file is not None:
        return f"The captions stand in {folder.metadata_file.name}: edit that file."
    if folder.captions.text is not None:
        return "All pictures have the one caption of data_config.caption_text."
    if folder.captions.source == "file_name":
        return "The captions are the names of the files (caption_source: file_name)."
    return ""


# ---- routes


async def show(request: Request) -> Response:
    """The pictures of a config with their captions."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    return answer(request, "pictures.html", await run_in_threadpool(_view, work, file))


def _view(work: Workplace, file: ConfigFile) -> dict[str, object]:
    shelves: list[Shelf] = []
    problem = ""
    if file.config is not None:
        marks = checks.read_marks(work, file)
        try:
            numbers = range(len(folders_of(file.config.data_config)))
            shelves = [build_shelf(work.roots, file, number, marks) for number in numbers]
        except PixtuneError as error:
            problem = str(error)
    return {
        "step": "pictures",
        "steps": runs.steps_of_config(work, file),
        "file": {"place": file.place, "name": file.name},
        "problem": problem or (str(file.problem) if file.problem else ""),
        "shelves": shelves,
        "num_pictures": sum(len(shelf.tiles) for shelf in shelves),
        "num_missing": sum(not tile.has_file or not tile.caption for shelf in shelves for tile in shelf.tiles),
        "is_small": file.config is not None and is_small_model(file.config.pretrained_model_name_or_path),
        "check": checks.state_of(work, file),
        "triggers": list(file.config.trigger_words) if file.config else [],
    }


async def thumb(request: Request) -> Response:
    """A picture of a chosen folder, made small: `edge` is 320 or 1280 pixels."""
    work = workplace_of(request)
    source = work.roots.find(place_in(request))
    edge = request.query_params.get("edge", "320")
    if edge not in ("320", "1280"):
        raise BadRequestError("edge is 320 or 1280")
    path = await work.thumbnails.of(source, int(edge))
    keep = {"cache-control": "private, max-age=31536000, immutable"} if "v" in request.query_params else {}
    return FileResponse(path, media_type="image/webp", headers=keep)


def _caption_file(folder: Folder, name: str) -> str:
    """Checks the path of a caption file below a folder, as a tile gives it.

    Raises:
        BadRequestError: it is none.
    """
    if why_not := why_not_edited(folder):
        raise BadRequestError(why_not)
    extension = folder.captions.extension.lstrip(".").lower()
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or not name.lower().endswith(f".{extension}"):
        raise BadRequestError(f"{name[:200]!r} is no caption file of this folder")
    return name


async def save_caption(request: Request) -> Response:
    """Saves a caption: fields `folder` (number), `file`, `before` (as it was shown) and `text`."""
    work, form = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    folder = folder_of(file, _number(form))
    name = _caption_file(folder, field(form, "file"))
    if not work.roots.holds(folder.img_dir / name):
        raise OutsideError(f"{name[:200]!r} leads out of the folders that this page may write to")
    text = edits.tidy(field(form, "text"))
    before = edits.text_of(folder.img_dir / name)
    if (before or "") != edits.tidy(form.get("before", before or "")):
        raise ConflictError(f"{name} was changed meanwhile. It holds now: {before or 'nothing'}")
    if before != text:
        edit = edits.Edit(name, before, text)
        await run_in_threadpool(edits.change, folder.img_dir, f"caption of {Path(name).stem}", [edit])
    return done(request, f"/pictures/{file.place}", {"file": name, "text": text})


def _number(form: Mapping[str, str]) -> int:
    number = form.get("folder", "0")
    if not number.isdecimal() or len(number) > 6:
        raise BadRequestError("folder is the number of one of the config's folders, 0 for the first")
    return int(number)


async def replace_all(request: Request) -> Response:
    """Replaces a text in all captions of a folder: fields `folder`, `find`, `replace`; or puts `trigger` in front.

    With `preview`, nothing is changed.
    """
    work, form = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    number = _number(form)
    shelf = await run_in_threadpool(build_shelf, work.roots, file, number, {})
    if not shelf.can_edit:
        raise BadRequestError(shelf.why_not)
    trigger, find, put = form.get("trigger", "").strip(), form.get("find", ""), form.get("replace", "")
    if not trigger and not find:
        raise BadRequestError("there is nothing to look for: fill in the text to find, or the trigger word")
    changed = []
    for tile in shelf.tiles:
        new = edits.with_trigger(tile.caption, trigger) if trigger else edits.tidy(tile.caption.replace(find, put))
        if new != tile.caption:
            before = edits.text_of(folder_of(file, number).img_dir / tile.caption_file)
            changed.append(edits.Edit(tile.caption_file, before, new))
    words = f"trigger word {trigger}" if trigger else f"replace {find} by {put or 'nothing'}"
    if changed and "preview" not in form:
        await run_in_threadpool(edits.change, folder_of(file, number).img_dir, words, changed)
    view = {"num_changed": len(changed), "examples": changed[:5]}
    return done(request, f"/pictures/{file.place}", view)


async def undo(request: Request) -> Response:
    """Takes back the last change of captions in a folder: field `folder`."""
    work, form = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    folder = folder_of(file, _number(form))

    def is_caption(name: str) -> bool:
        try:
            return work.roots.holds(folder.img_dir / _caption_file(folder, name))
        except BadRequestError:
            return False

    batch = await run_in_threadpool(edits.undo, folder.img_dir, is_caption)
    if batch is None:
        raise BadRequestError("there is nothing to undo in this folder")
    view = {"words": batch.words, "texts": {edit.file: edit.after or "" for edit in batch.edits}}
    return done(request, f"/pictures/{file.place}", view)
