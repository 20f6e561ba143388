"""Measures one phase of a full-size model in this process alone; `phases.py` starts it.

    python benchmarks/phase_worker.py caching --model FOLDER --scratch FOLDER --limit-gib 23.3 --json FILE

Caching runs what `pixtune train` runs before its plan is made, sampling what `pixtune sample` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.bench.synthetic import write_pictures
from pixtune.commands import sample
from pixtune.commands.failures import exit_on_user_errors
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.data import drawing as apart
from pixtune.data import prepare
from pixtune.data.encode import Encoder
from pixtune.data.prepare import prepare_data
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.engine.load import LoadedTransformer
from pixtune.families import family_of
from pixtune.hardware.capping import outside_allocator_bytes, read_before_cuda
from pixtune.hardware.facts import GIB
from pixtune.hardware.monitor import StageLog
from pixtune.hardware.nvidia_smi import own_gpu
from pixtune.hardware.read import read_facts
from pixtune.launch.accelerator import start_accelerator
from pixtune.plan.encoders import count_caption_tokens
from pixtune.plan.passes import needs_negative
from pixtune.plan.phases import Phase, encoding_phases
from pixtune.planning import encoder_sizes
from pixtune.sampler import PromptSampler, SamplerSettings
from pixtune.storage.files import write_atomically
from pixtune.storage.model_folder import open_model_folder
from pixtune.tracking.memory import RunMemory

Opening = Callable[[Encoder], Callable[[Any], Any]]
NUM_PICTURES = 12
"""Three batches of the config's default, the first of which warms up."""
CAPTION = " ".join(["a"] * 470)
"""Caption that has, with template and number, about the 512 tokens that plans assume, whichever tokenizer serves."""
GUIDANCE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=MEASURES)
    parser.add_argument("--model", type=Path, required=True, help="folder with all weights that the phase needs")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for what the phase writes")
    parser.add_argument("--hashes", type=Path, help="folder that remembers the weights' hashes from run to run")
    parser.add_argument("--limit-gib", type=float, help="limit of the process's GPU memory")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps")
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    arguments = parser.parse_args()
    before = read_before_cuda(own_gpu(os.environ)) if torch.version.cuda else None
    result = MEASURES[arguments.phase](arguments)
    outside_gib = None if before is None else round(outside_allocator_bytes(before) / GIB, 3)
    result |= {
        "outside_allocator_gib": outside_gib,
        "process_peak_gib": process_peak_gib(result["stages"], outside_gib),
    }
    write_atomically(arguments.json, json.dumps({**result, **describe()}, indent=1).encode())


def process_peak_gib(stages: Sequence[Result], outside_gib: float | None) -> float | None:
    """Returns the peak of the process with its CUDA context, as the driver counts; None where it is not known."""
    peak = max(stage["peak_reserved_gib"] for stage in stages)
    return None if outside_gib is None else round(peak + outside_gib, 3)


# ---- caching


def measure_caching(arguments: argparse.Namespace) -> Result:
    """Measures encoding captions and pictures into an empty cache, each encoder loaded and removed."""
    data = write_pictures(arguments.scratch / "data", arguments.size, NUM_PICTURES, num_controls=0, num_words=1)
    for number in range(NUM_PICTURES):
        (data.images / f"{number}.txt").write_text(f"{number} {CAPTION}")
    config = TrainConfig(
        pretrained_model_name_or_path=str(arguments.model),
        output_dir=arguments.scratch / "run",
        max_train_steps=1,
        gpu_memory_limit_gib=arguments.limit_gib,
        data_config=DataConfig(
            img_dir=data.images, img_size=arguments.size, cache_dir=prepare_cache(arguments.scratch, arguments.hashes)
        ),
    )
    captions, pictures = Encodes(), Encodes()
    for opening, encodes in (("open_text_encoder", captions), ("open_autoencoder", pictures)):
        setattr(Encoder, opening, watched(getattr(Encoder, opening), encodes))

    prepare.check_parts = lambda *_: None  # type: ignore[attr-defined]  # the folder has no transformer
    memory = RunMemory(config)
    accelerator = start_accelerator(config)
    memory.start(accelerator.device)
    folder = open_model_folder(config.pretrained_model_name_or_path)
    family = family_of(folder)
    prepared = prepare_data(config, family, folder, accelerator, memory.stages)
    sizes = encoder_sizes(config, family, folder, count_caption_tokens(len(CAPTION) + 3, 0), arguments.size**2)
    phases = encoding_phases(sizes, prepared.encoders)
    return {
        "phase": "caching",
        "encoders": prepared.encoders.to_dict(),
        "stages": with_plans(memory.stages, {"text encoding": phases[0], "image encoding": phases[1]}),
        "captions": captions.rates(),
        "pictures": pictures.rates(),
    }


