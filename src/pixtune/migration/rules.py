"""Rules from another trainer's keys to ours, and what can become of a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtune.migration.models import Model

ABSENT: Any = object()
"""Stands for "no default": a key that is left out means nothing that differs from here."""


class WrongValue(Exception):
    """A value that its trainer could not have used either. Its text follows "KEY is VALUE: "."""


@dataclass(frozen=True)
class Lost:
    """Something that a config says and ours cannot."""

    why: str
    """Reason and remedy, as a sentence without a full stop."""
    changes_result: bool = True
    """Whether the trained weights differ for it. False: it is about speed, memory or logs, or is so here anyway."""
    to_fill_in: bool = False
    """Whether a person has to write a value before the config is complete."""


@dataclass(frozen=True)
class Outcome:
    """Everything that becomes of one value, where that is more than one value of one key."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Values by our dotted keys."""
    lost: tuple[Lost, ...] = ()


@dataclass(frozen=True)
class Look:
    """Everything that the meaning of a value may depend on."""

    written: Mapping[str, Any]
    """Keys of the same part of the source, dotted, as written; null counts as left out."""
    defaults: Mapping[str, Any]
    """Values that its trainer takes for keys that are left out."""
    model: Model
    turns: float | None = None
    """Number of turns of an epoch: pictures times repeats. None: the pictures are not on this machine."""
    examples_per_step: int = 1
    """Number of examples of an optimizer step."""
    length: tuple[int | None, float | None] = (None, None)
    """Number of steps and number of epochs of the run, of which one is known."""
    folder: Path = Path()
    """Folder of the config, where files that it names are looked for."""
    prompts_file: str = ""
    """File for prompts with settings of their own, as the config would name it; empty: none can be written."""
    prompts: list[Mapping[str, Any]] = field(default_factory=list)
    """Rows of that file, which conversions fill."""
    taken: set[str] = field(default_factory=set)
    """Written keys that the conversion under way has taken into its result."""

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Returns the value of a key there that goes into the result, or its trainer's default."""
        if self.written.get(key) is not None:
            self.taken.add(key)
        return self.peek(key, otherwise)

    def peek(self, key: str, otherwise: Any = None) -> Any:
        """Returns the value of a key there that only decides what another one means, or its trainer's default."""
        value = self.written.get(key)
        return self.defaults.get(key, otherwise) if value is None else value

    def steps_of(self, epochs: float) -> int | None:
        """Returns the number of optimizer steps of some epochs; None: the number of pictures is not known."""
        if self.turns is None:
            return None
        return max(1, round(epochs * math.ceil(self.turns / self.examples_per_step)))

    @property
    def total_steps(self) -> int | None:
        """Number of optimizer steps of the whole run; None: it is not known."""
        steps, epochs = self.length
        return steps if steps is not None or epochs is None else self.steps_of(epochs)


Convert = Callable[[Any, Look], Any]
"""From a value there to a value here, or to a `Lost` or an `Outcome`."""


def as_it_is(value: Any, look: Look) -> Any:
    return value


@dataclass(frozen=True)
class Rule:
    """One row of a trainer's table."""

    theirs: str
    """Key there, dotted; "cloud.*" is all keys of a section."""
    ours: str = ""
    """Key here; several with a space between, of which the conversion chooses, by an `Outcome`, others than the first.
    Empty: there is none."""
    convert: Convert = as_it_is
    default: Any = ABSENT
    """Value that the trainer takes where the key is left out, if that is not ours."""
    remark: str = ""
    """Difference that a reader of the table should know."""
    null: Any = None
    """Value that null stands for, where it does not mean that the key is left out."""


def only_if(holds: Callable[[Look], bool], why_not: str) -> Callable[[Convert], Convert]:
    """Makes a way to make conversions of keys that count in some configs alone."""

    def limit(convert: Convert) -> Convert:
        return lambda value, look: convert(value, look) if holds(look) else Lost(why_not, False)

    return limit


def fine(*values: Any, otherwise: str) -> Convert:
    """Makes a conversion of a key without a counterpart, of which some values mean what happens here."""
    return lambda value, look: Lost("as here", False) if value in values else Lost(otherwise)


OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", "NONE", "no", "disabled", [], {}, ())
"""Values that switch a thing off."""


def is_off(value: Any) -> bool:
    """Returns whether a value switches its key off."""
    return any(value is off or (type(value) is type(off) and value == off) or value == 0.0 for off in OFF if off != 0)


def lost(keys: str, why: str, default: Any = ABSENT) -> tuple[Rule, ...]:
    """Makes rules of keys without a counterpart that change the result where they are on."""

    def convert(value: Any, look: Look) -> Lost:
        return Lost("off, as here", changes_result=False) if is_off(value) else Lost(why)

    return tuple(Rule(key, convert=convert, default=default, remark=f"no counterpart: {why}") for key in keys.split())


def harmless(keys: str, why: str) -> tuple[Rule, ...]:
    """Makes rules of keys that have no counterpart and need none."""
    return tuple(Rule(key, convert=lambda value, look: Lost(why, False), remark=why) for key in keys.split())


def used(keys: str, why: str) -> tuple[Rule, ...]:
    """Makes rules of keys that the choice of the model, or of files to read, takes up."""
    return tuple(Rule(key, convert=lambda value, look: Lost(why, False), remark=why) for key in keys.split())


def defaults_of(rules: Iterable[Rule]) -> dict[str, Any]:
    """Returns the values that a trainer takes for keys that are left out."""
    return {rule.theirs: rule.default for rule in rules if rule.default is not ABSENT}
