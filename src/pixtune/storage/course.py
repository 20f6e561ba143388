"""One session's way through the checkpoints of its output folder: where it begins, what it saves, what is deleted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pixtune.config.sources import override_word
from pixtune.errors import CheckpointError, DamagedError
from pixtune.storage.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    FolderContent,
    WriteFiles,
    delete_checkpoint,
    read_folder,
    read_saved,
    remove_unfinished,
    save_checkpoint,
    verify_checkpoint,
    write_set_back,
)
from pixtune.storage.checkpoint_state import NAME, find_checkpoints
from pixtune.storage.files import remove_temporary
from pixtune.storage.lineage import Saved, Session, SetBack, descend, next_serial
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.resume import RunIdentity, free_folder


def resolve_resume(output_dir: Path, resume_from: str | None, show: Callable[[str], None]) -> Path | None:
    """Returns the checkpoint to resume from, whose files are what was written, or None to start anew.

    Args:
        resume_from: the config's `resume_from_checkpoint`: None, "latest", or a folder (also by its name alone).
        show: receives a sentence where "latest" is not the checkpoint that a user may expect.

    Raises:
        CheckpointError: a named folder does not exist, or none that "latest" may mean is whole, or a new start would
            mix with an older run's checkpoints.
    """
    if resume_from == "latest":
        return _latest(output_dir, show)
    existing = [path.name for path in find_checkpoints(output_dir)]
    if resume_from is None:
        if existing:
            raise CheckpointError(
                f"{output_dir} already holds a run (up to {existing[-1]}), which a new start would overwrite. To go on "
                "with it: resume_from_checkpoint=latest. To train anew and keep it: "
                f"{override_word('output_dir', free_folder(output_dir))}. Or delete it."
            )
        return None
    places = [Path(resume_from).expanduser(), output_dir / resume_from]
    for path in reversed(places) if NAME.fullmatch(resume_from) else places:
        if path.is_dir():
            verify_checkpoint(path)
            _refuse_strangers(output_dir, path)
            return path
    names = ", ".join(existing) or "none"
    raise CheckpointError(
        f"resume_from_checkpoint: there is no folder {resume_from}. In {output_dir} there are: {names}."
    )


def _latest(output_dir: Path, show: Callable[[str], None]) -> Path | None:
    content = _with_outside(output_dir, read_folder(output_dir))
    order = content.order
    if not content.saved and not content.unusable:
        return None
    for error in content.unusable:
        if not isinstance(error, DamagedError):  # a newer version's, for example: no reason to take an older step
            raise error
    damaged = [str(error) for error in content.unusable]
    for saved in order.course:
        try:
            verify_checkpoint(saved.path)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        for sentence in damaged:
            show(f"warning: {sentence} It is left out; going on after step {saved.step} with {saved.path.name}")
        if any(other.step > saved.step for other in order.given_up):
            show(
                f"latest is {saved.path.name}: what was saved of other steps was given up when the run was set back "
                f"({_names(order.given_up)})"
            )
        return saved.path
    listed = [*damaged, *(f"{other.path} was given up when the run was set back." for other in order.given_up)]
    others = "".join(
        f"\nTo go on from what was given up: resume_from_checkpoint={other.path.name}." for other in order.given_up[:1]
    )
    raise CheckpointError(
        f"resume_from_checkpoint=latest: no checkpoint in {output_dir} can be resumed from:\n"
        + "\n".join(f"  - {line}" for line in listed)
        + f"\nRestore one from a copy, or start anew in another output_dir.{others}"
    )


def _with_outside(output_dir: Path, content: FolderContent) -> FolderContent:
    """Adds the checkpoint that a run was set back to, where it lies in another folder."""
    if content.set_back is None or NAME.fullmatch(content.set_back.to):
        return content
    try:
        saved = read_saved(Path(content.set_back.to))
    except CheckpointError as error:
        return FolderContent(content.saved, (*content.unusable, error), content.set_back)
    return FolderContent((*content.saved, saved), content.unusable, content.set_back)


def _refuse_strangers(output_dir: Path, path: Path) -> None:
    """Refuses to resume from another folder into one that holds another run."""
    if path.resolve().parent == output_dir.resolve():
        return
    run = read_saved(path).lineage.run
    others = [saved.path.name for saved in read_folder(output_dir).saved if saved.lineage.run != run]
    if others:
        raise CheckpointError(
            f"{output_dir} already holds another run than that of {path}: {', '.join(sorted(others))}. "
            "Choose another output_dir, or delete what it holds."
        )


def _unusable(content: FolderContent) -> list[str]:
    return [f"{error} It is neither counted nor deleted." for error in content.unusable]


def _names(saved: Sequence[Saved]) -> str:
    return ", ".join(each.path.name for each in saved)


class Course:
    """The checkpoints of one session: what it descends from, and what it saves and deletes.

    Only the first process calls it.
    """

    def __init__(
        self,
        output_dir: Path,
        identity: RunIdentity,
        changes: Sequence[str] = (),
        resumed: Checkpoint | None = None,
        lock: OutputLock | None = None,
    ) -> None:
        """Begins where `resumed` ends.

        Args:
            changes: sentences on what differs from the run that is resumed, as the config allows.
            lock: the one on `output_dir`; None where no other run can know of it.
        """
        self.output_dir, self.identity, self.changes, self.lock = output_dir, identity, changes, lock
        self._resumed = resumed
        self._by_name = identity.config.get("resume_from_checkpoint") != "latest"
        self.given_up: str | None = None
        """Name of the newest checkpoint that the run was set back from, by its lineage; None where it was not."""
        self._parent = resumed.lineage if resumed else None
        self._doubtful = [*resumed.record.get("doubtful", ()), resumed.lineage.name] if resumed else []
        """Names of the newest checkpoints, as long as no loss with their weights is known to be a number."""
        self._told: set[str] = set()
        """Sentences on checkpoints that cannot be used."""
        self._session = Session.new(resumed.step if resumed else 0, identity.in_short(), changes)

    def begin(self, limit: int | None, takes_steps: bool) -> list[str]:
        """Clears away what a killed session left half-written, and notes where the run is set back.

        Args:
            limit: the config's `checkpoints_total_limit`.
            takes_steps: whether this session will take any; without, nothing is given up.

        Returns:
            Sentences for the user.
        """
        remove_unfinished(self.output_dir)
        # Its own, those of samples, and that of the best weights.
        for folder in (self.output_dir, *self.output_dir.glob("*/step-*"), self.output_dir / "best"):
            remove_temporary(folder)
        if self._resumed is None or self._parent is None:
            return []
        content, path = read_folder(self.output_dir), self._resumed.path.resolve()
        if not self._by_name:  # else nobody has looked at the others
            self._told.update(_unusable(content))
        if not takes_steps:
            return []
        beyond = [saved for saved in content.order.course if not saved.led_to(self._parent.sessions)]
        inside = path.parent == self.output_dir.resolve()
        if not self._by_name or not (beyond or not inside):
            return []
        last = max((saved.lineage.serial for saved in content.saved), default=-1)
        write_set_back(self.output_dir, SetBack(path.name if inside else str(path), self._parent.sessions, last))
        if not beyond:
            return []
        self.given_up = beyond[0].lineage.name
        deleted = f", or deleted beyond checkpoints_total_limit={limit}" if limit else ""
        return [
            f"set back to step {self._resumed.step}: {_names(beyond)} will not be resumed from by "
            f"resume_from_checkpoint=latest, and will be replaced when this run saves the same step{deleted}. Copy "
            "elsewhere what you want to keep"
        ]

    @property
    def resumed(self) -> str | None:
        """Name of the checkpoint that was resumed, by its lineage."""
        return self._resumed.lineage.name if self._resumed else None

    @property
    def resumed_log(self) -> Mapping[str, Any] | None:
        """Size and digest of the log when the resumed checkpoint was saved; None for those of version 0.1.0."""
        return self._resumed.record.get("log") if self._resumed else None

    def at(self, step: int) -> None:
        """Notes the step, for whoever finds the folder locked."""
        if self.lock is not None:
            self.lock.step = step

    def save(self, step: int, files: CheckpointFiles | WriteFiles, record: Mapping[str, Any]) -> Path:
        """Writes a checkpoint with the run's identity and lineage; see `save_checkpoint`.

        Args:
            record: everything else that resuming needs, as JSON values.

        Raises:
            InUseError: another run has taken the folder over, for example while this one's machine was asleep.
        """
        if self.lock is not None:
            self.lock.check()
        content = read_folder(self.output_dir)
        serial = next_serial(content.saved, content.set_back, self._parent, time.time_ns() // 1_000_000)
        lineage = descend(self._parent, self._session, step, serial)
        whole = {**self.identity.to_dict(), **record, "doubtful": self._doubtful}
        path = save_checkpoint(self.output_dir, step, files, whole, lineage)
        self._parent, self._doubtful = lineage, [*self._doubtful, lineage.name]
        return path

    def trust(self) -> bool:
        """Notes that a loss with the weights that were saved last is a number, or that none will be computed.

        Returns:
            Whether this is news, so that older checkpoints can be deleted.
        """
        is_news = any(name.startswith(self._session.name) for name in self._doubtful)
        self._doubtful = []
        return is_news

    def prune(self, limit: int | None, losses: Mapping[int, float] = MappingProxyType({})) -> list[str]:
        """Deletes checkpoints beyond `limit`: first what was given up, then the oldest. Returns warnings.

        The one with the lowest of the held-out `losses`, which are given by step, is kept beside `limit` others.

        The newest is kept beside `limit` others until it can be trusted. Must be called only after a newer one is
        complete. What is damaged is neither counted nor deleted, which is said once.
        """
        warnings = prune_checkpoints(self.output_dir, limit, self._doubtful, losses)
        news = [warning for warning in warnings if warning not in self._told]
        self._told.update(news)
        return news

    def give_up_doubtful(self) -> list[str]:
        """Gives up the newest checkpoints, if their weights yield no number: `latest` is the one before them.

        Returns:
            Names of the folders that the run can go on from, the newest first. Where there is none, none is given up.
        """
        content = read_folder(self.output_dir)
        good = [saved for saved in content.order.course if saved.lineage.name not in self._doubtful]
        if good and self._doubtful:
            last = max(saved.lineage.serial for saved in content.saved)
            write_set_back(self.output_dir, SetBack(good[0].path.name, good[0].lineage.sessions, last))
        return [saved.path.name for saved in good]


def prune_checkpoints(
    output_dir: Path,
    limit: int | None,
    doubtful: Sequence[str] = (),
    losses: Mapping[int, float] = MappingProxyType({}),
) -> list[str]:
    """Deletes checkpoints as `Course.prune` does; returns a warning for each that cannot be used or deleted.

    Args:
        doubtful: names of those that do not count, since their weights may be spoiled: only the newest of all is kept.
        losses: held-out losses by step; the checkpoint with the lowest of them is kept.
    """
    content = read_folder(output_dir)
    warnings, saved = _unusable(content), content.order.all
    kept = [each.path for each in saved if each.lineage.name not in doubtful][:limit]
    measured = [each for each in content.order.course if each.step in losses]
    kept += [each.path for each in sorted(measured, key=lambda each: losses[each.step])[:1]]
    for each in saved if limit else ():
        if each is saved[0] or each.path in kept:
            continue
        try:
            delete_checkpoint(each.path)
        except OSError as error:
            warnings.append(f"{each.path} is beyond checkpoints_total_limit and cannot be deleted ({error})")
    return warnings
