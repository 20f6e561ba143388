"""Draws what a soak does from a seed: a run's settings and pictures, and what happens to each of its sessions."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tests import single_files
from tests.runs import DEMO_TRAIN, ROOT

EDIT_TRAIN = ROOT / "assets" / "demo-edit" / "train"
MODELS = {"qwen": "tiny-qwen-image", "edit": "tiny-qwen-image-edit", "flux": "tiny-flux"}
INSTALLED_AVERAGING = [
    name
    for name, module in (("adamw_schedule_free", "schedulefree"), ("prodigy_schedule_free", "prodigyplus"))
    if find_spec(module)
]
"""Schedule-free optimizers whose packages are there."""
RATIOS = (1.0, 1.0, 4 / 3, 3 / 4, 16 / 9)
TWO_PROCESSES = 0.08
"""Share of runs in two processes. Each of their sessions takes as long as three others."""

Settings = dict[str, object]
"""Config keys and values; `__` stands for the dot of a nested key, as in `tests.runs.overrides`."""


@dataclass(frozen=True)
class Drawn:
    """One run of a soak."""

    family: str
    num_processes: int
    settings: Settings
    num_pictures: int


def draw_run(draw: random.Random) -> Drawn:
    """Draws the settings of a small run whose keys do not contradict each other."""
    family = draw.choices(list(MODELS), (4, 3, 3))[0]
    full = draw.random() < 0.25
    settings: Settings = {
        "pretrained_model_name_or_path": ROOT / "assets" / MODELS[family],
        "method": "full" if full else "lora",
        "mixed_precision": draw.choice(["'no'", "bf16"]),
        "max_train_steps": draw.randint(4, 10),
        "train_batch_size": draw.choice([1, 1, 2]),
        "gradient_accumulation_steps": draw.choice([1, 1, 2]),
        "learning_rate": 1e-4 if full else 1e-3,
        "lr_scheduler": draw.choice(["constant", "cosine", "linear", "rex", "constant_with_warmup"]),
        "lr_warmup_steps": draw.randint(0, 3),
        "max_grad_norm": draw.choice([0, 0.5, 1.0]),
        "seed": draw.randrange(1000),
        "logging_steps": draw.randint(1, 4),
        "checkpointing_steps": draw.randint(1, 5),
        "checkpoints_total_limit": draw_limit(draw),
        "report_to": draw.choice(["null", "null", "tensorboard"]),
        "precompute_text_embeddings": yes(draw, 0.8),
        "precompute_image_embeddings": yes(draw, 0.8),
        "save_cache_on_disk": yes(draw, 0.75),
        "data_config__img_size": draw.choice([64, 64, 128, "[64,96]"]),
        "data_config__flip": yes(draw, 0.3),
        "data_config__caption_prefix": draw.choice(["''", "''", "sks"]),
        "data_config__shuffle_tags": yes(draw, 0.3),
        "data_config__tag_dropout_rate": draw.choice([0, 0, 0.3]),
        "data_config__caption_variants": draw.randint(1, 3),
        "data_config__num_workers": draw.randint(0, 2),
        "data_config__caption_dropout_rate": draw.choice([0, 0.3]),
        "data_config__random_ratio": yes(draw, 0.3),
        "objective__sigma_distribution": draw.choice(["uniform", "logit_normal", "mode"]),
        "objective__weighting_scheme": draw.choice(["none", "sigma_sqrt"]),
        "objective__loss": draw.choice(["mse", "huber"]),
        "objective__min_sigma": draw.choice([0, 0, 0.2]),
        "objective__max_sigma": draw.choice([1, 1, 0.7]),
        "data_config__weight_outside_mask": draw.choice([0, 0.1]),
        "data_config__allow_missing_masks": "true",
    }
    if family == "qwen" and draw.random() < 0.3:
        settings |= {"prior_preservation__prompts": "['a cat','a sun']", "prior_preservation__num_pictures": 2}
        settings |= {"prior_preservation__num_steps": 2, "prior_preservation__loss_weight": draw.choice([1, 0.5])}
    if full:
        settings["weight_update"] = draw.choice(["stochastic_rounding", "fp32_master"])
    else:
        settings["rank"] = draw.choice([2, 4, 8])
        settings["lora_targets"] = draw.choice(["null", "[attention_mlp]"])
        settings |= draw_adapter(draw)
        names = "comfyui" if "adapter__kind" in settings else draw.choice(["comfyui", "kohya"])
        settings["lora_files__formats"] = f"[diffusers,{names}]"
        settings["ema__decay"] = draw.choice(["null", 0.5, 0.99])
        settings["ema__warm_up"], settings["ema__on_host"] = yes(draw, 0.7), yes(draw, 0.5)
    settings |= draw_optimizer(draw, full)
    if family == "edit":
        settings["data_config__control_size"] = 64
    if family == "flux":
        settings["data_config__max_text_tokens"] = 24
    if draw.random() < 0.6:
        settings |= {"validation__held_out": 0.2, "validation__num_draws": 1, "validation__every": draw.randint(1, 5)}
        settings["validation__patience"] = draw.choice(["null", "null", 1, 2])
    if draw.random() < 0.5:
        settings |= {"samples__prompts": "['a cat','a sun']", "samples__num_steps": draw.randint(1, 3)}
        settings |= {"samples__every": draw.randint(2, 6), "samples__width": 64, "samples__height": 64}
        settings["samples__strengths"] = "[1.0]" if full else draw.choice(["[1.0]", "[0.0,1.0]"])
        if family == "edit":
            control = sorted((EDIT_TRAIN / "control").glob("*.png"))[0]
            settings["samples__controls"] = f"[[{control}],[{control}]]"
    if draw.random() < 0.15:
        settings = streamed(draw, settings)
    num_processes, num_pictures = 2 if draw.random() < TWO_PROCESSES else 1, draw.randint(6, 10)
    if num_processes > 1 and (not full or settings.get("optimizer", "adamw") == "adamw"):
        settings["distributed__shards"] = draw.choice([1, 2] if full else ["null", 2, 2])
    return Drawn(family, num_processes, settings, num_pictures)


def streamed(draw: random.Random, settings: Settings) -> Settings:
    """Returns the settings of a run whose data set is streamed, without what contradicts that."""
    kept = {key: value for key, value in settings.items() if not key.startswith("prior_preservation")}
    kept |= {"stream__window": draw.randint(2, 6), "stream__shards_at_once": draw.randint(1, 3)}
    kept |= dict.fromkeys(("precompute_text_embeddings", "precompute_image_embeddings", "save_cache_on_disk"), "true")
    if "validation__held_out" in kept:
        kept |= {"validation__held_out": "auto", "validation__patience": "null"}
    return kept


def draw_optimizer(draw: random.Random, full: bool) -> Settings:
    """Draws an optimizer of those that train so, and what it needs otherwise; half of them AdamW, in 8 bits or not."""
    if draw.random() < 0.5:
        return {"adam8bit": yes(draw, 0.5)}
    names = ["adafactor", "muon"] if full else ["adafactor", "prodigy", "prodigy", *INSTALLED_AVERAGING]
    name = draw.choice(names)
    settings: Settings = {"optimizer": name}
    if name.startswith("prodigy"):
        settings |= {"learning_rate": 1, "prodigy__d0": draw.choice([1e-6, 1e-4])}
    if name == "prodigy":
        settings["prodigy__slice"] = draw.choice([1, 11])
    if name == "adafactor":
        settings["adafactor__momentum"] = draw.choice(["null", 0.9])
    if name in INSTALLED_AVERAGING:
        settings |= {"lr_scheduler": "constant", "ema__decay": "null"}
    return settings


def draw_adapter(draw: random.Random) -> Settings:
    """Draws the kind of adapter with keys that fit it; a plain LoRA half of the time."""
    kind = draw.choice(["lora", "lora", "lokr", "dora"])
    settings: Settings = {"adapter__kind": kind}
    if kind == "lokr":
        settings["adapter__lokr_factor"] = draw.choice([2, 16, 65536])
        settings["adapter__lokr_low_rank"] = low_rank = draw.choice(["none", "larger", "both"])
        return settings | ({"adapter__rank_pattern": "{to_q: 3}"} if low_rank != "none" and draw.random() < 0.5 else {})
    settings["adapter__rslora"] = yes(draw, 0.3)
    return settings | ({"adapter__rank_pattern": "{to_q: 3, to_k: 5}"} if draw.random() < 0.3 else {})


def yes(draw: random.Random, share: float) -> str:
    return str(draw.random() < share).lower()


def draw_limit(draw: random.Random) -> object:
    return draw.choice([1, 1, 2, 3, "null"])


def write_pictures(drawn: Drawn, folder: Path, draw: random.Random) -> Settings:
    """Writes pictures of several shapes with their captions, into one folder or two; returns their settings."""
    source = EDIT_TRAIN / "images" if drawn.family == "edit" else DEMO_TRAIN
    parts = {"images": source, **({"control": EDIT_TRAIN / "control"} if drawn.family == "edit" else {})}
    later = draw.randint(1, drawn.num_pictures - 1) if draw.random() < 0.4 else drawn.num_pictures
    has_masks = draw.random() < 0.4
    if "stream__window" in drawn.settings:  # of one folder, and without masks and names
        later, has_masks = drawn.num_pictures, False
    for number, path in enumerate(draw.sample(sorted(source.glob("*.png")), drawn.num_pictures)):
        ratio = draw.choice(RATIOS)
        end = "" if number < later else "_2"
        for name, part in ((f"{name}{end}", part) for name, part in parts.items()):
            (folder / name).mkdir(parents=True, exist_ok=True)
            with Image.open(part / path.name) as picture:
                side = picture.width
                picture.crop((0, 0, int(side * min(1, ratio)), int(side / max(1, ratio)))).save(
                    folder / name / path.name
                )
        if has_masks and (number in (0, later) or draw.random() < 0.7):
            (folder / f"masks{end}").mkdir(exist_ok=True)
            width, height = Image.open(folder / f"images{end}" / path.name).size
            mask = Image.new("L", (width, height))
            mask.paste(255, (0, 0, width // 2, height))
            mask.save(folder / f"masks{end}" / path.name)
        (folder / f"images{end}" / f"{path.stem}.txt").write_text(path.with_suffix(".txt").read_text())
    settings: Settings = {}
    if drawn.settings["method"] == "lora" and draw.random() < 0.4:
        settings["training_adapter__path"] = write_adapter(folder / "adapter.safetensors")
    if draw.random() < 0.2:
        settings |= write_base(MODELS[drawn.family], folder / "transformer.safetensors", draw)
    is_plain = drawn.settings.get("adapter__kind", "lora") == "lora"
    if drawn.settings["method"] == "lora" and draw.random() < 0.3 and is_plain:
        settings["init_lora"] = write_adapter(folder / "init_lora.safetensors")
    if later == drawn.num_pictures:
        if draw.random() < 0.3 and "stream__window" not in drawn.settings:
            settings["data_config__loss_weights"] = json.dumps({path.stem: draw.choice([0.3, 2])})
        settings["data_config__img_dir"] = folder / "images"
        settings |= {"data_config__mask_dir": folder / "masks"} if has_masks else {}
        return settings | ({"data_config__control_dir": folder / "control"} if "control" in parts else {})
    folders = [
        {
            "img_dir": str(folder / f"images{end}"),
            "repeats": draw.choice([1, 2, 1.5]),
            "loss_weight": draw.choice([1, 0.5, 0] if end else [1, 0.5]),
            "flip": draw.choice([None, True]),
            "caption_dropout_rate": draw.choice([None, 0.5]),
        }
        | ({"mask_dir": str(folder / f"masks{end}")} if has_masks else {})
        | ({"control_dir": str(folder / f"control{end}")} if "control" in parts else {})
        for end in ("", "_2")
    ]
    return settings | {"data_config__img_dir": "null", "data_config__folders": json.dumps(folders)}


def write_base(model: str, path: Path, draw: random.Random) -> Settings:
    """Writes a small model's transformer as one file, in a form that other tools have."""
    form = draw.choice([single_files.with_prefix, single_files.fp8_scaled, single_files.int8_convrot])
    single_files.write(form(single_files.published(model)), path)
    return {"pretrained_model_name_or_path": path, "model_parts__others": ROOT / "assets" / model}


