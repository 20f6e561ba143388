"""Draws a full-size run by lot, and prepares and plans it as its run will: a cell of random_cells.py."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, write_model_folder
from full_size import training_command
from PIL import Image

from pixtune.bench.result import Result
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.prepared import PreparedData
from pixtune.families import family_of
from pixtune.family import ModelFamily
from pixtune.hardware.facts import HardwareFacts
from pixtune.plan.footprint import Footprint
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.model_folder import ModelFolder, open_model_folder

LIMIT_GIB, RANK, SIZE = (5.5, 100.0), (4, 256), (256, 2048)
"""Least and largest value; all are drawn evenly in their logarithm."""
MULTIPLE = 16
"""Number of pixels that sides are a multiple of."""
BATCH_SIZES, ACCUMULATIONS = (1, 1, 1, 1, 2, 2, 3, 4, 6, 8), (1, 1, 1, 1, 2, 4)
RATIOS = (1.0, 1.0, 9 / 7, 7 / 9, 16 / 9, 9 / 16, 2.4)
TARGETS = ("attention", "attention", "attention", "attention_mlp", "all_linear", "[to_q,to_v]")
MOST_CONTROLS = {"qwen-image-edit": 1, "qwen-image-edit-2509": 3, "qwen-image-edit-2511": 3, "flux-kontext": 1}
SHARE_OF_FULL, SHARE_OF_MANY_SHAPES = 0.08, 0.25
MOST_TOKENS = 300_000
"""Tokens of a cell's passes together; where a draw has more, batch, sizes and shapes are drawn again. They take
some minutes on a quarter of a GPU."""
START_SECONDS, TOKENS_PER_SECOND = 110.0, 2500.0
"""Assumed time before a cell's second step, and speed of its steps, where several share a GPU."""


# ---- drawing


@dataclass(frozen=True)
class RandomCell:
    """One run that was drawn."""

    seed: int
    number: int
    model: str
    limit_gib: float
    method: str
    rank: int
    targets: str
    batch_size: int
    accumulation: int
    size: int
    """Side in pixels of the square that pictures have about the area of."""
    shapes: tuple[tuple[float, int], ...]
    """Aspect ratio and words of the caption of each shape."""
    num_controls: int
    control_size: int
    adam8bit: bool | None

    @property
    def name(self) -> str:
        """Stem of its file."""
        return f"{self.seed}-{self.number:03}-{self.model}-{self.limit_gib:g}".replace(".", "_")

    @property
    def steps(self) -> int:
        """Number of steps: a shape is captured at its third pass, several once no new one has come for a while."""
        passes = 6 if len(self.shapes) == 1 else 7 * len(self.shapes)
        return max(3, math.ceil(passes / self.accumulation))

    @property
    def tokens(self) -> int:
        """Tokens of a step, about."""
        pictures = (self.size**2 + self.num_controls * self.control_size**2) / 256
        return round(self.batch_size * self.accumulation * (pictures + max(words for _, words in self.shapes)))

    @property
    def seconds(self) -> float:
        """Time that it will take, a rough guess."""
        return START_SECONDS + self.steps * self.tokens / TOKENS_PER_SECOND

    def words(self) -> list[str]:
        """Returns its `key=value` words of the config, those of the data's folders left out."""
        values: dict[str, Any] = {
            "gpu_memory_limit_gib": self.limit_gib,
            "method": self.method,
            "rank": self.rank,
            "train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "data_config.img_size": self.size,
            "data_config.max_text_tokens": max(words for _, words in self.shapes),
        }
        if self.num_controls:
            values["data_config.control_size"] = self.control_size
        if self.method == "lora":
            values["lora_targets"] = self.targets if self.targets.startswith("[") else f"[{self.targets}]"
        if self.adam8bit is not None:
            values["adam8bit"] = json.dumps(self.adam8bit)
        return [f"{key}={value}" for key, value in values.items()]


