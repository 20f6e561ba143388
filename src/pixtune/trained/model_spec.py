"""Describes a LoRA in its file by the modelspec convention (sai_model_spec 1.0.1), so that LoRA managers show it.

Title, model, trigger words, size, licence of the base, and the newest sample as a thumbnail; beside them the few `ss_`
entries of kohya's trainers that such programs read. No path, no prompt and no caption is among them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from pixtune.config.lora_files import LoraFilesConfig
from pixtune.family import ModelFamily
from pixtune.storage.base_reference import BaseReference
from pixtune.storage.safetensors_writer import file_pieces

log = logging.getLogger(__name__)

SAMPLES_FOLDER = "samples"
"""Folder of a run's samples, by step, in its output folder."""
THUMBNAIL_EDGE = 256
"""Longer side of a thumbnail in pixels, which the convention recommends."""


def model_spec(
    config: Mapping[str, Any], family: ModelFamily, base: BaseReference, step: int, run_folder: Path | None
) -> dict[str, str]:
    """Builds the entries for a LoRA's files, all but the digest of the numbers, which differs by file.

    Args:
        config: the run's config as `to_dict` gives it; what it lacks is left out.
        run_folder: the run's output folder, for its newest sample up to `step`; None: there is none.
    """
    about = wishes_of(config)
    words = [word for word in config.get("trigger_words") or () if isinstance(word, str)]
    spec, side = family.modelspec, largest_size(config.get("data_config"))
    title = about.title or f"{', '.join(words)} ({base.name} LoRA)" if words else about.title or f"{base.name} LoRA"
    entries: dict[str, str | None] = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{spec.architecture_of(base.name)}/lora",
        "modelspec.implementation": spec.implementation,
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.author": about.author,
        "modelspec.description": about.description,
        "modelspec.license": about.license or spec.licenses.get(base.name.rpartition("/")[2].lower()),
        "modelspec.trigger_phrase": ", ".join(words) or None,
        "modelspec.resolution": f"{side}x{side}" if side else None,
        "modelspec.thumbnail": thumbnail(run_folder, step) if about.thumbnail and run_folder else None,
        "ss_base_model_version": spec.version,
        "ss_sd_model_name": base.name,
        "ss_network_module": spec.network_module,
        "ss_network_dim": _text(config.get("rank")),
        "ss_network_alpha": _text(config.get("lora_alpha") or config.get("rank")),
        "ss_output_name": title,
        "ss_steps": str(step),
    }
    return {key: text for key, text in entries.items() if text is not None}


def wishes_of(config: Mapping[str, Any]) -> LoraFilesConfig:
    """Returns a recorded config's `lora_files`; the defaults, with a warning, where a damaged record has none."""
    try:
        return LoraFilesConfig.model_validate(config.get("lora_files") or {})
    except ValidationError as error:
        log.warning("lora_files of the checkpoint's config cannot be read: %s", error)
        return LoraFilesConfig()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def digest_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the entry with the SHA-256 of the bytes that follow the header of a file of these tensors."""
    digest = hashlib.sha256()
    for piece in islice(file_pieces(tensors, {}), 1, None):
        digest.update(piece)
    return {"modelspec.hash_sha256": f"0x{digest.hexdigest()}"}


def largest_size(data_config: object) -> int | None:
    """Returns the largest training size that a recorded `data_config` names, in pixels; None where it names none."""
    if not isinstance(data_config, Mapping):
        return None
    folders = data_config.get("folders") or ()
    own = [each.get("img_size") for each in folders if isinstance(each, Mapping)]
    named = [data_config.get("img_size"), *own] if not own or None in own else own
    sizes = [size for each in named for size in (each if isinstance(each, list | tuple) else (each,))]
    return max((size for size in sizes if isinstance(size, int)), default=None)


def thumbnail(run_folder: Path, step: int) -> str | None:
    """Returns a run's newest sample up to a step as a data URL of a small JPEG; None where there is none.

    Of a round of samples it is the first at full strength. A picture that cannot be read is warned of.
    """
    rounds = [
        (int(found[1]), folder)
        for folder in (run_folder / SAMPLES_FOLDER).glob("step-*")
        if (found := re.fullmatch(r"step-(\d+)", folder.name)) and int(found[1]) <= step
    ]
    for _, folder in sorted(rounds, reverse=True):
        for path in sorted(folder.glob("*.png"), key=lambda path: ("-strength" in path.name, path.name)):
            try:
                with Image.open(path) as picture:
                    small = picture.convert("RGB")
                small.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
                small.save(stream := io.BytesIO(), "JPEG", quality=85)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                log.warning("the sample %s cannot be the LoRA's thumbnail (%s)", path, error)
                continue
            return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return None
