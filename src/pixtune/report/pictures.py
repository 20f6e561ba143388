"""Samples in the report, opened, resized and embedded; and the grid of `before_after.png`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from pixtune.inputs.reading import MEBIBYTE, check_size
from pixtune.report.record import RunRecord, Sample

Item = TypeVar("Item")
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

KEPT_EDGE = 256
"""Longest side in pixels of pictures that are embedded as they are, unless they are noisy."""
MOST_PNG_BYTES_PER_PIXEL = 1.5
JPEG_QUALITY = 88
LARGEST_SAMPLE_BYTES, MOST_SAMPLE_PIXELS = 256 * MEBIBYTE, 1 << 26
"""Bounds of the samples that are opened: 8192x8192 pixels, uncompressed."""

SMALLEST_TILE, LARGEST_TILE = 256, 512
"""Longer side of a picture in the grid, pixels."""
MOST_ROWS = 16
MARGIN, GAP, LABEL_WIDTH, TITLE_HEIGHT, HEADER_HEIGHT = 24, 12, 230, 40, 36
FONTS = (
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallback.ttf",
    "Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "malgun.ttf",
)  # fmt: skip
"""Fonts that are tried in this order for letters that Pillow's own font, which is Latin, lacks."""


def open_picture(output_dir: Path, path: str) -> Image.Image | None:
    """Opens a sample of a run as RGB; None if it is missing, damaged or no sample.

    The path stands in a log that may be somebody else's. So only PNG files within the run's folder are opened: the page
    that holds them may be handed on, and Pillow starts programs for other formats.
    """
    try:
        within = (output_dir / path).resolve()
        if not within.is_relative_to(output_dir.resolve()):
            return None
        check_size(within, LARGEST_SAMPLE_BYTES)
        with Image.open(within, formats=("PNG",)) as picture:
            return picture.convert("RGB") if picture.width * picture.height <= MOST_SAMPLE_PIXELS else None
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # Pillow raises each of them for one kind of damage or another


def resize(picture: Image.Image, edge: int) -> Image.Image:
    """Returns a copy whose longer side has `edge` pixels."""
    scale = edge / max(picture.size)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    return picture.resize(size, Image.Resampling.LANCZOS)


def data_uri(picture: Image.Image, edge: int) -> str:
    """Returns a picture of at most `edge` pixels a side as text that a page can hold: small ones as is, else a JPEG."""
    if max(picture.size) <= min(edge, KEPT_EDGE):
        data = encode(picture, "png")
        if len(data) <= MOST_PNG_BYTES_PER_PIXEL * picture.width * picture.height:
            return as_uri(data, "png")
    if max(picture.size) > edge:
        picture = resize(picture, edge)
    return as_uri(encode(picture, "jpeg", quality=JPEG_QUALITY), "jpeg")


def encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    """Returns the content of a picture's file."""
    stream = io.BytesIO()
    picture.save(stream, kind, optimize=True, **options)
    return stream.getvalue()


