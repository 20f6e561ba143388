"""Keeps the files of the weights that were best on held-out pictures, beside those of the newest ones."""

from __future__ import annotations

from pathlib import Path

from pixtune.judging.best import best_step
from pixtune.services.held_out_loss import HeldOutLoss
from pixtune.services.session import Session
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.trained.export import DIFFUSERS_FILE, FILES, RAW_FILE, export_checkpoint, read_lora_file

BEST_FOLDER = "best"


class BestWeights:
    """The files of a LoRA's best step, written anew whenever a validation has a new lowest loss.

    All weights of a model are too large for that: of them the checkpoint with the lowest loss is never deleted.
    """

    name = "the files of the best weights"

    def __init__(self, session: Session, held_out_loss: HeldOutLoss) -> None:
        self._session, self._held_out_loss = session, held_out_loss
        self.folder = session.output_dir / BEST_FOLDER

    @property
    def saved_step(self) -> int | None:
        """Step of the weights in the folder; None where there are none."""
        path = self.folder / DIFFUSERS_FILE
        return int(read_lora_file(path)[1].get("pixtune.step", -1)) if path.is_file() else None

    def is_due(self, step: int) -> bool:
        """Returns whether there may be a new lowest loss."""
        return self._held_out_loss.is_due(step)

    def look(self, step: int) -> None:
        """Writes the files where this step is the best so far."""
        if not self._session.is_main or self._session.config.method == "full":
            return
        if best_step(self._held_out_loss.means) == step and self.saved_step != step:
            self.folder.mkdir(exist_ok=True)
            self._session.run.trained.export_so_far(self.folder, step)

    def judge(self, step: int) -> None:
        """Ends no run; `HeldOutLoss.has_stalled` does."""

    def agree_with_log(self) -> None:
        """Brings the folder to what the log knows, where a run was killed, or set back from better weights."""
        best = best_step(self._held_out_loss.means)
        if self.saved_step in (None, best):
            return
        for name in (*FILES.values(), RAW_FILE):
            (self.folder / name).unlink(missing_ok=True)
        source = Path() if best is None else checkpoint_path(self._session.output_dir, best)
        if best is not None and source.is_dir():
            export_checkpoint(source, self.folder)
