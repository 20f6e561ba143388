"""Asks a captioner about pictures, several at once, and yields what becomes of each: a caption, or a problem.

Greedy answers are those of the library's own `generate`. With a temperature each picture has random numbers of its
own, functions of (seed, name, place in the answer), so that they depend neither on other pictures nor on a kill.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.captioning.pictures import Picture
from pixtune.captioning.wording import Caption, caption_of
from pixtune.data.images import decoded, read_size
from pixtune.engine.relief import drop_frames, first_line, free_unused, lacks_memory
from pixtune.engine.weight_only import quantize_encoder
from pixtune.errors import DataError, PlanError
from pixtune.family import PICTURE_TOKENS, Answer, Captioner, Choose, Placement, Question, TextEncoder
from pixtune.launch.crew import Share
from pixtune.plan.captioning import CaptionPlan
from pixtune.plan.encoders import ON_CPU

READ_THREADS = 4
"""Number of threads that read pictures while the captioner writes of others."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """The question about each picture, and the form that captions are to have."""

    question: str
    max_words: int | None
    """Number of words that a caption has at most, without the trigger; None: as many as there are."""
    max_tokens: int
    """Tokens at which an answer is cut."""
    trigger: str | None = None
    """Words in front of each caption."""
    temperature: float = 0.0
    """Spread of the draws among likely words; 0: always the likeliest."""
    seed: int = 0
    picture_tokens: int = PICTURE_TOKENS
    """Tokens that the captioner makes of a picture at most."""


@dataclass(frozen=True)
class Asked:
    """A picture with the length of its question in tokens."""

    picture: Picture
    num_tokens: int


@dataclass(frozen=True)
class Outcome:
    """Result of asking about a picture."""

    picture: Picture
    caption: Caption | None
    problem: str = ""
    """Sentence that names the picture, where there is no caption."""


def measure(captioner: Captioner, wish: Wish, picture: Picture, with_controls: bool) -> Asked | Outcome:
    """Reads the sizes of a picture and its controls, and counts the tokens of its question.

    Args:
        with_controls: the question shows control pictures, too.
    """
    paths = picture.all_paths if with_controls else (picture.path,)
    try:
        sizes = [read_size(path) for path in paths]
    except DataError as error:
        return Outcome(picture, None, " ".join(error.faults))
    try:
        return Asked(picture, captioner.count_tokens(wish.question, sizes))
    except ValueError as error:
        return Outcome(picture, None, f"{picture.path} {error}, which the captioner cannot see. Crop it, or remove it.")


def load_captioner(captioner: Captioner, plan: CaptionPlan, placement: Placement) -> TextEncoder:
    """Loads a captioner in its planned form.

    Raises:
        WeightsError: its files are damaged.
        PlanError: there is less memory than there was when the plan was made.
    """
    try:
        if plan.text_format is None:
            return captioner.load(placement)
        loaded = captioner.load(Placement(torch.device("cpu"), placement.dtype))
        if plan.text_format != ON_CPU:
            for model in loaded.models:
                quantize_encoder(model, plan.text_format, placement.device, captioner.formats)
        return loaded
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise PlanError(
            f"the captioner does not fit ({first_line(error)}): other programs have taken memory since its plan was "
            "made. Close them, or quantize it: --quantize."
        ) from error


def describe(
    captioner: Captioner,
    encoder: TextEncoder,
    wish: Wish,
    asked: Sequence[Asked],
    at_once: int,
    with_controls: bool,
    share: Share | None = None,
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of pictures, some at a time; those with questions of about one length come together.

    Where memory runs short, fewer are asked about at once from there on.

    Args:
        share: share of the pictures that this process takes, some at a time; None: all.

    Raises:
        PlanError: not even one picture's question fits.
    """
    ordered = sorted(asked, key=lambda each: (each.num_tokens, each.picture.shown))
    groups = [ordered[start : start + at_once] for start in range(0, len(ordered), at_once)]
    asker = _Asker(captioner, encoder, wish, at_once)
    read = partial(_read, captioner, wish.question, with_controls)
    # What takes longest comes first where others wait for the last ones.
    taken = iter(groups) if share is None else share.take(groups[::-1])
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read ahead") as pool:

        def begin() -> list[Future[tuple[Picture, Question | Outcome]]]:
            return [pool.submit(read, each.picture) for each in next(taken, ())]

        ahead = begin()
        while ahead:
            found = [each.result() for each in ahead]
            ahead = begin()  # the next pictures are read while the captioner writes of these
            outcomes = [each for _, each in found if isinstance(each, Outcome)]
            questions = [(picture, each) for picture, each in found if isinstance(each, Question)]
            answers = asker.answers(questions)
            outcomes += [_outcome(picture, each, wish) for (picture, _), each in zip(questions, answers, strict=True)]
            yield outcomes


