"""The listing of what the folders of a config give to an epoch, for `pixtune validate CONFIG`."""

from __future__ import annotations

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.data.controls import ControlRules, usual_rules
from pixtune.data.folder_listing import count_folders
from pixtune.errors import DataError
from pixtune.inputs.printing import lines
from pixtune.storage.model_folder import lies_here

USUAL_MULTIPLE = 16
"""Number of pixels that picture sides are multiples of, where the model is not here."""


def folder_listing(config: TrainConfig) -> str:
    """Returns the listing of a config's folders as lines for a terminal.

    Sizes are the model's own where it is a folder here; nothing is fetched. Data that cannot be trained on are not
    counted: their problems are for the report beside it.
    """
    multiple, rules = _rules(config)
    try:
        return count_folders(config, multiple, rules).render()
    except DataError as error:
        folders = len(folders_of(config.data_config))
        return f"An epoch of {folders} folder{'s' * (folders > 1)} cannot be counted: {error.headline}."


def stream_listing(config: TrainConfig) -> str:
    """Returns what the first rows of a config's stream are, as lines for a terminal.

    Raises:
        DataError: they cannot be trained on.
    """
    from pixtune.data.streamed.check import first_rows_of  # imports torch

    return lines(first_rows_of(config, *_rules(config)))


def _rules(config: TrainConfig) -> tuple[int, ControlRules | None]:
    data = config.data_config
    if not lies_here(config.pretrained_model_name_or_path, config.model_parts):
        has_controls = any(folder.has_controls for folder in folders_of(data))
        return USUAL_MULTIPLE, usual_rules(data.control_size, USUAL_MULTIPLE) if has_controls else None
    from pixtune.data.prompts import control_rules
    from pixtune.families import family_of
    from pixtune.families.opening import open_model

    model = open_model(config.pretrained_model_name_or_path, config.model_parts)
    family = family_of(model)
    return family.pixel_multiple(model), control_rules(family, model, data.control_size)
