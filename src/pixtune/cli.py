"""Command line: `pixtune train | plan | bench | validate | sample | export | doctor`, and entry of the root scripts."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pixtune.config.schema import TrainConfig
from pixtune.console import make_printing_safe
from pixtune.errors import PixtuneError, WeightsError, WriteError
from pixtune.inputs.printing import lines, one_line

app = typer.Typer(
    help="Fine-tune Qwen-Image, Qwen-Image-Edit and FLUX.1-dev on the GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Option("--config", help="YAML file, for example one of train_configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config keys as key=value; nested ones as data_config.img_dir=./pictures.")
]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a LoRA, or all weights, and write the result with a report."""
    run_config(config, overrides or [])


def run_config(
    config: Path, overrides: list[str], check: Callable[[TrainConfig], None] = lambda settings: None
) -> None:
    """Trains as a config says and prints the result in a line.

    Args:
        check: may refuse the config by raising.
    """
    from pixtune.config import load_config
    from pixtune.launch.launcher import find_launcher, is_orphan
    from pixtune.launch.stop import STOPPED, Stopped, StopRequest

    with StopRequest(find_launcher()) as stop:
        try:
            if is_orphan(os.environ):
                raise Stopped
            settings = load_config(config, overrides)
            check(settings)
            from pixtune.train import train as run_training

            result = run_training(settings, stop)
        except Stopped:
            typer.echo("stopped; nothing is lost: go on with resume_from_checkpoint=latest")
            raise typer.Exit(STOPPED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # typer would end without a word
                raise WriteError(system_trouble(error)) from error
            raise
    if not result.finished:
        raise typer.Exit(STOPPED)
    if result.first_loss and result.last_loss and result.took_steps:
        before, after = result.first_loss.mean, result.last_loss.mean
        few = result.few_held_out
        rough = "" if few is None else f"; {few} held-out picture{'s give' if few > 1 else ' gives'} a rough figure"
        typer.echo(f"held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%){rough}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, for example one of train_configs/.")],
    overrides: Overrides = None,
    card: Annotated[str | None, typer.Option("--as", help='Another GPU to plan for, for example "RTX 4090".')] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Report whether a run fits, how it would use the machine and why. Loads no weights, trains nothing."""
    from pixtune.commands.plan import make_report, render
    from pixtune.config import load_config

    report = make_report(load_config(config, overrides or [], folders_must_exist=False), card)
    if json_output:
        typer.echo(report.to_json())
    else:
        render(report, Console())


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="YAML file, for example one of train_configs/.")],
    overrides: Overrides = None,
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
    """Time training steps of a config on synthetic pictures: speed, share of the chip's peak, memory. Keeps no file."""
    from pixtune.bench.baseline import compare, load_baseline, refuse_other
    from pixtune.bench.result import render
    from pixtune.bench.steps import Request, case_as_json, measure
    from pixtune.storage.files import write_atomically

    before = None if baseline is None else load_baseline(baseline)
    request = Request(steps, resolution, text_tokens, controls)
    result = measure(
        config, overrides or [], request,
        lambda case: refuse_other(case_as_json(case), before, baseline) if before and baseline else None,
    )  # fmt: skip
    if json_output is not None:
        write_atomically(json_output, json.dumps(result, indent=1).encode())
    render(result, Console())
    if before is not None and baseline is not None:
        comparison = compare(result, before, baseline)
        typer.echo(comparison.in_words())
        raise typer.Exit(1 if comparison.is_worse else 0)


