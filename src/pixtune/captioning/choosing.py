"""Decides which pictures get a caption. A caption that a person wrote or changed is never replaced unasked."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pixtune.captioning.pictures import Picture
from pixtune.captioning.record import Written
from pixtune.data.captions import read_caption
from pixtune.errors import DataError
from pixtune.storage.files import text_digest

Overwrite = Literal["nothing", "own", "all"]
"""Captions that are replaced: none, those that the program wrote and nobody changed, or those by hand, too."""


class Choice(enum.Enum):
    """Fate of a picture's caption, in words."""

    NEW = "is written"
    AGAIN = "is written again"
    KEPT = "has a caption"
    BY_HAND = "has a caption that was written or changed by hand"
    DONE = "has the caption that this request writes"

    @property
    def writes(self) -> bool:
        return self in (Choice.NEW, Choice.AGAIN)


@dataclass(frozen=True)
class Chosen:
    """A picture, and what becomes of its caption."""

    picture: Picture
    choice: Choice


def choose(
    picture: Picture, overwrite: Overwrite, record: Mapping[str, Written], request_of: Callable[[Picture], str]
) -> Chosen:
    """Decides what becomes of a picture's caption.

    Args:
        record: captions that the program wrote, by the names of their pictures.
        request_of: returns the digest of everything that decides a picture's caption; reads its files.

    Raises:
        DataError: a picture cannot be read.
    """
    if not picture.has_caption:
        return Chosen(picture, Choice.NEW)
    if overwrite == "nothing":
        return Chosen(picture, Choice.KEPT)
    written = record.get(picture.name)
    if written is None or written.caption != _digest_there(picture):
        return Chosen(picture, Choice.AGAIN if overwrite == "all" else Choice.BY_HAND)
    # A run that was killed goes on where it was: what it wrote is not written a second time.
    return Chosen(picture, Choice.DONE if written.request == request_of(picture) else Choice.AGAIN)


def _digest_there(picture: Picture) -> str | None:
    """Returns the digest of the caption that is there; None where it cannot be read."""
    try:
        return text_digest(read_caption(picture.caption_path))
    except DataError:
        return None
