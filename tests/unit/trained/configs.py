"""The config of a short run, for tests of what reads a few of its keys."""

from __future__ import annotations

from typing import Any

from pixtune.config.schema import TrainConfig


def config(**changes: Any) -> TrainConfig:
    """Returns the config of a run of 30 steps."""
    settings = {
        "pretrained_model_name_or_path": "x", "output_dir": "x", "data_config": {"img_dir": "x"}, "max_train_steps": 30,
        "learning_rate": 2e-3,
    }  # fmt: skip
    return TrainConfig.model_validate({**settings, **changes})
