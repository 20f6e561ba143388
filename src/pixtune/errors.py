"""Defines every error that a user can cause, in one small tree.

A message says what is wrong, which value was found, where, and what to do about it. The command line prints a
`PixtuneError` as one readable block and exits with code 1; anything else is a bug of pixtune and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from pixtune.inputs.printing import lines, one_line


class PixtuneError(Exception):
    """Base of all errors that a user can act on. Its text is fit for a terminal, whatever names it holds."""

    def __str__(self) -> str:
        return lines(super().__str__())


class FaultsError(PixtuneError):
    """Several problems that are reported together, so that a user can fix them in one go.

    Args:
        headline: the thing that was checked, for example "the config train.yaml has 3 problems".
        faults: problems, one complete sentence each.
    """

    def __init__(self, headline: str, faults: Sequence[str]) -> None:
        self.headline = headline
        self.faults = list(faults)
        super().__init__(headline, self.faults)  # both in args, so that the error survives pickling

    def __str__(self) -> str:
        return "\n".join([f"{one_line(self.headline)}:", *(f"  - {one_line(fault)}" for fault in self.faults)])


class ConfigError(FaultsError, ValueError):
    """The config file or an override on the command line is wrong."""


class DataError(FaultsError, ValueError):
    """Pictures or captions cannot be used as they are."""


class ShardError(PixtuneError, OSError):
    """A shard of a streamed data set cannot be read now.

    Args:
        cause: the error that it came of, in words.
        looks_damaged: the cause is in the shard, and not on the way to it, so that waiting may not help.
    """

    def __init__(self, cause: str, looks_damaged: bool = False) -> None:
        self.looks_damaged = looks_damaged
        super().__init__(cause)


class MigrationError(PixtuneError, ValueError):
    """A config of another trainer cannot be read, is of none that is known, or trains a model that none here does."""

    def __str__(self) -> str:
        return f"{one_line(super().__str__())}."


class BaselineError(FaultsError, ValueError):
    """A stored result cannot be read, or is of something else than the current measurement."""


class WeightsError(PixtuneError, OSError):
    """A model folder is missing, incomplete or of an unexpected kind."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class CheckpointError(PixtuneError, ValueError):
    """A checkpoint cannot be resumed from: damaged, absent, or made by a different run."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written, or cannot be read; an earlier one may still serve."""


class InUseError(PixtuneError, RuntimeError):
    """Another run that is still alive writes to the same folder."""


class RunError(PixtuneError, ValueError):
    """A folder holds no run, or a run cannot be asked for something in the state that it is in."""


class QueueError(PixtuneError, ValueError):
    """The queue's files cannot be used, or an entry does not allow what is asked."""


class PlanError(PixtuneError, RuntimeError):
    """The run does not fit the machine. The message says how much is missing and what would fit."""


class WriteError(PixtuneError, OSError):
    """A file could not be written, most often because the disk is full. An older file in its place is kept."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class TrainingError(PixtuneError, RuntimeError):
    """Training cannot continue, for example because the loss is no longer a number."""


class LossError(TrainingError):
    """Losses or weights are no numbers, or losses have exploded.

    Args:
        message: what happened, without a full stop.
        weights_are_sound: the weights are known to give numbers, so they can be saved.
        culprits: names of the examples whose losses are no numbers, where these alone may be at fault.
    """

    def __init__(self, message: str, weights_are_sound: bool = False, culprits: Sequence[str] = ()) -> None:
        self.weights_are_sound, self.culprits = weights_are_sound, culprits
        super().__init__(message)


class MemoryShortage(TrainingError):
    """A step needs more memory than there is, and nothing is left that it could give up.

    Args:
        what: what ran out of memory, as the subject of a sentence.
        obstacle: the first line of the device's own message.
        weights_are_torn: the step had changed some of the weights, so that it can neither be saved nor taken again.
    """

    def __init__(self, what: str, obstacle: str, weights_are_torn: bool = False) -> None:
        self.what, self.obstacle, self.weights_are_torn = what, obstacle, weights_are_torn
        super().__init__(
            f"{what} needs more device memory than there is, and nothing is left to give up ({obstacle}). The steps "
            "before are saved; resume with resume_from_checkpoint=latest once other programs have given memory back, "
            "or start anew, in another output_dir, with a smaller img_size, rank or train_batch_size."
        )


class ExchangeError(TrainingError):
    """Processes of a run cannot exchange gradients any more, and the weights are those of the step before."""


class NotYetError(PixtuneError, NotImplementedError):
    """A documented option is asked for that this version does not have yet. The message names the key."""
