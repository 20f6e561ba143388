"""Changes of captions that can be undone: each is noted in the folder of pictures before it is made.

The note is a line of `JOURNAL` with the texts before and after, so nothing is lost where a browser, the server or the
machine ends in between. Undoing is one more change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtune.data.captions import LARGEST_CAPTION_BYTES, read_caption, tidy_caption
from pixtune.errors import PixtuneError, WriteError
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.storage.files import write_atomically
from pixtune.ui.answers import BadRequestError, ConflictError

JOURNAL = ".pixtune_edits.jsonl"
"""Name of the notes; names with a dot in front are no data."""
LARGEST_JOURNAL_BYTES = 64 * MEBIBYTE
"""Size from which the notes are no longer read, and begun anew."""


@dataclass(frozen=True)
class Edit:
    """One caption file's change; None stands for no file."""

    file: str
    """Path of the caption file below the folder of pictures."""
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Batch:
    """Changes that were made together, and are undone together."""

    number: int
    words: str
    """Name of what was done, for people."""
    edits: tuple[Edit, ...]
    undoes: int | None = None
    """Number of the batch that this one takes back."""


def text_of(path: Path) -> str | None:
    """Returns a caption file's text; None where there is no file, or one that cannot be read."""
    try:
        return read_caption(path) if os.path.lexists(path) else None
    except PixtuneError:
        return None


def change(folder: Path, words: str, edits: Sequence[Edit], undoes: int | None = None) -> Batch:
    """Notes changes and makes them, file by file.

    Raises:
        ConflictError: a caption is no longer what it was before; nothing is changed then.
        BadRequestError: a text is too long for a caption.
        WriteError: a file cannot be written.
    """
    for edit in edits:
        if text_of(folder / edit.file) != edit.before:
            raise ConflictError(
                f"{edit.file} was changed meanwhile, in another window or by a program. It holds now: "
                f"{text_of(folder / edit.file) or 'nothing'}"
            )
        if len((edit.after or "").encode(errors="replace")) > LARGEST_CAPTION_BYTES:
            raise BadRequestError(f"{edit.file}: a caption has at most {LARGEST_CAPTION_BYTES:,} bytes")
    done = read_batches(folder)
    batch = Batch((done[-1].number if done else 0) + 1, words, tuple(edits), undoes)
    _note(folder, batch, begin_anew=not done)
    for edit in edits:
        if edit.after is None:
            (folder / edit.file).unlink(missing_ok=True)
        else:
            write_atomically(folder / edit.file, edit.after.encode(errors="replace"))
    return batch


def _note(folder: Path, batch: Batch, begin_anew: bool) -> None:
    edits = [[edit.file, edit.before, edit.after] for edit in batch.edits]
    line = {"number": batch.number, "words": batch.words, "edits": edits, "undoes": batch.undoes}
    try:
        with (folder / JOURNAL).open("wb" if begin_anew else "ab") as stream:
            stream.write(b"\n" + json.dumps(line).encode() + b"\n")  # a line that a kill cut off ends here
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise WriteError(f"{folder / JOURNAL} could not be written ({error.strerror or error}).") from error


def read_batches(folder: Path) -> list[Batch]:
    """Reads what was changed, the oldest first. Lines that are none of ours are left out."""
    try:
        data = read_bounded(folder / JOURNAL, LARGEST_JOURNAL_BYTES)
    except OSError:
        return []
    batches = []
    for line in data.splitlines():
        try:
            batches.append(_read_batch(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return batches


def _read_batch(values: Mapping[str, object]) -> Batch:
    match values:
        case {"number": int(number), "words": str(words), "edits": list(rows), "undoes": int() | None as undoes}:
            edits = [Edit(file, before, after) for file, before, after in rows]
            texts = [text for edit in edits for text in (edit.before, edit.after) if text is not None]
            if all(isinstance(each, str) for each in [*texts, *(edit.file for edit in edits)]):
                return Batch(number, words, tuple(edits), undoes)
    raise ValueError


def last_to_undo(batches: Sequence[Batch]) -> Batch | None:
    """Returns the last batch that was neither taken back nor takes one back."""
    undone = {batch.undoes for batch in batches}
    left = [batch for batch in batches if batch.undoes is None and batch.number not in undone]
    return left[-1] if left else None


def undo(folder: Path, is_caption: Callable[[str], bool]) -> Batch | None:
    """Takes the last batch back that still stands; None where there is none.

    Args:
        is_caption: whether a file below the folder is a caption: the notes may be somebody else's.

    Raises:
        ConflictError: a caption has been changed since.
    """
    batch = last_to_undo(read_batches(folder))
    if batch is None or not all(is_caption(edit.file) for edit in batch.edits):
        return None
    back = [Edit(edit.file, edit.after, edit.before) for edit in batch.edits]
    return change(folder, f"undo: {batch.words}", back, batch.number)


def with_trigger(text: str, trigger: str) -> str:
    """Returns a caption that begins with a trigger word, unless it holds it already."""
    trigger = " ".join(trigger.split())
    return text if trigger.casefold() in text.casefold() else f"{trigger}, {text}" if text else trigger


def tidy(text: str) -> str:
    """Returns a caption as training reads it."""
    return tidy_caption(text.replace("\0", ""))
