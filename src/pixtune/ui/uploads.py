"""Pictures and captions that are dropped on the page: one file a request, checked before it gets its name."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pixtune.data.captions import LARGEST_CAPTION_BYTES
from pixtune.data.images import read_size
from pixtune.data.pairs import PICTURE_EXTENSIONS, UNREAD_EXTENSIONS
from pixtune.errors import DataError, WriteError
from pixtune.storage.files import sync_folder
from pixtune.ui.answers import BadRequestError
from pixtune.ui.configs import open_config
from pixtune.ui.edits import text_of
from pixtune.ui.pictures import folder_of, why_not_edited
from pixtune.ui.roots import OutsideError
from pixtune.ui.workplace import place_in, workplace_of

LARGEST_PICTURE_BYTES = 256 << 20
"""Size of a picture that may be dropped; larger ones are copied into the folder by hand."""
NAME = re.compile(r"[^/\\\0\x01-\x1f]{1,200}")


def checked_file_name(name: str, caption_extension: str) -> str:
    """Returns the name of a dropped file.

    Raises:
        BadRequestError: it cannot be that of a picture or caption.
    """
    name = os.path.basename(name.replace("\\", "/"))
    extension = name.rpartition(".")[2].lower()
    if extension in UNREAD_EXTENSIONS:
        raise BadRequestError(f"{name[:80]}: pictures of this kind are not read. Convert them to PNG or JPEG")
    if not NAME.fullmatch(name) or name.startswith(".") or extension not in {*PICTURE_EXTENSIONS, caption_extension}:
        raise BadRequestError(f"{name[:80]!r} is neither a picture nor a .{caption_extension} caption")
    return name


async def receive(request: Request) -> Response:
    """Takes one file as the request's body: query `name`, and `folder` for one of several. Nothing is replaced."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    number = request.query_params.get("folder", "0")
    folder = folder_of(file, int(number) if number.isdecimal() and len(number) < 7 else -1)
    if folder.dataset is not None:
        raise BadRequestError(why_not_edited(folder))
    if not work.roots.holds(folder.img_dir):
        raise OutsideError("the folder of pictures lies outside the folders that this page may write to")
    extension = folder.captions.extension.lstrip(".").lower()
    name = checked_file_name(request.query_params.get("name", ""), extension)
    is_caption = name.lower().endswith(f".{extension}")
    target = folder.img_dir / name
    if os.path.lexists(target):
        raise BadRequestError(f"{name} is there already, and is kept: rename the new one, or delete the old one first")
    length = request.headers.get("content-length", "0")
    most = LARGEST_CAPTION_BYTES if is_caption else LARGEST_PICTURE_BYTES
    if not length.isdecimal() or int(length) > most:
        raise BadRequestError(f"{name} has more than {most >> 20} MiB: copy it into {folder.img_dir} by hand")
    temporary = folder.img_dir / f".upload-{secrets.token_hex(8)}.{name.rpartition('.')[2].lower()}"
    try:
        folder.img_dir.mkdir(parents=True, exist_ok=True)
        await _store(request, temporary, most)
        await run_in_threadpool(_take, temporary, target, is_caption)
    except OSError as error:
        raise WriteError(f"{target} could not be written ({error.strerror or error}): is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)
    return JSONResponse({"name": name}, 201)


async def _store(request: Request, path: Path, most_bytes: int) -> None:
    num_bytes = 0
    with path.open("xb") as stream:
        try:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > most_bytes:
                    raise BadRequestError(f"the file has more than {most_bytes >> 20} MiB")
                stream.write(chunk)
        except ClientDisconnect as error:
            raise BadRequestError("the upload broke off") from error
        os.fsync(stream.fileno())


def _take(temporary: Path, target: Path, is_caption: bool) -> None:
    """Checks a file that has arrived, and gives it its name unless another one has it meanwhile."""
    if is_caption:
        if text_of(temporary) is None:
            raise BadRequestError(f"{target.name} is no text in UTF-8")
    else:
        try:
            read_size(temporary)
        except DataError as error:  # it is no picture, or has too many pixels
            raise BadRequestError(error.faults[0].replace(str(temporary), target.name)) from error
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise BadRequestError(f"{target.name} is there already, and is kept") from error
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise BadRequestError(f"{target.name} is there already, and is kept") from None
        temporary.rename(target)
    sync_folder(target.parent)
