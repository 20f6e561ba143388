"""Whether a checkpoint belongs to this run: going on with other settings would look like a resume and be none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.errors import CheckpointError
from pixtune.storage.checkpoint import Checkpoint

MAY_CHANGE = (
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "logging_steps", "max_train_steps",
    "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "samples",
    "validation.every", "trigger_words", "save_cache_on_disk", "encode_batch_size", "data_config.img_dir",
    "data_config.cache_dir", "data_config.num_workers", "pretrained_model_name_or_path", "disable_cpu_offload",
    "pin_memory", "data_config.control_dir", "data_config.metadata_file", "precompute_text_embeddings",
    "precompute_image_embeddings",
)  # fmt: skip
"""Keys that leave each step as it was. Folders may move: data and weights are recognized by content."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that name a config by its content, which is given as `to_dict` gives it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def refuse_other_run(checkpoint: Checkpoint, config: TrainConfig, data_fingerprint: str) -> None:
    """Checks that config and data are those of the checkpoint.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    before, now = flatten(checkpoint.record["config"]), flatten(to_dict(config))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if checkpoint.record["data"] != data_fingerprint:
        changed.append("the data set: pictures, captions or their encodings are not those of the checkpoint")
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} is of a run with other settings, so its steps cannot simply go on:\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nSet them back, or start anew in another output_dir."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
