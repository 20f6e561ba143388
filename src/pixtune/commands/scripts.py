"""The check that sets the root scripts apart from `pixtune train`."""

from __future__ import annotations

from collections.abc import Sequence

from pixtune.config.schema import TrainConfig
from pixtune.errors import WeightsError


def check_family(settings: TrainConfig, families: Sequence[str]) -> None:
    """Refuses a model of another family than a script is for.

    Raises:
        WeightsError: names the model's family and the script that trains it.
    """
    from pixtune.families import family_of
    from pixtune.families.opening import open_model

    folder = open_model(settings.pretrained_model_name_or_path, settings.model_parts)
    family = family_of(folder)
    if families and family.name not in families:
        raise WeightsError(
            f"{settings.pretrained_model_name_or_path} is a {folder.pipeline_class} (family {family.name}), and this "
            f"script trains {', '.join(families)}. Use {family.script} with the same config, or `pixtune train`, "
            "which takes every family."
        )
