"""The form of each kind of line in `metrics.jsonl`, as far as its readers rely on it. See `tracking/metrics.py`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on

LARGEST_STEP = 2**53
"""Number up to which steps can be divided and plotted without loss."""


def _is_float(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError("must be a number that a float can hold")
    return value


Number = Annotated[int | float, AfterValidator(_is_float)]
"""A number, also one that is not finite, as Python's JSON has it."""


class Line(TypedDict):
    """A line of any kind, which may have more keys than its readers ask for."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]
    kind: str
    step: Annotated[int, Field(ge=0, le=LARGEST_STEP)]


class MeasuredLine(Line):
    """A loss at fixed noise, and that of each quarter of the sigma range."""

    loss: Number
    quarters: Annotated[list[Number], Field(min_length=4, max_length=4)]


class CaptionsLine(Line):
    """Gains of captions by the names of their pictures, and entries of suspects."""

    gains: dict[str, Any]
    suspects: list[Any]


class SampleLine(Line):
    """A generated picture."""

    prompt: str
    seed: int
    path: str
    controls: NotRequired[list[str] | None]
    strength: NotRequired[Number | None]
    size: NotRequired[list[Any] | None]
    negative: NotRequired[str | None]


class EditDriftLine(Line):
    """Drift of a sample from its control."""

    path: NotRequired[str]
    off_pixels: Number
    color_levels: Number
    is_sure: bool


class FirstStepLine(Line):
    """Time of a session's first step."""

    first_step_seconds: Number
    compiled_graphs: int


class MessageLine(Line):
    """A warning that was printed."""

    message: str


class StageEntry(TypedDict):
    """Memory of one stage of a run, GiB."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]
    stage: str
    seconds: Number
    allocated_gib: Number
    peak_gib: Number
    peak_reserved_gib: Number
    host_rss_gib: Number


class MemoryLine(Line):
    """Memory of a finished run, GiB."""

    stages: list[StageEntry]
    expected_peak_gib: NotRequired[Number | None]
    measured_peak_gib: NotRequired[Number | None]
    reserved_peak_gib: NotRequired[Number | None]
    process_peak_gib: NotRequired[Number | None]


_ANY: TypeAdapter[Any] = TypeAdapter(Line)
_OF_KIND: Mapping[str, TypeAdapter[Any]] = {
    "validation": TypeAdapter(MeasuredLine),
    "training_pictures": TypeAdapter(MeasuredLine),
    "captions": TypeAdapter(CaptionsLine),
    "sample": TypeAdapter(SampleLine),
    "edit_drift": TypeAdapter(EditDriftLine),
    "first_step": TypeAdapter(FirstStepLine),
    "skipped": TypeAdapter(MessageLine),
    "exploded": TypeAdapter(MessageLine),
    "drift": TypeAdapter(MessageLine),
    "problem": TypeAdapter(MessageLine),
    "memory": TypeAdapter(MemoryLine),
}


def has_form(line: object) -> bool:
    """Returns whether a value is a line of its kind. A kind that this version does not know has the keys of `Line`."""
    kind = line.get("kind") if isinstance(line, Mapping) else None
    try:
        _OF_KIND.get(kind if isinstance(kind, str) else "", _ANY).validate_python(line)
    except ValidationError:
        return False
    return True
