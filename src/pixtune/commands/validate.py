"""`pixtune validate`: checks the pictures and captions of a folder, or those that a config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console

from pixtune.commands.folders import folder_listing, stream_listing
from pixtune.commands.words import config_and_overrides, refuse_options
from pixtune.config import load_config
from pixtune.config.folders import folder_beside, folders_of
from pixtune.config.model_parts import NO_PARTS, ModelParts
from pixtune.config.schema import TrainConfig
from pixtune.data.caption_tokens import CaptionCounter
from pixtune.data.doctor.across import copies_across
from pixtune.data.examples import folders_apart
from pixtune.data.findings import Level
from pixtune.data.layouts import find_examples
from pixtune.data.masks import find_masks
from pixtune.data.report_json import to_json
from pixtune.data.report_page import terminal_width, verdict
from pixtune.data.validate import DatasetReport, Examination, mask_findings, validate_folder, validate_pairs
from pixtune.inputs.printing import lines
from pixtune.storage.model_folder import lies_here

PROBLEMS = 1
"""Exit code where training cannot start."""
ONLY_WARNINGS = 3
"""Exit code where `--strict` is given and there are warnings; 2 is that of a wrong command line."""


@dataclass(frozen=True)
class FolderRequest:
    """Settings of a folder that is named on the command line, which a config would have."""

    caption_type: str = "txt"
    img_size: int | None = None
    multiple: int | None = None
    upscale: bool = False
    control_folders: tuple[Path, ...] = ()
    allow_missing_controls: bool = False
    model: str | None = None
    max_text_tokens: int | None = None
    control_size: int = 1024
    triggers: tuple[str, ...] = ()


def check(
    words: Sequence[str], path: Path | None, config: Path | None, request: FolderRequest
) -> tuple[list[DatasetReport], str]:
    """Checks what a command line names: one folder, as its first word or `path`, or a config with its overrides.

    Returns:
        The reports, and what the folders of a config give to an epoch, for people; of a stream its first rows alone.

    Raises:
        BadParameter: it names neither, or both.
    """
    console = Console(stderr=True)
    is_config = path is None and bool(words) and words[0].endswith((".yaml", ".yml")) and not Path(words[0]).is_dir()
    if config is not None or is_config:
        if path is not None:
            raise typer.BadParameter("name a config or a folder as --path, not both")
        settings = load_config(*config_and_overrides(words, config))
        if settings.stream.window is not None:
            return [], stream_listing(settings)
        return check_config(settings, console), folder_listing(settings)
    refuse_options(words)
    folders = [Path(word) for word in words] + ([path] if path else [])
    if len(folders) != 1:
        raise typer.BadParameter("name one folder, or a config with its keys: pixtune validate ./dataset")
    if request.max_text_tokens is not None and request.model is None:
        raise typer.BadParameter("--max-text-tokens works with --model only, whose tokenizer counts the tokens")
    return [check_folder(folders[0], request, console)], ""


def check_folder(folder: Path, request: FolderRequest, console: Console) -> DatasetReport:
    """Checks one folder."""
    counter, multiple = None, request.multiple
    if request.model is not None:
        counter = _counter(request.model, NO_PARTS, request.max_text_tokens, request.control_size)
        multiple = multiple or counter.family.pixel_multiple(counter.folder)
    return validate_folder(
        folder, request.caption_type, request.img_size, multiple, request.control_folders,
        request.allow_missing_controls, request.upscale, counter, Examination(request.triggers or None, console),
    )  # fmt: skip


def check_config(config: TrainConfig, console: Console) -> list[DatasetReport]:
    """Checks the folders that a config trains on and holds out, as a run would use them.

    Its model is asked about captions where it is a folder here; nothing is fetched.
    """
    data, held_out = config.data_config, config.validation.held_out_dir
    counter = multiple = None
    if lies_here(config.pretrained_model_name_or_path, config.model_parts):
        name, parts = config.pretrained_model_name_or_path, config.model_parts
        counter = _counter(name, parts, data.max_text_tokens, data.control_size)
        multiple = counter.family.pixel_multiple(counter.folder)
    folders = [*folders_of(data), *([folder_beside(data, held_out)] if held_out is not None else [])]
    apart, triggers = folders_apart(config), tuple(config.trigger_words)
    reports = []
    for each in folders:
        found = find_examples(each, apart)
        report = validate_pairs(
            found, each.img_size, multiple, each.upscale, each.control_dirs, counter,
            Examination(triggers, console, each.captions),
        )  # fmt: skip
        of_masks = mask_findings(find_masks(found.pairs, each, apart))
        reports.append(replace(report, findings=(*report.findings, *of_masks)))
    looks = [report.looks for report in reports]
    across = copies_across(looks, []) if held_out is None else copies_across(looks[:-1], looks[-1])
    return [*reports[:-1], replace(reports[-1], findings=(*reports[-1].findings, *across))]


def finish(
    reports: Sequence[DatasetReport],
    listing: str,
    show: Callable[[str], object],
    as_json: bool,
    all_names: bool,
    strict: bool,
) -> int:
    """Prints reports and returns the exit code: 0, `PROBLEMS`, or with `strict` `ONLY_WARNINGS`."""
    if as_json:
        show(to_json(reports))
    else:
        pages = [report.render(all_names, terminal_width()) for report in reports]
        if len(reports) > 1:
            findings = [finding for report in reports for finding in report.findings]
            together = verdict(sum(report.num_pictures for report in reports), findings)
            pages = [f"{len(reports)} folders together: {together}", *pages]
        show(lines("\n\n".join([*pages, *([listing] if listing else [])])))
    if not all(report.ok for report in reports):
        return PROBLEMS
    return ONLY_WARNINGS if strict and any(report.of_level(Level.WARNING) for report in reports) else 0


def _counter(model: str, parts: ModelParts, max_text_tokens: int | None, control_size: int) -> CaptionCounter:
    from pixtune.families import family_of  # takes seconds, and a folder alone needs none
    from pixtune.families.opening import open_model

    folder = open_model(model, parts)
    return CaptionCounter(family_of(folder), folder, max_text_tokens, control_size)