def as_uri(data: bytes, kind: str) -> str:
    """Returns a picture's file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def edge_for(num_pictures: int, most_pixels: int, edges: Sequence[int]) -> int:
    """Returns the first of `edges` at which all pictures together stay below `most_pixels`; else the last."""
    return next((edge for edge in edges if num_pictures * edge * edge <= most_pixels), edges[-1])


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Chooses at most `most` (2 or more) items evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


# ---- before_after.png


def render_before_after(output_dir: Path, record: RunRecord) -> bytes:
    """Renders a PNG with a row for each prompt and seed: its words, the samples before and after training."""
    pairs = spread(record.pairs, MOST_ROWS)
    rows = [[open_picture(output_dir, sample.path) for sample in pair] for pair in pairs]
    tiles = [[picture and as_tile(picture) for picture in row] for row in rows]
    sizes = [tile.size for row in tiles for tile in row if tile] or [(SMALLEST_TILE, SMALLEST_TILE)]
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    columns = [MARGIN + LABEL_WIDTH + GAP, MARGIN + LABEL_WIDTH + GAP + width + GAP]
    first_row = MARGIN + TITLE_HEIGHT + HEADER_HEIGHT
    grid = Image.new(
        "RGB",
        (columns[1] + width + MARGIN, first_row + len(pairs) * (height + GAP) - GAP + MARGIN),
        "white",
    )
    pen = ImageDraw.Draw(grid)
    title = str(record.outcome or f"{output_dir.resolve().name}: {record.last_step:,} steps")
    pen.text((MARGIN, MARGIN), title[:1].upper() + title[1:], "black", font_for(title, 22) or own_font(22))
    for x, header in zip(columns, ("before", f"after {pairs[0][1].step:,} steps"), strict=True):
        pen.text((x, MARGIN + TITLE_HEIGHT + 4), header, "#444444", own_font(18))
    for number, (pair, row) in enumerate(zip(pairs, tiles, strict=True)):
        y = first_row + number * (height + GAP)
        render_label(pen, (MARGIN, y), height, pair[0], number + 1)
        for x, sample, tile in zip(columns, pair, row, strict=True):
            if tile:
                grid.paste(tile, (x, y))
                pen.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline="#d0d4da")
            else:
                render_missing(pen, (x, y, x + width - 1, y + height - 1), sample.path)
    return encode(grid, "png")


def as_tile(picture: Image.Image) -> Image.Image:
    """Enlarges a small picture until it can be seen, and reduces a large one."""
    return resize(picture, min(max(*picture.size, SMALLEST_TILE), LARGEST_TILE))


def render_label(pen: ImageDraw.ImageDraw, place: tuple[int, int], height: int, sample: Sample, number: int) -> None:
    """Renders prompt, seed and control pictures beside a row."""
    prompt, font = " ".join(sample.prompt.split()), font_for(sample.prompt, 17)
    if font is None:
        prompt, font = f"prompt {number} (its words are in report.html)", own_font(17)
    lines = wrap(prompt, font, LABEL_WIDTH - GAP, most_lines=max(height // 23 - 1, 1))
    for index, line in enumerate(lines):
        pen.text((place[0], place[1] + 23 * index), line, "black", font)
    pen.text((place[0], place[1] + 23 * len(lines) + 2), sample.detail, "#555555", own_font(14))


def render_missing(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], path: str) -> None:
    """Renders a grey field in place of a picture that cannot be read."""
    pen.rectangle(box, "#e8e8e8", "#b0b0b0")
    font = own_font(15)
    for index, line in enumerate(["no picture:", *wrap(path, font, box[2] - box[0] - 2 * GAP, most_lines=5)]):
        pen.text((box[0] + GAP, box[1] + GAP + 20 * index), line, "#555555", font)


def own_font(size: int) -> Font:
    """Returns Pillow's own font, which exists on every machine."""
    return ImageFont.load_default(size)


def font_for(text: str, size: int) -> Font | None:
    """Finds a font that has every letter of the text: Pillow's own or one of this machine; None if there is none."""
    for name in ("", *FONTS):
        try:
            font = ImageFont.truetype(name, size) if name else own_font(size)
        except OSError:
            continue
        blank = bytes(font.getmask("\U0010fffe"))
        if all(letter.isspace() or bytes(font.getmask(letter)) != blank for letter in set(text)):
            return font
    return None


def wrap(text: str, font: Font, width: int, most_lines: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels, between words or, where a word is longer, within it."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) <= most_lines:
        length = min(len(rest), width)  # no letter is narrower than a pixel
        while length > 1 and font.getlength(rest[:length]) > width:
            length -= 1
        if length < len(rest) and (space := rest.rfind(" ", 1, length + 1)) > 0:
            length = space
        lines.append(rest[:length])
        rest = rest[length:].lstrip()
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1][:-1] + "…"]
    return lines
