"""Draws the pictures of the config's prompts between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixtune.sampler import PromptPicture, PromptSampler
from pixtune.services.session import Session
from pixtune.storage.requests import is_asked, withdraw
from pixtune.trained.model_spec import SAMPLES_FOLDER


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
        """Returns whether they are due after this step, or were asked for; that is looked up as often as losses are."""
        config = self._session.config
        return self._session.is_due(step, config.samples.every) or (step % config.logging_steps == 0 and self._asked)

    @property
    def _asked(self) -> bool:
        return self._session.is_main and is_asked(self._session.output_dir, "sample_now")

    def look(self, step: int) -> None:
        """Draws one picture for each prompt, seed and strength, unless that was done before a resume.

        Raises:
            WriteError: a picture could not be written.
        """
        session = self._session
        if not session.is_main:
            return
        if self._asked:
            self._answer(step)
        if not session.data.prompts:
            return
        for strength in session.config.samples.strengths:
            self._draw(step, strength)

    def _answer(self, step: int) -> None:
        """Deletes the file that asks for samples, before they are drawn: a later one asks for others."""
        session = self._session
        try:
            withdraw(session.output_dir, "sample_now")
        except OSError as error:
            path, why = session.output_dir / "sample_now", error.strerror or error
            session.print(f"warning: {path} cannot be deleted ({why}), and asks again and again")
        if not session.data.prompts:
            session.print(f"step {step}: sample_now asks for samples, and the config has no samples.prompts")

    def _draw(self, step: int, strength: float) -> None:
        session, sampler = self._session, self._sampler
        ending = "" if strength == 1 else f"-strength{strength:g}"
        paths = [f"{SAMPLES_FOLDER}/step-{step:06d}/{n:03d}{ending}.png" for n in range(sampler.num_pictures)]
        if self._sampled.issuperset(paths):
            return
        num_passes = sampler.num_pictures * session.config.samples.num_steps
        in_place = session.run.trained.result_in_place(strength=strength)
        with in_place, session.aside("samples", num_passes) as after_step:
            for relative, picture in zip(paths, sampler.sample(session.run.transformer, after_step), strict=True):
                picture.write(session.output_dir / relative)
                if relative not in self._sampled:
                    self._log(step, strength, relative, picture)
                    self._sampled.add(relative)

    def _log(self, step: int, strength: float, relative: str, picture: PromptPicture) -> None:
        """Writes a picture's line into the log, with what tells it from others of its prompt."""
        settings, prompt = self._session.config.samples, picture.prompt
        apart: dict[str, Any] = {} if strength == 1 else {"strength": strength}
        if settings.sizes or settings.prompts_file is not None:
            apart["size"] = list(prompt.size)
        if prompt.negative_text is not None:
            apart["negative"] = prompt.negative_text
        controls = [path.as_posix() for path in prompt.control_paths]
        self._session.log.write(
            "sample", step, prompt=prompt.text, seed=picture.seed, path=relative, controls=controls, **apart
        )

    def judge(self, step: int) -> None:
        """Ends no run: a person judges samples."""
