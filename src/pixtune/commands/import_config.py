"""`pixtune import`: translates a config of another trainer, and prints what has no counterpart."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtune.errors import MigrationError
from pixtune.inputs.printing import one_line

if TYPE_CHECKING:
    from pixtune.migration.reading import Source

STANDARD = "-"
"""Word for standard input or output in place of a file."""


def import_config(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Config of another trainer, a script with its command, or - for standard input."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write; -: print it; default: NAME.pixtune.yaml."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of the data set, where the config names one that is elsewhere."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name, in place of the config's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Translate a config of ai-toolkit, musubi-tuner, diffusion-pipe, sd-scripts, SimpleTuner, OneTrainer or diffusers.

    Each line says where it came from; what has no counterpart is listed. Nothing is written where a value is wrong.

    Example: pixtune import ai_toolkit_config.yaml -o train.yaml
    """
    from pixtune.migration.engine import migrate
    from pixtune.migration.peer import Options
    from pixtune.migration.peers import peer_of
    from pixtune.migration.writing import config_text, summary
    from pixtune.storage.files import write_atomically

    source = _read(file)
    peer = peer_of(source)
    if output == STANDARD:
        print(config_text(migrate(source, peer, Options(dataset), model)), end="")
        return
    target = Path(output) if output else Path(f"{_stem(file)}.pixtune.yaml")
    prompts_file = target.with_name(f"{target.stem}.prompts.jsonl")
    imported = migrate(source, peer, Options(dataset), model, str(prompts_file))
    text = config_text(imported)
    if target.is_dir():
        raise MigrationError(f"{target} is a folder: give a file as -o, for example {target / 'train.yaml'}")
    if _is_same(target, file):
        raise MigrationError(f"{target} is the config itself: give another name as -o")
    for written in (target, *([prompts_file] if imported.prompts else [])):
        if written.exists() and not force:
            raise MigrationError(f"{written} is there already: give another name as -o, or --force to replace it")
    if imported.prompts:
        rows = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in imported.prompts)
        write_atomically(prompts_file, rows.encode())
        typer.echo(one_line(f"{prompts_file}: {len(imported.prompts)} prompts with their own sizes and seeds"))
    write_atomically(target, text.encode())
    for line in summary(imported):
        typer.echo(one_line(line))
    count = len(imported.lines) + sum(len(lines) for lines in imported.folders)
    shown = one_line(str(target))
    typer.echo(f"{shown}: {count} keys from {peer.name}. Next: pixtune plan {shlex.quote(shown)}")


def _read(file: str) -> Source:
    from pixtune.migration.command_line import looks_like_commands
    from pixtune.migration.reading import LARGEST_FILE_BYTES, parse_source, read_source

    if file == STANDARD:
        text = sys.stdin.read(LARGEST_FILE_BYTES + 1)
        if len(text) > LARGEST_FILE_BYTES:
            raise MigrationError("standard input is longer than any config")
        return parse_source(text, "standard input", Path())
    if looks_like_commands(file) and not _is_there(file):
        return parse_source(file, "the command", Path())
    return read_source(Path(file))


def _is_there(file: str) -> bool:
    try:
        return Path(file).exists()
    except (OSError, ValueError):
        return False


def _is_same(target: Path, file: str) -> bool:
    return _is_there(file) and target.exists() and target.samefile(file)


def _stem(file: str) -> str:
    return "imported" if file == STANDARD or not _is_there(file) else Path(file).stem
