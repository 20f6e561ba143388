"""Plan of encoding: how text encoders and autoencoder are held while captions and pictures are encoded. No torch.

Both work before the training step and leave room for it, so they are planned against the whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.plan.footprint import BYTES_PER_WEIGHT

ON_CPU = "cpu"
KEPT_SHARE = 0.08
"""Largest share of a text encoder's weights that no format touches: embeddings and norms (7.7% of those weights of
Qwen2.5-VL 7B that are read, 3.5% of CLIP-L and T5-XXL together)."""
PIECES_BYTES = GIB // 4
"""Bytes of a layer's piece in full precision (`weight_only.PIECE_WEIGHTS`), with what unpacks it."""
TEXT_BYTES_PER_TOKEN = 480 * 1024
"""Working memory of a text encoder in 16 bits, per token of a caption. Measured on an H100 at full size: Qwen2.5-VL
7B 199 KiB allocated and up to 481 reserved, T5-XXL at 512 tokens 464 and 485, since it holds its attention in fp32."""
TEXT_TOKENS = 512
"""Length of the longest caption where it is not known: what the stock pipelines take at most."""
CHARACTERS_PER_TOKEN = 3
"""Characters per token, at least, in captions that are longer than `TEXT_TOKENS`."""
PIXELS_PER_VISION_TOKEN = 28 * 28
"""Pixels per token in text encoders that see pictures: patches of 14 pixels, four to a token."""
DECODING_BYTES_PER_PIXEL = 4750
"""Working memory per pixel that a bf16 autoencoder decodes. Measured on an H100 with Qwen-Image's at 512 to 1328 pixels
a side: 4230 allocated, 4750 reserved. Others have the same widths and no time axis."""
TILE_SIDES = (1024, 768, 512, 384, 256)
"""Sides of tiles in pixels. The largest that fits is taken: the fewer the seams, the nearer to the whole picture."""

COPY_A_CACHE = "A cache that a larger machine has filled can be copied (data_config.cache_dir)."


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of the encoders and of the largest items that they encode."""

    text_bytes: int
    """Weights of all text encoders in the run's number format; 0: there is none."""
    autoencoder_bytes: int
    caption_tokens: int = TEXT_TOKENS
    """Tokens of the longest caption, with those of the control pictures beside it."""
    picture_pixels: int = 0
    """Pixels of the largest picture."""
    element_bytes: int = 2
    """Bytes of a number in the run's format."""
    encoding_bytes_per_pixel: int = 3150
    """Working memory per pixel that the autoencoder encodes in bf16 (`ModelFamily`)."""


@dataclass(frozen=True)
class EncoderPlan:
    """Decision on how a run encodes. Stored in every checkpoint: features of another format would be other data."""

    text_format: str | None = field(metadata={"choices": ("int8", "nf4", ON_CPU)})
    """Format of the text encoder's linear layers: "int8", "nf4" or None, the run's own; "cpu": its own, on the CPU."""
    tile_pixels: int | None
    """Side of the tiles in which pictures are encoded; None: whole."""
    reasons: tuple[str, ...] = ()

    @property
    def weights_format(self) -> str | None:
        """Text format as far as features depend on it: they do not depend on where they are computed."""
        return None if self.text_format == ON_CPU else self.text_format

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}


PLAINLY = EncoderPlan(None, None)
"""Plan of a CPU: everything is encoded as it is loaded."""

FORMER_FIELDS = ("caption_batch", "picture_batch")
"""Fields of plans in checkpoints of version 0.1.0, which encoded several captions, or pictures, together."""


