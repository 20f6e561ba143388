"""Masks painted on the page, and controls that change places with their targets."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pixtune.config.folders import Folder
from pixtune.data.images import read_size
from pixtune.data.layouts import find_examples
from pixtune.data.masks import find_masks
from pixtune.data.pairs import Pair
from pixtune.errors import DataError, WriteError
from pixtune.storage.files import write_atomically
from pixtune.ui.answers import BadRequestError, done, field, read_body, read_form
from pixtune.ui.configs import ConfigFile, open_config, write_config
from pixtune.ui.pictures import folder_of
from pixtune.ui.roots import OutsideError
from pixtune.ui.workplace import Workplace, place_in, workplace_of
from pixtune.ui.yaml_edit import set_key

LARGEST_MASK_BYTES = 16 << 20


def find_pair(folder: Folder, name: str) -> Pair:
    """Finds a picture with a caption by its name below its folder.

    Raises:
        BadRequestError: there is none.
    """
    pair = next((each for each in find_examples(folder).pairs if each.name == name), None)
    if pair is None:
        raise BadRequestError(
            f"there is no picture {name[:200]!r} with a caption in this folder: write its caption first"
        )
    return pair


def number_in(text: str) -> int:
    """Reads the number of one of a config's folders; -1 where it is none."""
    return int(text) if text.isdecimal() and len(text) < 7 else -1


async def show_mask(request: Request) -> Response:
    """The place of a picture's mask: query `name`, and `folder` for one of several; "" where it has none."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    folder = folder_of(file, number_in(request.query_params.get("folder", "0")))
    place = await run_in_threadpool(_mask_place, work, folder, request.query_params.get("name", ""))
    return JSONResponse({"place": place})


def _mask_place(work: Workplace, folder: Folder, name: str) -> str:
    pair = find_pair(folder, name)
    mask = find_masks([pair], folder, ()).of_picture.get(pair.name) if isinstance(folder.masks, Path) else None
    return work.roots.place_of(mask.path) if mask is not None and work.roots.holds(mask.path) else ""


async def save_mask(request: Request) -> Response:
    """Saves a picture's mask, a PNG as the request's body: the loss counts where it is white.

    Where the config names no folder of masks yet, it gets one beside its pictures.
    """
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    folder = folder_of(file, number_in(request.query_params.get("folder", "0")))
    pair = await run_in_threadpool(find_pair, folder, request.query_params.get("name", ""))
    masks = folder.masks if isinstance(folder.masks, Path) else folder.img_dir.with_name(f"{folder.img_dir.name}-masks")
    target = masks / Path(pair.name).with_suffix(".png")
    if not work.roots.holds(target):
        raise OutsideError("the folder of masks lies outside the folders that this page may write to")
    data = await read_body(request, LARGEST_MASK_BYTES)
    await run_in_threadpool(_write_mask, target, data)
    if folder.masks != masks:
        await run_in_threadpool(_name_masks, file, folder, masks)
    return JSONResponse({"place": work.roots.place_of(target)}, 201)


def _write_mask(target: Path, data: bytes) -> None:
    probe = target.with_name(f".mask-{secrets.token_hex(8)}.png")
    try:
        write_atomically(probe, data)
        read_size(probe)
        probe.replace(target)
    except DataError as error:
        raise BadRequestError(error.faults[0].replace(str(probe), "the mask")) from error
    finally:
        probe.unlink(missing_ok=True)


def _name_masks(file: ConfigFile, folder: Folder, masks: Path) -> None:
    if folder.place != "data_config" or folder.masks is not None:
        raise BadRequestError(f"{folder.place} has no folder of masks: give it a mask_dir in the YAML first")
    text = set_key(set_key(file.text, "data_config.mask_dir", str(masks)), "data_config.allow_missing_masks", True)
    write_config(file.path, text)


async def swap(request: Request) -> Response:
    """Lets a picture and its first control change places: fields `folder` and `name`. Doing it again takes it back."""
    work, form = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    folder = folder_of(file, number_in(form.get("folder", "0")))
    pair = await run_in_threadpool(find_pair, folder, field(form, "name"))
    if not pair.control_paths:
        raise BadRequestError(f"{pair.name} has no control")
    one, other = pair.image_path, pair.control_paths[0]
    if not (work.roots.holds(one) and work.roots.holds(other)):
        raise OutsideError("the pictures lie outside the folders that this page may write to")
    await run_in_threadpool(exchange, one, other)
    return done(request, f"/pictures/{file.place}", {"name": pair.name})


def exchange(one: Path, other: Path) -> None:
    """Exchanges the contents of two files; a crash in between leaves both, one of them under a name of its own.

    Raises:
        WriteError: it cannot be done.
    """
    kept_one, kept_other = (path.with_name(f".swap-{secrets.token_hex(4)}-{path.name}") for path in (one, other))
    try:
        os.link(one, kept_one)
        os.link(other, kept_other)
        os.replace(kept_other, one)
        os.replace(kept_one, other)
    except OSError as error:
        raise WriteError(f"{one} and {other} could not change places ({error.strerror or error})") from error
    finally:
        if one.exists() and other.exists() and os.path.lexists(kept_one) and kept_one.samefile(one):
            kept_one.unlink()
        kept_other.unlink(missing_ok=True)
