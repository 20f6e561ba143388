"""What a config does: its plan on a large GPU, and everything that a run of two steps on a small model shows."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import BatchSource
from pixtune.errors import PixtuneError
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.files import file_digest
from pixtune.tracking.figures import StepFigures
from pixtune.tracking.metrics import FILE_NAME, read_metrics
from pixtune.train import train
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.optimizers import build_optimizer
from pixtune.trained.schedule import build_schedule, set_learning_rate
from tests import single_files
from tests.full_size import full_size_footprint
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, ROOT
from tests.shallow import shallow_model

HUGE_GPU = HardwareFacts("cuda", "a Hopper GPU that holds anything", (9, 0), 10_000 * GIB, 10_000 * GIB)

BASE: dict[str, object] = {
    "pretrained_model_name_or_path": "SHALLOW/tiny-qwen-image",
    "output_dir": "RUN/out",
    "data_config.img_dir": "SCENE/pictures",
    "data_config.cache_dir": "SCENE/cache",
    "data_config.img_size": 64,
    "data_config.num_workers": 0,
    "mixed_precision": "no",
    "learning_rate": 1e-3,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "rank": 2,
}
"""A run of two steps. `RUN` is a folder of its own, `SCENE` one that all runs share; of a model of `assets/` after
`SHALLOW`, one block of each kind is enough."""

Observed = dict[str, object]
"""Part of what a run shows -> its value. Nothing in it depends on time or on where the run's folder is."""


def make_scene(folder: Path) -> None:
    """Pictures, other pictures, masks, edit pairs: four of each."""
    for source, name in ((DEMO_TRAIN, "pictures"), (DEMO_HELD_OUT, "other_pictures")):
        (folder / name).mkdir()
        for picture in sorted(source.glob("*.png"))[:4]:
            shutil.copy(picture, folder / name)
            caption = picture.with_suffix(".txt").read_text(encoding="utf-8")
            (folder / name / f"{picture.stem}.txt").write_text(caption, encoding="utf-8")
            (folder / name / f"{picture.stem}.note").write_text(f"a note on {picture.stem}", encoding="utf-8")
    for number, picture in enumerate(sorted((folder / "pictures").glob("*.png"))):
        mask = Image.new("L", (128, 128))
        mask.paste(255, (0, 0, 64, 128))
        for name in ("masks", *(["too_few_masks"] if number else [])):
            (folder / name).mkdir(exist_ok=True)
            mask.save(folder / name / picture.name)
        (folder / "cutouts").mkdir(exist_ok=True)
        cutout = Image.open(picture).convert("RGBA")
        cutout.putalpha(mask)
        cutout.save(folder / "cutouts" / picture.name)
        shutil.copy(picture.with_suffix(".txt"), folder / "cutouts")
    rows = [
        json.dumps({"image": picture.name, "caption": f"row {picture.stem}"})
        for picture in sorted((folder / "pictures").glob("*.png"))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "red heart", "seed": 3}\n', encoding="utf-8")
    matrices = {"lora_A": (2, 256), "lora_B": (256, 2)}
    save_file(
        {f"transformer.transformer_blocks.0.attn.to_q.{n}.weight": torch.full(s, 0.05) for n, s in matrices.items()},
        folder / "adapter.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})},
    )
    published = single_files.published(str(shallow_model("tiny-qwen-image", 1)))
    rounded = single_files.with_prefix(single_files.fp8_cast(published))
    single_files.write(rounded, folder / "transformer.safetensors")
    for name in ("images", "control", "other_control", "too_few_controls"):
        (folder / "edit" / name).mkdir(parents=True)
    pairs = ROOT / "assets" / "demo-edit" / "train"
    for number, picture in enumerate(sorted((pairs / "images").glob("*.png"))[:4]):
        control = pairs / "control" / picture.name
        shutil.copy(picture, folder / "edit" / "images")
        shutil.copy(picture.with_suffix(".txt"), folder / "edit" / "images")
        shutil.copy(control, folder / "edit" / "control")
        shutil.copy(picture, folder / "edit" / "other_control")
        if number:
            shutil.copy(control, folder / "edit" / "too_few_controls")


