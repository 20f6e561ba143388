"""How text encoders and autoencoder are held while captions and pictures are encoded: a pure decision, no torch.

Both come before the training step's own plan and leave room for it, so they are planned against the whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.plan.footprint import BYTES_PER_WEIGHT

ON_CPU = "cpu"
KEPT_SHARE = 0.08
"""Most of a text encoder's weights that no format touches: embeddings and norms (7.7% of Qwen2.5-VL 7B without what is
not read of it, 3.5% of CLIP-L and T5-XXL together)."""
PIECES_BYTES = GIB // 4
"""A piece of a layer in full precision, as `weight_only.PIECE_WEIGHTS` has it, with what unpacks it."""
TEXT_BYTES_PER_TOKEN = 480 * 1024
"""Working memory of a text encoder in 16 bits. Measured on an H100 at full size: Qwen2.5-VL 7B 199 KiB allocated and up
to 481 reserved, T5-XXL at 512 tokens 464 and 485, since it holds its attention in fp32."""
TEXT_TOKENS = 512
"""Assumed of the longest caption: as many as the stock pipelines take."""
CHARACTERS_PER_TOKEN = 3
"""Of a caption longer than that, at the least."""
PIXELS_PER_VISION_TOKEN = 28 * 28
"""Of the text encoders that see pictures: patches of 14 pixels, four to a token."""
DECODING_BYTES_PER_PIXEL = 4750
"""Of a picture on its way out of an autoencoder in bf16, besides the weights. Measured on an H100 with Qwen-Image's at
512 to 1328 pixels a side: 4230 allocated, so much reserved. Others have the same widths and no time axis."""
TILE_SIDES = (1024, 768, 512, 384, 256)
"""In pixels, the largest that fits is taken: the fewer the seams, the nearer to the whole picture."""


@dataclass(frozen=True)
class EncoderSizes:
    """What is to be encoded with what."""

    text_bytes: int
    """Weights of all text encoders in the run's number format; 0: there is none."""
    autoencoder_bytes: int
    caption_tokens: int = TEXT_TOKENS
    """Of the longest caption, with those of the control pictures beside it."""
    picture_pixels: int = 0
    """Of the largest picture."""
    element_bytes: int = 2
    """Of the run's number format."""
    encoding_bytes_per_pixel: int = 3150
    """Of a picture on its way into the autoencoder in bf16, besides the weights (`ModelFamily`)."""


@dataclass(frozen=True)
class EncoderPlan:
    """The decision. Stored in every checkpoint, since features of another format would be other data."""

    text_format: str | None
    """Of the text encoder's linear layers: "int8", "nf4", or None, the run's own; "cpu": the run's own, on the CPU."""
    caption_batch: int
    picture_batch: int
    tile_pixels: int | None
    """Pictures are encoded in tiles of this side; None: whole."""
    reasons: tuple[str, ...] = ()

    @property
    def weights_format(self) -> str | None:
        """The text format as far as it decides features: where they are computed does not."""
        return None if self.text_format == ON_CPU else self.text_format

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}


def encode_plainly(batch_size: int) -> EncoderPlan:
    """Everything as it is loaded: what a CPU does."""
    return EncoderPlan(None, batch_size, batch_size, None)


