"""The folders of a config as people count them: pictures, sizes, turns and steps of an epoch. Reads headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pixtune.config.folders import Folder, folders_of, prior_folder
from pixtune.config.schema import TrainConfig
from pixtune.data.controls import ControlRules
from pixtune.data.example_table import Example
from pixtune.data.examples import folders_apart, read_examples, shared_pictures, used_examples
from pixtune.data.held_out import hold_out
from pixtune.data.order import BatchOrder
from pixtune.data.shares import EPOCHS_COUNTED, draws_an_epoch
from pixtune.inputs.printing import one_line
from pixtune.sizes import Size


@dataclass(frozen=True)
class FolderCount:
    """Share of one folder in an epoch."""

    folder: Folder
    num_pictures: int
    sizes: dict[Size, float]
    """Number of pictures of each training size; a picture of several sizes counts for each by its share of turns."""
    num_captions: int
    """Number of captions, and of drawn forms of them, of all pictures together."""
    turns: float
    """Number of turns of an epoch, on average, those that fill micro-batches included."""


@dataclass(frozen=True)
class FolderListing:
    """Shares of all folders of a config in an epoch, and its length, on one GPU."""

    folders: tuple[FolderCount, ...]
    steps: float
    """Optimizer steps of an epoch, on average."""
    pictures_per_step: int
    notes: tuple[str, ...]

    def render(self) -> str:
        """Formats the listing as plain text whose lines no name can forge."""
        total = sum(each.turns for each in self.folders)
        lines = [f"An epoch: {_number(self.steps)} steps of {self.pictures_per_step} pictures on one GPU"]
        for each in self.folders:
            share = each.turns / total if total else 0.0
            repeats = f"{each.folder.repeats:g} times an epoch" if each.folder.repeats != 1 else "once an epoch"
            repeats = repeats if each.folder.loss_weight else "not used at a loss_weight of 0"
            captions = f", {each.num_captions} captions" if each.num_captions > each.num_pictures else ""
            mirrored = ", half of the turns mirrored" if each.folder.flip else ""
            pictures = f"{each.num_pictures} picture{'s' * (each.num_pictures != 1)}"
            lines.append(
                f"  {one_line(each.folder.label or str(each.folder.img_dir))}: {pictures}{captions}, "
                f"{repeats}: {_number(each.turns)} turns, {share:.0%} of all{mirrored}"
            )
            sizes = sorted(each.sizes.items(), key=lambda item: -item[1])
            lines += [f"    {width} x {height}: {_number(count)}" for (width, height), count in sizes]
        lines += [f"  {one_line(note)}" for note in self.notes]
        return "\n".join(lines)


def count_folders(config: TrainConfig, multiple: int, rules: ControlRules | None) -> FolderListing:
    """Counts what each folder of a config gives to an epoch, without the pictures that are held out.

    Args:
        multiple, rules: as for `examples.read_examples`.

    Raises:
        DataError: all problems of all folders, together.
    """
    folders, apart, prior = list(folders_of(config.data_config)), folders_apart(config), config.prior_preservation
    examples = read_examples(folders, multiple, rules, apart, seed=config.seed)
    training, held_out = hold_out(used_examples(examples), config)
    own = training
    if prior.folder is not None:
        folders.append(prior_folder(config.data_config, prior, prior.folder))
        training = [*training, *read_examples(folders[-1:], multiple, rules, apart, seed=config.seed)]
    used = [example for example in training if example.is_used]
    training = [*training, *(example for example in examples if not example.is_used)]
    batch_size = config.batch_size
    order = BatchOrder(
        [[example.signature(variant) for variant in range(len(example.framings))] for example in used],
        batch_size, config.seed, [example.use for example in used],
    )  # fmt: skip
    draws = {example.name: number for example, number in zip(used, draws_an_epoch(order), strict=True)}
    epochs = 1 if order.is_even else EPOCHS_COUNTED
    steps = order.epoch_end(epochs - 1) / epochs / config.gradient_accumulation_steps
    notes = []
    if len(folders) > 1 and (sentence := shared_pictures(examples)):
        notes.append(sentence)
    if prior.prompts:
        notes.append("Regularization pictures, which the base model draws before the first step, are not counted.")
    if held_out:
        notes.append(f"{len(held_out)} of {len(held_out) + len(own)} pictures are held out, and not counted.")
    return FolderListing(
        tuple(_count(folder, [each for each in training if each.folder == folder.label], draws) for folder in folders),
        steps,
        batch_size * config.gradient_accumulation_steps,
        tuple(notes),
    )


def _count(folder: Folder, examples: Sequence[Example], draws: dict[str, float]) -> FolderCount:
    sizes: dict[Size, float] = {}
    for example in examples:
        shares = example.use.shares or [1 / len(example.framings)] * len(example.framings)
        for framing, share in zip(example.framings, shares, strict=True):
            sizes[framing.size] = sizes.get(framing.size, 0.0) + share
    return FolderCount(
        folder,
        len(examples),
        sizes,
        sum(len(set(example.captions)) for example in examples),
        sum(draws.get(example.name, 0.0) for example in examples),
    )


def _number(value: float) -> str:
    """Formats a mean without digits that say nothing."""
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"