def words(settings: Mapping[str, object], scene: Path, run: Path) -> list[str]:
    """Settings as the command line has them, with real folders."""

    def placed(value: object) -> str:
        text = json.dumps(value).replace("SCENE", str(scene)).replace("RUN", str(run))
        return re.sub(r"SHALLOW/([\w-]+)", lambda model: str(shallow_model(model[1], 1)), text)

    return [f"{key}={placed(value)}" for key, value in settings.items()]


def plan_of(config: TrainConfig) -> TrainingPlan:
    """The plan for the full-size Qwen-Image at 1024x1024 on a GPU that holds anything."""
    return plan_training(HUGE_GPU, full_size_footprint(config), config)


def stepped_weights(config: TrainConfig) -> list[float]:
    """A matrix after eight steps by the config's optimizer and schedule, towards 1, with noise."""
    if config.optimizer == "adamw_schedule_free":
        pytest.importorskip("schedulefree")
    weight, rate_at = nn.Parameter(torch.zeros(8, 12)), build_schedule(config, 8)
    optimizer = build_optimizer(config, plan_of(config).optimizer, [weight])
    for step in range(8):
        set_learning_rate(optimizer, rate_at(step))
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = weight.detach() - 1 + 0.1 * noise
        optimizer.step()
    flat: list[float] = weight.detach().flatten().tolist()
    return flat


def observe_run(settings: Mapping[str, object], scene: Path, run: Path) -> Observed:
    """Trains as the settings say and reports what can be seen of it; "error" is what a user would be told."""
    arguments = words({**BASE, **settings}, scene, run)
    error, output, printed = None, run, StringIO()
    with watch() as seen, redirect_stdout(printed):
        try:
            config = load_config(None, arguments)
            output = config.output_dir
            train(config)
        except PixtuneError as refusal:
            error = refusal
    lines = _lasting_lines(printed.getvalue(), run)
    return {"error": error, "printed": lines, **seen, **_read(output, run)}


@contextmanager
def watch() -> Iterator[dict[str, Any]]:
    """What leaves no trace in a file: threads that read, what a tracker is told, the rates of the optimizer itself."""
    seen: dict[str, Any] = {"reading threads": 0, "times tracked": 0, "rates": []}
    threads: set[int] = set()
    parts, track = BatchSource.parts, StepFigures.track

    def watched_parts(source: BatchSource, *arguments: Any) -> Any:
        threads.update({threading.get_ident()} - {threading.main_thread().ident})
        return parts(source, *arguments)

    def watched_track(figures: StepFigures, *arguments: Any) -> None:
        seen["times tracked"] += 1
        track(figures, *arguments)

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen["rates"].append(float(optimizer.param_groups[0]["lr"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchSource, "parts", watched_parts)
        patch.setattr(StepFigures, "track", watched_track)
        handle = register_optimizer_step_pre_hook(before_step)
        yield seen
        handle.remove()
    seen["reading threads"] = len(threads)


def _lasting_lines(printed: str, run: Path) -> list[str]:
    return [line.replace(str(run), "RUN") for line in printed.splitlines() if not is_timing(line)]


def is_timing(line: str) -> bool:
    if re.search(r" \.\.\.$|: [\d.]+ s$|: \d+ min \d+ s$|\d+/\d+, about .* left$", line):
        return True  # what took over a second
    return "s/step" in line or line.startswith("first step: ")


def _read(output: Path, run: Path) -> Observed:
    lines = read_metrics(output / FILE_NAME)
    steps = [line for line in lines if line["kind"] == "step"]
    metadata, weights = _read_lora(output / DIFFUSERS_FILE)
    return {
        "steps": [(line["step"], line["loss"], line["grad_norm"]) for line in steps],
        "held-out losses": [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"],
        "pictures": {
            path.relative_to(output).as_posix(): file_digest(path) for path in output.glob("samples/**/*.png")
        },
        "weights": weights,
        "metadata": {name: text for name, text in metadata.items() if not re.search("hash|date", name)},
        "files": sorted({_lasting_name(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}),
    }


def _lasting_name(path: Path) -> str:
    """Trackers put time and machine into their names; cache entries are named by content."""
    name = "events" if "tfevents" in path.name else path.name
    return "entries" if "entries" in path.parts else (path.parent / name).as_posix()


def _read_lora(path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    if not path.is_file():
        return {}, {}
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118
