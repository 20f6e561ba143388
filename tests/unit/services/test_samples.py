"""Samples between steps: when they are due, and what is drawn where a file asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from pixtune.config import load_config
from pixtune.sampler import EncodedPrompt, PromptPicture
from pixtune.services.samples import Samples
from tests.runs import overrides, write_config


class FakeSession:
    """The first process's session of a run that logs every 5 steps and samples every 100."""

    def __init__(self, folder: Path, prompts: Sequence[EncodedPrompt], **changes: object) -> None:
        words = {"samples__every": 100, "logging_steps": 5, "samples__strengths": "[0.5, 1.0]", **changes}
        self.config = load_config(write_config(folder), overrides(folder, folder, **words))
        self.output_dir, self.is_main, self.data = folder, True, SimpleNamespace(prompts=prompts)
        self.printed: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.strengths: list[float] = []
        self.run = SimpleNamespace(transformer=None, trained=SimpleNamespace(result_in_place=self.in_place))
        self.log = SimpleNamespace(write=lambda kind, step, **values: self.lines.append({"step": step, **values}))
        self.print = self.printed.append

    def is_due(self, step: int, every: int) -> bool:
        return step % every == 0

    @contextmanager
    def in_place(self, strength: float) -> Iterator[None]:
        self.strengths.append(strength)
        yield

    @contextmanager
    def aside(self, stage: str, num_passes: int) -> Iterator[Callable[[], None]]:
        yield lambda: None


class FakeSampler:
    num_pictures = 2

    def __init__(self, prompt: EncodedPrompt) -> None:
        self._prompt = prompt

    def sample(self, transformer: object, on_step: object) -> Iterator[PromptPicture]:
        for seed in (3, 4):
            yield PromptPicture(self._prompt, seed, Image.new("RGB", (8, 8)))


PROMPT = EncodedPrompt("a cat", {}, None, (), (8, 8), negative_text="blurry")


@pytest.fixture
def session(tmp_path: Path) -> FakeSession:
    return FakeSession(tmp_path, [PROMPT])


def samples_of(session: FakeSession) -> Samples:
    return Samples(cast(Any, session), cast(Any, FakeSampler(PROMPT)))


def test_a_file_asks_for_samples_once(session: FakeSession) -> None:
    samples, asking = samples_of(session), session.output_dir / "sample_now"
    assert [step for step in range(201) if samples.is_due(step)] == [0, 100, 200]
    asking.touch()
    assert [step for step in range(7) if samples.is_due(step)] == [0, 5], "looked up as often as losses are read back"
    samples.look(5)
    assert not asking.exists() and not samples.is_due(10)
    assert session.strengths == [0.5, 1.0]
    assert [(line["path"], line.get("strength"), line["negative"]) for line in session.lines] == [
        (f"samples/step-000005/{number:03d}{ending}.png", strength, "blurry")
        for ending, strength in (("-strength0.5", 0.5), ("", None))
        for number in (0, 1)
    ]
    assert all((session.output_dir / line["path"]).is_file() for line in session.lines)


def test_what_was_drawn_before_a_resume_is_not_drawn_again(session: FakeSession) -> None:
    samples = samples_of(session)
    samples.look(100)
    again = samples_of(session)
    again.remember([{"kind": "sample", **line} for line in session.lines])
    session.strengths.clear()
    again.look(100)
    assert session.strengths == []
    again.remember([{"kind": "sample", **line} for line in session.lines[1:]])
    again.look(100)
    assert session.strengths == [0.5] and len(session.lines) == 5


def test_a_file_that_asks_in_vain_is_answered(tmp_path: Path) -> None:
    session = FakeSession(tmp_path, [])
    (tmp_path / "sample_now").symlink_to(tmp_path / "nowhere")
    samples_of(session).look(5)
    assert session.printed == ["step 5: sample_now asks for samples, and the config has no samples.prompts"]
    assert session.lines == [] and not (tmp_path / "sample_now").is_symlink()


def test_a_folder_of_that_name_is_a_warning(session: FakeSession) -> None:
    (session.output_dir / "sample_now").mkdir()
    samples_of(session).look(5)
    assert len(session.lines) == 4 and "cannot be deleted" in session.printed[0]


def test_other_processes_do_not_look(session: FakeSession) -> None:
    (session.output_dir / "sample_now").touch()
    session.is_main = False
    samples = samples_of(session)
    assert not samples.is_due(5)
    samples.look(100)
    assert session.lines == [] and (session.output_dir / "sample_now").exists()
