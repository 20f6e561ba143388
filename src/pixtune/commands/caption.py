"""`pixtune caption`: writes captions beside pictures, by the text encoder of the model that is trained on them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from pixtune.captioning.presets import EDIT, PLAIN, PRESETS, question_of
from pixtune.commands.words import config_and_overrides, refuse_options
from pixtune.config.folders import Folder, folder_beside, folders_of
from pixtune.config.load import load_config
from pixtune.config.model_parts import NO_PARTS
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.errors import ConfigError
from pixtune.family import PICTURE_TOKENS
from pixtune.inputs.printing import lines, one_line

if TYPE_CHECKING:
    from pixtune.captioning.job import Job

MAX_WORDS, MAX_TOKENS = 60, 256


@dataclass(frozen=True)
class Source:
    """The pictures, and the config with their model and the keys on memory; made from a folder where there is none."""

    config: TrainConfig
    folders: tuple[Folder, ...]
    apart: tuple[Path, ...] = ()
    """Folders that have a purpose of their own."""

    @property
    def has_controls(self) -> bool:
        return any(folder.control_dirs for folder in self.folders)


def caption(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER | CONFIG KEY=VALUE",
            show_default=False,
            help="Folder of pictures (with --model or --captioner), or a run's YAML file with keys for this time.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The config file, where it is not the first word.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose text encoder writes; default: the one that the config names.")
    ] = None,
    captioner: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Local Qwen2.5-VL or Qwen3-VL to write instead.")
    ] = None,
    preset: Annotated[
        Literal["plain", "style", "person", "object", "edit"] | None,
        typer.Option(
            help="What is to be learnt; edit: what changes from the control to the picture. Default: edit where "
            "there are controls, else plain.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Question of your own about each picture.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Word to put in front of each caption.")] = None,
    max_words: Annotated[
        int | None, typer.Option(min=1, help=f"Words of a caption at most; default: {MAX_WORDS}; with --prompt none.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of an answer at most.")] = MAX_TOKENS,
    extension: Annotated[
        str | None, typer.Option(help="Extension of the caption files; default: the config's, or txt.")
    ] = None,
    control_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder of control pictures; give one for each control.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Picture to caption; may be given several times.")
    ] = None,
    only_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with names of pictures to caption, one a line.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace captions that this command wrote, unless edited since.")
    ] = False,
    overwrite_edited: Annotated[
        bool, typer.Option("--overwrite-edited", help="Replace captions by hand, too. They are lost.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Spread among likely words; 0: always the likeliest.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws, with --temperature.")] = 0,
    picture_tokens: Annotated[
        int, typer.Option(min=16, max=16384, help="Tokens of a picture at most; fewer: less memory and detail.")
    ] = PICTURE_TOKENS,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at once at most; default: by memory.")] = None,
    weights_format: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Number format of plain weights; default: the config's.")
    ] = None,
    quantize: Annotated[
        bool | None,
        typer.Option("--quantize/--no-quantize", help="Captioner in 8 or 4 bits; default: by the memory there is."),
    ] = None,
    gpu_memory_limit_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Limit of GPU memory in GiB, CUDA context included.")
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="K/N", help="Caption the K-th of N shares of the pictures, where N jobs on N machines divide them."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done. Loads no weights.")] = False,
) -> None:
    """Write captions for pictures, by the model's own text encoder.

    Captions that are there are kept. Downloads nothing, trains nothing; what was killed goes on with the same command.
    The exit code is 1 if a picture got no caption. For example:

    \b
    pixtune caption ./pictures --model ./Qwen-Image --preset style
    pixtune caption my_run.yaml --trigger "zwx person" --preset person
    torchrun --nproc-per-node 8 -m pixtune.cli caption ./pictures --model ./Qwen-Image

    Processes that a launcher has started divide the pictures among their GPUs.
    """
    of_shares = read_share(share)
    source = find_source(words, config, model, captioner, extension, tuple(control_dir or ()))
    shows_controls, question = the_question(preset, prompt, max_words, source.has_controls)
    if (trigger := None if trigger is None else " ".join(trigger.split())) == "":
        raise typer.BadParameter("--trigger is empty")
    changes = {
        "mixed_precision": {None: source.config.mixed_precision, "bf16": "bf16", "fp32": "no"}[weights_format],
        "gpu_memory_limit_gib": gpu_memory_limit_gib or source.config.gpu_memory_limit_gib,
        "quantize": quantize,  # the config's own is of the transformer
        "disable_quantization": source.config.disable_quantization if quantize is None else not quantize,
    }

    from pixtune.captioning.describe import Wish
    from pixtune.captioning.job import Places, names_in, open_job
    from pixtune.families.captioners import captioner_of, open_captioner
    from pixtune.families.opening import open_model

    names = (*(only or ()), *(names_in(only_from) if only_from is not None else ()))
    most_words = max_words or (MAX_WORDS if prompt is None else None)
    job = open_job(
        Places(
            source.folders,
            shows_controls,
            source.apart,
            None if only is None and only_from is None else names,
            "all" if overwrite_edited else "own" if overwrite else "nothing",
            of_shares,
        ),
        Wish(question, most_words, max_tokens, trigger, temperature, seed if temperature else 0, picture_tokens),
        open_captioner(captioner, picture_tokens)
        if captioner is not None
        else captioner_of(
            open_model(source.config.pretrained_model_name_or_path, source.config.model_parts), picture_tokens
        ),
    )
    try:
        num_problems = carry_out(job, source.config.model_copy(update=changes), batch_size, dry_run)
    except KeyboardInterrupt:
        typer.echo("stopped; the captions so far are written, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(1 if num_problems else 0)


def carry_out(job: Job, memory: TrainConfig, at_once: int | None, dry_run: bool) -> int:
    """Plans, writes and prints, and returns the number of pictures that got no caption.

    Args:
        memory: the keys on memory and number format.
        at_once: pictures at once, at most; None: as many as fit.
        dry_run: only prints what would be done.

    Raises:
        PlanError, WeightsError, WriteError: see `write_captions`.
    """
    from pixtune.captioning.choosing import Choice
    from pixtune.captioning.job import check_same_job, make_plan, placement_for, write_captions
    from pixtune.hardware.read import read_facts
    from pixtune.launch.accelerator import join_crew
    from pixtune.tracking.memory import RunMemory

    run_memory = RunMemory(memory)
    device, crew = join_crew()

    def report(line: str) -> None:
        if crew.is_first:
            typer.echo(lines(line), err=True)

    check_same_job(job, crew)
    run_memory.start(device)
    for note in job.notes:
        report(f"note: {note}")
    plan = make_plan(job, memory, read_facts(device), at_once) if job.asked else None
    for reason in plan.reasons if plan else ():
        report(f"plan: {reason}")
    for chosen in job.chosen if dry_run and crew.is_first else ():
        if chosen.choice is not Choice.KEPT:  # those are counted: of a thousand, the two that lack one are looked for
            typer.echo(one_line(f"{chosen.picture.shown}: {chosen.choice.value}"))
    problems = [each.problem for each in job.failed] if crew.is_first else []
    num_written = num_cut = 0
    if plan and not dry_run:
        console = Console(stderr=True, quiet=not crew.is_first)
        for outcome in write_captions(job, plan, placement_for(memory, device), console, crew):
            if outcome.caption is None:
                problems.append(outcome.problem)
                continue
            num_written, num_cut = num_written + 1, num_cut + outcome.caption.cut
            typer.echo(one_line(f"{outcome.picture.shown}: {outcome.caption.text}"))
    found = crew.gather("writing captions", [num_written, num_cut, problems])
    num_written, num_cut = sum(each[0] for each in found), sum(each[1] for each in found)
    problems = [problem for each in found for problem in each[2]]
    for problem in problems:
        report(f"problem: {problem}")
    if num_cut:
        report(f"note: captions that were longer than allowed and are cut: {num_cut} (--max-words, --max-tokens)")
    done = f"captions to write: {len(job.asked)}" if dry_run else f"captions written: {num_written}"
    report(f"{done}; kept: {len(job.kept)}; pictures without: {len(problems)}")
    return len(problems)


def read_share(text: str | None) -> tuple[int, int]:
    """Reads --share: the number of a share, 0 for the first, and of all shares.

    Raises:
        BadParameter: it is no such pair of numbers.
    """
    if text is None:
        return 0, 1
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise typer.BadParameter(f"--share is {text!r}; it must be like 1/8, the first of eight shares, up to 8/8")
    return int(number) - 1, int(of)


def the_question(preset: str | None, prompt: str | None, max_words: int | None, has_controls: bool) -> tuple[bool, str]:
    """Returns whether the question shows the controls, and the question.

    Raises:
        ConfigError: preset and prompt contradict each other, controls are missing, or the prompt holds marks of the
            model.
    """
    if prompt is None:
        preset = preset or (EDIT if has_controls else PLAIN)
        if preset == EDIT and not has_controls:
            raise ConfigError(
                "there is nothing to compare",
                [
                    "--preset edit describes what changes from a control picture to the picture, and there are no "
                    "controls. Name their folder: --control-dir FOLDER, or data_config.control_dir."
                ],
            )
        return preset == EDIT, question_of(preset, max_words or MAX_WORDS)
    faults = []
    if preset not in (None, EDIT):
        faults.append(f"--preset {preset} and --prompt are both a question: give one ({', '.join(PRESETS)}).")
    if preset == EDIT and not has_controls:
        faults.append("--preset edit shows control pictures beside the prompt, and there are none: --control-dir.")
    if not prompt.strip():
        faults.append("--prompt is empty.")
    if "<|" in prompt:
        faults.append(f"--prompt holds {prompt[prompt.index('<|') :][:20]!r}, a mark of the model's own. Leave it out.")
    if faults:
        raise ConfigError("this cannot be asked", faults)
    return preset == EDIT, prompt.strip()


def find_source(
    words: Sequence[str] | None,
    config: Path | None,
    model: str | None,
    captioner: Path | None,
    extension: str | None,
    control_folders: tuple[Path, ...],
) -> Source:
    """Finds pictures and model: those of a config, or a folder with --model or --captioner.

    Raises:
        BadParameter: neither is named.
        ConfigError: the config is wrong, or has its captions in a file.
    """
    folders = [Path(word) for word in words or () if Path(word).is_dir()]
    if config is None and folders:
        refuse_options(words or ())
        if len(words or ()) > 1:
            raise typer.BadParameter(f"name one folder, without keys; there are {' '.join(words or ())}")
        if model is None and captioner is None:
            raise typer.BadParameter(
                f"name the model: pixtune caption {shlex.quote(str(folders[0]))} --model FOLDER, or --captioner FOLDER"
            )
        from pixtune.data.validate import find_layout

        folder, control_folders = find_layout(folders[0], control_folders)
        minimal = TrainConfig(
            pretrained_model_name_or_path=model or str(captioner),
            output_dir=folder,
            max_train_steps=1,
            data_config=DataConfig(img_dir=folder, control_dir=control_folders or None),
        )
        return Source(minimal, with_extension(folders_of(minimal.data_config), extension), control_folders)
    path, overrides = config_and_overrides(words, config)
    if not path.exists() and config is None:
        raise typer.BadParameter(f"there is no folder of pictures and no config file {path}")
    settings = load_config(path, overrides)
    own = folders_of(settings.data_config)
    elsewhere = [
        f"{each.place} has its captions from {why}, and this command writes text files beside pictures. Caption the "
        f"folder itself, pixtune caption {shlex.quote(str(each.img_dir))} --model "
        f"{shlex.quote(settings.pretrained_model_name_or_path)}, and train without that key."
        for each in own
        if (why := source_of_captions(each)) is not None
    ]
    if elsewhere:
        raise ConfigError("captions go to text files", elsewhere)
    if control_folders:
        own = tuple(replace(each, control_dirs=control_folders) for each in own)
    if (held_out := settings.validation.held_out_dir) is not None:
        own = (*own, replace(folder_beside(settings.data_config, held_out), label=f"{held_out.name}/"))
    if model is not None:
        settings = settings.model_copy(update={"pretrained_model_name_or_path": model, "model_parts": NO_PARTS})

    from pixtune.data.examples import folders_apart

    return Source(settings, with_extension(own, extension), (*folders_apart(settings), *control_folders))


def source_of_captions(folder: Folder) -> str | None:
    """Returns where a folder's captions come from in training, unless it is text files."""
    if folder.dataset is not None:
        return f"the data set {folder.dataset.name}"
    if folder.metadata_file is not None:
        return f"metadata_file ({folder.metadata_file})"
    if folder.captions.text is not None:
        return "caption_text"
    return None if folder.captions.source != "file_name" else "caption_source: file_name"


def with_extension(folders: Sequence[Folder], extension: str | None) -> tuple[Folder, ...]:
    """Returns the folders with caption files of another extension; None: their own."""
    if extension is None:
        return tuple(folders)
    return tuple(replace(each, captions=replace(each.captions, extension=extension)) for each in folders)
