"""Asks the base model before a new run's first step which captions do not fit their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image

from pixtune.data.images import open_rgb
from pixtune.data.measured import measured_example
from pixtune.data.rivals import FEW, CaptionTrial
from pixtune.engine.relief import first_that_fits
from pixtune.judging.captions import (
    MOST_AGAIN,
    MOST_AGAIN_SHARE,
    SIGMA,
    SIGMA_AGAIN,
    beyond_others,
    gain_of,
    rank,
    suspects,
    to_look_at_again,
    understands,
)
from pixtune.judging.validation import losses_at
from pixtune.services.session import Session

KIND = "captions"
"""Kind of its line in the log."""
FOLDER, EDGE = "suspects", 192
"""Folder of the suspects' thumbnails in the output folder, and their longer side in pixels."""


class Gains(NamedTuple):
    """Gains of captions by the names of their pictures: of all, and of those that were looked at again."""

    first: dict[str, float]
    again: dict[str, float]


class CaptionCheck:
    """The look at each training picture with its own caption and with those of others: see `judging/captions.py`."""

    name = "the check of captions"

    def __init__(self, session: Session) -> None:
        self._session = session

    def is_due(self, step: int) -> bool:
        """Returns whether no step has been taken."""
        return step == 0

    def look(self, step: int) -> None:
        """Measures each picture, and names those whose captions are most likely wrong."""
        session, trials = self._session, self._session.data.trials.each
        if not trials or not session.is_main:
            return
        batch_size = session.config.batch_size
        most_again = min(MOST_AGAIN, round(MOST_AGAIN_SHARE * len(trials)))
        num_passes = len(trials) + most_again + len(session.data.trials.judges)
        with session.with_base_alone(), session.aside("check of captions", num_passes) as after_picture:

            def one_by_one() -> Gains:
                session.run.forward_backward.release()
                return self._measure(trials, 1, after_picture)

            gains = first_that_fits([lambda: self._measure(trials, batch_size, after_picture), one_by_one], self.name)
        self._tell(step, gains)

    def _measure(self, trials: Sequence[CaptionTrial], batch_size: int, after_picture: Callable[[], None]) -> Gains:
        """Looks at each picture, and again at those that look suspicious, whose captions are tried on the judges."""
        names = self._session.run.source.reader.names

        def log_losses(example: int, captions_of: Sequence[int], sigma: float) -> list[float]:
            found = self._log_losses(example, captions_of, sigma, batch_size)
            after_picture()
            return found

        first = {
            names[each.example]: gain_of(log_losses(each.example, (each.example, *each.rivals[:FEW]), SIGMA))
            for each in trials
        }
        by_name = {names[each.example]: each for each in trials}
        again = [by_name[name] for name in to_look_at_again(first)]
        own = {
            names[each.example]: gain_of(log_losses(each.example, (each.example, *each.rivals), SIGMA_AGAIN))
            for each in again
        }
        captions_of = [each.example for each in again]
        on_others = {
            names[judge]: dict(zip(own, log_losses(judge, captions_of, SIGMA_AGAIN), strict=True))
            for judge in self._session.data.trials.judges
        }
        return Gains(first, beyond_others(own, on_others))

    def _log_losses(self, example: int, captions_of: Sequence[int], sigma: float, batch_size: int) -> list[float]:
        """Returns the logarithm of a picture's loss with the caption of each of some examples."""
        session, run = self._session, self._session.run
        losses = losses_at(
            run.family, run.transformer, measured_example(run.source.reader, example),
            [sigma] * len(captions_of), session.config.seed, run.accelerator.device,
            session.config.objective.guidance, batch_size, session.pace,
            [session.data.trials.read(of, example) for of in captions_of],
        )  # fmt: skip
        logarithms: list[float] = losses.double().log().tolist()
        return logarithms

    def _tell(self, step: int, gains: Gains) -> None:
        session, named = self._session, suspects(gains.first, gains.again)
        by_name = {example.name: example for example in session.data.trials.training}
        entries = []
        for number, name in enumerate(named):
            path = f"{FOLDER}/{number:02d}.png"
            self._write_thumbnail(open_rgb(by_name[name].image_path), path)
            entries.append({"name": name, "caption": by_name[name].caption, "gain": gains.again[name], "path": path})
        last = gains.first | gains.again
        session.log.write(KIND, step, gains={name: round(last[name], 5) for name in rank(last)}, suspects=entries)
        if not understands(gains.first):
            session.print("captions: the base model does not understand them, so none can be judged")
            return
        if not named:
            session.print(f"captions: {len(last)} were tried on other pictures, and none fits its own as badly")
            return
        listed = ", ".join(f"{name} ({by_name[name].caption[:60]!r})" for name in named)
        session.print(
            f"warning: {len(named)} of {len(last)} captions fit their pictures hardly better than other pictures' "
            f"captions do, so they may be wrong: {listed}. Look at them; correct what is wrong, or leave "
            f"those pictures out: data_config.exclude='[{', '.join(named)}]'"
        )

    def _write_thumbnail(self, picture: Image.Image, path: str) -> None:
        target = self._session.output_dir / path
        target.parent.mkdir(exist_ok=True)
        picture.thumbnail((EDGE, EDGE))
        picture.save(target)

    def judge(self, step: int) -> None:
        """Ends no run: a caption is the user's."""