def draw_cell(seed: int, number: int, has_8bit_adam: bool = False) -> RandomCell:
    """Draws a cell; equal arguments give equal cells.

    Args:
        has_8bit_adam: 8-bit optimizer states can be had, so that some cells demand them or leave them to the plan.
    """
    dice = random.Random(f"{seed} {number}")
    model = dice.choice(list(ARCHITECTURES))
    limit_gib = round(log_uniform(dice, *LIMIT_GIB), 1)
    rank = round(log_uniform(dice, *RANK))
    method = "full" if dice.random() < SHARE_OF_FULL else "lora"
    targets = dice.choice(TARGETS)
    adam8bit = dice.choice((None, True, False)) if has_8bit_adam else False
    longest = 512 if model.startswith("flux") else dice.randint(16, 512)  # FLUX pads, and users rarely change how far
    while True:
        num_shapes = dice.choice((2, 3, 4)) if dice.random() < SHARE_OF_MANY_SHAPES else 1
        cell = RandomCell(
            seed, number, model, limit_gib, method, rank, targets,
            batch_size=dice.choice(BATCH_SIZES),
            accumulation=dice.choice(ACCUMULATIONS),
            size=round(log_uniform(dice, *SIZE) / MULTIPLE) * MULTIPLE,
            shapes=tuple(
                (dice.choice(RATIOS), dice.randint(8, longest) if place else longest) for place in range(num_shapes)
            ),
            num_controls=dice.randint(1, MOST_CONTROLS[model]) if model in MOST_CONTROLS else 0,
            control_size=dice.choice((1024, 1024, 768, 512)),
            adam8bit=adam8bit,
        )  # fmt: skip
        if cell.steps * cell.tokens <= MOST_TOKENS:
            return cell


def log_uniform(dice: random.Random, least: float, largest: float) -> float:
    """Draws a number evenly in its logarithm."""
    return math.exp(dice.uniform(math.log(least), math.log(largest)))


# ---- one cell


def prepare(cell: RandomCell, folder: Path) -> list[str]:
    """Writes model folder, pictures of one colour and config of a cell, and returns the command that trains it."""
    write_model_folder(folder / "model", ARCHITECTURES[cell.model])
    images = folder / "images"
    controls = [folder / f"control_{number}" for number in range(cell.num_controls)]
    for place in (images, *controls):
        place.mkdir()
    num_pictures = cell.batch_size * (2 if len(cell.shapes) == 1 else 1)  # whole batches of each shape
    for number, (ratio, words) in enumerate(shape for shape in cell.shapes for _ in range(num_pictures)):
        sides = tuple(
            max(round(side / MULTIPLE), 1) * MULTIPLE for side in (cell.size * ratio**0.5, cell.size / ratio**0.5)
        )
        for place in (images, *controls):
            Image.new("RGB", (sides[0], sides[1]), (number % 256, len(place.name), 0)).save(place / f"{number}.png")
        (images / f"{number}.txt").write_text(" ".join(["noise"] * words))
    data = [f"data_config.img_dir={images}"]
    data += [f"data_config.control_dir={json.dumps([str(place) for place in controls])}"] if controls else []
    return training_command(folder, folder / "run", cell.steps, [*cell.words(), *data])


def cell_of(result: Result) -> RandomCell:
    """Returns the cell that a result is of."""
    values = dict(result["cell"])
    return RandomCell(**{**values, "shapes": tuple((ratio, words) for ratio, words in values["shapes"])})


@dataclass(frozen=True)
class Prepared:
    """What planning has to know of a prepared cell."""

    config: TrainConfig
    family: ModelFamily
    folder: ModelFolder
    data: PreparedData

    def count_tokens(self, multiple: int) -> int:
        """Counts the tokens of the largest micro-batch, its captions padded to a multiple."""
        return self.data.micro_batch_tokens(self.config.batch_size, multiple)


def weigh(command: Sequence[str]) -> tuple[TrainConfig, Footprint]:
    """Returns config and footprint of a prepared cell whose captions are not padded."""
    from pixtune.planning import footprint_of

    cell = read_prepared(command)
    return cell.config, footprint_of(cell.config, cell.family, cell.folder, cell.count_tokens(1))


def read_prepared(command: Sequence[str]) -> Prepared:
    """Reads a prepared cell as its run does."""
    from pixtune.config.folders import folders_of
    from pixtune.data.examples import read_examples
    from pixtune.data.prompts import control_rules
    from pixtune.data.random_data import random_data

    place = command.index("--config")
    config = load_config(Path(command[place + 1]), list(command[place + 2 :]))
    folder = open_model_folder(config.pretrained_model_name_or_path)
    family, settings = family_of(folder), config.data_config
    rules = control_rules(family, folder, settings.control_size)
    examples = read_examples(folders_of(settings), family.pixel_multiple(folder), rules)
    return Prepared(config, family, folder, random_data(config, family, folder, examples, []))


def plan_cell(command: Sequence[str], facts: HardwareFacts) -> TrainingPlan:
    """Plans a prepared cell as its run will, apart from the trials of attention kernels.

    Raises:
        PlanError: it does not fit.
    """
    from pixtune.planning import plan_for_captions

    cell = read_prepared(command)
    captions = cell.data.captions if cell.family.pads_text else None
    return plan_for_captions(
        lambda footprint: plan_training(facts, footprint, cell.config, captions=captions),
        cell.config, cell.family, cell.folder, cell.count_tokens, captions,
    )  # fmt: skip
