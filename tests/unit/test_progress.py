"""Whatever takes long says what it does and how long it took; what is quick says nothing."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from pixtune import progress
from pixtune.progress import StepBar, announced, counted, in_words


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)


def log() -> Console:
    """A console that writes to a file, as under nohup."""
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_long_work_is_announced_while_it_lasts_and_timed_at_its_end() -> None:
    lines: list[str] = []
    with announced("loading the transformer", lines.append):
        time.sleep(0.15)
        assert lines == ["loading the transformer ..."]
    assert lines[1].startswith("loading the transformer: 0.")
    with pytest.raises(ValueError, match="damaged"), announced("loading it", lines.append):
        time.sleep(0.15)
        raise ValueError("damaged")
    assert len(lines) == 3, "what has failed was not done in any time"


def test_quick_work_is_silent() -> None:
    lines: list[str] = []
    with announced("loading the transformer", lines.append):
        pass
    time.sleep(0.1)
    assert not lines


def test_in_a_log_counted_work_prints_a_line_now_and_then() -> None:
    console = log()
    with counted("encoding captions", 3, console) as count:
        for _ in range(3):
            time.sleep(0.03)
            count()
    first, second, last = printed(console)
    assert first.startswith("encoding captions: 1/3, about 0.") and second.startswith("encoding captions: 2/3")
    assert last.startswith("encoding captions: 0.")


def test_work_between_steps_has_a_count_of_its_own() -> None:
    console = log()
    with StepBar(console, 0, 10) as bar:
        with bar.aside("samples", 2) as count:
            for _ in range(2):
                time.sleep(0.03)
                count()
        bar.figures(0.5, 0.1, 10.0, 0.0, 7)
        bar.advance(1)
    lines = printed(console)
    assert lines[0].startswith("samples: 1/2") and "step 1/10  loss 0.5000 (last 7)" in lines[-1]


@pytest.mark.parametrize(("seconds", "words"), [(3.21, "3.2 s"), (61.4, "1 min 1 s"), (7325.0, "2 h 2 min")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
