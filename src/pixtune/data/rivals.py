"""Chooses other pictures' captions to try on a picture: where its own fits no better than they do, it may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pixtune import randomness
from pixtune.config.schema import TrainConfig
from pixtune.data.encode import TextItem
from pixtune.data.encodings import Encodings, text_item
from pixtune.data.example_table import Example
from pixtune.family import Conditioning

FEW, MANY = 2, 10
"""Number of other captions that are tried on each picture, and at a second look on those that look suspicious."""
JUDGES = MANY + 1
"""Number of pictures on which captions that look suspicious are tried, of which one may be their own."""
PASSES = 6
"""Forward passes for a picture: 5.6 where all captions are right, 6.5 with 3 of 48 swapped, 8.5 at most."""
MOST_TIME, PASSES_PER_TURN = 0.05, 3
"""Share of the steps' time that trials may add where the config leaves them open; passes that last a turn."""
FEWEST_CAPTIONS = 8
"""Number of different captions below which pictures cannot be told apart by them."""


@dataclass(frozen=True)
class CaptionTrial:
    """One training picture, and the examples whose captions are tried on it, by their numbers."""

    example: int
    rivals: tuple[int, ...]


@dataclass(frozen=True)
class CaptionTrials:
    """The trials of a run, and access to the captions' encodings."""

    training: Sequence[Example] = ()
    each: tuple[CaptionTrial, ...] = ()
    judges: tuple[int, ...] = ()
    """Examples on which captions that look suspicious are tried, by their numbers."""
    encodings: Encodings | None = None

    def texts(self) -> list[TextItem]:
        """Lists the captions to encode: each picture's own and those of its rivals, with its controls."""
        pairs = [(of, trial.example) for trial in self.each for of in (trial.example, *trial.rivals)]
        return [text_item(self.training[of].caption, self.training[example], 0) for of, example in pairs]

    def read_by(self, encodings: Encodings) -> CaptionTrials:
        """Returns the trials with access to what has been encoded."""
        return replace(self, encodings=encodings)

    def read(self, of: int, example: int) -> Conditioning:
        """Reads the features of one example's caption, with another one's controls."""
        assert self.encodings is not None, "captions are read once they are encoded"
        return self.encodings.text(text_item(self.training[of].caption, self.training[example], 0))


NO_TRIALS = CaptionTrials()


def choose_trials(training: Sequence[Example], config: TrainConfig, controls_in_text: bool) -> CaptionTrials:
    """Chooses rivals of each picture by lot; none where captions are not to be judged, or most say the same.

    Rivals are neighbours in one order by lot, so that each caption is tried about as often as any other.

    Args:
        controls_in_text: text encoders see the control pictures, so each rival is encoded anew: few are taken, and no
            judges.
    """
    wanted = config.validation.judge_captions
    too_few_turns = MOST_TIME * PASSES_PER_TURN * _turns_of_each(config, len(training)) < PASSES
    if wanted is False or (wanted is None and too_few_turns):
        return NO_TRIALS
    captions = [example.caption.strip() for example in training]
    if len(set(captions)) < max(FEWEST_CAPTIONS, len(captions) / 2):
        return NO_TRIALS
    order = sorted(
        range(len(training)), key=lambda number: randomness.draw_key(config.seed, "rivals", training[number].name)
    )
    trials = []
    for place, example in enumerate(order):
        most = FEW if controls_in_text and training[example].control_paths else MANY
        behind = (order[(place + distance) % len(order)] for distance in range(1, len(order)))
        rivals = [other for other in behind if captions[other] != captions[example]][:most]
        trials.append(CaptionTrial(example, tuple(rivals)))
    texts_differ = controls_in_text and any(example.control_paths for example in training)
    judges = () if texts_differ else tuple(order[:JUDGES])
    return CaptionTrials(training, tuple(sorted(trials, key=lambda trial: trial.example)), judges)


def not_judged(trials: CaptionTrials, config: TrainConfig) -> list[str]:
    """Writes a sentence where the config demands that captions be judged, and they cannot be."""
    if not config.validation.judge_captions or trials.each:
        return []
    return [
        f"validation.judge_captions is true, and captions are not judged: at least {FEWEST_CAPTIONS} different ones "
        "are needed among the pictures to train on, and half as many as pictures."
    ]


def _turns_of_each(config: TrainConfig, num_examples: int) -> float:
    """Returns how often a run sees each picture."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    turns = [] if config.max_train_steps is None else [config.max_train_steps * per_step / num_examples]
    return min([*turns, *([] if config.num_train_epochs is None else [float(config.num_train_epochs)])])
