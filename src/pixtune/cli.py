"""Command line: `pixtune train | plan | bench | validate | caption | sample | lora | import | ...`; root scripts."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pixtune.commands.caption import caption
from pixtune.commands.failures import exit_on_user_errors, system_trouble
from pixtune.commands.import_config import import_config
from pixtune.commands.lora import app as lora_app
from pixtune.commands.queue import queue_app
from pixtune.commands.runs import ask, runs, stop
from pixtune.commands.scripts import check_family
from pixtune.commands.typed import bench, doctor, export, keys
from pixtune.commands.watch import watch
from pixtune.commands.words import (
    HELP_OPTIONS,
    TAKES_KEYS,
    Config,
    Part,
    Words,
    config_and_overrides,
    forgotten_command,
    model_parts,
)
from pixtune.config.schema import TrainConfig
from pixtune.errors import WriteError
from pixtune.inputs.printing import lines, one_line
from pixtune.ui.command import ui

app = typer.Typer(
    help="Fine-tune Qwen-Image, Qwen-Image-Edit and FLUX.1-dev on the GPU you have.\n\n"
    "Example: pixtune train train_configs/demo.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # a table of rich's cuts options at 80 columns
    context_settings=HELP_OPTIONS,
)


@app.callback()
def begin(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and exit.", is_eager=True)
    ] = False,
    debug: Annotated[  # taken out of the words before they come here, wherever it stands
        bool, typer.Option("--debug", help="Show where an error happened; may stand behind any command.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"pixtune {package_version('pixtune')}")
        raise typer.Exit


@app.command(context_settings=TAKES_KEYS)
def train(words: Words = None, config: Config = None) -> None:
    """Train a LoRA, or all weights, and write a report.

    Example: pixtune train train_configs/demo.yaml rank=16 output_dir=runs/mine
    """
    run_config(*config_and_overrides(words, config))


def run_config(
    config: Path, overrides: list[str], check: Callable[[TrainConfig], None] = lambda settings: None
) -> None:
    """Trains as a config says and prints the result in a line.

    Args:
        check: may refuse the config by raising.
    """
    from pixtune.config import load_config
    from pixtune.launch.joining import join_launched
    from pixtune.launch.launcher import find_launcher, is_orphan
    from pixtune.launch.stop import Stopped, StopRequest, stopped_code

    result = None
    with StopRequest(find_launcher()) as stop:
        try:
            if is_orphan(os.environ):
                raise Stopped
            if (peers := join_launched(os.environ)) is not None:
                stop.connect(peers)
            settings = load_config(config, overrides)
            check(settings)
            from pixtune.train import train as run_training

            result = run_training(settings, stop)
        except Stopped:
            if stop.is_first:
                typer.echo("stopped; nothing is lost: go on with resume_from_checkpoint=latest")
        except Exception as error:
            failure: Exception = error
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # typer would end without a word
                failure = WriteError(system_trouble(error))
            report = stop.one_voice(failure)
            if report is None:  # another process of the run prints it
                raise typer.Exit(1) from error
            if report is error:
                raise
            raise report from error
    if result is None or not result.finished:
        raise typer.Exit(stopped_code(os.environ))
    if result.first_loss and result.last_loss and result.took_steps:
        before, after = result.first_loss.mean, result.last_loss.mean
        few = result.few_held_out
        rough = "" if few is None else f"; {few} held-out picture{'s give' if few > 1 else ' gives'} a rough figure"
        typer.echo(f"held-out loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%){rough}")


@app.command(context_settings=TAKES_KEYS)
def plan(
    words: Words = None,
    config: Config = None,
    card: Annotated[
        str | None, typer.Option("--as", "--card", help='Another GPU to plan for, for example "RTX 4090".')
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(min=1, help="With --as: memory of each machine, in GiB; default: 64 a GPU.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="GPUs of each host, one process a GPU.")] = 1,
    hosts: Annotated[int, typer.Option(min=1, max=65536, help="Hosts with so many GPUs each.")] = 1,
    network: Annotated[
        float | None, typer.Option(min=0.1, max=1e6, help="With --hosts: network of each host, in Gbit/s.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every decision, and why.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Report whether a run fits, how long it takes and why.

    Loads no weights, trains nothing.

    Example: pixtune plan train_configs/train_lora.yaml --as "RTX 4090" --gpus 2
    """
    from pixtune.commands.plan import Machines, make_report
    from pixtune.commands.plan_page import render
    from pixtune.config import load_config

    path, overrides = config_and_overrides(words, config)
    if host_memory is not None and card is None:
        raise typer.BadParameter("--host-memory works with --as only; for this machine: host_memory_limit_gib=N")
    if network is not None and hosts == 1:
        raise typer.BadParameter("--network works with --hosts 2 or more")
    machines = Machines(gpus, hosts, network)
    report = make_report(load_config(path, overrides, folders_must_exist=False), card, host_memory, machines)
    if json_output:
        typer.echo(report.to_json())
    else:
        render(report, Console(), verbose)