def plan_encoders(
    usable_bytes: int,
    sizes: EncoderSizes,
    batch_size: int,
    may_quantize: bool = True,
    text_stays: bool = False,
    must_stay: bool = False,
    host_bytes: int | None = None,
) -> EncoderPlan:
    """The most exact way to encode that fits a GPU.

    Args:
        usable_bytes: what torch's allocator may use.
        host_bytes: what may be taken of the host's memory; None: enough.
        batch_size: most captions, or pictures, encoded together.
        text_stays: the text encoder is still on the device when pictures are encoded.
        must_stay: the config demands that it is, so the CPU is no way out.

    Raises:
        PlanError: `must_stay` with a text encoder that fits in no format, or the host lacks memory for it.
    """
    text_format, caption_batch, reasons = _choose_text(usable_bytes, sizes, batch_size, may_quantize)
    if text_format == ON_CPU and must_stay:
        least = text_peak_bytes(sizes, _formats(may_quantize)[-1], 1)
        raise PlanError(
            f"disable_cpu_offload keeps the text encoder on the GPU, where it needs {least / GIB:.1f} GiB at the least "
            f"and {usable_bytes / GIB:.1f} GiB are usable. Leave disable_cpu_offload out: captions are then encoded on "
            "the CPU."
        )
    on_host = text_host_bytes(sizes, text_format)
    if host_bytes is not None and on_host > host_bytes:
        raise PlanError(_host_lacks(usable_bytes, sizes, _formats(may_quantize)[-1], on_host, host_bytes))
    beside = text_weight_bytes(sizes, text_format) if text_stays else 0
    room = usable_bytes - beside - sizes.autoencoder_bytes
    tile_pixels = fitting_tile(sizes.picture_pixels, room, partial(encoding_bytes, sizes))
    picture_batch = _largest_batch(room, encoding_bytes(sizes, sizes.picture_pixels, tile_pixels), batch_size)
    if tile_pixels:
        reasons.append(
            f"pictures in tiles of {tile_pixels} pixels: one of {sizes.picture_pixels / 1e6:.1f} megapixels would need "
            f"{encoding_bytes(sizes, sizes.picture_pixels) / GIB:.1f} GiB beside the weights"
        )
    elif picture_batch < batch_size and sizes.picture_pixels:
        reasons.append(f"{picture_batch} pictures at a time instead of {batch_size}: more would not fit")
    return EncoderPlan(text_format, caption_batch, picture_batch, tile_pixels, tuple(reasons))


def _choose_text(
    usable_bytes: int, sizes: EncoderSizes, batch_size: int, may_quantize: bool
) -> tuple[str | None, int, list[str]]:
    if not sizes.text_bytes:
        return None, batch_size, []
    plain_gib, have_gib = sizes.text_bytes / GIB, usable_bytes / GIB
    for text_format in _formats(may_quantize):
        if text_peak_bytes(sizes, text_format, 1) > usable_bytes:
            continue
        idle = text_peak_bytes(sizes, text_format, 0)
        batch = _largest_batch(usable_bytes - idle, text_peak_bytes(sizes, text_format, 1) - idle, batch_size)
        reasons = [f"{batch} captions at a time instead of {batch_size}"] if batch < batch_size else []
        if text_format:
            bits = {"int8": "8", "nf4": "4"}[text_format]
            weight_gib = text_weight_bytes(sizes, text_format) / GIB
            reasons.insert(
                0,
                f"text encoder in {bits} bits ({text_format} weights, {weight_gib:.1f} GiB): it weighs {plain_gib:.1f} "
                f"GiB and {have_gib:.1f} GiB are usable; its features differ a little",
            )
        return text_format, batch, reasons
    why = "disable_quantization leaves no other way" if not may_quantize else "even in 4 bits it would not fit"
    reason = (
        f"captions are encoded on the CPU, which is slow: the text encoder weighs {plain_gib:.1f} GiB, {have_gib:.1f} "
        f"GiB are usable, and {why}. A cache that a larger GPU filled can be copied (data_config.cache_dir)"
    )
    return ON_CPU, batch_size, [reason]


def _host_lacks(usable_bytes: int, sizes: EncoderSizes, least_format: str | None, on_host: int, host_bytes: int) -> str:
    least = text_peak_bytes(sizes, least_format, 1)
    if least <= usable_bytes:
        why, way_out = "to be brought to the GPU in fp32", "mixed_precision=bf16 needs none for it"
    else:
        why = f"to work on the CPU, since the GPU has {usable_bytes / GIB:.1f} and {least / GIB:.1f} would be needed"
        way_out = "A cache that a larger machine filled can be copied (data_config.cache_dir)"
    return (
        f"the text encoder takes {on_host / GIB:.1f} GiB of host memory {why}, and {host_bytes / GIB:.1f} GiB may be "
        f"taken: {(on_host - host_bytes) / GIB:.1f} GiB are missing. Close other programs. {way_out}."
    )