def write_adapter(path: Path) -> Path:
    """Writes a LoRA on a layer that each small model has."""
    shapes = {"lora_A": (2, 256), "lora_B": (256, 2)}
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.{matrix}.weight": torch.full(shape, 0.03) for matrix, shape in shapes.items()}
    scale = {"transformer.r": 2, "transformer.lora_alpha": 2}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(scale)})
    return path


SIGNALS = {"SIGKILL": 9, "SIGTERM": 4, "SIGHUP": 3, "SIGINT": 2, "SIGUSR1": 2}
"""Signals with how often each is drawn."""
REQUESTS = ("save_now", "pause")
HARMS = ("flip", "cut", "zero", "delete", "empty", "exchange")
TARGETS = {"checkpoint": 5, "cache": 3, "metrics": 2, "other": 2}
"""What is damaged, with how often: a file of a checkpoint, of the cache, the log, or anything else in the folder."""


@dataclass(frozen=True)
class Happening:
    """What happens to one session of a run; with every field at its default nothing does."""

    harms: tuple[tuple[str, str, float], ...] = ()
    """Damage before it starts: target, kind, and a number in [0, 1) that chooses the file."""
    set_back: float | None = None
    """Number in [0, 1) that chooses the checkpoint it is set back to; None: it goes on from the latest."""
    fault: int | None = None
    """Seed of an I/O error."""
    signals: tuple[tuple[str, float], ...] = ()
    """Signals, each with its time after the one before, in durations of the whole run."""
    to_rank: bool = False
    """Whether signals go to one of two processes, and not to their launcher."""
    rival: float | None = None
    """Time after which a second run is started in the same folder."""
    limit: object = None
    """Another value of `checkpoints_total_limit`."""
    requests: tuple[tuple[str, float], ...] = ()
    """Requests by files in the output folder, each with its time, in durations of the whole run."""


