"""Asks the base model before a new run's first step which captions do not fit their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from pixtune.data.images import open_rgb
from pixtune.data.measured import measured_example
from pixtune.data.rivals import FEW, SUSPICIOUS, CaptionTrial
from pixtune.engine.relief import first_that_fits
from pixtune.judging.captions import SIGMA, gain_of, rank, suspects, understands
from pixtune.judging.validation import losses_at
from pixtune.services.session import Session

KIND = "captions"
"""Kind of its line in the log."""
FOLDER, EDGE = "suspects", 192
"""Folder of the suspects' thumbnails in the output folder, and their longer side in pixels."""


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
        num_passes = len(trials) + round(SUSPICIOUS * len(trials))
        with session.with_base_alone(), session.aside("check of captions", num_passes) as after_picture:

            def one_by_one() -> dict[str, float]:
                session.run.forward_backward.release()
                return self._measure(trials, 1, after_picture)

            gains = first_that_fits([lambda: self._measure(trials, batch_size, after_picture), one_by_one], self.name)
        self._tell(step, gains)

    def _measure(
        self, trials: Sequence[CaptionTrial], batch_size: int, after_picture: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the gain of each picture's caption, by name: over few others, and over many where it looks small."""
        names = self._session.run.source.reader.names
        losses = {}
        for trial in trials:
            losses[trial] = self._log_losses(trial, (trial.example, *trial.rivals[:FEW]), batch_size)
            after_picture()
        gains = {names[trial.example]: gain_of(each) for trial, each in losses.items()}
        most_suspicious = set(rank(gains)[: round(SUSPICIOUS * len(gains))])
        for trial, each in losses.items():
            if (name := names[trial.example]) in most_suspicious and len(trial.rivals) > FEW:
                gains[name] = gain_of([*each, *self._log_losses(trial, trial.rivals[FEW:], batch_size)])
                after_picture()
        return gains

    def _log_losses(self, trial: CaptionTrial, captions_of: Sequence[int], batch_size: int) -> list[float]:
        """Returns the logarithm of a picture's loss with the caption of each of some examples."""
        session, run = self._session, self._session.run
        losses = losses_at(
            run.family, run.transformer, measured_example(run.source.reader, trial.example),
            [SIGMA] * len(captions_of), session.config.seed, run.accelerator.device,
            session.config.objective.guidance, batch_size, session.pace,
            [session.data.trials.read(of, trial.example) for of in captions_of],
        )  # fmt: skip
        logarithms: list[float] = losses.double().log().tolist()
        return logarithms

    def _tell(self, step: int, gains: dict[str, float]) -> None:
        session, named = self._session, suspects(gains)
        by_name = {example.name: example for example in session.data.trials.training}
        entries = []
        for number, name in enumerate(named):
            path = f"{FOLDER}/{number:02d}.png"
            self._write_thumbnail(open_rgb(by_name[name].image_path), path)
            entries.append({"name": name, "caption": by_name[name].caption, "gain": gains[name], "path": path})
        session.log.write(KIND, step, gains={name: round(gains[name], 5) for name in rank(gains)}, suspects=entries)
        if not understands(gains):
            session.print("captions: the base model does not understand them, so none can be judged")
            return
        if not named:
            session.print(f"captions: {len(gains)} were tried on other pictures, and none fits its own as badly")
            return
        listed = ", ".join(f"{name} ({by_name[name].caption[:60]!r})" for name in named)
        session.print(
            f"warning: {len(named)} of {len(gains)} captions fit their pictures hardly better than other pictures' "
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
