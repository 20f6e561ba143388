"""Decides whether a run can be resumed from a checkpoint: with other settings, its next steps would be another run's.

`RULES` is the one table of what may change and when. What else may change if a user says so is every key that
`resume_with_changes_in` names, except those in `FIXED`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.config.section import Section
from pixtune.config.sections import DataConfig, FolderConfig
from pixtune.config.sources import override_word
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
    adapter: str | None = None
    """`saved_lora.lora_fingerprint` of the training adapter; None: there is none."""
    examples: Mapping[str, str] | None = None
    """Short digests of the examples by name, caption and pictures apart: they tell what of the data has changed. None
    in checkpoints of version 0.1.0, and of data sets of more than `MOST_NAMED_EXAMPLES`."""
    init_lora: str | None = None
    """`saved_lora.lora_fingerprint` of the LoRA that it started from; None: there is none."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint records."""
        return {
            "config": self.config,
            "data": self.data,
            "num_processes": self.num_processes,
            "num_steps": self.num_steps,
            "base": self.base,
            "examples": self.examples,
            **({} if self.adapter is None else {"adapter": self.adapter}),
            **({} if self.init_lora is None else {"init_lora": self.init_lora}),
        }

    def in_short(self) -> dict[str, Any]:
        """Returns it as the lineage of a checkpoint holds it for each session."""
        short = {**self.to_dict(), "config": config_hash(self.config)}
        return {key: value for key, value in short.items() if key != "examples"}


Rule = Callable[[RunIdentity, RunIdentity], str | None]
"""A function of the run as it was and as it is now. Returns None if the change is allowed, else what it would do."""


def _is_harmless(before: RunIdentity, now: RunIdentity) -> None:
    return None


def _changes_rates(before: RunIdentity, now: RunIdentity) -> str | None:
    schedule = now.config["lr_scheduler"]
    if now.num_steps is None:
        return None  # not known yet, and compared again when it is
    is_free = schedule in LENGTH_FREE_SCHEDULES and not now.config.get("lr_warmup_share")
    if is_free or (before.num_steps is not None and before.num_steps == now.num_steps):
        return None
    if schedule in LENGTH_FREE_SCHEDULES:
        return (
            "with lr_warmup_share, another length is another warm-up. Give its length as lr_warmup_steps, which is the "
            "same run"
        )
    return (
        f"with lr_scheduler {schedule!r}, another length is another learning rate at every step. Only runs with a "
        f"schedule of {', '.join(LENGTH_FREE_SCHEDULES)} can be made longer or shorter"
    )


def batch_size_of(config: Mapping[str, Any]) -> int:
    """Returns the number of examples in a process's micro-batch, from a config as `to_dict` gives it."""
    return config["train_batch_size"] or config["data_config"]["train_batch_size"] or 1


def _changes_batches(before: RunIdentity, now: RunIdentity) -> str | None:
    sizes = [batch_size_of(run.config) * (run.num_processes or now.num_processes or 1) for run in (before, now)]
    if sizes[0] == sizes[1]:
        return None
    return (
        f"a batch of all processes together would have size {sizes[1]} instead of {sizes[0]}, so that other examples "
        f"meet in each step. Keep train_batch_size times the number of processes at {sizes[0]}"
    )


def _changes_folders(before: RunIdentity, now: RunIdentity) -> str | None:
    return None if _folders_of(before) == _folders_of(now) else "other pictures would meet, or be used otherwise"


def _folders_of(run: RunIdentity) -> list[dict[str, Any]]:
    """Returns the keys of each of a run's folders that do not only say where it lies."""
    # A key that a version did not know yet had its default's effect, as at the top level.
    defaults = FolderConfig(img_dir=Path(".")).model_dump(mode="json")
    return [
        {key: value for key, value in {**defaults, **folder}.items() if key not in _PLACES}
        for folder in run.config["data_config"].get("folders", ())
    ]


def _changes_within_folders(before: RunIdentity, now: RunIdentity) -> str:
    """Names the keys of folders that differ: a list of folders as a whole is too long to be read."""
    were, are = _folders_of(before), _folders_of(now)
    if len(were) != len(are):
        return f"were {len(were)}, are {len(are)}"
    return "; ".join(
        f"[{number}].{key} was {was[key]!r}, is {is_now[key]!r}"
        for number, (was, is_now) in enumerate(zip(were, are, strict=True))
        for key in was
        if was[key] != is_now.get(key)
    )