@app.command()
def validate(
    path: Annotated[Path, typer.Option("--path", help="Folder of pictures with captions, or of images/ and control/.")],
    caption_type: Annotated[str, typer.Option(help="Extension of the caption files.")] = "txt",
    img_size: Annotated[int | None, typer.Option(help="Training size in pixels, to show its buckets too.")] = None,
    multiple: Annotated[
        int | None, typer.Option(help="Number that the sides of the model's pictures must be divisible by.")
    ] = None,
    upscale: Annotated[
        bool, typer.Option(help="Count small pictures as enlarged, as data_config.upscale does.")
    ] = False,
    control_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder of control pictures; give one for each control.")
    ] = None,
    allow_missing_controls: Annotated[bool, typer.Option(help="Accept pictures without a control.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name, to find captions that its text encoders cut.")
    ] = None,
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --model: value of data_config.max_text_tokens in training.")
    ] = None,
    control_size: Annotated[
        int, typer.Option(min=16, help="With --model: value of data_config.control_size in training.")
    ] = 1024,
) -> None:
    """Check a data set and report all problems together; exit code 1 if there is one."""
    from pixtune.data.caption_tokens import CaptionCounter
    from pixtune.data.validate import validate_folder

    counter = None
    if model is not None:
        from pixtune.families import family_of
        from pixtune.storage.model_folder import open_model_folder

        folder = open_model_folder(model)
        counter = CaptionCounter(family_of(folder), folder, max_text_tokens, control_size)
        multiple = multiple or counter.family.pixel_multiple(folder)
    elif max_text_tokens is not None:
        raise typer.BadParameter("--max-text-tokens works with --model only, whose tokenizer counts the tokens")
    report = validate_folder(
        path, caption_type, img_size, multiple, control_dir or (), allow_missing_controls, upscale, counter=counter
    )
    typer.echo(lines(report.render()))
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="Model folder or hub name.")],
    prompt: Annotated[list[str], typer.Option(help="Prompt to sample; may be given several times.")],
    output: Annotated[Path, typer.Option(help="Folder for the samples.")] = Path("samples"),
    lora: Annotated[Path | None, typer.Option(help="LoRA file in diffusers' format, of pixtune or others.")] = None,
    control: Annotated[
        list[Path] | None, typer.Option(help="Control picture (edit models); may be given several times.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of the noise; may be given several times; default: 0.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of sampler steps.")] = 30,
    guidance: Annotated[
        float, typer.Option(min=1, help="Guidance scale; with classifier-free guidance, 1 turns it off.")
    ] = 4.0,
    width: Annotated[int | None, typer.Option(min=16, help="Width in pixels; default: 1024 or the control's.")] = None,
    height: Annotated[
        int | None, typer.Option(min=16, help="Height in pixels; default: 1024 or the control's.")
    ] = None,
    weights_format: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of plain weights.")] = "bf16",
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Value of data_config.max_text_tokens in training.")
    ] = None,
    control_size: Annotated[int, typer.Option(min=16, help="Value of data_config.control_size in training.")] = 1024,
    quantize: Annotated[
        bool | None,
        typer.Option("--quantize/--no-quantize", help="Base weights in 8 bits; default: by the memory there is."),
    ] = None,
    gpu_memory_limit_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Limit of GPU memory in GiB, CUDA context included.")
    ] = None,
) -> None:
    """Sample pictures from a model, with or without a LoRA, on the GPU there is; reports how it fits."""
    from pixtune.commands.sample import SampleRequest, sample_pictures
    from pixtune.sampler import SamplerSettings

    request = SampleRequest(
        model=model,
        prompts=tuple(prompt),
        controls=tuple(control or ()),
        lora=lora,
        weights_format=weights_format,
        settings=SamplerSettings(tuple(seed or [0]), steps, guidance),
        size=(width or 1024, height or 1024) if width or height else None,
        max_text_tokens=max_text_tokens,
        control_size=control_size,
        quantize=quantize,
        gpu_memory_limit_gib=gpu_memory_limit_gib,
    )
    for path in sample_pictures(request, output, lambda line: typer.echo(lines(line), err=True)):
        typer.echo(one_line(str(path)))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or LoRA file.")],
    output: Annotated[Path, typer.Option(help="Folder for the written files.")] = Path("."),
) -> None:
    """Write a checkpoint's LoRA for diffusers and for ComfyUI, or its whole model where all weights were trained."""
    from pixtune.storage.files import check_writable
    from pixtune.trained.export import export_checkpoint

    check_writable(output, "Give another folder as --output.")
    for path in export_checkpoint(checkpoint, output):
        typer.echo(one_line(str(path)))


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs and bug reports.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name to check instead: plain, in 8 bits, against diffusers.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures of --model.")] = None,
) -> None:
    """Report your hardware and what to fix; exit code 1 if training is impossible. Trains nothing."""
    from pixtune.commands.doctor import examine, examine_model, render, render_model

    if model is not None:
        check = examine_model(model)
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


def main() -> None:
    """Runs the command line; an error that a user can fix is one readable block and exit code 1, no traceback."""
    exit_on_user_errors(app)


def exit_on_user_errors(run: Callable[[], object]) -> None:
    """Runs something; warnings are printed as lines and errors of users, disks and connections as one block."""
    make_printing_safe()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(make_fit)
    # On import it tells every user without a GPU to install a package that is of no use to training.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        run()
    except (PixtuneError, OSError) as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        print(error if isinstance(error, PixtuneError) else system_trouble(error), file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        gc.freeze()  # else Python looks through a million objects of the libraries before it ends, for some seconds


def system_trouble(error: OSError) -> str:
    """Describes an error of the system that no other place has expected."""
    return (
        f"{' '.join(str(error).split()) or type(error).__name__}. The system reports this, of a disk, a connection or "
        "a permission. Checkpoints that were saved before are kept: mend it, and resume with "
        "resume_from_checkpoint=latest."
    )


def make_fit(record: logging.LogRecord) -> bool:
    """Makes a log record's text fit for a terminal, and lets it pass."""
    record.msg, record.args = lines(record.getMessage()), None
    return True


def run_script(families: Sequence[str] = (), method: str | None = None) -> None:
    """Runs a root script: `accelerate launch train.py --config FILE [key=value ...]` is `pixtune train`.

    Args:
        families: names of the only families that the script trains; empty: all.
        method: the `method` that the script trains, whatever the config says; None: the config's.
    """

    def script(config: Config, overrides: Overrides = None) -> None:
        words = [*(overrides or []), *([f"method={method}"] if method else [])]
        run_config(config, words, lambda settings: check_family(settings, families))

    exit_on_user_errors(lambda: typer.run(script))


def check_family(settings: TrainConfig, families: Sequence[str]) -> None:
    """Refuses a model of another family than a script is for.

    Raises:
        WeightsError: names the model's family and the script that trains it.
    """
    from pixtune.families import family_of
    from pixtune.storage.model_folder import open_model_folder

    folder = open_model_folder(settings.pretrained_model_name_or_path)
    family = family_of(folder)
    if families and family.name not in families:
        raise WeightsError(
            f"{settings.pretrained_model_name_or_path} is a {folder.pipeline_class} (family {family.name}), and this "
            f"script trains {', '.join(families)}. Use {family.script} with the same config, or `pixtune train`, "
            "which takes every family."
        )


if __name__ == "__main__":
    main()
