"""Prompts of samples: put into the form of training examples, so that both are encoded alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pixtune.data.buckets import Framing, build_buckets, frame_picture
from pixtune.data.controls import ControlRules, frame_control
from pixtune.data.encode import shorten
from pixtune.data.encodings import Encodings, control_pictures, text_item
from pixtune.data.example_table import Example
from pixtune.data.images import read_size
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.errors import ConfigError, DataError
from pixtune.family import ModelFamily
from pixtune.plan.passes import needs_negative
from pixtune.sampler import EncodedPrompt
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder


def control_rules(family: ModelFamily, folder: ModelFolder, side: int) -> ControlRules | None:
    """Returns the family's use of control pictures of about `side` squared pixels; None where it takes none."""
    if family.max_controls == 0:
        return None
    return ControlRules(
        family.max_controls,
        partial(family.control_size, folder, side=side),
        partial(family.vision_size, side=side) if family.controls_in_text else None,
    )


def prompt_example(
    text: str, controls: Sequence[Path], size: Size, own_shape: bool, multiple: int, rules: ControlRules | None
) -> Example:
    """Puts a prompt with its control pictures into the form of a training example, so that both are encoded alike.

    Args:
        size: size of the sample, whose sides are rounded down as the stock pipelines do; see `rounded_sizes`.
        own_shape: take the last control's shape instead, at the area of `size`, as the stock edit pipelines do.

    Raises:
        DataError: a control cannot be read, or the model takes fewer.
    """
    if controls and (rules is None or len(controls) > rules.most):
        most = rules.most if rules else 0
        raise DataError(
            "a prompt has too many control pictures",
            [f"{text!r} has {len(controls)}; this model takes at most {most}."],
        )
    sizes = [read_size(path) for path in controls]
    if own_shape and sizes:
        side = round((size[0] * size[1]) ** 0.5)
        size = frame_picture(*sizes[-1], build_buckets(side, multiple), upscale=True).size
    size = round_down(size, multiple)
    whole = Framing(*size, 1.0, (0.0, 0.0, float(size[0]), float(size[1])), 0.0)
    framings = tuple(frame_control(control, size, whole, rules) for control in sizes if rules)
    return Example(text, controls[-1] if controls else Path(), text, (whole,), tuple(controls), (framings,))


def round_down(size: Size, multiple: int) -> Size:
    """Returns the largest size with sides that the model can draw.

    Raises:
        ConfigError: a side is shorter than the model's shortest.
    """
    if min(size) < multiple:
        raise ConfigError(
            "a sample of this size cannot be drawn",
            [f"It is {size[0]}x{size[1]} pixels; the model's sides are multiples of {multiple}."],
        )
    return size[0] // multiple * multiple, size[1] // multiple * multiple


def rounded_sizes(asked: Size, multiple: int) -> list[str]:
    """Writes a sentence where samples are drawn in another size than was asked for; else none."""
    drawn = round_down(asked, multiple)
    if drawn == asked:
        return []
    drawn_text, asked_text = (f"{width}x{height}" for width, height in (drawn, asked))
    return [f"samples are drawn at {drawn_text}, not {asked_text}: the model's sides are multiples of {multiple}."]


def nothing_to_edit(family: ModelFamily, prompts: Sequence[AskedPrompt], how: str) -> list[str]:
    """Writes a sentence where an edit model is to draw without a picture to edit; else none.

    Args:
        how: the user's words for giving one.
    """
    missing = [asked.text for asked in prompts if not asked.controls]
    if not family.max_controls or not missing:
        return []
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return [
        f"no picture to edit for {shorten(missing[0])}{others}: from words alone an edit model draws little. {how}."
    ]


def encode_prompt(
    family: ModelFamily,
    encodings: Encodings,
    asked: AskedPrompt,
    example: Example,
    guidance_scale: float,
) -> EncodedPrompt:
    """Encodes everything that the sampler needs of a prompt and its `prompt_example`."""
    negative = None
    if needs_negative(family, guidance_scale):
        instead = family.dropped_caption if asked.negative is None else asked.negative
        negative = encodings.text(text_item(instead, example, 0))
    return EncodedPrompt(
        example.caption,
        encodings.text(text_item(example.caption, example, 0)),
        negative,
        tuple(encodings.latents(picture).mean_BCHW for picture in control_pictures(example, 0)),
        example.framings[0].size,
        example.control_paths,
        asked.negative,
        asked.seeds,
    )
