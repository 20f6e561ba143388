"""A check by the base model, before it learns anything, of whether controls and targets were swapped.

No distance of pixels has a direction, but a model that knows the edit has one: the instruction helps it from control to
target and misleads it on the way back. So a few pairs are measured both ways, each with its caption and with the
dropped caption instead, and a caption's gain is how much it lowers the loss. Data look swapped where the caption
misleads as given and helps the other way round.

The loss itself does not show it. A picture in a style that the base knows has the lower loss whichever way it stands,
so data to learn a new style from look swapped by it, in up to a quarter of draws of eight pairs (docs/experiments.md).
A caption's gain compares a picture with itself. It shows nothing where the base does not know the edit, where the
caption does not ask for one (a trigger word, a description), and for edits that are their own inverse ("mirror it").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.data.controls import ControlRules, frame_box, frame_control, same_part, same_shape
from pixtune.data.encode import FramedPicture, TextItem
from pixtune.data.encodings import Encodings, control_pictures, target_picture, text_item
from pixtune.data.example_table import Example
from pixtune.data.images import read_size
from pixtune.engine.load import LoadedTransformer
from pixtune.family import ModelFamily
from pixtune.judging.validation import HeldOutPicture, losses_at
from pixtune.sizes import Size

MOST_PAIRS = 8
"""Number of pairs to measure. Each costs two directions x two captions x two sigmas = 8 forward passes."""

FEWEST_PAIRS = 4
"""Number of pairs below which their spread means nothing."""

SIGMAS = (0.5, 0.8)
"""Sigmas at which captions matter most: nearer to clean, the noisy picture itself shows the edit. Two serve as well as
four."""

NUM_STANDARD_ERRORS = 3.0
"""Distance in standard errors at which a mean counts: with eight pairs chance gets there once in 100 times (Student's
t of 7 degrees of freedom)."""

LEAST_GAIN = 0.02
"""Mean gain below which there is none, however steady: 2% of the loss."""


@dataclass(frozen=True)
class BothWays:
    """One pair as it is given and the other way round."""

    as_given: Example
    swapped: Example


@dataclass(frozen=True)
class Encoded:
    """One way of a pair, with its caption and without."""

    captioned: HeldOutPicture
    uncaptioned: HeldOutPicture


@dataclass(frozen=True)
class EncodedBothWays:
    """One pair, encoded both ways."""

    as_given: Encoded
    swapped: Encoded


@dataclass(frozen=True)
class Gains:
    """Decrease of the loss by captions, in its natural logarithm: one number a pair, negative where they mislead."""

    as_given: tuple[float, ...]
    swapped: tuple[float, ...]


# ---- which pairs, and their encodings


def choose_pairs(examples: Sequence[Example], rules: ControlRules | None, dropped: str, seed: int) -> list[BothWays]:
    """Chooses at most `MOST_PAIRS` captioned examples with one control of the target's shape.

    A control of another shape is a reference: it could not have been the target.

    Args:
        dropped: the family's `dropped_caption`.

    Returns:
        Pairs with their swap; none if there are fewer than `FEWEST_PAIRS`.
    """
    if rules is None:
        return []
    chosen: list[BothWays] = []
    for example in sorted(examples, key=lambda example: randomness.draw_key(seed, "swap check", example.name)):
        if len(example.control_paths) != 1 or example.caption.strip() == dropped.strip():
            continue
        target, control = read_size(example.image_path), read_size(example.control_paths[0])
        if same_shape(target, control):
            chosen.append(BothWays(example, swap(example, target, control, rules)))
        if len(chosen) == MOST_PAIRS:
            break
    return chosen if len(chosen) >= FEWEST_PAIRS else []


def swap(example: Example, target: Size, control: Size, rules: ControlRules) -> Example:
    """Returns the example in its first framing with control and target in each other's place.

    The control is cut where the target was and brought to the target's size, enlarged if need be: both ways then have
    latents of one shape and the same noise.

    Args:
        target, control: sizes of the upright originals, of one shape.
    """
    framing = example.framings[0]
    swapped_framing = frame_box(same_part(framing.crop_box, target, control), framing.size, framing.share_lost)
    return Example(
        f"{example.name}, swapped",
        example.control_paths[0],
        example.caption,
        (swapped_framing,),
        (example.image_path,),
        ((frame_control(target, control, swapped_framing, rules),),),
    )


def needed_texts(pairs: Sequence[BothWays], dropped: str) -> list[TextItem]:
    """Lists the captions to encode, and the dropped caption with the same controls."""
    ways = [way for pair in pairs for way in (pair.as_given, pair.swapped)]
    return [text_item(text, way, 0) for way in ways for text in (way.caption, dropped)]


def needed_pictures(pairs: Sequence[BothWays]) -> list[FramedPicture]:
    """Lists the targets and controls to encode."""
    ways = [way for pair in pairs for way in (pair.as_given, pair.swapped)]
    return [picture for way in ways for picture in (target_picture(way, 0), *control_pictures(way, 0))]


def read_pairs(pairs: Sequence[BothWays], encodings: Encodings, dropped: str) -> list[EncodedBothWays]:
    """Reads the encodings of `needed_texts` and `needed_pictures`."""

    def read(way: Example, name: str) -> Encoded:
        latents_1CHW = encodings.latents(target_picture(way, 0)).mean_BCHW
        controls = tuple(encodings.latents(picture).mean_BCHW for picture in control_pictures(way, 0))
        captioned, uncaptioned = (
            HeldOutPicture(name, latents_1CHW, encodings.text(text_item(text, way, 0)), controls)
            for text in (way.caption, dropped)
        )
        return Encoded(captioned, uncaptioned)

    # One name for both ways: it decides the noise.
    return [
        EncodedBothWays(read(pair.as_given, pair.as_given.name), read(pair.swapped, pair.as_given.name))
        for pair in pairs
    ]


# ---- the measurement and its warning


def measure_gains(
    family: ModelFamily,
    transformer: LoadedTransformer,
    pairs: Sequence[EncodedBothWays],
    seed: int,
    device: torch.device,
    guidance: float,
    after_pass: Callable[[], None] = lambda: None,
) -> Gains:
    """Measures how much captions help this model in both directions, at fixed noise and sigmas."""

    def gain(way: Encoded) -> float:
        uncaptioned, captioned = (
            losses_at(family, transformer, picture, SIGMAS, seed, device, guidance, None, after_pass).double().log()
            for picture in (way.uncaptioned, way.captioned)
        )
        return float((uncaptioned - captioned).mean())

    return Gains(tuple(gain(pair.as_given) for pair in pairs), tuple(gain(pair.swapped) for pair in pairs))


def swap_warning(gains: Gains) -> str | None:
    """Returns a warning for the user, or None where nothing speaks for a swap.

    Captions must help the other way round, and by more than as given, both beyond the spread of pairs, since one odd
    pair is no evidence. As given they must mislead on average, or an edit that is its own inverse would be blamed for a
    small difference. That mean needs no test: some pairs may be alike in both directions (a grey picture to be made
    grey), which widens its spread and is no evidence against a swap.
    """
    as_given_P, swapped_P = torch.tensor(gains.as_given), torch.tensor(gains.swapped)
    misled = bool(as_given_P.mean() < -LEAST_GAIN)
    if not (misled and _clearly_positive(swapped_P) and _clearly_positive(swapped_P - as_given_P)):
        return None
    return (
        f"controls and targets look swapped: on {len(as_given_P)} pairs measured with the base model, captions change "
        f"its loss by {_loss_change(as_given_P)} as the data are given and by {_loss_change(swapped_P)} the other way "
        "round. The target (data_config.img_dir) is the picture after the edit, the control (data_config.control_dir) "
        "the one before it. Exchange the two folders, or reword the captions if they tell the way back."
    )


def _clearly_positive(gains_P: Tensor) -> bool:
    """Returns whether the mean is notable and beyond the spread of pairs. False for losses that are no numbers."""
    mean, standard_error = float(gains_P.mean()), float(gains_P.std()) / len(gains_P) ** 0.5
    return mean > LEAST_GAIN and mean > NUM_STANDARD_ERRORS * standard_error


def _loss_change(gains_P: Tensor) -> str:
    """Formats the mean gain as a change of the loss: ln 2 is -50%."""
    return f"{gains_P.mean().neg().expm1():+.0%}"
