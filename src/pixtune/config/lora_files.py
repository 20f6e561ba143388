"""The section of a config that says which LoRA files a run writes, and what they say about themselves."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pixtune.config.section import Section
from pixtune.config.values import Text

LORA_FORMATS = Literal["diffusers", "comfyui", "kohya"]
LoraFormat = StrEnum("LoraFormat", ["diffusers", "comfyui", "kohya"])
"""Names of the formats, as command lines take several of them."""


def _with_diffusers(formats: tuple[str, ...]) -> tuple[str, ...]:
    if "diffusers" not in formats:
        raise ValueError("must hold diffusers, whose file pixtune itself reads")
    return tuple(dict.fromkeys(formats))


LoraFormats = Annotated[tuple[LORA_FORMATS, ...], Field(strict=False), AfterValidator(_with_diffusers)]


class LoraFilesConfig(Section):
    """Keys of the LoRA files that a run writes, and of what they say about themselves for LoRA managers."""

    formats: LoraFormats = ("diffusers", "comfyui")
    """Formats of the LoRA files: "diffusers" (always), "comfyui", "kohya" (sd-scripts, musubi-tuner). Each is a file of
    its own, with the same effect."""
    title: Text | None = None
    """Title. Absent: the trigger words and the base's name."""
    author: Text | None = None
    """Author. Absent: none is stated."""
    description: Text | None = None
    """Description of the LoRA for its users. Absent: none."""
    license: Text | None = None
    """Licence. Absent: that of the base, where it is a published one."""
    thumbnail: bool = True
    """Whether the newest sample is in the files, as a picture of 256 pixels without its prompt."""
