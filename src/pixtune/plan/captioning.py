"""Plan of `pixtune caption`: how the captioner is held, and how many pictures it describes at once. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pixtune.errors import PlanError
from pixtune.family import CaptionerWeights
from pixtune.hardware.facts import GIB
from pixtune.plan.encoders import ON_CPU, PIECES_BYTES, TEXT_BYTES_PER_TOKEN
from pixtune.plan.footprint import BYTES_PER_WEIGHT

MOST_AT_ONCE = 16
"""Number of pictures at once beyond which little time is gained: each further token reads all weights once, whatever
the number of pictures."""
AT_ONCE_ON_CPU = 4
"""Number of pictures at once on a CPU, whose arithmetic, and not its memory's bandwidth, takes the time."""
CACHE_COPIES = 2
"""Keys and values in memory, in sizes of the cache: it grows by being copied, a layer at a time, and leaves gaps."""
BITS = {"int8": "8", "nf4": "4"}


@dataclass(frozen=True)
class CaptionSizes:
    """Sizes of a captioner and of the longest question that it gets."""

    weights: CaptionerWeights
    cached_numbers_per_token: int
    question_tokens: int
    """Tokens of the longest question, with those of its pictures."""
    answer_tokens: int
    """Tokens of the longest answer that is allowed."""
    element_bytes: int = 2
    """Bytes of a number that is not quantized."""


@dataclass(frozen=True)
class CaptionPlan:
    """Decision on how captions are written."""

    text_format: str | None
    """Format of the language model's linear layers: "int8", "nf4" or None, unquantized; "cpu": that, on the CPU."""
    at_once: int
    """Pictures whose captions are written at once."""
    expected_peak_bytes: int
    """Estimate for torch's allocator, or where it works on the CPU for the host."""
    reasons: tuple[str, ...] = ()


def plan_captions(
    usable_bytes: int | None,
    sizes: CaptionSizes,
    num_pictures: int,
    quantize: bool | None = None,
    at_once: int | None = None,
    host_bytes: int | None = None,
) -> CaptionPlan:
    """Chooses the most exact way to hold a captioner, then as many pictures at once as fit beside it.

    Args:
        usable_bytes: device memory that torch's allocator may use; None: there is no GPU.
        num_pictures: pictures to caption.
        quantize: whether the language model is quantized; None: where it does not fit otherwise.
        at_once: pictures at once, at most; None: `MOST_AT_ONCE`, or on a CPU `AT_ONCE_ON_CPU`.
        host_bytes: host memory that may be taken; None: it is enough.

    Raises:
        PlanError: neither GPU nor host can hold it; reports how much is missing.
    """
    for text_format in _formats(quantize) if usable_bytes is not None else ():
        room = (usable_bytes or 0) - caption_bytes(sizes, text_format, 0)
        most = min(room // _bytes_of_one(sizes), at_once or MOST_AT_ONCE, num_pictures)
        if most >= 1:
            return _with_reasons(text_format, most, sizes, usable_bytes, quantize)
    most = min(at_once or AT_ONCE_ON_CPU, num_pictures)
    if host_bytes is not None:
        room = host_bytes - caption_bytes(sizes, ON_CPU, 0)
        most = min(most, room // _bytes_of_one(sizes))
        if most < 1:
            raise PlanError(_lacks(sizes, usable_bytes, host_bytes, quantize))
    return _with_reasons(ON_CPU, most, sizes, usable_bytes, quantize)


def _formats(quantize: bool | None) -> Iterator[str | None]:
    """Yields the formats of a language model on a GPU, the most exact first."""
    if not quantize:
        yield None
    if quantize is not False:
        yield from BITS


def _with_reasons(
    text_format: str | None, at_once: int, sizes: CaptionSizes, usable_bytes: int | None, quantize: bool | None
) -> CaptionPlan:
    weights, peak = weight_bytes(sizes, text_format), caption_bytes(sizes, text_format, at_once)
    plain_gib = weight_bytes(sizes, None) / GIB
    reasons = []
    if text_format == ON_CPU and usable_bytes is not None:
        *_, least_format = _formats(quantize)
        least, room = weight_bytes(sizes, least_format), usable_bytes / GIB
        way_out = (
            "--picture-tokens 320, less of each picture, may fit" if least < usable_bytes else "--captioner FOLDER"
        )
        reasons.append(
            f"captions are written on the CPU, which is slow: the captioner weighs {least / GIB:.1f} GiB at least, and "
            f"with questions of up to {sizes.question_tokens:,} tokens does not fit the {room:.1f} GiB that are usable "
            f"on the GPU. A way out: {way_out}"
        )
    elif text_format == ON_CPU and quantize:
        reasons.append("captions are written on the CPU, where the captioner is not quantized")
    elif text_format in BITS:
        reasons.append(
            f"captioner in {BITS[text_format]} bits ({text_format} weights, {weights / GIB:.1f} GiB), its vision tower "
            f"unquantized: in full it weighs {plain_gib:.1f} GiB; captions differ a little"
        )
    of = "the host" if text_format == ON_CPU else "the GPU"
    have = f" of {usable_bytes / GIB:.1f} usable" if usable_bytes is not None and text_format != ON_CPU else ""
    reasons.append(
        f"captions of {at_once} picture{'s' if at_once > 1 else ''} at once: the captioner weighs {weights / GIB:.1f} "
        f"GiB, and with questions of up to {sizes.question_tokens:,} tokens takes about {peak / GIB:.1f} GiB of {of}"
        f"{have}"
    )
    return CaptionPlan(text_format, at_once, peak, tuple(reasons))


def _lacks(sizes: CaptionSizes, usable_bytes: int | None, host_bytes: int, quantize: bool | None) -> str:
    on_cpu = caption_bytes(sizes, ON_CPU, 1)
    on_gpu = ""
    if usable_bytes is not None:
        *_, least_format = _formats(quantize)
        least = caption_bytes(sizes, least_format, 1)
        on_gpu = f"{least / GIB:.1f} GiB of a GPU that has {usable_bytes / GIB:.1f} usable, or "
    return (
        f"the captioner needs {on_gpu}{on_cpu / GIB:.1f} GiB of host memory, where {host_bytes / GIB:.1f} may be "
        f"taken: {(on_cpu - host_bytes) / GIB:.1f} GiB are missing. Close other programs, or give a smaller model: "
        "--captioner FOLDER."
    )


# ---- bytes


def weight_bytes(sizes: CaptionSizes, text_format: str | None) -> int:
    """Returns the memory of a captioner's weights."""
    weights, element = sizes.weights, sizes.element_bytes
    if text_format in BITS:
        linear, output = BYTES_PER_WEIGHT[text_format], BYTES_PER_WEIGHT["int8"]
    else:
        linear = output = element
    return round(weights.linear * linear + weights.output * output + weights.plain * element)


def caption_bytes(sizes: CaptionSizes, text_format: str | None, at_once: int) -> int:
    """Returns the peak of memory while captions of `at_once` pictures are written."""
    pieces = PIECES_BYTES if text_format in BITS else 0
    return weight_bytes(sizes, text_format) + pieces + at_once * _bytes_of_one(sizes)


def _bytes_of_one(sizes: CaptionSizes) -> int:
    """Returns the working memory of one picture's caption: the question's activations, and keys and values."""
    working = sizes.question_tokens * TEXT_BYTES_PER_TOKEN * sizes.element_bytes // 2
    tokens = sizes.question_tokens + sizes.answer_tokens
    return working + CACHE_COPIES * tokens * sizes.cached_numbers_per_token * sizes.element_bytes
