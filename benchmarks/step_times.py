"""Compares the planner's estimate of a step's time with every step that was measured: python benchmarks/step_times.py

It reads the recorded results: captured LoRA steps of full-size models, each alone on an H100 or H200. For each it
counts the seconds that today's planner expects of the same rung, and prints them beside what was measured, with a
summary. It needs no GPU, and some seconds. A change of the planner's constants is judged by the two outputs before and
after it, and by `--held-out` first: the cells that no constant was fitted to. `--fitted` prints the others.

Left out are steps that shared their GPU (`random_cells_h200`, `drawn_cells`), that were not captured, that several
GPUs took together, that trained all weights, for which there is no estimate, or that lacked kernels of today.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, write_model_folder
from cells import markdown_header, markdown_line

from pixtune.config import load_config
from pixtune.families import family_of
from pixtune.hardware.cards import facts_as
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import Rung
from pixtune.plan.seconds import step_seconds
from pixtune.plan.situation import Situation, situation_of
from pixtune.plan.training import with_todays_names
from pixtune.planning import footprint_of
from pixtune.storage.model_folder import open_model_folder

RESULTS = Path(__file__).parent / "results"
FITTED = ("neighbours_h200/11-qwen-image", "sweep/qwen-image", "headline_h200/qwen-image", "card_size_qwen_image")
"""Beginnings of the names of cells that the constants of `plan/seconds.py` were fitted to: those of Qwen-Image."""
OUTDATED = ("qwen_image_31", "qwen_image_79", "flux_47", "flux_79")
"""Card sizes on an H100 before the one-pass kernels of docs/profile.md; the H200's are of today's code."""
SHAPES_OR_PLAIN = ("qwen_image_23_3_shapes", "qwen_image_15_3_not_recorded")
"""Card sizes with pictures of 20 shapes, and without captures."""
WAYS_OF_TWO_GPUS = {
    "one8": Rung("fp8", 128, kept_transposes=True),
    "stream16": Rung("bf16", 128, True, 60, True, 13),
    "stream8": Rung("fp8", 128, True, 60, True, 18),
}
"""Rungs of `two_gpus_h200/lora.json` that one GPU had by itself."""


@dataclass(frozen=True)
class Measured:
    """A step that was measured, with its rung and situation."""

    name: str
    card: str
    model: str
    num_tokens: int
    """Image and text tokens of a micro-batch."""
    batch_size: int
    rank: int
    words: tuple[str, ...]
    """Further words of its config."""
    rung: Rung
    seconds: float

    @property
    def is_fitted(self) -> bool:
        return self.name.startswith(FITTED)

    @property
    def situation(self) -> Situation:
        return situation_for(self.card, self.model, self.num_tokens, self.batch_size, self.rank, self.words)

    @property
    def estimate(self) -> float:
        return step_seconds(self.rung, self.situation)

    @property
    def error(self) -> float:
        """Share by which the estimate is above what was measured; below 0: it is short."""
        return self.estimate / self.seconds - 1


# ---- what was recorded


def measured_steps() -> Iterator[Measured]:
    """Yields every measured step that counts."""
    for path in sorted(RESULTS.glob("card_size_*.json")):
        if path.stem.removeprefix("card_size_") not in (*OUTDATED, *SHAPES_OR_PLAIN):
            yield of_full_size(path)
    yield of_full_size(RESULTS / "filling_23_3_h200.json")
    for path in sorted((RESULTS / "restructuring_h200").glob("*.json")):
        yield of_full_size(path)
    for folder in ("headline", "headline_h200", "headline_equal_memory_h200", "sweep"):
        for path in sorted((RESULTS / folder).glob("*.json")):
            if "reference" not in path.name:
                model = max(filter(path.stem.startswith, ARCHITECTURES), key=len)
                yield of_bench(f"{folder}/{path.stem}", model, json.loads(path.read_text()))
    adapters = json.loads((RESULTS / "adapters_h200.json").read_text())
    for name, found in adapters["cells"].items():
        kind = name.partition(",")[0]
        yield of_bench(f"adapters_h200/{kind}", adapters["model"], found, (f"adapter.kind={kind}",))
    for path in sorted((RESULTS / "neighbours_h200").glob("*.json")):
        yield from of_neighbours(path)
    for run in json.loads((RESULTS / "two_gpus_h200" / "lora.json").read_text())["runs"]:
        if rung := WAYS_OF_TWO_GPUS.get(run["name"]):
            name, seconds = f"two_gpus_h200/{run['name']}", run["seconds_per_step_median"]
            yield Measured(name, "H200", "qwen-image", tokens("qwen-image", 1024, 1), 1, 16, (), rung, seconds)


def of_full_size(path: Path) -> Measured:
    """Reads a result of full_size.py."""
    found = json.loads(path.read_text())
    model, side = found["model"], found["size_pixels"]
    name = path.stem if path.parent == RESULTS else f"{path.parent.name}/{path.stem}"
    return Measured(
        name, card_of(found), model, tokens(model, side, 1), 1, 16, tuple(found["overrides"]), rung_of(found["plan"]),
        found["seconds_per_step_median"],
    )  # fmt: skip


def of_bench(name: str, model: str, found: dict[str, Any], words: tuple[str, ...] = ()) -> Measured:
    """Reads a result of `pixtune bench`."""
    case = found["case"]
    num_tokens = case["batch_size"] * (case["num_image_tokens"] + case["num_text_tokens"])
    return Measured(
        name, card_of(found), model, num_tokens, case["batch_size"], case["rank"], words, rung_of(found["plan"]),
        found["seconds_per_step"]["median"],
    )  # fmt: skip


def of_neighbours(path: Path) -> Iterator[Measured]:
    """Reads the rungs that neighbours.py measured, those that kept to their plan."""
    found = json.loads(path.read_text())
    case = found["case"]
    for each in found["results"]:
        if "seconds" in each and not each["gave_up"]:
            yield Measured(
                f"neighbours_h200/{path.stem}", card_of(found), case["model"],
                tokens(case["model"], case["size"], case["batch_size"]), case["batch_size"], case["rank"],
                (), rung_of(each["rung"]), each["seconds"],
            )  # fmt: skip


def card_of(found: dict[str, Any]) -> str:
    return "H200" if "H200" in found["machine"]["gpu"] else "H100"


def rung_of(plan: dict[str, Any]) -> Rung:
    """Returns the rung of a recorded plan."""
    named = with_todays_names(plan)
    return Rung(**{field.name: named[field.name] for field in fields(Rung) if named.get(field.name) is not None})


def tokens(model: str, side: int, batch_size: int) -> int:
    """Counts the image and text tokens of square pictures of so many pixels a side."""
    return batch_size * ((side // 16) ** 2 + ARCHITECTURES[model].num_text_tokens)


@cache
def situation_for(
    card: str, model: str, num_tokens: int, batch_size: int, rank: int, words: tuple[str, ...]
) -> Situation:
    """Returns the situation of a run on a card."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model_folder(folder, ARCHITECTURES[model])
        needed = (
            f"pretrained_model_name_or_path={folder}", f"output_dir={name}", f"data_config.img_dir={name}",
            "max_train_steps=1", "random_weights=true", "mixed_precision=bf16", f"rank={rank}",
            f"train_batch_size={batch_size}",
        )  # fmt: skip
        config = load_config(None, [*needed, *words], folders_must_exist=False)
        opened = open_model_folder(str(folder))
        footprint = footprint_of(config, family_of(opened), opened, num_tokens)
    return situation_of(facts_as(card), footprint, demands_of(config))


