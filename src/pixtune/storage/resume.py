"""Decides whether a run can be resumed from a checkpoint: with other settings, its next steps would be another run's.

`RULES` is the one table of what may change and when. What else may change if a user says so is every key that
`resume_with_changes_in` names, except those in `FIXED`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
    data: str | None
    """Fingerprint of the examples and their encodings; None before they are read."""
    num_processes: int | None
    """Number of processes that train together; None in checkpoints of version 0.1.0, which did not record it."""
    num_steps: int | None
    """Length of the whole run in optimizer steps; None in checkpoints of version 0.1.0, and while it is unknown."""
    base: str | None = None
    """`base_reference.steps_fingerprint` of the base model; None in checkpoints of version 0.1.0."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint records."""
        return {
            "config": self.config,
            "data": self.data,
            "num_processes": self.num_processes,
            "num_steps": self.num_steps,
            "base": self.base,
        }

    def in_short(self) -> dict[str, Any]:
        """Returns it as the lineage of a checkpoint holds it for each session."""
        return {**self.to_dict(), "config": config_hash(self.config)}


Rule = Callable[[RunIdentity, RunIdentity], str | None]
"""A function of the run as it was and as it is now. Returns None if the change is allowed, else what it would do."""


def _is_harmless(before: RunIdentity, now: RunIdentity) -> None:
    return None


def _changes_rates(before: RunIdentity, now: RunIdentity) -> str | None:
    schedule = now.config["lr_scheduler"]
    if now.num_steps is None:
        return None  # not known yet, and compared again when it is
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
            "checkpoints_total_limit", "resume_from_checkpoint", "resume_with_changes_in", "samples", "guard",
            "validation.every", "trigger_words", "save_cache_on_disk", "encode_batch_size", "data_config.img_dir",
            "data_config.control_dir", "data_config.metadata_file", "data_config.cache_dir", "data_config.num_workers",
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

Folders may move, since data and models are recognized by content. Two processes with a batch of 1 draw what one process
with a batch of 2 draws (`BatchOrder`), so processes and batch size may change where their product stays; sums are then
rounded in another order, and the plan stays the checkpoint's.
"""

BASE, DATA = "base_model", "data"
"""Names of what is recognized by content, beside the keys of the config and `num_processes`."""

FIXED = (
    "method", "weight_update", "rank", "lora_alpha", "lora_targets", "random_weights", "mixed_precision",
    "deterministic", "adam8bit", "disable_gradient_checkpointing", "disable_quantization", "quantize", "keep_plain",
    "cuda_graphs", "unified_memory", "gpu_memory_limit_gib", "host_memory_limit_gib", "memory_fraction",
    "expandable_segments", "use_fastsafetensors", "fastsafetensors_num_threads", "cuda_features",
)  # fmt: skip
"""Keys and sections of what is trained and of the plan, which a run keeps: a change would not load, or do nothing."""

RATE_KEYS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules", "max_train_steps",
    "num_train_epochs",
)  # fmt: skip
"""Keys that decide a step's learning rate."""

MEANINGS: Mapping[str, str] = {
    BASE: "the weights are others, or the scheduler is: what was trained so far was trained on another model",
    DATA: "pictures, captions or their encodings are not those of the checkpoint, so other examples meet in each step",
    "seed": "all noise, all noise levels and the order of the examples would be others",
    "gradient_accumulation_steps": "a step would learn from another number of examples",
}
"""Meaning of changes that are always refused, where the key does not show it."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that name a config by its content, which is given as `to_dict` gives it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def refuse_other_run(
    checkpoint: Checkpoint,
    now: RunIdentity,
    rate_at: Callable[[RunIdentity, int], float] | None = None,
) -> tuple[str, ...]:
    """Checks that a checkpoint is of the run that is to be resumed. What is not known yet of `now` is not compared.

    Args:
        rate_at: returns the learning rate of a step (0 for the first) by the settings of a run whose length is known.

    Returns:
        Sentences on what differs and matters, and is allowed by the config's `resume_with_changes_in`.

    Raises:
        CheckpointError: names every setting that differs in a way that matters, with both values and what it means.
    """
    record, allowed = checkpoint.record, now.config.get("resume_with_changes_in", ())
    before = RunIdentity(
        record["config"], record["data"], record.get("num_processes"), record.get("num_steps"), record.get("base")
    )
    if now.num_steps is not None and now.num_steps < checkpoint.step:
        raise CheckpointError(_is_beyond(checkpoint, now.num_steps))
    changed = _changes(before, now)
    refused = {key: sentence for key, sentence in changed.items() if key not in allowed or is_fixed(key)}
    rates = ""
    step, lengths_known = checkpoint.step, before.num_steps is not None and now.num_steps is not None
    if rate_at is not None and lengths_known and step < (now.num_steps or 0) and changed.keys() & set(RATE_KEYS):
        was, is_now = rate_at(before, step - 1), rate_at(now, step)
        rates = f"The learning rate goes from {was:.4g} at step {step} to {is_now:.4g} at step {step + 1}."
    if refused:
        raise CheckpointError(_refusal(checkpoint, refused, rates, [*changed.keys() & set(allowed)]))
    return (*changed.values(), *filter(None, [rates]))


def is_fixed(key: str) -> bool:
    """Returns whether a config key can never change within a run."""
    return key in FIXED or key.partition(".")[0] in FIXED


def _changes(before: RunIdentity, now: RunIdentity) -> dict[str, str]:
    """Describes every difference that matters, by its name."""
    values_before, values_now = _defaults() | _values(before), _values(now)
    changed = {}
    for key in sorted(values_before.keys() | values_now.keys()):
        was, is_now = values_before.get(key), values_now.get(key)
        rule = RULES.get(key) or RULES.get(key.partition(".")[0])
        meaning = rule(before, now) if rule and was != is_now else MEANINGS.get(key, "")
        if was != is_now and meaning is not None:
            changed[key] = f"{key}: was {was!r}, is {is_now!r}" + (f" ({meaning})" if meaning else "")
    if None not in (before.base, now.base) and before.base != now.base:
        changed[BASE] = f"{BASE}: another than the checkpoint's ({MEANINGS[BASE]})"
    if now.data is not None and before.data != now.data:
        changed[DATA] = f"{DATA}: the data set is another than the checkpoint's ({MEANINGS[DATA]})"
    return changed


def _refusal(checkpoint: Checkpoint, refused: Mapping[str, str], rates: str, allowed: Sequence[str]) -> str:
    lines = [f"{checkpoint.path} is of a run with other settings and cannot be resumed with these:"]
    lines += [f"  - {sentence}" for sentence in refused.values()]
    lines += [rates] if rates else []
    fixed = [key for key in refused if is_fixed(key)]
    if fixed:
        lines.append(f"What is trained, and the plan, stay the same within a run: {', '.join(fixed)} cannot change.")
    else:
        names = ", ".join([*allowed, *refused])
        lines.append(
            f"To change it all the same, which the checkpoints will record: resume_with_changes_in='[{names}]'."
        )
    return "\n".join([*lines, "Set them back, or start anew in another output_dir."])


def _is_beyond(checkpoint: Checkpoint, num_steps: int) -> str:
    return (
        f"{checkpoint.path} is of step {checkpoint.step}, and the run is to have {num_steps} steps "
        "(max_train_steps, num_train_epochs): nothing is left to train, and nothing was changed. Raise the number of "
        f"steps, or resume from an earlier checkpoint by its name, or write the files of this one with `pixtune export "
        f"{checkpoint.path}`."
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