def _formats(may_quantize: bool) -> tuple[str | None, ...]:
    """Most exact first."""
    return (None, "int8", "nf4") if may_quantize else (None,)


def _largest_batch(room_bytes: int, each_bytes: int, most: int) -> int:
    """At least one: whether one fits is another question."""
    return max(1, min(most, room_bytes // each_bytes)) if each_bytes else most


def more_exact(plan: EncoderPlan) -> Iterator[EncoderPlan]:
    """Plans whose captions, if they are encoded already, are better than those the plan would make; best first.

    One that turns out to be missing after all, a prompt that is added to a run, is encoded on the CPU: to the run's own
    format there is no other way here.
    """
    formats = _formats(may_quantize=True)
    for text_format in formats[: formats.index(plan.weights_format)]:
        reason = f"captions are in the cache in {text_format or 'full'} precision, more than this GPU would have given"
        yield replace(plan, text_format=text_format or ON_CPU, reasons=(reason,))


# ---- bytes


def text_weight_bytes(sizes: EncoderSizes, text_format: str | None) -> int:
    """Of the text encoders on the device."""
    if text_format == ON_CPU:
        return 0
    if text_format is None:
        return sizes.text_bytes
    num_weights = sizes.text_bytes / sizes.element_bytes
    each = KEPT_SHARE * sizes.element_bytes + (1 - KEPT_SHARE) * BYTES_PER_WEIGHT[text_format]
    return round(num_weights * each)


def text_peak_bytes(sizes: EncoderSizes, text_format: str | None, num_captions: int) -> int:
    """Most on the device while so many captions are encoded together."""
    if text_format == ON_CPU:
        return 0
    pieces = PIECES_BYTES if text_format else 0
    working = num_captions * sizes.caption_tokens * TEXT_BYTES_PER_TOKEN * sizes.element_bytes // 2
    return text_weight_bytes(sizes, text_format) + pieces + working


def text_host_bytes(sizes: EncoderSizes, text_format: str | None) -> int:
    """Host memory that the text encoders take.

    On their way to a device, weights of 16 bits are views of their mapped files, which the kernel drops when it needs
    the pages; in fp32 they are copies. Weights that work on the CPU must stay in memory either way: else each batch of
    captions would read them from the disk again.
    """
    if text_format == ON_CPU:
        return sizes.text_bytes + sizes.caption_tokens * TEXT_BYTES_PER_TOKEN * sizes.element_bytes // 2
    return sizes.text_bytes if sizes.element_bytes > 2 else 0


def encoding_bytes(sizes: EncoderSizes, num_pixels: int, tile_pixels: int | None = None) -> int:
    """Working memory of encoding so many pixels at once, or one tile after the other."""
    return _at_once(num_pixels, tile_pixels) * sizes.encoding_bytes_per_pixel


def decoding_bytes(num_pixels: int, tile_pixels: int | None = None) -> int:
    """The same of decoding."""
    return _at_once(num_pixels, tile_pixels) * DECODING_BYTES_PER_PIXEL


def _at_once(num_pixels: int, tile_pixels: int | None) -> int:
    return min(num_pixels, tile_pixels * tile_pixels) if tile_pixels else num_pixels


def fitting_tile(num_pixels: int, room_bytes: int, needed: Callable[[int], int]) -> int | None:
    """Side of the tiles in which a picture passes the autoencoder; None: it fits whole.

    Where not even the smallest tile fits that is returned: nothing needs less.

    Args:
        needed: by a number of pixels, as `decoding_bytes`.
    """
    if needed(num_pixels) <= room_bytes:
        return None
    fitting = (side for side in TILE_SIDES if needed(side * side) <= room_bytes)
    return next(fitting, TILE_SIDES[-1])


def count_caption_tokens(most_characters: int, vision_pixels: int) -> int:
    """An upper estimate for a caption and the control pictures that the text encoder sees beside it."""
    return max(TEXT_TOKENS, most_characters // CHARACTERS_PER_TOKEN) + vision_pixels // PIXELS_PER_VISION_TOKEN
