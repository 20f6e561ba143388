"""Every error a user can cause, in one small tree.

A message says what is wrong, which value was found, where, and what to do about it. `PixtuneError` is what the command
line turns into one readable block and exit code 1; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class PixtuneError(Exception):
    """Base of all errors that a user can act on."""


class FaultsError(PixtuneError):
    """Several faults found in one go, so that a user mends them all at once.

    Args:
        headline: what was being checked, for example "the config train.yaml has 3 faults".
        faults: one complete sentence each.
    """

    def __init__(self, headline: str, faults: Sequence[str]) -> None:
        self.headline = headline
        self.faults = list(faults)
        super().__init__(headline, self.faults)  # both in args, so that the error survives pickling

    def __str__(self) -> str:
        return "\n".join([f"{self.headline}:", *(f"  - {fault}" for fault in self.faults)])


class ConfigError(FaultsError, ValueError):
    """The config file or an override on the command line is wrong."""


class DataError(FaultsError, ValueError):
    """Pictures or captions cannot be used as they are."""


class BaselineError(FaultsError, ValueError):
    """A stored result is none, or of something else than what was measured now."""


class WeightsError(PixtuneError, OSError):
    """A model folder is missing, incomplete or of another kind than expected."""


class CheckpointError(PixtuneError, ValueError):
    """A checkpoint cannot be resumed from: damaged, absent, or made by a different run."""


class PlanError(PixtuneError, RuntimeError):
    """The run does not fit the machine. Says how much is missing and what would fit."""


class WriteError(PixtuneError, OSError):
    """A file could not be written, most often because the disk is full. What stood there before still stands."""


class TrainingError(PixtuneError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer a number."""


class NotYetError(PixtuneError, NotImplementedError):
    """A documented option that this version does not have yet. Names the key; never silently ignored."""