def without_former_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the fields of a stored plan that plans no longer have."""
    return {name: value for name, value in values.items() if name not in FORMER_FIELDS}


def plan_encoders(
    usable_bytes: int,
    sizes: EncoderSizes,
    may_quantize: bool = True,
    text_stays: bool = False,
    must_stay: bool = False,
    host_bytes: int | None = None,
) -> EncoderPlan:
    """Chooses the most exact way to encode that fits a GPU.

    Args:
        usable_bytes: device memory that torch's allocator may use.
        may_quantize: the text encoder may have fewer bits where it does not fit otherwise.
        text_stays: the text encoder is still on the device when pictures are encoded.
        must_stay: the config demands that it is, so the CPU is no way out.
        host_bytes: host memory that may be taken; None: it is enough.

    Raises:
        PlanError: the text encoder fits in no format and `must_stay`, or the host lacks memory for it.
    """
    text_format, reasons = _choose_text(usable_bytes, sizes, may_quantize)
    on_host = text_host_bytes(sizes, text_format)
    lacks_host = host_bytes is not None and on_host > host_bytes
    if text_format == ON_CPU and must_stay:
        least = text_peak_bytes(sizes, _formats(may_quantize)[-1])
        way_out = "Leave disable_cpu_offload out: captions are then encoded on the CPU."
        raise PlanError(
            f"disable_cpu_offload keeps the text encoder on the GPU, where it needs at least {least / GIB:.1f} GiB and "
            f"{usable_bytes / GIB:.1f} GiB are usable. {COPY_A_CACHE if lacks_host else way_out}"
        )
    if host_bytes is not None and lacks_host:
        raise PlanError(_host_lacks(usable_bytes, sizes, _formats(may_quantize)[-1], on_host, host_bytes))
    beside = text_weight_bytes(sizes, text_format) if text_stays else 0
    room = usable_bytes - beside - sizes.autoencoder_bytes
    tile_pixels = fitting_tile(sizes.picture_pixels, room, partial(encoding_bytes, sizes))
    if tile_pixels:
        reasons.append(
            f"pictures are encoded in tiles of {tile_pixels} pixels: {sizes.picture_pixels / 1e6:.1f} megapixels at "
            f"once would need {encoding_bytes(sizes, sizes.picture_pixels) / GIB:.1f} GiB besides the weights"
        )
    return EncoderPlan(text_format, tile_pixels, tuple(reasons))


def _choose_text(usable_bytes: int, sizes: EncoderSizes, may_quantize: bool) -> tuple[str | None, list[str]]:
    if not sizes.text_bytes:
        return None, []
    plain_gib, have_gib = sizes.text_bytes / GIB, usable_bytes / GIB
    for text_format in _formats(may_quantize):
        if text_peak_bytes(sizes, text_format) > usable_bytes:
            continue
        if text_format is None:
            return None, []
        bits = {"int8": "8", "nf4": "4"}[text_format]
        weight_gib = text_weight_bytes(sizes, text_format) / GIB
        reason = (
            f"text encoder in {bits} bits ({text_format} weights, {weight_gib:.1f} GiB): unquantized, it weighs "
            f"{plain_gib:.1f} GiB, and {have_gib:.1f} GiB are usable; its features differ a little"
        )
        return text_format, [reason]
    why = "even in 4 bits it would not fit" if may_quantize else "disable_quantization leaves no other way"
    reason = (
        f"captions are encoded on the CPU, which is slow: the text encoder weighs {plain_gib:.1f} GiB, {have_gib:.1f} "
        f"GiB are usable, and {why}. A cache that a larger GPU has filled can be copied (data_config.cache_dir)"
    )
    return ON_CPU, [reason]


def _host_lacks(usable_bytes: int, sizes: EncoderSizes, least_format: str | None, on_host: int, host_bytes: int) -> str:
    least = text_peak_bytes(sizes, least_format)
    if least <= usable_bytes:
        why, way_out = "on its way to the GPU in fp32", "Or set mixed_precision=bf16, which takes none for it."
    else:
        why = f"to work on the CPU, since it needs {least / GIB:.1f} GiB of the GPU, which has {usable_bytes / GIB:.1f}"
        way_out = COPY_A_CACHE
    return (
        f"the text encoder takes {on_host / GIB:.1f} GiB of host memory {why}, and {host_bytes / GIB:.1f} GiB may be "
        f"taken: {(on_host - host_bytes) / GIB:.1f} GiB are missing. Close other programs. {way_out}"
    )


def _formats(may_quantize: bool) -> tuple[str | None, ...]:
    """Returns the formats of a text encoder, the most exact first."""
    return (None, "int8", "nf4") if may_quantize else (None,)


def more_exact(plan: EncoderPlan) -> Iterator[EncoderPlan]:
    """Yields plans whose captions, if they are encoded already, are better than those of `plan`; the best first.

    A caption that turns out to be missing after all, such as a prompt that is added to a run, is encoded on the CPU:
    the GPU offers no way to the run's own format.
    """
    formats = _formats(may_quantize=True)
    for text_format in formats[: formats.index(plan.weights_format)]:
        reason = f"captions are in the cache in {text_format or 'full'} precision, better than this GPU would make them"
        yield replace(plan, text_format=text_format or ON_CPU, reasons=(reason,))


# ---- bytes


def text_weight_bytes(sizes: EncoderSizes, text_format: str | None) -> int:
    """Returns the device memory of the text encoders' weights."""
    if text_format == ON_CPU:
        return 0
    if text_format is None:
        return sizes.text_bytes
    num_weights = sizes.text_bytes / sizes.element_bytes
    each = KEPT_SHARE * sizes.element_bytes + (1 - KEPT_SHARE) * BYTES_PER_WEIGHT[text_format]
    return round(num_weights * each)


