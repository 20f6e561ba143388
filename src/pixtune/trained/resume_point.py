"""Finds the checkpoint that a run goes on from, and checks that it is the same run, before more of it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.errors import DamagedError, PixtuneError
from pixtune.hardware.facts import package_versions
from pixtune.storage.base_reference import steps_fingerprint
from pixtune.storage.checkpoint import Checkpoint, load_checkpoint
from pixtune.storage.course import resolve_resume
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.restart import resume_after_restart
from pixtune.storage.resume import RunIdentity, refuse_other_run
from pixtune.storage.state_form import fault_of_record
from pixtune.trained import schedule
from pixtune.trained.init_lora import KEY as INIT_LORA
from pixtune.trained.saved_lora import lora_fingerprint
from pixtune.trained.training_adapter import KEY as TRAINING_ADAPTER

Decision = TypeVar("Decision")


def decide_once(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Lets the first process decide for all, where each on its own might see other files.

    Args:
        decide: returns what can be pickled. Is called in the first process alone.

    Raises:
        PixtuneError: the first process's, in all of them.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except PixtuneError as error:
            outcome[1] = error
    decision, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return cast(Decision, decision)


def find_resume_point(config: TrainConfig, accelerator: Accelerator, show: Callable[[str], None]) -> Checkpoint | None:
    """Reads the checkpoint to resume from, which the first process chooses for all; None for a new run."""
    output_dir = config.output_dir

    def choose() -> Path | None:
        wanted = resume_after_restart(output_dir, config.resume_from_checkpoint, os.environ, show)
        return resolve_resume(output_dir, wanted, show)

    path = decide_once(accelerator, choose)
    if path is None:
        return None
    checkpoint = load_checkpoint(path, verified=accelerator.is_main_process)
    if fault := fault_of_record(checkpoint.record):
        raise DamagedError(
            f"{checkpoint.path} is of another form than pixtune writes: {fault}. Resume from another one."
        )
    if changed := changed_versions(checkpoint.record.get("versions", {}), package_versions()):
        show(f"note: {path.name} was written with other versions ({changed}), which may round sums in another way")
    return checkpoint


def with_stored_choices(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """Returns the config with what it leaves to be chosen as the checkpoint has it: a resumed run keeps its data."""
    validation = checkpoint.record["config"].get("validation") if checkpoint else None
    share = validation.get("held_out") if isinstance(validation, Mapping) else None
    if config.validation.held_out != "auto" or not isinstance(share, float | int) or not 0 <= share < 1:
        return config
    if share and config.validation.held_out_dir is not None:
        return config
    return config.model_copy(update={"validation": config.validation.model_copy(update={"held_out": float(share)})})


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Lists the packages whose versions differ, with both; empty where none does, or none was recorded."""
    differing = [name for name in now if before.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in differing)


def identify(
    config: TrainConfig, accelerator: Accelerator, folder: ModelFolder, checkpoint: Checkpoint | None
) -> RunIdentity:
    """Returns what is known of a run before its data are read: its length only where epochs do not decide it.

    Args:
        checkpoint: what the run is resumed from. It holds all that the LoRA in `init_lora` was for, whose file may
            therefore be gone, or another by now.

    Raises:
        WeightsError: the training adapter, or the LoRA that a new run starts from, cannot be read.
    """
    length = config.max_train_steps if config.num_train_epochs is None else None
    path = config.training_adapter.path
    adapter = None if path is None else lora_fingerprint(TRAINING_ADAPTER, path)
    start, init_lora = config.init_lora, None
    if start is not None:
        record = checkpoint.record if checkpoint else {"config": {}}
        is_used_up = checkpoint is not None and (not start.exists() or record["config"].get(INIT_LORA) == str(start))
        init_lora = record.get(INIT_LORA) if is_used_up else lora_fingerprint(INIT_LORA, start)
    return RunIdentity(
        to_dict(config), None, accelerator.num_processes, length, steps_fingerprint(folder), adapter,
        init_lora=init_lora,
    )  # fmt: skip


def check_run(config: TrainConfig, checkpoint: Checkpoint | None, identity: RunIdentity) -> tuple[str, ...]:
    """Checks that a run is the one that it resumes, and learns something, by what of it is known yet.

    Returns:
        Sentences on what differs from the run that is resumed, as the config allows.

    Raises:
        CheckpointError: it is another run.
        ConfigError: nothing would be learned.
    """
    if identity.num_steps is not None:
        schedule.check_schedule(config, identity.num_steps)
    if checkpoint is None:
        return ()
    return refuse_other_run(
        checkpoint, identity, lambda run, step: schedule.rate_in(config, run.config, run.num_steps or 1, step)
    )
