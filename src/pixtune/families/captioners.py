"""Finds the model that writes captions: a vision-language model of its own, or the text encoder of an image model."""

from __future__ import annotations

from pathlib import Path

from pixtune.errors import WeightsError
from pixtune.families import FAMILIES, family_of
from pixtune.families.qwen_vl import WHAT_CAN, QwenCaptioner
from pixtune.family import PICTURE_TOKENS, Captioner
from pixtune.storage.model_folder import MODEL_INDEX, ModelFolder, open_model_folder


def captioner_of(folder: ModelFolder, picture_tokens: int = PICTURE_TOKENS) -> Captioner:
    """Makes a captioner of the text encoder of an image model.

    Args:
        picture_tokens: tokens that a picture becomes at most.

    Raises:
        WeightsError: it cannot write captions; says which can.
    """
    family = family_of(folder)
    if family.captioner_parts is None:
        able = ", ".join(each.name for each in FAMILIES.values() if each.captioner_parts is not None)
        raise WeightsError(
            f"{folder.path} is a {folder.pipeline_class}, whose text encoders read words and see no pictures, so it "
            f"cannot write captions. Families that can: {able}. {WHAT_CAN}"
        )
    weights, tokenizer, processor = (folder.part(part) for part in family.captioner_parts)
    return QwenCaptioner(weights, tokenizer, processor, picture_tokens)


def open_captioner(path: Path, picture_tokens: int = PICTURE_TOKENS) -> Captioner:
    """Makes a captioner of a local folder: a vision-language model's, or an image model's.

    Args:
        picture_tokens: tokens that a picture becomes at most.

    Raises:
        WeightsError: there is none, or it cannot write captions.
    """
    if (path / MODEL_INDEX).is_file():
        return captioner_of(open_model_folder(str(path)), picture_tokens)
    if not path.is_dir():
        raise WeightsError(f"--captioner: there is no folder {path.absolute()}. Nothing is downloaded. {WHAT_CAN}")
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} is no model: it has neither config.json nor {MODEL_INDEX}. {WHAT_CAN}")
    return QwenCaptioner(path, path, path, picture_tokens)