def text_peak_bytes(sizes: EncoderSizes, text_format: str | None) -> int:
    """Returns the peak of device memory while the longest caption is encoded."""
    if text_format == ON_CPU:
        return 0
    pieces = PIECES_BYTES if text_format else 0
    working = sizes.caption_tokens * TEXT_BYTES_PER_TOKEN * sizes.element_bytes // 2
    return text_weight_bytes(sizes, text_format) + pieces + working


def text_host_bytes(sizes: EncoderSizes, text_format: str | None) -> int:
    """Returns the host memory that the text encoders take, in bytes.

    On their way to a device, weights of 16 bits are views of their mapped files, which the kernel drops when it needs
    the pages; in fp32 they are copies. Weights that work on the CPU must stay in memory either way: otherwise each
    caption would read them from the disk again.
    """
    if text_format == ON_CPU:
        return sizes.text_bytes + sizes.caption_tokens * TEXT_BYTES_PER_TOKEN * sizes.element_bytes // 2
    return sizes.text_bytes if sizes.element_bytes > 2 else 0


def encoding_bytes(sizes: EncoderSizes, num_pixels: int, tile_pixels: int | None = None) -> int:
    """Returns the working memory of encoding `num_pixels` at once, or one tile after the other."""
    return _at_once(num_pixels, tile_pixels) * sizes.encoding_bytes_per_pixel


def decoding_bytes(num_pixels: int, tile_pixels: int | None = None) -> int:
    """Returns the working memory of decoding `num_pixels` at once, or one tile after the other."""
    return _at_once(num_pixels, tile_pixels) * DECODING_BYTES_PER_PIXEL


def _at_once(num_pixels: int, tile_pixels: int | None) -> int:
    return min(num_pixels, tile_pixels * tile_pixels) if tile_pixels else num_pixels


def fitting_tile(num_pixels: int, room_bytes: int, needed: Callable[[int], int]) -> int | None:
    """Returns the side of the tiles in which a picture passes the autoencoder; None: it fits whole.

    Where not even the smallest tile fits, that one is returned: nothing needs less.

    Args:
        needed: bytes by a number of pixels, for example `decoding_bytes`.
    """
    if needed(num_pixels) <= room_bytes:
        return None
    fitting = (side for side in TILE_SIDES if needed(side * side) <= room_bytes)
    return next(fitting, TILE_SIDES[-1])


def count_caption_tokens(most_characters: int, vision_pixels: int) -> int:
    """Returns an upper estimate of the tokens of a caption and the control pictures that its text encoder sees."""
    return max(TEXT_TOKENS, most_characters // CHARACTERS_PER_TOKEN) + vision_pixels // PIXELS_PER_VISION_TOKEN
