"""Captions: read from files, and the forms that training makes of them. Needs neither torch nor Pillow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pixtune import randomness
from pixtune.config.folders import CaptionRules
from pixtune.errors import DataError
from pixtune.inputs.reading import MEBIBYTE, read_bounded

LARGEST_CAPTION_BYTES = MEBIBYTE
"""Size that no caption reaches: a hundred thousand words, of which models read a few hundred."""

MOST_CAPTIONS = 256
"""Number of captions of one picture from which a file of them is taken for another kind of file."""

RECODE = "Save it as UTF-8, for example by: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
"""Remedy for a caption that cannot be read."""


def caption_without_file(rules: CaptionRules) -> Callable[[Path], str] | None:
    """Returns the function from a picture to its caption where captions stand in no files; None where they do."""
    if rules.text is not None:
        text = tidy_caption(rules.text)
        return lambda path: text
    if rules.source == "file_name":
        return lambda path: " ".join(path.stem.replace("_", " ").split())
    return None


def split_lines(caption: str, rules: CaptionRules, file: Path) -> tuple[str, ...]:
    """Returns the captions that a file's text holds: one, or one a line. An empty text is one empty caption.

    Raises:
        DataError: it has more lines than any file of captions.
    """
    if rules.source != "lines":
        return (caption,)
    lines = tuple(line.strip() for line in caption.split("\n") if line.strip()) or ("",)
    if len(lines) > MOST_CAPTIONS:
        problem = f"{file} has {len(lines):,} lines, and caption_source is lines; at most {MOST_CAPTIONS} are read."
        raise DataError("a caption cannot be used", [problem])
    return lines


def with_prefix(caption: str, rules: CaptionRules) -> str:
    """Returns a caption with the prefix in front, unless it holds it already, in whatever letter case."""
    prefix = tidy_caption(rules.prefix)
    if not prefix or prefix.casefold() in caption.casefold():
        return caption
    if not caption:
        return prefix
    return f"{prefix} {caption}" if prefix.endswith((",", ".", ":", ";")) else f"{prefix}, {caption}"


def forms_of(captions: Sequence[str], rules: CaptionRules, seed: int, name: str) -> tuple[str, ...]:
    """Returns the forms of a picture's captions that its turns draw from, each with an equal share.

    Where tags are shuffled or left out, each caption has `rules.num_forms` forms, as its seed and the picture's name
    decide. Equal ones stay: leaving out rarely must stay rare.
    """
    if not rules.shuffle and not rules.dropout_rate:
        return tuple(with_prefix(caption, rules) for caption in captions)
    return tuple(
        with_prefix(_draw_form(caption, rules, seed, name, number, form), rules)
        for number, caption in enumerate(captions)
        for form in range(rules.num_forms)
    )


def _draw_form(caption: str, rules: CaptionRules, seed: int, name: str, *which: int) -> str:
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    kept, others = tags[: rules.keep], tags[rules.keep :]
    places = randomness.shuffled(len(others), seed, "tags", name, *which) if rules.shuffle else range(len(others))
    left = [
        others[place]
        for place in places
        if not rules.dropout_rate or randomness.uniform(seed, "tag dropout", name, *which, place) >= rules.dropout_rate
    ]
    return ", ".join([*kept, *left])


def read_caption(path: Path) -> str:
    """Reads a caption as `tidy_caption` gives it. It may be empty or have several lines; UTF-8, BOM or not.

    Raises:
        DataError: one problem, with the file, the position of the bad byte and what to do.
    """
    try:
        data = read_bounded(path, LARGEST_CAPTION_BYTES)
    except OSError as error:
        raise _caption_error(path, f"cannot be read: {error.strerror or error}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        position = max(data.find(b"\0"), 0)
        raise _caption_error(
            path,
            f"is UTF-16 or not text (first such byte at position {position}). Save it as UTF-8.",
        )
    try:
        return tidy_caption(data.decode("utf-8"))  # "utf-8-sig" would shift the position of a bad byte
    except UnicodeDecodeError as error:
        raise _caption_error(
            path,
            f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}. {RECODE}",
        ) from error


def tidy_caption(text: str) -> str:
    """Returns a caption without what an editor or a file system adds: its own line ends, BOMs, white space around it.

    Lines end with a line feed alone, so that a caption from Windows is the same caption: the same tokens and encoding.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").strip()


def _caption_error(path: Path, sentence: str) -> DataError:
    return DataError("a caption cannot be used", [f"{path} {sentence}"])
