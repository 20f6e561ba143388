"""Asking about several pictures at once: memory that runs short, pictures that cannot be read, draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixtune.captioning.describe import Asked, Outcome, Wish, describe, draws, measure
from pixtune.captioning.pictures import Picture, find_pictures
from pixtune.errors import PlanError
from pixtune.family import Answer, Choose, Question, TextEncoder
from pixtune.sizes import Size
from tests.pictures import noise

ENCODER = TextEncoder((), ())


class Fake:
    """Answers with the picture's width, as long as not too many are asked about at once."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, list[int]()

    def count_tokens(self, text: str, sizes: Sequence[Size]) -> int:
        if sizes[-1][0] > 90:
            raise ValueError("is too wide")
        return sum(width for width, _ in sizes)

    def fit(self, picture: Image.Image) -> Image.Image:
        return picture

    def answer(
        self, encoder: TextEncoder, questions: Sequence[Question], max_tokens: int, choose: Choose | None = None
    ) -> list[Answer]:
        self.asked.append(len(questions))
        if len(questions) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [Answer(f"wide {question.pictures[-1].width}", True) for question in questions]


def written(folder: Path, widths: Sequence[int]) -> list[Picture]:
    for number, width in enumerate(widths):
        Image.new("RGB", (width, 8)).save(folder / f"{number:02d}.png")
    return find_pictures(folder, "txt")[0]


WISH = Wish("?", None, 8)


def outcomes_of(fake: Fake, pictures: Sequence[Picture], at_once: int) -> list[Outcome]:
    asked = [measured for each in pictures if isinstance(measured := measure(fake, WISH, each, False), Asked)]  # type: ignore[arg-type]
    return [each for some in describe(fake, ENCODER, WISH, asked, at_once, False) for each in some]  # type: ignore[arg-type]


def test_memory_that_runs_short_means_fewer_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake, pictures = Fake(most=2), written(tmp_path, range(8, 17))
    outcomes = outcomes_of(fake, pictures, at_once=8)
    assert fake.asked == [8, 4, 2, 2, 2, 2, 1]
    assert [each.caption.text for each in outcomes if each.caption] == [f"wide {width}" for width in range(8, 17)]
    assert "2 pictures at once" in caplog.text


def test_questions_of_about_one_length_come_together(tmp_path: Path) -> None:
    outcomes = outcomes_of(Fake(most=2), written(tmp_path, [30, 8, 20, 9]), at_once=2)
    assert [each.picture.name for each in outcomes] == ["01.png", "03.png", "02.png", "00.png"]


def test_where_not_one_fits_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"00\.png.*more memory than there is.*--quantize.*goes on"):
        outcomes_of(Fake(most=0), written(tmp_path, [8]), at_once=2)


def test_another_error_is_none_of_memory(tmp_path: Path) -> None:
    class Broken(Fake):
        def answer(self, *arguments: object, **more: object) -> list[Answer]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        outcomes_of(Broken(9), written(tmp_path, [8]), at_once=2)


def test_a_damaged_picture_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    pictures = written(tmp_path, [8, 9, 10])
    noise(9, 400).save(pictures[1].path)
    data = pictures[1].path.read_bytes()
    pictures[1].path.write_bytes(data[: len(data) // 2])  # the header is good
    outcomes = {each.picture.name: each for each in outcomes_of(Fake(9), pictures, at_once=3)}
    assert outcomes["01.png"].caption is None and "01.png cannot be decoded" in outcomes["01.png"].problem
    assert outcomes["02.png"].caption is not None


def test_a_shape_that_cannot_be_seen_is_named(tmp_path: Path) -> None:
    (picture,) = written(tmp_path, [91])
    outcome = measure(Fake(9), WISH, picture, False)  # type: ignore[arg-type]
    assert isinstance(outcome, Outcome) and "is too wide, which the captioner cannot see" in outcome.problem


def test_draws_follow_the_probabilities_of_the_temperature() -> None:
    logits, temperature, count = torch.tensor([2.0, 1.0, 0.0, -1.0]), 0.7, 4000
    drawn = torch.cat([draws([f"{number}.png"], 5, temperature)(logits[None], 3).argmax(-1) for number in range(count)])
    expected = torch.softmax(logits / temperature, 0)
    for number, share in enumerate(expected.tolist()):
        error = abs((drawn == number).float().mean().item() - share)
        assert error < 4 * math.sqrt(share * (1 - share) / count), number


def test_a_draw_depends_on_seed_name_and_place_alone() -> None:
    logits = torch.zeros(2, 1000)
    both, alone = draws(["a", "b"], 1, 1.0)(logits, 4), draws(["b"], 1, 1.0)(logits[:1], 4)
    assert torch.equal(both[1:], alone)
    others = [
        draws([name], seed, 1.0)(logits[:1], place) for name, seed, place in (("a", 1, 4), ("b", 2, 4), ("b", 1, 5))
    ]
    assert not [other for other in others if torch.equal(other, alone)]
