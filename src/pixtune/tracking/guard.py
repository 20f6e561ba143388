"""Watches over a run's losses: names what made steps skip, and notices weights, pictures or rates that go wrong.

That a step changes nothing whose loss or gradients are no numbers is decided on the device (`trained/skipped_step.py`).
Here it is learned afterwards, with all figures that are read back: which examples it was, whether the run may go on,
and whether a loss that is a number has exploded.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import GuardConfig
from pixtune.errors import CheckpointError, LossError

WINDOW_STEPS = 32
"""Steps whose median is the level of the loss. Losses of single steps differ tenfold by their sigmas."""
HIGHEST_RATIO = 3.0
"""Ratio of the level to its lowest from which the loss has exploded. With a batch of 1, single losses have a deviation
of 0.5 in their logarithms; even with 0.6, no level of 100 made-up runs of 3,000 steps went so far from the lowest."""
SHORT_WINDOW_STEPS = 8
HIGHEST_SHARE = 1.5
"""Loss from which it has exploded whatever it was before: as a share of the loss of a model that predicts nothing, the
geometric mean of `SHORT_WINDOW_STEPS` steps. A rate that is far too high is seen within them, and a model that is
merely poor has 1.1 at most."""
HIGHEST_HELD_OUT_RATIO = 2.0
"""Ratio of the held-out loss to its lowest from which it has exploded: its noise and sigmas are fixed."""
MOST_NAMES = 12
"""Number of examples that a message names, at most."""


@dataclass(frozen=True)
class ExampleLoss:
    """The loss of one example in one step."""

    name: str
    sigma: float
    loss: float

    def __str__(self) -> str:
        return f"{self.name} (sigma {self.sigma:.3g})"


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing, since its loss or the norm of its gradients was no finite number."""

    step: int
    loss: float
    grad_norm: float
    examples: Sequence[ExampleLoss]
    """Examples of all processes."""

    @property
    def culprits(self) -> Sequence[ExampleLoss]:
        """Examples whose own loss was no number; all of them where it was a number for each."""
        return [each for each in self.examples if not math.isfinite(each.loss)] or self.examples

    @property
    def message(self) -> str:
        if math.isfinite(self.loss):
            why = f"the norm of its gradients was {self.grad_norm}, with a loss of {self.loss:.4g}. Its examples"
        elif len(self.culprits) == len(self.examples):
            why = f"its loss was {self.loss}, for each of its examples"
        else:
            why = f"its loss was {self.loss}, because of"
        return f"step {self.step} was skipped: {why}: {listed([str(each) for each in self.culprits])}"


@dataclass
class GuardState:
    """Everything that a resumed run has to know of the steps before it; part of a checkpoint, as JSON values."""

    num_skipped: int = 0
    """Number of skipped steps."""
    culprits: dict[str, int] = field(default_factory=dict)
    """Examples whose loss was no number, with the number of such steps."""
    in_a_row: int = 0
    """Number of steps skipped since the last that was not."""
    row_culprits: list[str] = field(default_factory=list)
    """Culprits of these steps, each once."""
    proven_step: int = 0
    """Last step in which an example had a loss that is a number: the weights before that step are sound."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last `WINDOW_STEPS` steps, each as a share of the loss of a model that predicts nothing."""
    first: float | None = None
    """First of all these shares, from weights that had learned nothing."""
    lowest: float | None = None
    """Lowest median of as many shares."""
    exploded: bool = False
    """Whether the loss has exploded and not come down since."""

    def add(self, share: float) -> str | None:
        """Takes in another share. Returns how far the loss is too high, in words; None where it is not."""
        share = max(share, 1e-9)  # a logarithm is taken of it
        self.recent = [*self.recent[1 - WINDOW_STEPS :], share]
        self.first = share if self.first is None else self.first
        settled = 0.8 if self.exploded else 1.0  # what has exploded has to come down well below the limits
        if len(self.recent) == WINDOW_STEPS:
            level = statistics.median(self.recent)
            self.lowest = level if self.lowest is None else min(self.lowest, level)
            if level > settled * HIGHEST_RATIO * self.lowest:
                return f"the median of the last {WINDOW_STEPS} is {level / self.lowest:.1f} times its lowest"
        level = statistics.geometric_mean(self.recent[-SHORT_WINDOW_STEPS:])
        if len(self.recent) >= SHORT_WINDOW_STEPS and level > settled * HIGHEST_SHARE * max(1.0, self.first):
            return (
                f"the last {SHORT_WINDOW_STEPS} are {level:.1f} times as high as those of a model that predicts nothing"
            )
        return None


