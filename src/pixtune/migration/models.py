"""Names of models in other trainers, each with the model that is trained here, or with what it is.

The one place outside `families/` with names of models: it translates what others wrote, and decides nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from pixtune.errors import MigrationError

WEIGHT_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


@dataclass(frozen=True)
class Model:
    """A model that is trained here."""

    name: str
    """Name on the hub."""
    guided: bool = False
    """Whether it has a guidance input (distilled models)."""
    edits: bool = False
    """Whether it takes control pictures."""
    layers: str = "attention"
    """Kind of its blocks, by which other trainers' words for layers are translated: "double" or "double_single"."""


def _qwen(name: str, edits: bool = False) -> Model:
    return Model(f"Qwen/{name}", edits=edits, layers="double")


def _flux(name: str, guided: bool = True, edits: bool = False) -> Model:
    return Model(f"black-forest-labs/{name}", guided, edits, "double_single")


TRAINED: tuple[tuple[str, Model], ...] = (
    (r"qwen.?image.?edit.?(plus.?)?2511|qwen.?edit.?2511", _qwen("Qwen-Image-Edit-2511", edits=True)),
    (r"qwen.?image.?edit.?(plus|2509)|qwen.?edit.?2509", _qwen("Qwen-Image-Edit-2509", edits=True)),
    (r"qwen.?image.?edit|qwen.?edit", _qwen("Qwen-Image-Edit", edits=True)),
    (r"qwen.?image.?2512", _qwen("Qwen-Image-2512")),
    (r"qwen.?image|^qwen$", _qwen("Qwen-Image")),
    (r"flux.*kontext|kontext", _flux("FLUX.1-Kontext-dev", edits=True)),
    (r"flux.*krea", _flux("FLUX.1-Krea-dev")),
    (r"flux.*schnell", _flux("FLUX.1-schnell", guided=False)),
    (r"^flux$|flux.?dev|flux.?1", _flux("FLUX.1-dev")),
)
"""Patterns of names, first the special ones, each with the model that is meant."""

NOT_TRAINED: tuple[tuple[str, str], ...] = (
    (r"qwen.?image.?layered|qwen.?layered", "Qwen-Image-Layered"),
    (r"qwen.?image.?2[._]?1(?!\d)|qwenimage21", "Qwen-Image-2.1"),
    (r"flux.?[._]?2|klein", "FLUX.2"),
    (r"flux.?3", "FLUX 3"),
    (r"flux.?fill", "FLUX.1-Fill"),
    (r"flux.?redux|flux.?canny|flux.?depth", "a FLUX.1 tool model"),
    (r"flex.?1|flex.?2|^flex", "Flex"),
    (r"chroma", "Chroma"),
    (r"sdxl|stable.?diffusion.?xl|(?<![a-z])xl(?![a-z])|illustrious|pony|noobai|kolors", "SDXL"),
    (r"sd.?3|stable.?diffusion.?3", "Stable Diffusion 3"),
    (r"sd.?1|sd.?2|stable.?diffusion", "Stable Diffusion 1 or 2"),
    (r"(?<![a-z])wan(?![a-z])|wan.?2", "Wan"),
    (r"hunyuan|(?<![a-z])hv(?![a-z])", "HunyuanVideo or HunyuanImage"),
    (r"frame.?pack|fpack", "FramePack"),
    (r"hi.?dream", "HiDream"),
    (r"z.?image", "Z-Image"),
    (r"krea.?2", "Krea 2"),
    (r"ltx", "LTX-Video"),
    (r"lumina", "Lumina"),
    (r"pixart", "PixArt"),
    (r"aura.?flow", "AuraFlow"),
    (r"sana", "Sana"),
    (r"cosmos", "Cosmos"),
    (r"omnigen", "OmniGen"),
    (r"ideogram", "Ideogram"),
    (r"anima", "Anima"),
    (r"ernie", "ERNIE-Image"),
    (r"minimax", "MiniMax-H3"),
    (r"cascade|wuerstchen", "Stable Cascade"),
    (r"deep.?floyd", "DeepFloyd"),
    (r"kandinsky", "Kandinsky"),
    (r"legacy", "Stable Diffusion 1 or 2"),
)
"""Patterns of names of models that are not trained here, each with the name that people know."""

KNOWN = "Qwen-Image, Qwen-Image-Edit and FLUX.1 (dev, Krea, Kontext, schnell)"


def find_model(words: str) -> Model | str | None:
    """Returns the model that a name, path or word of another trainer means.

    Returns:
        The model; a name where it is one that is not trained here; None: nothing is recognized.
    """
    text = words.strip().casefold().replace("\\", "/")
    last = text.rstrip("/").rpartition("/")[2]  # a folder's name says what it holds, and those above it do not
    for part in (last, text):
        for pattern, name in NOT_TRAINED:
            if re.search(pattern, part):
                return name
        for pattern, model in TRAINED:
            if re.search(pattern, part):
                return model
    return None


def model_of(*candidates: tuple[str, object]) -> Model:
    """Returns the model that a config trains, from values that may name it, of which the first that does decides.

    Args:
        candidates: keys there with their values.

    Raises:
        MigrationError: it is a model that is not trained here, or none that can be recognized.
    """
    given = [(key, value) for key, value in candidates if isinstance(value, str) and value.strip()]
    for key, value in given:
        found = find_model(value)
        if isinstance(found, Model):
            return found
        if found is not None:
            raise MigrationError(
                f"this config trains {found} ({key} = {value!r:.80}), which pixtune does not train: it trains {KNOWN}. "
                "Nothing was written"
            )
    said = " and ".join(f"{key} = {value!r:.80}" for key, value in given) or "no key names one"
    raise MigrationError(
        f"the model of this config is not recognized ({said}). pixtune trains {KNOWN}: name it by --model, as a folder "
        "in diffusers' layout or a hub name, for example --model Qwen/Qwen-Image"
    )


def is_weight_file(path: str) -> bool:
    """Returns whether a path is a single file of weights, by its name."""
    return path.casefold().endswith(WEIGHT_FILES)


def is_hub_name_or_folder(value: object) -> bool:
    """Returns whether a value can stand as the name of a model here: a hub name, or a folder's path."""
    return isinstance(value, str) and bool(value.strip()) and not is_weight_file(value)


def file_name(path: str) -> str:
    """Returns the last part of a path of either system."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