@app.command(context_settings=TAKES_KEYS)
def validate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER | CONFIG KEY=VALUE",
            show_default=False,
            help="Folder of pictures with captions, or of images/ and control/; or a config, to check its folders.",
        ),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--path", metavar="FOLDER", help="The folder, as the document has it.")
    ] = None,
    config: Config = None,
    caption_type: Annotated[str, typer.Option(help="Extension of the caption files.")] = "txt",
    img_size: Annotated[int | None, typer.Option(help="Training size in pixels, to show its buckets too.")] = None,
    multiple: Annotated[int | None, typer.Option(help="Number that picture sides must be divisible by.")] = None,
    upscale: Annotated[bool, typer.Option(help="Count small pictures as enlarged: data_config.upscale.")] = False,
    control_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder of control pictures; give one for each control.")
    ] = None,
    allow_missing_controls: Annotated[bool, typer.Option(help="Accept pictures without a control.")] = False,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name, to find captions that it cuts.")] = None,
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --model: value of data_config.max_text_tokens in training.")
    ] = None,
    control_size: Annotated[
        int, typer.Option(min=16, help="With --model: value of data_config.control_size in training.")
    ] = 1024,
    trigger: Annotated[list[str] | None, typer.Option(help="Trigger word; may be given several times.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 3 where there are warnings.")] = False,
    all_names: Annotated[bool, typer.Option("--all", help="Show every name, not the first few.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Check a data set, and report what is wrong or odd.

    The exit code is 1 where training cannot start.

    Example: pixtune validate ./pictures --trigger mystyle
    """
    from pixtune.commands.validate import FolderRequest, check, finish

    request = FolderRequest(
        caption_type, img_size, multiple, upscale, tuple(control_dir or ()), allow_missing_controls, model,
        max_text_tokens, control_size, tuple(trigger or ()),
    )  # fmt: skip
    reports, listing = check(words or [], path, config, request)
    raise typer.Exit(finish(reports, listing, typer.echo, json_output, all_names, strict))


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts to sample.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="A run's output_dir, a checkpoint, or any LoRA file: diffusers, ComfyUI, kohya.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder, file or hub name; default: the one that the LoRA's run names.")
    ] = None,
    part: Part = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to sample, too; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="File of further prompts, as samples.prompts_file of a config.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Prompt that guidance leads away from.")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="Factor of the LoRA's scale; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the samples.")] = Path("samples"),
    control: Annotated[list[Path] | None, typer.Option(help="Control picture (edit models); may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the noise; may be repeated; default: 0.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of sampler steps.")] = 30,
    guidance: Annotated[
        float, typer.Option(min=1, help="Guidance scale; with classifier-free guidance, 1 turns it off.")
    ] = 4.0,
    width: Annotated[
        int | None, typer.Option(min=16, help="Width in pixels; default: the LoRA's training size, or 1024.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Height in pixels; default: likewise.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="WxH", help="Width and height in pixels, as 1328x800; may be repeated.")
    ] = None,
    weights_format: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of plain weights.")] = "bf16",
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Value of data_config.max_text_tokens in training; default: the LoRA's.")
    ] = None,
    control_size: Annotated[
        int | None,
        typer.Option(min=16, help="Value of data_config.control_size in training; default: the LoRA's, or 1024."),
    ] = None,
    quantize: Annotated[
        bool | None,
        typer.Option("--quantize/--no-quantize", help="Base weights in 8 bits; default: by the memory there is."),
    ] = None,
    gpu_memory_limit_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Limit of GPU memory in GiB, CUDA context included.")
    ] = None,
) -> None:
    """Sample pictures from a model, with or without a LoRA.

    It fits itself to the GPU there is, and reports how.

    Example: pixtune sample "red heart, twemoji style" --lora runs/demo
    """
    from pixtune.commands.sample import sample_pictures, sizes_of
    from pixtune.data.drawing import SampleRequest
    from pixtune.data.sample_prompts import AskedPrompt, at_sizes, read_prompts
    from pixtune.sampler import SamplerSettings
    from pixtune.trained.find_lora import FoundLora, find_lora

    found = FoundLora() if lora is None else find_lora(lora)
    parts = found.model_parts if model is None and not part else model_parts(part or [])
    model, side = model or found.model, found.side or 1024
    asked = [AskedPrompt(text, controls=tuple(control or ())) for text in (*(prompts or ()), *(prompt or ()))]
    asked += [] if prompts_file is None else read_prompts(prompts_file)
    if not asked or model is None:
        missing = "name the model" if asked else "name a prompt"
        raise typer.BadParameter(f'{missing}: pixtune sample "a cat" --lora runs/mine, or --model Qwen/Qwen-Image')
    request = SampleRequest(
        model=model,
        model_parts=parts,
        prompts=tuple(at_sizes(asked, negative, sizes_of(size, width, height, side))),
        lora=found.path,
        strengths=tuple(dict.fromkeys(strength or [1.0])),
        side=side,
        weights_format=weights_format,
        settings=SamplerSettings(tuple(seed or [0]), steps, guidance),
        max_text_tokens=max_text_tokens or found.max_text_tokens,
        control_size=control_size or found.control_size or 1024,
        quantize=quantize,
        gpu_memory_limit_gib=gpu_memory_limit_gib,
    )
    for path in sample_pictures(request, output, lambda line: typer.echo(lines(line), err=True)):
        typer.echo(one_line(str(path)))


app.command(context_settings=TAKES_KEYS)(caption)
app.command(name="import")(import_config)
app.command(context_settings=TAKES_KEYS)(bench)
app.add_typer(lora_app, name="lora")
for each in (runs, watch, stop, ask, keys, export, doctor, ui):
    app.command()(each)
app.add_typer(queue_app, name="queue")


def main() -> None:
    """Runs the command line; an error that a user can fix is one readable block and exit code 1, no traceback."""
    if (hint := forgotten_command(sys.argv[1:])) is not None:
        typer.echo(hint, err=True)
        raise SystemExit(2)
    exit_on_user_errors(app)


def run_script(families: Sequence[str] = (), method: str | None = None) -> None:
    """Runs a root script: `accelerate launch train.py --config FILE [key=value ...]` is `pixtune train`.

    Args:
        families: names of the only families that the script trains; empty: all.
        method: the `method` that the script trains, whatever the config says; None: the config's.
    """

    own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @own.command(context_settings=TAKES_KEYS)
    def script(words: Words = None, config: Config = None) -> None:
        path, overrides = config_and_overrides(words, config)
        demanded = [f"method={method}"] if method else []
        run_config(path, [*overrides, *demanded], lambda settings: check_family(settings, families))

    exit_on_user_errors(own)


if __name__ == "__main__":
    main()