class LossGuard:
    """The watch over the losses of a run.

    Args:
        spoiled_weights: returns the names of trained tensors with values that are no numbers. It waits for the device,
            and is asked only after a skipped step in which no example gave a number.
    """

    def __init__(self, settings: GuardConfig, spoiled_weights: Callable[[], Sequence[str]]) -> None:
        self._settings, self._spoiled_weights = settings, spoiled_weights
        self.state = GuardState()
        self.held_out: dict[int, float] = {}
        """Held-out losses so far by step."""
        self._end: LossError | None = None
        """Reason why the run must end."""

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint records; older versions recorded nothing.

        Raises:
            CheckpointError: the values are of another form.
        """
        try:
            self.state = TypeAdapter(GuardState).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            (first, *_) = error.errors()
            where = ".".join(map(str, ("guard", *first["loc"])))
            raise CheckpointError(
                f"the checkpoint's {where} is {first['input']!r:.60}. Resume from another one."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return asdict(self.state)

    @property
    def has_exploded(self) -> bool:
        """Whether a loss is far too high now."""
        return self.state.exploded or held_out_excess(self.held_out) is not None

    def proves(self, step: int) -> bool:
        """Returns whether the weights after a step have shown in a later one that they are sound."""
        return self.state.proven_step > step and not self.has_exploded

    def is_in_doubt(self, step: int) -> bool:
        """Returns whether the weights after the last step may be spoiled: it was skipped, without any number."""
        in_a_row = self.state.in_a_row
        return self.has_exploded or (in_a_row > 0 and not self.proves(step - in_a_row))

    def check(self) -> None:
        """Ends the run, if what was taken in since the last call demands it.

        Raises:
            LossError: too many steps in a row were skipped, weights are no numbers, or a loss has exploded.
        """
        if self._end is not None:
            end, self._end = self._end, None
            self.state.in_a_row, self.state.row_culprits = 0, []  # a run that goes on may skip as many again
            end.weights_are_sound = end.weights_are_sound and not self.has_exploded
            end.culprits = end.culprits if end.weights_are_sound else ()  # else the weights are to blame, most likely
            raise end

    def see(self, step: int, loss: float, loss_of_nothing: float) -> str | None:
        """Takes in a step that was not skipped. Returns a warning, or None.

        Args:
            loss_of_nothing: what the loss would be for a model that predicts no velocity at all.
        """
        state = self.state
        state.proven_step, state.in_a_row, state.row_culprits = step, 0, []
        if self._end is not None:
            self._end.weights_are_sound = True
        excess, had_exploded = state.add(loss / loss_of_nothing) if loss_of_nothing else None, state.exploded
        state.exploded = excess is not None
        return None if excess is None or had_exploded else self._exploded(step, "training loss", excess)

    def see_held_out(self, step: int, loss: float, culprits: Sequence[str] = ()) -> str | None:
        """Takes in the held-out loss after a step. Returns a warning, or None.

        Args:
            culprits: pictures without which it would be a number.
        """
        if not math.isfinite(loss):
            why = f", because of {listed(culprits)}" if culprits else ""
            self._end = LossError(
                f"step {step}: held-out loss {loss}{why}. Training stops here", bool(culprits), culprits
            )
            return None
        had_exploded = held_out_excess(self.held_out) is not None
        self.held_out[step] = loss
        excess = held_out_excess(self.held_out)
        return None if excess is None or had_exploded else self._exploded(step, "held-out loss", excess)

    def see_skipped(self, skipped: SkippedStep) -> str | None:
        """Takes in a step that was skipped. Returns a warning, once for a row of such steps, or None."""
        state, most = self.state, self._settings.max_skipped_steps
        names = dict.fromkeys(each.name for each in skipped.culprits)
        is_news = not state.in_a_row or not names.keys() <= {*state.row_culprits}
        for name in names:
            state.culprits[name] = state.culprits.get(name, 0) + 1
        state.row_culprits = [*dict.fromkeys([*state.row_culprits, *names])]
        state.num_skipped += 1
        state.in_a_row += 1
        if any(math.isfinite(each.loss) for each in skipped.examples):
            state.proven_step = skipped.step
        elif spoiled := self._spoiled_weights():
            self._end = self._end or LossError(
                f"{skipped.message}. The trained weights themselves are no numbers any more, in {len(spoiled)} tensors "
                f"({listed(spoiled)}). Training stops here"
            )
            return None
        if state.in_a_row < most:
            return skipped.message if is_news else None
        self._end = LossError(
            f"{state.in_a_row} steps in a row were skipped, and changed nothing, since losses or gradients were no "
            f"numbers (guard.max_skipped_steps={most}). The last one: {skipped.message}. Training stops here",
            state.proven_step > skipped.step - state.in_a_row,
            tuple(state.row_culprits),
        )
        return None

    def summary(self) -> str | None:
        """Sums up what was skipped so far; None where nothing was."""
        state = self.state
        if not state.num_skipped:
            return None
        often = sorted(state.culprits.items(), key=lambda each: -each[1])
        names = [name if count == 1 else f"{name} ({count} times)" for name, count in often]
        return f"skipped steps: {state.num_skipped}, with the examples {listed(names)}"

    def _exploded(self, step: int, what: str, excess: str) -> str | None:
        sentence = f"step {step}: the {what} has exploded: {excess}"
        if self._settings.exploded_loss == "warn":
            return f"{sentence}. A lower learning_rate may be needed"
        self._end = self._end or LossError(f"{sentence} (guard.exploded_loss=stop). Training stops here")
        return None


def held_out_excess(losses: Mapping[int, float]) -> str | None:
    """Returns how far the last held-out loss is too high, in words; None where it is not."""
    *before, last = [losses[step] for step in sorted(losses)] or [0.0]
    lowest = min(before, default=math.inf)
    if not lowest or last <= HIGHEST_HELD_OUT_RATIO * lowest:
        return None
    return f"{last:.4f} is {last / lowest:.1f} times its lowest, {lowest:.4f}"


def ways_on(error: LossError, good: Sequence[str], config: TrainConfig) -> str:
    """Lists what a user can do after an error, each with the words to type.

    Args:
        good: names of the checkpoints that can be gone on from, the newest first.
    """
    resume = "resume_from_checkpoint=latest"
    folders = [
        each.dataset.name if each.dataset else each.metadata_file or each.img_dir
        for each in folders_of(config.data_config)
    ]
    sources = dict.fromkeys((*folders, config.validation.held_out_dir))
    source = " or ".join(str(path) for path in sources if path is not None)
    lower, fewer = f"learning_rate={config.learning_rate / 10:g}", f"take {listed(error.culprits)} out of {source}"
    if good:
        newest = f"{resume} goes on from {good[0]}."
        ways = [f"with a lower rate: {resume} {lower} resume_with_changes_in='[learning_rate]'"]
        fewer = f"{fewer}, and then: {resume} resume_with_changes_in='[data]'"
    else:
        newest = f"There is no earlier checkpoint in {config.output_dir}: start anew in another output_dir."
        ways = [f"with a lower rate: {lower}"]
    if error.culprits:
        ways.insert(0, f"without these examples: {fewer}")
    if good[1:]:
        names = listed([f"resume_from_checkpoint={name}" for name in good[1:]])
        ways.append(f"from an earlier step, in place of latest: {names}")
    return "\n".join([f"{error}. {newest} Ways on:", *(f"  - {way}" for way in ways)])


def listed(names: Sequence[str]) -> str:
    """Lists names, and counts those beyond `MOST_NAMES`."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
