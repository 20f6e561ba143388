"""The command line: `pixtune train | validate | sample | export`, and the entry of the root scripts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pixtune.errors import PixtuneError

app = typer.Typer(
    help="Fine-tune image models on the GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Option("--config", help="YAML file; see train_configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, nested: data_config.img_dir=./pictures")]
INTERRUPTED = 130
"""Exit code of a run that was told to stop and saved itself."""


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a LoRA and write it with a report."""
    from pixtune.config import load_config

    settings = load_config(config, overrides or [])
    from pixtune.train import train as run_training

    result = run_training(settings)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if result.first_loss and result.last_loss:
        before, after = result.first_loss.mean, result.last_loss.mean
        typer.echo(f"held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%)")


@app.command()
def validate(
    path: Annotated[Path, typer.Option("--path", help="Folder of pictures and captions.")],
    caption_type: Annotated[str, typer.Option(help="Extension of the caption files.")] = "txt",
    img_size: Annotated[int | None, typer.Option(help="Also show buckets for this training size, pixels.")] = None,
) -> None:
    """Check a data set: every fault at once, exit code 1 if there is one."""
    from pixtune.data.validate import validate_folder

    report = validate_folder(path, caption_type, img_size)
    typer.echo(report.render())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="Model folder or hub name.")],
    prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    lora: Annotated[Path | None, typer.Option(help="A LoRA file of pixtune.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be given several times; default 0.")] = None,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 4.0,
    width: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    height: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    weights_format: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format.")] = "bf16",
) -> None:
    """Draw pictures from a model, with or without a LoRA."""
    from pixtune.draw import DrawRequest, draw
    from pixtune.sample import SamplerSettings

    settings = SamplerSettings(tuple(seed or [0]), steps, guidance, width, height)
    for path in draw(DrawRequest(model, tuple(prompt), lora, weights_format, settings), output):
        typer.echo(path)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder or LoRA file.")],
    output: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path("."),
) -> None:
    """Write a checkpoint's LoRA for diffusers and for ComfyUI."""
    from pixtune.export import export_checkpoint

    for path in export_checkpoint(checkpoint, output):
        typer.echo(path)


def main() -> None:
    """Runs the command line; what a user can mend is one readable block, without a traceback, and exit code 1."""
    exit_on_user_errors(app)


def exit_on_user_errors(run: Callable[[], object]) -> None:
    """Runs something with warnings shown as lines and errors of the user's as one block."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # On import it tells every user without a GPU to install a package that is of no use to training.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        run()
    except PixtuneError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


def run_script() -> None:
    """The root scripts: `accelerate launch train.py --config FILE [key=value ...]` is `pixtune train`."""
    exit_on_user_errors(lambda: typer.run(train))


if __name__ == "__main__":
    main()