FOLDERS = "data_config.folders"
_PLACES = ("img_dir", "control_dir", "metadata_file", "dataset", "mask_dir")
"""Keys of a folder that only say where it lies: its pictures are recognized by their content."""

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "output_dir", "logging_dir", "report_to", "tracker_project_name", "logging_steps", "checkpointing_steps",
            "checkpoints_total_limit", "resume_from_checkpoint", "resume_with_changes_in", "samples", "guard",
            "validation.every", "validation.patience", "validation.judge_captions", "trigger_words",
            "save_cache_on_disk", "encode_batch_size", "data_config.img_dir", "data_config.control_dir",
            "data_config.mask_dir", "data_config.metadata_file", "data_config.cache_dir", "data_config.exclude",
            "data_config.num_workers", "prior_preservation.folder", "pretrained_model_name_or_path",
            "disable_cpu_offload", "pin_memory", "precompute_text_embeddings", "precompute_image_embeddings",
            "ema.on_host", "training_adapter.path", "init_lora", "lora_files", "model_parts",
            "distributed", "stream.cache_limit_gib", "stream.skipped_share", "stream.patience_seconds",
        ),
        _is_harmless,
    ),
    "max_train_steps": _changes_rates,
    "num_train_epochs": _changes_rates,
    "num_processes": _changes_batches,
    "train_batch_size": _changes_batches,
    "data_config.train_batch_size": _changes_batches,
    FOLDERS: _changes_folders,
}  # fmt: skip
"""Rules of config keys, of whole sections and of `num_processes`. A change of a key without a rule always matters.

Folders may move, since data and models are recognized by content. Two processes with a batch of 1 draw what one process
with a batch of 2 draws (`BatchOrder`), so processes and batch size may change where their product stays; sums are then
rounded in another order, and the plan stays the checkpoint's.
"""

MOST_NAMED_EXAMPLES = 10_000
"""Number of examples up to which checkpoints record a digest of each: 30 bytes and a name."""
BASE, DATA, ADAPTER, INIT_LORA = "base_model", "data", "training_adapter", "init_lora"
"""Names of what is recognized by content, beside the keys of the config and `num_processes`."""

FIXED = (
    "method", "weight_update", "rank", "lora_alpha", "lora_targets", "random_weights", "mixed_precision",
    "deterministic", "adam8bit", "disable_gradient_checkpointing", "disable_quantization", "quantize", "keep_plain",
    "cuda_graphs", "unified_memory", "gpu_memory_limit_gib", "host_memory_limit_gib", "memory_fraction",
    "expandable_segments", "use_fastsafetensors", "fastsafetensors_num_threads", "cuda_features", "training_adapter",
    "init_lora",
    "optimizer", "prodigy.d0", "prodigy.slice", "adafactor.momentum",
    "adapter",
)  # fmt: skip
"""Keys and sections of what is trained and of the plan, which a run keeps: a change would not load, or do nothing."""

RATE_KEYS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_warmup_share", "lr_floor", "lr_num_cycles", "lr_power",
    "lr_step_rules", "max_train_steps", "num_train_epochs",
)  # fmt: skip
"""Keys that decide a step's learning rate."""

MEANINGS: Mapping[str, str] = {
    BASE: "the weights are others, or the scheduler is: what was trained so far was trained on another model",
    DATA: "pictures, captions or their encodings are not those of the checkpoint, so other examples meet in each step",
    "seed": "all noise, all noise levels and the order of the examples would be others",
    **dict.fromkeys(
        ("ema.decay", "ema.warm_up"),
        "steps stay as they are, but samples and files would come from another average than the run's so far",
    ),
    "gradient_accumulation_steps": "a step would learn from another number of examples",
}
"""Meaning of changes that are always refused, where the key does not show it."""


