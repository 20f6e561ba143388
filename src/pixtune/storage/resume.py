"""Decides whether a run can be resumed from a checkpoint: with other settings, its next steps would be another run's.

`RULES` is the one table of what may change and when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtune.config import to_dict
from pixtune.config.schema import DataConfig, TrainConfig
from pixtune.errors import CheckpointError
from pixtune.storage.checkpoint import Checkpoint

LENGTH_FREE_SCHEDULES = ("constant", "constant_with_warmup", "piecewise_constant")
"""Values of `lr_scheduler` with which a step's learning rate does not depend on how many steps the run has."""


@dataclass(frozen=True)
class RunIdentity:
    """Everything that decides what a run's steps compute, as its checkpoints record it."""

    config: Mapping[str, Any]
    """The config as `to_dict` gives it."""
    data: str
    """Fingerprint of the examples and their encodings."""
    num_processes: int | None
    """Number of processes that train together; None in checkpoints of version 0.1.0, which did not record it."""
    num_steps: int | None
    """Length of the whole run in optimizer steps; None in checkpoints of version 0.1.0."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "data": self.data,
            "num_processes": self.num_processes,
            "num_steps": self.num_steps,
        }


Rule = Callable[[RunIdentity, RunIdentity], str | None]
"""A function of the run as it was and as it is now. Returns None if the change is allowed, else what it would do."""


def _is_harmless(before: RunIdentity, now: RunIdentity) -> None:
    return None


def _changes_rates(before: RunIdentity, now: RunIdentity) -> str | None:
    schedule = now.config["lr_scheduler"]
    if schedule in LENGTH_FREE_SCHEDULES or (before.num_steps is not None and before.num_steps == now.num_steps):
        return None
    return (
        f"with lr_scheduler {schedule!r}, another length is another learning rate at every step. Only runs with a "
        f"schedule of {', '.join(LENGTH_FREE_SCHEDULES)} can be made longer or shorter"
    )


def _changes_batches(before: RunIdentity, now: RunIdentity) -> str | None:
    sizes = [
        (run.config["train_batch_size"] or run.config["data_config"]["train_batch_size"] or 1)
        * (run.num_processes or now.num_processes or 1)
        for run in (before, now)
    ]
    if sizes[0] == sizes[1]:
        return None
    return (
        f"a batch of all processes together would have size {sizes[1]} instead of {sizes[0]}, so that other examples "
        f"meet in each step. Keep train_batch_size times the number of processes at {sizes[0]}"
    )


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "output_dir", "logging_dir", "report_to", "tracker_project_name", "logging_steps", "checkpointing_steps",
            "checkpoints_total_limit", "resume_from_checkpoint", "samples", "validation.every", "trigger_words",
            "save_cache_on_disk", "encode_batch_size", "data_config.img_dir", "data_config.control_dir",
            "data_config.metadata_file", "data_config.cache_dir", "data_config.num_workers",
            "pretrained_model_name_or_path", "disable_cpu_offload", "pin_memory", "precompute_text_embeddings",
            "precompute_image_embeddings",
        ),
        _is_harmless,
    ),
    "max_train_steps": _changes_rates,
    "num_train_epochs": _changes_rates,
    "num_processes": _changes_batches,
    "train_batch_size": _changes_batches,
    "data_config.train_batch_size": _changes_batches,
}  # fmt: skip
"""Rules of config keys, of whole sections and of `num_processes`. A change of a key without a rule always matters.

Folders may move, since data and encoders are recognized by content; the transformer's weights are not compared. Two
processes with a batch of 1 draw what one process with a batch of 2 draws (`BatchOrder`), so processes and batch size
may change where their product stays; sums are then rounded in another order, and the plan stays the checkpoint's.
"""


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that name a config by its content, which is given as `to_dict` gives it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def refuse_other_run(checkpoint: Checkpoint, now: RunIdentity) -> None:
    """Checks that a checkpoint is of the run that is to be resumed.

    Raises:
        CheckpointError: names every setting that differs in a way that matters, with both values and what it means.
    """
    record = checkpoint.record
    before = RunIdentity(record["config"], record["data"], record.get("num_processes"), record.get("num_steps"))
    values_before, values_now = _defaults() | _values(before), _values(now)
    changed = []
    for key in sorted(values_before.keys() | values_now.keys()):
        was, is_now = values_before.get(key), values_now.get(key)
        rule = RULES.get(key) or RULES.get(key.partition(".")[0])
        meaning = rule(before, now) if rule and was != is_now else ""
        if was != is_now and meaning is not None:
            changed.append(f"{key}: was {was!r}, is {is_now!r}" + (f" ({meaning})" if meaning else ""))
    if before.data != now.data:
        changed.append("the data set: pictures, captions or their encodings are not those of the checkpoint")
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} is of a run with other settings and cannot be resumed with these:\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nSet them back, or start anew in another output_dir."
        )


def _values(run: RunIdentity) -> dict[str, Any]:
    """Everything that is compared by key."""
    return flatten(run.config) | {"num_processes": run.num_processes}


def _defaults() -> dict[str, Any]:
    """Values of keys that a run did not set: a key that its version did not know yet had its default's effect."""
    nowhere = Path(".")
    config = TrainConfig(
        pretrained_model_name_or_path=".",
        output_dir=nowhere,
        max_train_steps=1,
        data_config=DataConfig(img_dir=nowhere),
    )
    return flatten(to_dict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
