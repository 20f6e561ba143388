"""Lists the samples that a run's config asks for, from its keys and from a file of prompts. Needs no torch.

A file of prompts is text with one prompt a line, or JSONL with settings of each prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixtune.config.folders import largest_size
from pixtune.config.schema import TrainConfig
from pixtune.errors import DataError
from pixtune.inputs.reading import MEBIBYTE, each_once, read_bounded
from pixtune.sizes import Size

LARGEST_FILE_BYTES = MEBIBYTE
MOST_PROMPTS = 1000
"""Number of prompts that no run draws between its steps."""
LARGEST_SEED, SHORTEST_SIDE, LONGEST_SIDE = 2**63 - 1, 16, 16_384
OPTION = re.compile(r"(?<!\S)--[a-z]{1,2}\s+\S+")
"""An option as other trainers read it behind a prompt: "--w 768" is the width, "--n ugly" the negative prompt."""
KEYS = ("prompt", "negative", "seed", "width", "height", "control")


@dataclass(frozen=True)
class AskedPrompt:
    """One prompt of which samples are asked for, one for each seed."""

    text: str
    negative: str | None = None
    """Prompt that guidance leads away from; None: the model's own empty one."""
    controls: tuple[Path, ...] = ()
    size: Size | None = None
    """(width, height) in pixels; None: the last control's shape, or the default."""
    seeds: tuple[int, ...] = ()
    """Seeds of the starting noise; empty: those of the config."""


def asked_prompts(config: TrainConfig) -> list[AskedPrompt]:
    """Returns each prompt at each size: those of the keys first, then those of the file.

    Raises:
        DataError: the file cannot be used; reports every line that is wrong.
    """
    settings = config.samples
    controls = settings.controls or ((),) * len(settings.prompts)
    prompts = [AskedPrompt(text, controls=paths) for text, paths in zip(settings.prompts, controls, strict=True)]
    if settings.prompts_file is not None:
        prompts += read_prompts(settings.prompts_file)
    sizes: list[Size | None] = [(width, height) for width, height in settings.sizes]
    return at_sizes(prompts, settings.negative_prompt, sizes or [_size_of_keys(config)])


def at_sizes(
    prompts: Sequence[AskedPrompt], negative_prompt: str | None, sizes: Sequence[Size | None]
) -> list[AskedPrompt]:
    """Returns each prompt at each size, unless it has one, with a negative prompt, unless it has one."""
    return [
        replace(
            each,
            negative=negative_prompt if each.negative is None else each.negative,
            size=each.size or size,
        )
        for each in prompts
        for size in ([None] if each.size else sizes)
    ]


def default_size(config: TrainConfig) -> Size:
    """Returns the size of samples for which none is asked, and that have no control."""
    side = largest_size(config.data_config)
    return side, side


def _size_of_keys(config: TrainConfig) -> Size | None:
    settings, (width, height) = config.samples, default_size(config)
    if settings.width is None and settings.height is None:
        return None
    return settings.width or width, settings.height or height


def read_prompts(file: Path) -> list[AskedPrompt]:
    """Reads a file of prompts, JSONL where its name ends so. Empty lines and those that begin with # are left out.

    Raises:
        DataError: it cannot be read, holds no prompt or too many, or lines are wrong; names each.
    """
    try:
        text = read_bounded(file, LARGEST_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError("the file of prompts cannot be read", [f"{file}: {error.strerror or error}."]) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "the file of prompts cannot be read", [f"{file} is no UTF-8 text. Save it as UTF-8."]
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not 0 < len(lines) <= MOST_PROMPTS:
        raise DataError(
            "the file of prompts cannot be used",
            [f"{file} holds {len(lines):,} prompts; 1 to {MOST_PROMPTS:,} are possible, one a line."],
        )
    if file.suffix.lower() != ".jsonl":
        return _prompts_of_text(file, lines)
    prompts, faults = [], []
    for number, line in lines:
        found = _read_row(line, file.parent)
        if isinstance(found, AskedPrompt):
            prompts.append(found)
        else:
            faults += [f"{file}:{number}: {fault}." for fault in found]
    if faults:
        raise DataError("the file of prompts cannot be used", faults)
    return prompts


def _prompts_of_text(file: Path, lines: Sequence[tuple[int, str]]) -> list[AskedPrompt]:
    """Takes each line as a prompt; refuses options, which would be drawn as words and without effect."""
    options = [(number, option.group()) for number, line in lines if (option := OPTION.search(line))]
    if options:
        raise DataError(
            "the file of prompts cannot be used",
            [
                f"{file}:{number}: {option.strip()!r} is an option of other trainers. Here settings of a prompt stand "
                'in a file that ends in .jsonl, one object a line: {"prompt": "...", "width": 768, "height": 512}.'
                for number, option in options
            ],
        )
    return [AskedPrompt(line) for _, line in lines]


def _read_row(line: str, folder: Path) -> AskedPrompt | list[str]:
    """Returns a row's prompt, or everything that is wrong with it."""
    try:
        row = json.loads(line, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        return [f"{line[:60]!r} is no JSON ({str(error)[:80]})"]
    if not isinstance(row, dict):
        return [f"{line[:60]!r} is no JSON object; its keys are {', '.join(KEYS)}"]
    if faults := list(_faults_of(row)):
        return faults
    seeds, controls = row.get("seed", []), row.get("control", [])
    return AskedPrompt(
        row["prompt"].strip(),
        row.get("negative"),
        tuple(folder / path for path in ([controls] if isinstance(controls, str) else controls)),
        (row["width"], row["height"]) if "width" in row else None,
        tuple([seeds] if isinstance(seeds, int) else seeds),
    )


def _faults_of(row: Mapping[str, Any]) -> Iterator[str]:
    for key in row:
        if key not in KEYS:
            yield f"{key[:60]!r} is no key of a prompt; these are {', '.join(KEYS)}"
    if not _is_text(row.get("prompt")) or not row["prompt"].strip():
        yield "it has no prompt, which is a text"
    if "negative" in row and not _is_text(row["negative"]):
        yield "its negative prompt is no text"
    if ("width" in row) != ("height" in row):
        yield "it has one of width and height: give both, or none"
    for key in ("width", "height"):
        if key in row and not _is_whole(row[key], SHORTEST_SIDE, LONGEST_SIDE):
            yield f"its {key} is {row[key]!r:.40}, not a whole number from {SHORTEST_SIDE} to {LONGEST_SIDE}"
    seeds = row.get("seed", 0)
    if not all(_is_whole(seed, 0, LARGEST_SEED) for seed in (seeds if isinstance(seeds, list) else [seeds])):
        yield f"its seed is {seeds!r:.40}, not a whole number from 0, or a list of them"
    controls = row.get("control", [])
    if not all(_is_text(path) and path for path in (controls if isinstance(controls, list) else [controls])):
        yield "its control is no path, and no list of paths"


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_text(value: object) -> bool:
    """Returns whether a value is text of whole characters: JSON can hold half of one, which no encoder takes."""
    return isinstance(value, str) and not any("\ud800" <= mark <= "\udfff" for mark in value)
