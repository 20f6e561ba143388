"""The registry of model families."""

from __future__ import annotations

from pixtune.errors import WeightsError
from pixtune.families.flux import FLUX, FLUX_KONTEXT
from pixtune.families.qwen_image import QWEN_IMAGE
from pixtune.families.qwen_image_edit import QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS
from pixtune.family import ModelFamily
from pixtune.storage.model_folder import ModelFolder

FAMILIES: dict[str, ModelFamily] = {
    family.name: family for family in (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS, FLUX, FLUX_KONTEXT)
}


def family_of(folder: ModelFolder) -> ModelFamily:
    """Finds the family of a model folder, by the folder's own `model_index.json`.

    Raises:
        WeightsError: no family trains this kind of model. The message names the kind, and those that are known.
    """
    kind = folder.pipeline_class
    for family in FAMILIES.values():
        if kind in family.pipeline_classes:
            return family
    known = ", ".join(f"{name} ({', '.join(f.pipeline_classes)})" for name, f in FAMILIES.items())
    raise WeightsError(f"{folder.path} holds a {kind}, which no family here trains. Known families: {known}.")
