"""The words of `pixtune bench`, `keys`, `export` and `doctor`. The work is imported when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pixtune.commands.words import Config, Part, Words, config_and_overrides, model_parts
from pixtune.config.lora_files import LoraFormat
from pixtune.inputs.printing import one_line


def bench(
    words: Words = None,
    config: Config = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps to time, after a few that warm up.")] = 20,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Side of the pictures in pixels; default: data_config.img_size.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per caption; default: data_config.max_text_tokens, or 256 words.")
    ] = None,
    controls: Annotated[
        int | None, typer.Option(min=0, help="Control pictures per example (edit models); default: the config's.")
    ] = None,
    json_output: Annotated[
        Path | None, typer.Option("--json", help="File for the figures, besides printing them.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Earlier file of --json: exit code 1 if steps are 5% slower or 2% larger.")
    ] = None,
) -> None:
    """Time training steps on synthetic pictures.

    Reports speed, share of the chip's peak and memory. Keeps no file.

    Example: pixtune bench train_configs/demo.yaml --steps 10
    """
    from pixtune.bench.baseline import compare, load_baseline, refuse_other
    from pixtune.bench.result import render
    from pixtune.bench.steps import Request, case_as_json, measure
    from pixtune.storage.files import write_atomically

    before = None if baseline is None else load_baseline(baseline)
    request = Request(steps, resolution, text_tokens, controls)
    result = measure(
        *config_and_overrides(words, config), request,
        lambda case: refuse_other(case_as_json(case), before, baseline) if before and baseline else None,
    )  # fmt: skip
    if json_output is not None:
        write_atomically(json_output, json.dumps(result, indent=1).encode())
    render(result, Console())
    if before is not None and baseline is not None:
        comparison = compare(result, before, baseline)
        typer.echo(comparison.in_words())
        raise typer.Exit(1 if comparison.is_worse else 0)


def keys(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Parts of a key's name or description, or its name elsewhere."),
    ] = None,
) -> None:
    """List the keys of a config, or those that a word means.

    Words are parts of names or descriptions, or names in other trainers.

    Example: pixtune keys network_dim
    """
    from pixtune.commands.keys import list_keys

    if not list_keys(words or [], typer.echo):
        raise typer.Exit(1)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or LoRA file.")],
    output: Annotated[Path, typer.Option(help="Folder for the written files.")] = Path("."),
    format: Annotated[
        list[LoraFormat] | None, typer.Option(help="Format of a LoRA's file; may be repeated. Absent: the run's own.")
    ] = None,
) -> None:
    """Write the files of a checkpoint for other programs.

    A LoRA for diffusers, ComfyUI or kohya's trainers, or the whole model where all weights were trained.

    Example: pixtune export runs/demo/checkpoint-000500 --output exported
    """
    from pixtune.storage.files import check_writable
    from pixtune.trained.export import export_checkpoint

    check_writable(output, "Give another folder as --output.")
    for path in export_checkpoint(checkpoint, output, tuple(format or ())):
        typer.echo(one_line(str(path)))


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs and bug reports.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder, file or hub name to check instead: plain, in 8 bits, against diffusers."),
    ] = None,
    part: Part = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures of --model.")] = None,
) -> None:
    """Report your hardware and what to fix. Trains nothing.

    The exit code is 1 if training is impossible.

    Example: pixtune doctor --json
    """
    from pixtune.commands.doctor import examine, examine_model, render, render_model

    if model is not None:
        check = examine_model(model, model_parts(part or []))
        if output is not None:
            check.write(output)
        if json_output:
            typer.echo(check.to_json())
        else:
            render_model(check, Console())
        raise typer.Exit(1 if check.faults else 0)
    if output is not None:
        raise typer.BadParameter("--output works with --model only; use --json for a report of the machine")
    examination = examine()
    if json_output:
        typer.echo(examination.to_json())
    else:
        render(examination, Console())
    raise typer.Exit(0 if examination.can_train else 1)