def _read(
    captioner: Captioner, question: str, with_controls: bool, picture: Picture
) -> tuple[Picture, Question | Outcome]:
    """Reads a picture, and its controls where the question shows them, at the sizes at which they are seen."""
    images = []
    try:
        for path in picture.all_paths if with_controls else (picture.path,):
            with decoded(path) as each:
                images.append(captioner.fit(each.image))
    except DataError as error:
        return picture, Outcome(picture, None, " ".join(error.faults))
    return picture, Question(question, tuple(images))


def _outcome(picture: Picture, answer: Answer, wish: Wish) -> Outcome:
    try:
        return Outcome(picture, caption_of(answer, wish.max_words, wish.trigger))
    except ValueError as error:
        return Outcome(picture, None, f"{picture.path} gets no caption: the answer {error}.")


class _Asker:
    """A loaded captioner that asks about as many pictures at once as memory allows."""

    def __init__(self, captioner: Captioner, encoder: TextEncoder, wish: Wish, at_once: int) -> None:
        self._captioner, self._encoder, self._wish, self._at_once = captioner, encoder, wish, at_once

    def answers(self, questions: Sequence[tuple[Picture, Question]]) -> list[Answer]:
        """Answers questions, in parts of as many as fit."""
        found: list[Answer] = []
        while len(found) < len(questions):
            part = questions[len(found) : len(found) + self._at_once]
            try:
                found += self._answer(part)
                continue
            except RuntimeError as error:  # out of memory is one, too
                if not lacks_memory(error):
                    raise
                obstacle = first_line(error)
                drop_frames(error)
            free_unused()
            if len(part) == 1:
                raise PlanError(
                    f"{part[0][0].path}: the question about this picture alone needs more memory than there is "
                    f"({obstacle}). Close other programs, or quantize the captioner: --quantize. The captions before "
                    "are written: the same command goes on."
                )
            self._at_once = len(part) // 2
            log.warning("captions lack memory (%s) and go on with %d pictures at once", obstacle, self._at_once)
        return found

    def _answer(self, part: Sequence[tuple[Picture, Question]]) -> list[Answer]:
        choose = None
        if self._wish.temperature > 0:
            choose = draws([picture.shown for picture, _ in part], self._wish.seed, self._wish.temperature)
        return self._captioner.answer(self._encoder, [question for _, question in part], self._wish.max_tokens, choose)


def draws(names: Sequence[str], seed: int, temperature: float) -> Choose:
    """Returns what makes the largest of logits a draw by their probabilities at a temperature.

    It adds Gumbel noise, minus the logarithm of an exponential number (Gumbel 1954; the "Gumbel-max trick").
    """

    def choose(logits_BV: Tensor, position: int) -> Tensor:
        rows = []
        for name in names:
            generator = torch.Generator().manual_seed(randomness.draw_key(seed, "caption", name, position))
            rows.append(torch.empty(logits_BV.shape[1]).exponential_(generator=generator))
        return logits_BV / temperature - torch.stack(rows).to(logits_BV.device).log()

    return choose
