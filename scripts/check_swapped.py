"""Measures how well a base model recognizes swapped controls and targets, as `pixtune/data/swapped.py` decides it.

    python scripts/check_swapped.py            # about 3 minutes on two cores

For edits that the small edit model knows, for a style that it does not know, and for a caption without meaning, it
prints the mean gain of captions with the data as given and swapped, and the share of 2000 draws of eight pairs in which
it warns. Beside it stands the rate of the plain criterion: the swapped loss is lower beyond the spread of pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_style import demo_names
from emoji_pictures import read_named_icons
from PIL import Image
from rich.console import Console
from tiny_edits import EDITS
from tiny_sets import load_pixels
from torch import Tensor

from pixtune import randomness
from pixtune.config.folders import folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.encode import Encoder
from pixtune.data.encodings import Encodings
from pixtune.data.examples import read_examples
from pixtune.data.images import read_size
from pixtune.data.prompts import control_rules
from pixtune.data.swapped import (
    MOST_PAIRS,
    NUM_STANDARD_ERRORS,
    SIGMAS,
    BothWays,
    EncodedBothWays,
    Gains,
    measure_gains,
    needed_pictures,
    needed_texts,
    read_pairs,
    swap,
    swap_warning,
)
from pixtune.engine.load import LoadedTransformer, load_transformer
from pixtune.families import family_of
from pixtune.family import ModelFamily, Placement
from pixtune.judging.validation import HeldOutPicture, losses_at
from pixtune.plan.encoders import PLAINLY
from pixtune.storage.model_folder import ModelFolder

ROOT = Path(__file__).resolve().parent.parent
SIZE_PIXELS = 256
NUM_DRAWS = 2000
SEED = 42


@dataclass(frozen=True)
class PairSet:
    """Pictures as uint8, shape (N, 3, H, W), and one instruction for all."""

    name: str
    controls: Tensor
    targets: Tensor
    caption: str


def pair_sets(num_pairs: int) -> Iterator[PairSet]:
    """Yields the sets of pairs that are checked."""
    names = [name for part in demo_names() for name in part][:num_pairs]
    noto, fluent, twemoji = (
        load_pixels(read_named_icons(set_name, names), SIZE_PIXELS, torch.device("cpu"))
        for set_name in ("noto", "fluent", "twemoji")
    )
    yield PairSet("Noto to Fluent", noto, fluent, "redraw in fluent flat style")
    yield PairSet("Fluent to Noto", fluent, noto, "redraw in noto style")
    for caption in ("make it black and white", "make it red", "mirror it", "turn it upside down"):
        yield PairSet("Noto, edited", noto, EDITS[caption](noto), caption)
    yield PairSet("Noto to Twemoji (demo-edit)", noto, twemoji, "redraw in twemoji style")
    yield PairSet("Fluent to Twemoji", fluent, twemoji, "redraw in twemoji style")
    yield PairSet("Noto to Twemoji", noto, twemoji, "sks")


def both_ways(pair_set: PairSet, folder: Path, encodings: Encodings) -> list[EncodedBothWays]:
    """Encodes every pair of a set both ways, through files as the trainer does."""
    for part, pictures in (("images", pair_set.targets), ("control", pair_set.controls)):
        (folder / part).mkdir(parents=True)
        for number, pixels_3HW in enumerate(pictures):
            path = folder / part / f"{number:03d}.png"
            Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy()).save(path)
            if part == "images":
                path.with_suffix(".txt").write_text(pair_set.caption)
    family, model = encodings.encoder.family, encodings.encoder.folder
    config = DataConfig(img_dir=folder / "images", control_dir=folder / "control", img_size=SIZE_PIXELS)
    rules = control_rules(family, model, SIZE_PIXELS)
    assert rules is not None, "an edit model takes controls"
    pairs = [
        BothWays(example, swap(example, read_size(example.image_path), read_size(example.control_paths[0]), rules))
        for example in read_examples(folders_of(config), family.pixel_multiple(model), rules)
    ]
    encodings.fill_texts(list(dict.fromkeys(needed_texts(pairs, family.dropped_caption))))
    encodings.fill_pictures(list(dict.fromkeys(needed_pictures(pairs))))
    return read_pairs(pairs, encodings, family.dropped_caption)


def log_loss_ratios(
    family: ModelFamily, transformer: LoadedTransformer, pairs: Sequence[EncodedBothWays], device: torch.device
) -> list[float]:
    """Computes the log ratio of the loss as given to the loss swapped, conditioned on captions: the plain criterion."""

    def log_loss(picture: HeldOutPicture) -> Tensor:
        return losses_at(family, transformer, picture, SIGMAS, SEED, device, 1.0).mean().log()

    return [float(log_loss(pair.as_given.captioned) - log_loss(pair.swapped.captioned)) for pair in pairs]


def beyond_spread(values: Tensor) -> bool:
    """Returns whether the mean is positive beyond the spread of the values."""
    return bool(values.mean() > NUM_STANDARD_ERRORS * values.std() / len(values) ** 0.5)


def rate(num_pairs: int, warns: Callable[[list[int]], bool]) -> str:
    """Formats the share of draws of eight pairs that warn."""
    drawn = (randomness.shuffled(num_pairs, SEED, "swap check", number)[:MOST_PAIRS] for number in range(NUM_DRAWS))
    return f"{sum(map(warns, drawn)) / NUM_DRAWS:.1%}"


def report(gains: Gains, ratios: Sequence[float]) -> None:
    """Prints gains and rates of warnings, with the data as they are and swapped."""
    given, swapped, ratio = (torch.tensor(values) for values in (gains.as_given, gains.swapped, ratios))
    for name, right, wrong, plain in (("as they are", given, swapped, ratio), ("swapped", swapped, given, -ratio)):

        def warns(rows: list[int], right: Tensor = right, wrong: Tensor = wrong) -> bool:
            return swap_warning(Gains(tuple(right[rows].tolist()), tuple(wrong[rows].tolist()))) is not None

        def warns_by_loss(rows: list[int], plain: Tensor = plain) -> bool:
            return beyond_spread(plain[rows])

        print(
            f"  {name:12s} gain as given {right.mean():+.2f} +- {right.std():.2f}, swapped {wrong.mean():+.2f} +- "
            f"{wrong.std():.2f}: warns {rate(len(ratio), warns)}; by the loss alone "
            f"{rate(len(ratio), warns_by_loss)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "tiny-qwen-image-edit")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each set")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelFolder(arguments.model)
    family, placement = family_of(model), Placement(device, torch.float32)
    transformer = load_transformer(family, model, placement)
    encoder = Encoder(
        family, model, placement, PLAINLY, max_text_tokens=None, store=MemoryStore(),
        ledger=Ledger(None), console=Console(quiet=True), memo_dir=None,
    )  # fmt: skip
    for pair_set in pair_sets(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            pairs = both_ways(pair_set, Path(folder), Encodings(encoder))
        gains = measure_gains(family, transformer, pairs, SEED, device, 1.0)
        print(f"{pair_set.name}, {pair_set.caption!r}")
        report(gains, log_loss_ratios(family, transformer, pairs, device))


if __name__ == "__main__":
    main()