def prepare_cache(scratch: Path, hashes: Path | None) -> Path:
    """Makes an empty cache folder that shares the weights' hashes: hashing 16 GB is no part of encoding."""
    cache = scratch / "cache"
    cache.mkdir(parents=True)
    if hashes is not None:
        hashes.mkdir(parents=True, exist_ok=True)
        (cache / "weights").symlink_to(hashes.resolve())
    return cache


@dataclass
class Encodes:
    """Times of an encoder."""

    load_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Seconds of each caption or picture."""

    def rates(self) -> Result:
        """Returns how many are encoded a second. The first one warms up, unless it is the only one."""
        warm = self.seconds[1:] or self.seconds
        return {"load_seconds": round(self.load_seconds, 2), "per_second": round(len(warm) / sum(warm), 3)}


def watched(open_encoder: Opening, encodes: Encodes) -> Opening:
    """Wraps an encoder so that it is timed."""

    def open_watched(encoder: Encoder) -> Callable[[Any], Any]:
        began = now()
        encode = open_encoder(encoder)
        encodes.load_seconds += now() - began

        def encode_watched(one: Any) -> Any:
            began = now()
            encoded = encode(one)
            encodes.seconds.append(now() - began)
            return encoded

        return encode_watched

    return open_watched


# ---- sampling


def measure_sampling(arguments: argparse.Namespace) -> Result:
    """Measures sampling one picture from its prompt."""
    output_dir = arguments.scratch / "samples"
    output_dir.mkdir(parents=True)
    request = apart.SampleRequest(
        model=str(arguments.model),
        prompts=(AskedPrompt(CAPTION, size=(arguments.size, arguments.size)),),
        lora=None,
        weights_format="bf16",
        settings=SamplerSettings((0,), arguments.steps, GUIDANCE),
        max_text_tokens=None,
        control_size=arguments.size,
        gpu_memory_limit_gib=arguments.limit_gib,
    )
    config = sample.config_of(request, output_dir)
    memory = RunMemory(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory.start(device)
    task = apart.open_task(request)
    passes_per_step = 2 if needs_negative(task.family, GUIDANCE) else 1
    plans = apart.make_plans(task, config, read_facts(device), apart.abilities_of(task, device))
    moments = watch_steps()
    for number, picture in enumerate(apart.sample_as_planned(task, plans, device, memory.stages)):
        picture.image.save(output_dir / f"{number}.png")
    sizes = encoder_sizes(config, task.family, task.folder, count_caption_tokens(len(CAPTION), 0), 0)
    drawing = Phase("pictures drawn", ", ".join(plans.sampling.reasons), plans.sampling.expected_peak_bytes)
    planned = {apart.ENCODING: encoding_phases(sizes, plans.encoders)[0]}
    planned |= dict.fromkeys((apart.LOADING, apart.SAMPLING, apart.DECODING), drawing)
    return {
        "phase": "sampling",
        "encoders": plans.encoders.to_dict(),
        "drawing": {**asdict(plans.sampling), "reasons": list(plans.sampling.reasons)},
        "stages": with_plans(memory.stages, planned),
        "seconds_per_step": statistics.median(seconds_of_steps(moments)),
        "passes_per_step": passes_per_step,
    }


def watch_steps() -> list[float]:
    """Returns a list that gets the moments at which sampling begins and at which each of its steps ends."""
    moments: list[float] = []
    latents = PromptSampler.latents

    def watched_latents(
        sampler: PromptSampler, transformer: LoadedTransformer, on_step: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        def after_step() -> None:
            moments.append(now())
            on_step()

        moments.append(now())
        yield from latents(sampler, transformer, after_step)

    setattr(PromptSampler, "latents", watched_latents)  # noqa: B010
    return moments


def seconds_of_steps(moments: Sequence[float]) -> list[float]:
    """Returns the seconds of each step; the first one, which warms up, only where it is alone."""
    seconds = [after - before for before, after in pairwise(moments)]
    return seconds[1:] or seconds


# ---- both


def with_plans(stages: StageLog, planned: dict[str, Phase]) -> list[Result]:
    """Returns the log's rows with what was planned for each; nothing is planned without a GPU."""
    rows = []
    for row in stages.rows():
        phase = planned[row["stage"]]
        planned_gib = round(phase.device_bytes / GIB, 3) if torch.cuda.is_available() else None
        rows.append({**row, "holds": phase.holds, "planned_gib": planned_gib})
    return rows


def now() -> float:
    """Reads the clock after the GPU has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


MEASURES = {"caching": measure_caching, "sampling": measure_sampling}

if __name__ == "__main__":
    exit_on_user_errors(main)
