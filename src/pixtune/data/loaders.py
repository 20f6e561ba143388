"""Pictures, captions and controls as a torch `DataLoader`, for a user's own scripts.

The trainer reads encoded pictures (`batches.py`). Here the same data set comes before encoding, with the same pairing,
sizes, crops and order, so that another script sees what the trainer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pixtune import randomness
from pixtune.config.folders import folders_of
from pixtune.config.sections import DataConfig, FolderConfig
from pixtune.data.controls import usual_rules
from pixtune.data.encodings import control_pictures, target_picture
from pixtune.data.examples import read_examples, used_examples
from pixtune.data.images import to_pixels
from pixtune.data.order import BatchOrder, Turn
from pixtune.errors import ConfigError

MULTIPLE = 16
"""Number of pixels that picture sides are multiples of, as the full-size models need."""


class CaptionedTurn(NamedTuple):
    """One example's turn in a batch, and the fate of its caption."""

    turn: Turn
    dropped: bool
    """Whether the empty caption replaces its own."""


class PictureBatch(NamedTuple):
    """One batch of the loader."""

    pixels_B3HW: Tensor
    """Pixels of the targets, in [-1, 1]."""
    captions: list[str]
    controls: list[Tensor]
    """Pixels of the control pictures, a tensor of shape B3HW for each, in [-1, 1]; none for text-to-image."""


def loader(train_batch_size: int, num_workers: int, seed: int = 0, **data_config: Any) -> DataLoader[Any]:
    """Opens a data set as `PictureBatch`es of one size each. Each pass is an epoch with its own order and crops.

    Args:
        seed: decides order, sizes, crops, flips and captions.
        data_config: keys of the config's `data_config`.

    Raises:
        ConfigError: keys that `data_config` does not have, or values of a wrong type.
        DataError: all problems of the data set, together.
    """
    pictures = Pictures(read_data_config({**data_config, "train_batch_size": train_batch_size}), seed)
    order = BatchOrder(
        [[example.signature(v) for v in range(len(example.framings))] for example in pictures.examples],
        train_batch_size, seed, [example.use for example in pictures.examples],
    )  # fmt: skip
    batches = EpochBatches(order, pictures.config.caption_dropout_rate)
    return DataLoader(pictures, batch_sampler=batches, num_workers=num_workers, collate_fn=_stack)


_FIELDS = {*DataConfig.model_fields, *FolderConfig.model_fields}


def read_data_config(values: Mapping[str, Any]) -> DataConfig:
    """Checks keys and values by the config's own schema.

    Raises:
        ConfigError: all problems, together.
    """
    from pydantic import ValidationError

    try:
        return DataConfig.model_validate(dict(values))
    except ValidationError as error:
        wanted: dict[str, list[str]] = {}
        for details in error.errors():
            is_unknown = details["type"] == "extra_forbidden"  # else, what is no field is a kind of value
            names = [word for word in details["loc"] if is_unknown or isinstance(word, int) or word in _FIELDS]
            place = f"{'.'.join(map(str, names))} is {details['input']!r}: " if names else ""
            problem = details["msg"] if names else str(details["ctx"]["error"])
            wanted.setdefault(place, []).append(problem)
        faults = [f"{place}{' or '.join(problems)}" for place, problems in wanted.items()]
        raise ConfigError("data_config is wrong", faults) from error


class Pictures(Dataset[tuple[Tensor, str, list[Tensor]]]):
    """Pictures by turn: pixels of shape 3HW in [-1, 1], the caption, and the controls' pixels."""

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.config = config
        folders = folders_of(config)
        has_controls = any(folder.has_controls for folder in folders)
        rules = usual_rules(config.control_size, MULTIPLE) if has_controls else None
        self.examples = used_examples(read_examples(folders, MULTIPLE, rules, seed=seed))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, captioned: CaptionedTurn) -> tuple[Tensor, str, list[Tensor]]:
        turn, dropped = captioned
        example = self.examples[turn.example]
        controls = [to_pixels(picture.read()) for picture in control_pictures(example, turn.variant)]
        pixels_3HW = to_pixels(target_picture(example, turn.variant).read())
        return pixels_3HW, "" if dropped else example.captions[turn.caption], controls


class EpochBatches(Sampler[list[CaptionedTurn]]):
    """Batches of one epoch after the other, in the trainer's order."""

    def __init__(self, order: BatchOrder, dropout_rate: float) -> None:
        self.order, self.dropout_rate, self.epoch = order, dropout_rate, 0

    def __len__(self) -> int:
        return len(self.order.epoch(self.epoch))

    def __iter__(self) -> Iterator[list[CaptionedTurn]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for number, members in enumerate(self.order.epoch(epoch)):
            yield [
                CaptionedTurn(turn, self._is_dropped(turn, epoch, number, slot)) for slot, turn in enumerate(members)
            ]

    def _is_dropped(self, turn: Turn, *place: int) -> bool:
        rate = self.order.uses[turn.example].drops(self.dropout_rate)
        return randomness.uniform(self.order.seed, "caption dropout", *place) < rate


def _stack(rows: list[tuple[Tensor, str, list[Tensor]]]) -> PictureBatch:
    pixels, captions, controls = zip(*rows, strict=True)
    return PictureBatch(
        torch.stack(pixels), list(captions), [torch.stack(same) for same in zip(*controls, strict=True)]
    )