def draw_happening(draw: random.Random) -> Happening:
    """Draws what happens to a session; often several things at once."""
    harms = tuple(
        (draw.choices(list(TARGETS), list(TARGETS.values()))[0], draw.choice(HARMS), draw.random())
        for _ in range(draw.choice([0, 0, 0, 0, 1, 1, 2]))
    )
    rival = draw.uniform(0, 0.5) if draw.random() < 0.1 else None
    set_back = draw.random() if draw.random() < 0.2 and rival is None else None
    fault = draw.randrange(2**32) if draw.random() < 0.3 else None
    signals: list[tuple[str, float]] = []
    if draw.random() < (0.35 if fault is not None else 0.75):
        signals.append((draw.choices(list(SIGNALS), list(SIGNALS.values()))[0], draw.uniform(0.02, 1.1)))
        if draw.random() < 0.25:
            signals.append((draw.choice(["SIGTERM", "SIGKILL"]), draw.choice([0.0, 0.1, 0.5])))
    limit = draw_limit(draw) if draw.random() < 0.3 else None
    to_rank = draw.random() < 0.3
    requests = tuple((draw.choice(REQUESTS), draw.uniform(0.1, 1.0)) for _ in range(draw.choice([0, 0, 1, 3])))
    return Happening(harms, set_back, fault, tuple(signals), to_rank, rival, limit, requests)


def describe(happening: Happening) -> Mapping[str, object]:
    """Returns what happens, without what does not."""
    return {name: value for name, value in vars(happening).items() if value not in ((), None, False)}
