"""The first page: every run that is there, and how a new one begins."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from pixtune.data.pairs import IGNORED_FOLDERS, PICTURE_EXTENSIONS, Pairs, find_pairs
from pixtune.errors import PixtuneError
from pixtune.report.pictures import spread
from pixtune.storage.shipped import shipped_names
from pixtune.ui import choices, edits
from pixtune.ui.answers import BadRequestError, answer, as_url, done, field, read_form, status_of, wants_json
from pixtune.ui.configs import given_values, list_configs, to_yaml, write_config
from pixtune.ui.roots import OutsideError, Roots
from pixtune.ui.workplace import CONFIGS, DATASETS, Workplace, checked_name, place_in, workplace_of
from pixtune.ui.yaml_edit import set_key

DEMO_PICTURES, DEMO_CONFIG = Path("assets/demo-style/train"), Path("train_configs/demo.yaml")
"""Files of this repository to try things with; the pictures are copied, so that editing changes none of it."""
NOTHING_GIVEN = {"name": "", "model": "", "source": "", "pictures": ""}
"""Fields of the form for a new run as they are at first."""
NUM_PROMPTS = 3
MOST_ENTRIES = 2000
"""Number of entries of a folder that are looked at to count its pictures."""


@dataclass(frozen=True)
class Model:
    """A model to choose."""

    name: str
    words: str


def known_models(work: Workplace) -> list[Model]:
    """Lists models to choose from: folders with a `model_index.json` two levels deep, and those that pixtune names."""
    found = []
    for folder in (work.home, work.home / "assets", work.home / "models"):
        if not folder.is_dir():
            continue
        for each in sorted(folder.iterdir()):
            if (each / "model_index.json").is_file():
                is_small = choices.is_small_model(str(each))
                words = "small, for trying things out on any CPU" if is_small else "on this machine"
                found.append(Model(str(each.relative_to(work.home)), words))
    return found + [Model(name, "from the hub") for name in shipped_names()]


async def show(request: Request) -> Response:
    """All runs, and the form for a new one."""
    work = workplace_of(request)
    return answer(request, "home.html", await run_in_threadpool(_view, work))


def _view(work: Workplace) -> dict[str, object]:
    from pixtune.ui.runs import list_runs

    configs = list_configs(work)
    models = known_models(work)
    demo = work.home / DEMO_PICTURES
    own = given_values(demo_config.read_text()) if (demo_config := work.home / DEMO_CONFIG).is_file() else {}
    first = own.get("pretrained_model_name_or_path")
    return {
        "step": "home",
        "given": NOTHING_GIVEN,
        "error": "",
        "known": "",
        "runs": list_runs(work, configs),
        "models": models,
        "first_model": first if any(model.name == first for model in models) else "",
        "roots": [{"name": name, "folder": str(folder)} for name, folder in work.roots.folders.items()],
        "demo": work.roots.place_of(demo) if demo.is_dir() else "",
    }


async def create(request: Request) -> Response:
    """Makes a config: fields `name`, `model`, and `pictures`, a folder's place or path; without it a new one is made.

    Where that cannot be, the page shows the form again, with what was filled in and why.
    """
    work, form = workplace_of(request), await read_form(request)
    try:
        path = await _create(work, form)
    except PixtuneError as error:
        if wants_json(request):
            raise
        known = work.home / CONFIGS / f"{as_name(form.get('name', ''))}.yaml"
        shown = {
            "given": {**NOTHING_GIVEN, **form},
            "error": str(error),
            "known": f"/pictures/{as_url(work.roots.place_of(known))}" if known.is_file() else "",
        }
        return answer(request, "home.html", {**await run_in_threadpool(_view, work), **shown}, status_of(error))
    return done(request, f"/pictures/{as_url(work.roots.place_of(path))}", {"place": work.roots.place_of(path)})


def as_name(words: str) -> str:
    """Joins the words of a name by dashes: it becomes that of files, which commands take as one word."""
    return "-".join(words.split())


async def _create(work: Workplace, form: Mapping[str, str]) -> Path:
    """Writes the config that a form describes, and returns its path."""
    name, model = checked_name(as_name(field(form, "name"))), field(form, "model").strip()
    if not model:
        raise BadRequestError("choose a model: a folder, or a name such as Qwen/Qwen-Image")
    path = work.home / CONFIGS / f"{name}.yaml"
    if os.path.lexists(path):
        raise BadRequestError(f"there is a config named {name} already: choose another name, or open that one")
    folder = work.home / DATASETS / name
    place = form.get("pictures", "").strip()
    if form.get("source") == "demo":
        if folder.exists():
            raise BadRequestError(f"there are pictures in {DATASETS}/{name} already: choose another name")
        await run_in_threadpool(shutil.copytree, work.home / DEMO_PICTURES, folder)
    elif place:
        folder = find_pictures(work.roots, place)
    elif form.get("source") == "folder":
        raise BadRequestError("no folder was chosen: open one below, or type its path")
    else:
        folder.mkdir(parents=True, exist_ok=True)
    shown = str(folder.relative_to(work.home)) if folder.is_relative_to(work.home) else str(folder)
    text = await run_in_threadpool(_first_text, name, model, shown)
    await run_in_threadpool(write_config, path, text)
    return path


def find_pictures(roots: Roots, words: str) -> Path:
    """Finds a folder by its place, such as "here/cats", or by its path as a file manager gives it.

    Raises:
        OutsideError: it lies outside the chosen folders; names the option that adds it.
        BadRequestError: there is no such folder.
    """
    if words.partition("/")[0] in roots.folders:
        folder = roots.find(words)
    else:
        try:
            folder = Path(os.path.realpath(roots.home / Path(words).expanduser()))
        except (OSError, ValueError, RuntimeError) as error:
            raise BadRequestError(f"{words[:200]!r} is no path ({error})") from error
        if not roots.holds(folder):
            raise OutsideError(
                f"{folder} lies outside the folders that this page may open. Drop its pictures on the next page "
                f"instead; or end the page in its terminal and start it again with --root {shlex.quote(str(folder))}"
            )
    if not folder.is_dir():
        raise BadRequestError(f"there is no folder {words[:200]!r}: open one below, or type its whole path")
    return folder


def _first_text(name: str, model: str, pictures: str) -> str:
    is_small = choices.is_small_model(model)
    text = to_yaml(choices.first_keys(name, model, pictures, is_small))
    found = find_pairs(Path(pictures))
    keys = choices.keys_of(choices.QUALITIES[0 if is_small else 1], len(found.pairs) or 40, is_small)
    keys["samples.prompts"] = first_prompts(found)
    for key, value in keys.items():
        text = set_key(text, key, value)
    return text


def first_prompts(found: Pairs) -> list[str] | None:
    """Returns a few captions as prompts to draw, spread over a folder; None where it has none."""
    pairs = spread(found.pairs, NUM_PROMPTS)
    prompts = [text for pair in pairs if pair.caption_path and (text := edits.text_of(pair.caption_path))]
    return [" ".join(prompt.split()) for prompt in prompts] or None


@dataclass(frozen=True)
class Entry:
    """A folder within another."""

    name: str
    place: str
    num_pictures: int


async def folders(request: Request) -> Response:
    """The folders in a place, with the numbers of pictures in each: to choose one."""
    work = workplace_of(request)
    return answer(request, "folders.html", await run_in_threadpool(_list_folders, work, place_in(request)))


def _list_folders(work: Workplace, place: str) -> dict[str, object]:
    if not place:
        entries = [Entry(str(path), name, count_pictures(path)) for name, path in work.roots.folders.items()]
        return {"place": "", "parent": None, "entries": entries, "num_pictures": 0}
    folder = work.roots.find(place)
    if not folder.is_dir():
        raise BadRequestError(f"{place!r} is no folder")
    entries = []
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise BadRequestError(f"{place} cannot be read ({error.strerror})") from error
    for path in inside:
        hidden = path.name.startswith(".") or path.name in IGNORED_FOLDERS
        if not hidden and path.is_dir() and work.roots.holds(path):
            entries.append(Entry(path.name, f"{place}/{path.name}", count_pictures(path)))
    parent = place.rpartition("/")[0]
    return {"place": place, "parent": parent, "entries": entries, "num_pictures": count_pictures(folder)}


def count_pictures(folder: Path) -> int:
    """Counts the pictures right inside a folder, by their names, among its first `MOST_ENTRIES` entries."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MOST_ENTRIES), strict=False)]
    except OSError:
        return 0
    return sum(name.rpartition(".")[2].lower() in PICTURE_EXTENSIONS and name[0] != "." for name in names)
