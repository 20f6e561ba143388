"""Measures a sampler's steps at full size with random weights: python benchmarks/drawing.py --model qwen-image ...

    python benchmarks/drawing.py --model qwen-image --limit 23.3 --json result.json

Plans as `pixtune sample` does, and samples one picture three times: plainly, as the transformer was loaded, then with
compiled blocks in the planned way, then in the other way of guidance's two passes (one batch or two). Text features are
random, so no encoder is loaded, and nothing is decoded: peaks are those of passes. Prints JSON, in which `psnr_db`
compares latents with those of the plain passes, relative to their range. What a capture failed of stands under `log`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from architectures import ARCHITECTURES, write_model_folder
from torch import Tensor
from torch._dynamo.utils import counters

from pixtune import randomness
from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.commands.failures import exit_on_user_errors
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.engine.apply import blocks_of, load_planned, placement_of
from pixtune.engine.capture import PLAIN_CALLS, Capture, GraphCapturer, Replay
from pixtune.engine.compile import compile_blocks, compile_obstacle
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.padded_attention import padding_obstacle
from pixtune.families import family_of
from pixtune.family import ModelFamily
from pixtune.hardware.facts import GIB
from pixtune.hardware.read import read_facts
from pixtune.plan.footprint import read_footprint
from pixtune.plan.passes import PLAIN_PASSES, Abilities, PassPlan, needs_negative
from pixtune.plan.sampling import SampleSizes, SamplingPlan, plan_sampling
from pixtune.sampler import EncodedPrompt, PromptSampler, SamplerSettings
from pixtune.storage.files import write_atomically
from pixtune.storage.model_folder import ModelFolder
from pixtune.tracking.memory import RunMemory

GUIDANCE = 4.0
EMPTY_PROMPT_TOKENS = 6
"""Tokens of the empty prompt in its template, about."""
LINES_OF_A_FAILURE = 12
KERNELS = 15
"""Number of kernels that are listed."""


@dataclass(frozen=True)
class Settings:
    """A case to measure."""

    model: str = "qwen-image"
    limit_gib: float | None = None
    quantize: bool | None = None
    size: int = 1024
    steps: int = 12
    seconds: float = 55.0
    """Seconds after which no further way is measured."""


@dataclass
class CountedCapturer:
    """Captures as another capturer does, and counts."""

    capture: Capture
    num_captured: int = 0
    num_replayed: int = 0
    seconds: float = 0.0

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        began = now()
        replay = self.capture(work)
        self.num_captured += 1
        self.seconds += now() - began

        def counted() -> Tensor:
            self.num_replayed += 1
            return replay()

        return counted


@dataclass
class LogLines(logging.Handler):
    """Keeps what pixtune logs."""

    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def measure(settings: Settings) -> Result:
    """Measures a case in all ways for which there is time."""
    began = time.perf_counter()
    log = LogLines()
    logging.getLogger("pixtune").addHandler(log)
    logging.getLogger("pixtune").setLevel(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as name:
            return _measure(settings, Path(name), began, log)
    finally:
        logging.getLogger("pixtune").removeHandler(log)


def _measure(settings: Settings, scratch: Path, began: float, log: LogLines) -> Result:
    write_model_folder(scratch / "model", ARCHITECTURES[settings.model])
    config = TrainConfig(
        pretrained_model_name_or_path=str(scratch / "model"),
        output_dir=scratch / "run",
        max_train_steps=1,
        data_config=DataConfig(img_dir=scratch),
        random_weights=True,
        quantize=settings.quantize,
        disable_quantization=settings.quantize is False,
        gpu_memory_limit_gib=settings.limit_gib,
    )
    memory = RunMemory(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory.start(device)
    folder = ModelFolder(scratch / "model")
    family = family_of(folder)
    prompt = random_prompt(settings, family, folder)
    head_size = folder.component_config("transformer")["attention_head_dim"]
    obstacles = {
        "compile": compile_obstacle(device) if device.type == "cuda" else "no GPU",
        "padding": padding_obstacle(device, head_size) if device.type == "cuda" else "no GPU",
    }
    abilities = Abilities(*(obstacle is None for obstacle in obstacles.values()))
    plan = plan_case(settings, config, family, folder, prompt, device, abilities)
    transformer = load_planned(family, folder, plan, device, random_weights=True)
    result: Result = {
        "case": asdict(settings),
        "plan": {**asdict(plan), "reasons": list(plan.reasons)},
        "obstacles": obstacles,
        "planned_gib": in_gib(plan.expected_peak_bytes),
        "loaded_seconds": round(time.perf_counter() - began, 1),
        "log": log.lines,
        "ways": {},
    }

    def sampler_of(
        passes: PassPlan, build_capture: Callable[[LoadedTransformer], Capture] = lambda loaded: GraphCapturer()
    ) -> PromptSampler:
        of_one = SamplerSettings((0,), settings.steps, GUIDANCE)
        placement = placement_of(plan, device)
        return PromptSampler(family, folder, [prompt], of_one, placement, False, None, passes, build_capture)

    def sample(passes: PassPlan, profiled: bool = False) -> tuple[Tensor, Result]:
        counters_of: list[CountedCapturer] = []

        def build_capture(loaded: LoadedTransformer) -> Capture:
            counters_of.append(CountedCapturer(GraphCapturer(loaded.stream)))
            return counters_of[-1]

        return run(sampler_of(passes, build_capture), transformer, counters_of, profiled)

    plain, result["ways"]["plain"] = sample(PLAIN_PASSES)
    if plan.compile:
        sizes_vary = sampler_of(plan.passes).sizes_vary
        compile_blocks(blocks_of(transformer.module, family), selective=False, sizes_vary=sizes_vary)
    both = (plan.passes.together, not plan.passes.together) if abilities.pads and family.pads_text else (False,)
    for together in both:
        if time.perf_counter() - began > settings.seconds or (together and prompt.negative is None):
            continue
        planned = together == plan.passes.together
        name = ("one batch" if together else "pass by pass") + (", planned" if planned else "")
        try:
            latents, row = sample(replace(plan.passes, together=together), profiled=planned and device.type == "cuda")
            result["ways"][name] = {**row, "psnr_db": psnr(latents, plain)}
        except Exception:  # noqa: BLE001, the ways before it are worth showing, and so is where it failed
            result["ways"][name] = {"failed": traceback.format_exc().splitlines()[-LINES_OF_A_FAILURE:]}
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def random_prompt(settings: Settings, family: ModelFamily, folder: ModelFolder) -> EncodedPrompt:
    """Draws text features and controls of the sizes that real ones have."""
    model = ARCHITECTURES[settings.model]
    negative = None
    if needs_negative(family, GUIDANCE):
        negative = family.random_text(folder, EMPTY_PROMPT_TOKENS, 1)
    size = (settings.size, settings.size)
    controls = tuple(
        randomness.normal((1, *family.latent_shape(folder, *family.control_size(folder, size, settings.size))), number,
                          "random weights", "control")
        for number in range(model.num_controls)
    )  # fmt: skip
    return EncodedPrompt("random", family.random_text(folder, model.num_text_tokens, 0), negative, controls, size)


def plan_case(
    settings: Settings,
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    prompt: EncodedPrompt,
    device: torch.device,
    abilities: Abilities,
) -> SamplingPlan:
    """Plans as `pixtune sample` does for many pictures, which are not decoded."""
    shapes = family.transformer_shapes(folder.component_config("transformer"))
    pictures = [family.latent_shape(folder, *prompt.size), *(control.shape[1:] for control in prompt.controls)]
    num_tokens = sum(family.num_image_tokens(*shape[-2:]) for shape in pictures)
    num_tokens += len(next(iter(prompt.positive.values())))
    sizes = SampleSizes(
        pixels=0,
        num_steps=settings.steps,
        autoencoder_bytes=0,
        num_pictures=1000,
        passes_per_step=1 if prompt.negative is None else 2,
        pads_text=family.pads_text,
    )
    footprint = read_footprint(family, shapes, family.block_shape(folder)[1], num_tokens)
    return plan_sampling(read_facts(device), footprint, config, sizes, abilities)


def run(
    sampler: PromptSampler, transformer: LoadedTransformer, capturers: Sequence[CountedCapturer], profiled: bool
) -> tuple[Tensor, Result]:
    """Samples one picture and returns its latents, with the seconds of its steps and the peak of its memory."""
    on_gpu = sampler.placement.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graphs_before = counters["stats"]["unique_graphs"]
    began, moments = now(), []
    profiler = None

    def on_step() -> None:
        nonlocal profiler
        moments.append(now())
        if profiled and len(moments) == sampler.settings.num_steps - 1:  # the last step is looked at
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiler.start()

    ((_, _, latents_BCHW),) = sampler.latents(transformer, on_step)
    row: Result = {}
    if profiler is not None:
        profiler.stop()
        row["kernels_ms"] = kernels_of(profiler)
        moments.pop()
    seconds = [after - before for before, after in zip([began, *moments], moments, strict=False)]
    warm = seconds[PLAIN_CALLS + 2 :] or seconds[-1:]
    row = {
        "seconds_per_step": round(statistics.median(warm), 4),
        "seconds_of_steps": [round(each, 3) for each in seconds],
        "compiled_graphs": counters["stats"]["unique_graphs"] - graphs_before,
        "captured": sum(capturer.num_captured for capturer in capturers),
        "replayed": sum(capturer.num_replayed for capturer in capturers),
        "capturing_seconds": round(sum(capturer.seconds for capturer in capturers), 2),
        **row,
    }
    if on_gpu:
        row |= {
            "peak_gib": in_gib(torch.cuda.max_memory_allocated()),
            "peak_reserved_gib": in_gib(torch.cuda.max_memory_reserved()),
        }
    return latents_BCHW.float().cpu(), row


def kernels_of(profiler: torch.profiler.profile) -> Result:
    """Returns the milliseconds of the kernels that take most of one step, and of all."""
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    listed = {f"{row.key[:90]} x{row.count}": round(row.self_device_time_total / 1e3, 2) for row in rows[:KERNELS]}
    return {"all": round(total / 1e3, 2), "launched": sum(row.count for row in rows), **listed}


def psnr(found: Tensor, expected: Tensor) -> float | None:
    """Returns the peak signal-to-noise ratio in dB; None where both are equal."""
    error = float((found - expected).square().mean())
    span = float(expected.max() - expected.min())
    return round(20 * math.log10(span) - 10 * math.log10(error), 2) if error else None


def in_gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 3)


def now() -> float:
    """Reads the clock after the GPU has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="qwen-image")
    parser.add_argument("--limit", type=float, help="limit of the process's GPU memory in GiB")
    parser.add_argument("--quantize", action=argparse.BooleanOptionalAction, help="default: by the memory there is")
    parser.add_argument("--size", type=int, default=Settings.size, help="pixels")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="sampler steps")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="after which no further way is tried")
    parser.add_argument("--json", type=Path, help="file of the result")
    words = parser.parse_args()
    result = measure(Settings(words.model, words.limit, words.quantize, words.size, words.steps, words.seconds))
    text = json.dumps({**result, **describe()}, indent=1, default=str)
    if words.json:
        write_atomically(words.json, text.encode())
    print(text)


if __name__ == "__main__":
    exit_on_user_errors(main)
