"""Draws the pictures of the config's prompts between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixtune.sampler import PromptSampler
from pixtune.services.session import Session

SAMPLES_FOLDER = "samples"


class Samples:
    """The look at what the weights draw so far."""

    name = "samples"

    def __init__(self, session: Session, sampler: PromptSampler) -> None:
        self._session, self._sampler = session, sampler
        self._sampled: set[str] = set()
        """Paths of the samples in the log."""

    def remember(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes the samples so far from the log's lines."""
        self._sampled = {line["path"] for line in lines if line["kind"] == "sample"}

    def is_due(self, step: int) -> bool:
        """Returns whether they are due after this step."""
        return self._session.is_due(step, self._session.config.samples.every)

    def look(self, step: int) -> None:
        """Draws one picture for each prompt and seed, unless that was done before a resume."""
        session, settings = self._session, self._session.config.samples
        if not session.data.prompts or not session.is_main:
            return
        folder = f"{SAMPLES_FOLDER}/step-{step:06d}"
        num_samples = len(session.data.prompts) * len(settings.seeds)
        if {f"{folder}/{number:03d}.png" for number in range(num_samples)} <= self._sampled:
            return
        in_place, num_steps = session.run.trained.result_in_place(), num_samples * settings.num_steps
        with in_place, session.aside("samples", num_steps) as after_step:
            for number, picture in enumerate(self._sampler.sample(session.run.transformer, after_step)):
                relative = f"{folder}/{number:03d}.png"
                picture.write(session.output_dir / relative)
                controls = [path.as_posix() for path in picture.prompt.control_paths]
                if relative not in self._sampled:
                    session.log.write(
                        "sample", step, prompt=picture.prompt.text, seed=picture.seed, path=relative, controls=controls
                    )
                    self._sampled.add(relative)

    def judge(self, step: int) -> None:
        """Ends no run: a person judges samples."""
