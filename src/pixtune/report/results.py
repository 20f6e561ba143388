"""Writes what a run has so far into its output folder: the files of its weights that others load, and the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.config.sources import override_word
from pixtune.errors import WriteError
from pixtune.hardware.facts import package_versions
from pixtune.plan.training import TrainingPlan
from pixtune.report.write import BEFORE_AFTER_FILE, write_report
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.resume import free_folder
from pixtune.trained.methods import TrainedWeights

FEW_HELD_OUT = 5
"""Number of held-out pictures up to which their loss is a rough figure."""


@dataclass(frozen=True)
class Results:
    """The results of one run, which stand in its `output_dir` from the first checkpoint on."""

    config: TrainConfig
    trained: TrainedWeights
    plan: Callable[[], TrainingPlan]
    """Returns the plan that is carried out now."""
    num_steps: int
    """Optimizer steps of the whole run."""
    facts: Mapping[str, str | int | float]
    """Further values for the report, by the words to show them under."""

    def write_weights(self, step: int) -> list[Path]:
        """Writes the files of the run's end, and returns their paths.

        Raises:
            WriteError: one could not be written; says that all steps are saved.
        """
        try:
            return self.trained.export(self.config.output_dir, step)
        except WriteError as error:
            raise WriteError(
                f"{error}. All {step} steps are saved in {checkpoint_path(self.config.output_dir, step)}: mend this, "
                "and write the files by resume_from_checkpoint=latest."
            ) from error

    def write_report(self) -> list[Path]:
        """Writes the report of the steps so far, and returns the paths of the page and of the pictures beside it."""
        page = write_report(
            self.config.output_dir,
            config=to_dict(self.config),
            plan=self.plan().to_dict(),
            versions=package_versions(),
            facts={**self.facts, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])},
            num_steps=self.num_steps,
        )
        return [path for path in (page, page.with_name(BEFORE_AFTER_FILE)) if path.exists()]

    def next_words(self, paths: list[Path]) -> str:
        """Returns what a user does next with these files, in a sentence."""
        folder = self.config.output_dir
        if self.config.method == "full":
            return f'draw with it: pixtune sample "a prompt" --model {shlex.quote(str(paths[0]))}'
        edits = " --control picture.png" if self.config.data_config.control_dir else ""
        return f'draw with it: pixtune sample "a prompt" --lora {shlex.quote(str(folder))}{edits}'


def already_finished(step: int, num_steps: int, folder: Path) -> str:
    """Returns what a run tells its user that has all of its steps already, or has ended before them."""
    longer = "a larger max_train_steps" if step == num_steps else "validation.patience=null"
    return (
        f"finished already, at step {step} of {num_steps}: nothing was trained, and the files were written again. To "
        f"train longer: {longer}. To train anew: {override_word('output_dir', free_folder(folder))}, or delete {folder}"
    )