# ---- the table


def describe(rung: Rung, footprint: Footprint) -> str:
    words = [rung.weights_format]
    words += ["transposes kept"] if rung.kept_transposes else []
    words += ["cheap recomputed"] if rung.selective else []
    words += [f"{rung.recomputed_blocks} of {footprint.num_blocks} recomputed"] if rung.recomputed_blocks else []
    words += [f"q, k, v of {rung.reprojected_blocks}"] if rung.reprojected_blocks else []
    words += ["inputs offloaded"] if rung.offload_inputs else []
    words += [f"{rung.streamed_blocks} streamed"] if rung.streamed_blocks else []
    return ", ".join(words)


def summary(steps: Sequence[Measured]) -> str:
    """Returns how far estimates are from what was measured."""
    errors = [each.error for each in steps]
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.12 for size in sizes) / len(sizes)
    return (
        f"{len(steps)} cells: median {statistics.median(sizes):.1%}, 90th percentile "
        f"{sizes[max(round(0.9 * len(sizes)) - 1, 0)]:.1%}, {within:.0%} within 12%, from {min(errors):+.0%} to "
        f"{max(errors):+.0%}"
    )


def print_table(steps: Iterable[Measured]) -> None:
    print(markdown_header(("cell", "card", "tokens", "rank", "rung", "measured, s", "estimated, s", "error", "fitted")))
    for each in steps:
        sizes = (each.card, str(each.num_tokens), str(each.rank), describe(each.rung, each.situation.footprint))
        figures = (f"{each.seconds:.3f}", f"{each.estimate:.3f}", f"{each.error:+.1%}", "yes" * each.is_fitted)
        print(markdown_line((each.name, *sizes, *figures)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--fitted", action="store_true", help="those alone that constants were fitted to")
    part.add_argument("--held-out", action="store_true", help="those alone that no constant was fitted to")
    arguments = parser.parse_args()
    steps = list(measured_steps())
    if arguments.fitted or arguments.held_out:
        steps = [each for each in steps if each.is_fitted == arguments.fitted]
    print_table(steps)
    print()
    for words, chosen in (
        ("all", steps),
        ("fitted", [each for each in steps if each.is_fitted]),
        ("held out", [each for each in steps if not each.is_fitted]),
        ("held out, FLUX.1-dev", [each for each in steps if not each.is_fitted and each.model == "flux"]),
        ("at most 2048 tokens", [each for each in steps if each.num_tokens <= 2048]),
    ):
        if chosen:
            print(f"* {words}: {summary(chosen)}")


if __name__ == "__main__":
    main()