LATER_KEYS = (
    "optimizer", "prodigy", "schedule_free", "adafactor", "muon", "lr_warmup_share", "lr_floor", "adapter",
    "distributed", "stream",
)  # fmt: skip
"""Keys and sections that count in a config's name only where they are set: runs without them keep the name they had."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that name a config by its content, which is given as `to_dict` gives it."""
    defaults = ((key, TrainConfig.model_fields[key].default) for key in LATER_KEYS)
    usual = {key: each.model_dump(mode="json") if isinstance(each, Section) else each for key, each in defaults}
    named = {key: value for key, value in config.items() if key not in usual or value != usual[key]}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


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
        record["config"], record["data"], record.get("num_processes"), record.get("num_steps"), record.get("base"),
        record.get("adapter"), record.get("examples"), record.get("init_lora"),
    )  # fmt: skip
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
        raise CheckpointError(_refusal(checkpoint, now, refused, rates, [*changed.keys() & set(allowed)]))
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
            values = f"was {_shown(was)}, is {_shown(is_now)}"
            values = _changes_within_folders(before, now) if key == FOLDERS else values
            changed[key] = f"{key}: {values}" + (f" ({meaning})" if meaning else "")
    if None not in (before.base, now.base) and before.base != now.base:
        changed[BASE] = f"{BASE}: another than the checkpoint's ({MEANINGS[BASE]})"
    for name, was, is_now in (
        (ADAPTER, before.adapter, now.adapter),
        (INIT_LORA, before.init_lora, now.init_lora),
    ):
        if was != is_now:
            changed[name] = f"{name}: was {was or 'none'}, is {is_now or 'none'}, by its content"
    if now.data is not None and before.data != now.data:
        named = what_changed(before.examples, now.examples)
        what = f"the data set has changed: {named}" if named else f"the data set has changed ({MEANINGS[DATA]})"
        changed[DATA] = f"{DATA}: {what}"
    return changed


def _shown(value: object) -> str:
    return "absent" if value is None else repr(value)


def what_changed(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> str:
    """Names the examples that were added or removed, or whose caption or pictures have changed; empty where unknown."""
    if before is None or now is None:
        return ""
    kinds = ("caption of", "picture, control or mask of")
    changed: dict[str, list[str]] = {kind: [] for kind in (*kinds, "new:", "no longer there:")}
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name), now.get(name)
        if was is None or is_now is None:
            changed["new:" if was is None else "no longer there:"].append(name)
        elif was != is_now:
            for kind, digest, digest_now in zip(kinds, was.split("-"), is_now.split("-"), strict=True):
                changed[kind] += [name] * (digest != digest_now)
    return "; ".join(f"{what} {shorten(names)}" for what, names in changed.items() if names)


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Lists a few names, and counts the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refusal(
    checkpoint: Checkpoint, now: RunIdentity, refused: Mapping[str, str], rates: str, allowed: Sequence[str]
) -> str:
    """Says what differs, and what a user can do: train anew beside it, or go on with the change."""
    lines = [f"{checkpoint.path} is of a run with other settings and cannot be resumed with these:"]
    lines += [f"  - {sentence}" for sentence in refused.values()]
    lines += [rates] if rates else []
    anew = override_word("output_dir", free_folder(Path(now.config["output_dir"])))
    fixed = [key for key in refused if is_fixed(key)]
    if fixed:
        lines.append(f"What is trained, and the plan, stay the same within a run: {', '.join(fixed)} cannot change.")
        return "\n".join([*lines, f"Set them back, or train anew beside it: {anew}."])
    is_over = now.num_steps is not None and now.num_steps <= checkpoint.step
    more = " and a larger max_train_steps, since all steps are taken" if is_over else ""
    names = ", ".join([*allowed, *refused])
    return "\n".join(
        [
            *lines,
            "Set them back, or choose:",
            f"  - train anew, and keep this run: {anew}",
            f"  - go on from step {checkpoint.step} with the change, which the checkpoints record: "
            f"resume_with_changes_in='[{names}]'{more}",
        ]
    )


def free_folder(folder: Path) -> Path:
    """Returns the first of FOLDER-2, FOLDER-3, ... that does not exist."""
    number = 2
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def _is_beyond(checkpoint: Checkpoint, num_steps: int) -> str:
    return (
        f"{checkpoint.path} is of step {checkpoint.step}, and the run is to have {num_steps} steps "
        "(max_train_steps, num_train_epochs): nothing is left to train, and nothing was changed. Raise the number of "
        f"steps, or resume from an earlier checkpoint by its name, or write the files of this one with `pixtune export "
        f"{shlex.quote(str(checkpoint.path))}`."
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
