"""A run's settings: the schema, and the reader that reports all problems together. Imports neither torch nor numpy."""

from pixtune.config.load import load_config, resolved_yaml, to_dict
from pixtune.config.schema import TrainConfig

__all__ = ["TrainConfig", "load_config", "resolved_yaml", "to_dict"]
