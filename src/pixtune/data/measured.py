"""Training examples in the form in which held-out pictures are measured."""

from __future__ import annotations

from pixtune.data.batches import ExampleReader
from pixtune.judging.validation import HeldOutPicture


def measured_example(reader: ExampleReader, example: int) -> HeldOutPicture:
    """Reads one training example, in its first framing and with its first caption, as a picture to measure."""
    return HeldOutPicture(
        reader.names[example],
        reader.read_latents(example, 0).mean_BCHW,
        reader.read_text(example, 0, 0),
        tuple(reader.read_controls(example, 0)),
        reader.read_weights(example, 0) if reader.read_weights else None,
    )
