"""`pixtune sample`: samples pictures from a model folder, with a saved LoRA attached as other tools would load it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, SamplesConfig
from pixtune.config.sources import show
from pixtune.data.drawing import SampleRequest, abilities_of, build_encoder, make_plans, open_task, sample_as_planned
from pixtune.data.encode import shorten
from pixtune.data.encodings import text_item
from pixtune.engine.apply import placement_of
from pixtune.errors import ConfigError
from pixtune.hardware.read import read_facts
from pixtune.sizes import Size
from pixtune.storage.files import check_writable
from pixtune.storage.loading import check_parts
from pixtune.tracking.memory import RunMemory

OPTIONS = {
    "sizes": "--size", "seeds": "--seed", "strengths": "--strength", "guidance_scale": "--guidance",
    "num_steps": "--steps",
}  # fmt: skip
"""Options of the command line, by the keys of `samples` that have their values."""


def sample_pictures(
    request: SampleRequest, output_dir: Path, say: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """Samples a picture for each strength, prompt and seed, and yields the paths of the PNG files.

    Args:
        say: called with each line of the plan, and with notes on what differs from the request.

    Raises:
        WriteError: `output_dir` cannot be written to.
        WeightsError: model or LoRA cannot be used.
        DataError: a control picture cannot be used.
        PlanError: it fits neither the GPU nor the host beside it; reports how much is missing.
        ConfigError: a number of the request is none that can be, or it demands what this GPU cannot do.
        WriteError: a picture could not be written; those before it are kept.
    """
    config = config_of(request, output_dir)
    check_writable(output_dir, "Give another folder as --output.")
    memory = RunMemory(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory.start(device)
    task = open_task(request)
    check_parts(task.folder, (*task.family.text_components, "vae", "transformer"))
    plans = make_plans(task, config, read_facts(device), abilities_of(task, device))
    for reason in (*plans.encoders.reasons, *plans.sampling.reasons):
        say(f"plan: {reason}")
    encoder = build_encoder(task, plans.encoders, placement_of(plans.sampling, device))
    prompts = [(f"the prompt {shorten(each.caption)}", text_item(each.caption, each, 0)) for each in task.examples]
    for sentence in (*task.notes, *encoder.cut_captions(prompts)):
        say(f"note: {sentence}")
    output_dir.mkdir(parents=True, exist_ok=True)
    first = _first_free(output_dir)
    for number, picture in enumerate(sample_as_planned(task, plans, device, memory.stages, Console(stderr=True))):
        ending = f"-strength{picture.strength:g}" if len(request.strengths) > 1 else ""
        path = output_dir / f"{first + number % request.num_pictures:03d}-seed{picture.seed}{ending}.png"
        picture.write(path)
        yield path


def _first_free(output_dir: Path) -> int:
    """Returns the number behind those of all pictures in a folder: samples of another prompt are not written over."""
    found = (re.match(r"([0-9]{3,9})-seed", path.name) for path in output_dir.glob("*-seed*.png"))
    return max((int(match[1]) for match in found if match), default=-1) + 1


def sizes_of(words: Sequence[str] | None, width: int | None, height: int | None, side: int) -> list[Size | None]:
    """Returns the sizes that a command's words ask for; None in the list: the prompt's own.

    Args:
        words: "1328x800": width and height in pixels.
        side: of what `width` or `height` leaves out.

    Raises:
        ConfigError: words are no size, or both ways to ask for one were taken.
    """
    sizes: list[Size | None] = []
    for word in dict.fromkeys(words or ()):
        match = re.fullmatch(r"([0-9]{1,5})[xX\u00d7]([0-9]{1,5})", word.strip(), re.ASCII)
        if match is None:
            raise ConfigError("a size cannot be read", [f"--size is {word!r}; write width and height as 1328x800."])
        sizes.append((int(match[1]), int(match[2])))
    if sizes and (width or height):
        raise ConfigError("the size is given twice", ["Give --size, or --width and --height."])
    return sizes or [(width or side, height or side) if width or height else None]


def _shown(error: ErrorDetails, request: SampleRequest) -> str:
    """Returns the value that a problem is about as it is written: of a size, all of it."""
    place = error["loc"]
    if place[0] == "sizes" and len(place) > 1:
        width, height = list(dict.fromkeys(asked.size for asked in request.prompts if asked.size))[int(place[1])]
        return f"{width}x{height}"
    return show(error["input"])


def config_of(request: SampleRequest, output_dir: Path) -> TrainConfig:
    """Expresses the request in the keys of a run, from which plans are made.

    Raises:
        ConfigError: a value is none that the key can have.
    """
    settings = request.settings
    try:
        return TrainConfig(
            pretrained_model_name_or_path=request.model,
            model_parts=request.model_parts,
            output_dir=output_dir,
            max_train_steps=1,
            data_config=DataConfig(
                img_dir=output_dir, max_text_tokens=request.max_text_tokens, control_size=request.control_size
            ),
            samples=SamplesConfig(
                prompts=tuple(asked.text for asked in request.prompts),
                seeds=settings.seeds,
                num_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                sizes=tuple(dict.fromkeys(asked.size for asked in request.prompts if asked.size)),
                strengths=request.strengths,
            ),
            mixed_precision="bf16" if request.weights_format == "bf16" else "no",
            quantize=request.quantize,
            disable_quantization=request.quantize is False,
            gpu_memory_limit_gib=request.gpu_memory_limit_gib,
        )
    except ValidationError as error:
        found = error.errors()
        # What holds a wrong item is also said to be too short: the item alone is meant.
        within = {each["loc"][:length] for each in found for length in range(1, len(each["loc"]))}
        faults = [
            f"{OPTIONS.get(str(each['loc'][0]), each['loc'][0])} is {_shown(each, request)}: "
            f"{each['msg'].removeprefix('Value error, ').replace('Input should be', 'must be')}."
            for each in found
            if each["loc"] not in within
        ]
        raise ConfigError("these pictures cannot be sampled", faults) from error
