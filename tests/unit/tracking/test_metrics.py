"""metrics.jsonl across crashes and resumes."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pixtune.errors import WriteError
from pixtune.tracking.metrics import MetricsLog, read_metrics


def test_a_resumed_log_drops_what_came_after_the_checkpoint_and_a_cut_off_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    for step in range(1, 6):
        log.write("step", step, loss=step / 10)
    log.close()
    with path.open("a") as stream:
        stream.write('{"kind": "step", "st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]

    log = MetricsLog(path, resume_step=3)
    assert [line["step"] for line in log.kept] == [1, 2, 3]
    log.write("step", 4, loss=0.4)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 7}\n')
    MetricsLog(path, resume_step=0).close()
    assert read_metrics(path) == []


class FullDisk:
    """A file on a disk that has room for some bytes, and later for more."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = data[: self.room]
        self.content += taken
        self.room -= len(taken)
        return len(taken)

    def close(self) -> None:
        pass


def test_lines_wait_for_room_on_the_disk_and_come_once_and_whole(tmp_path: Path) -> None:
    log, disk = MetricsLog(tmp_path / "metrics.jsonl", 0), FullDisk(100)
    log._stream = disk  # type: ignore[assignment]
    for step in range(1, 5):
        log.write("step", step, loss=0.5)
    assert disk.room == 0 and not disk.content.endswith(b"\n"), "a line is cut"
    problem = log.take_problem()
    assert problem is not None and problem.errno == errno.ENOSPC
    assert log.take_problem() is None
    disk.room = 10_000
    log.write("step", 5, loss=0.5)
    assert [json.loads(line)["step"] for line in disk.content.decode().splitlines()] == [1, 2, 3, 4, 5]
    assert log.take_problem() is None
    disk.room = 0
    log.write("step", 6, loss=0.5)
    assert log.close() == 1


DAMAGED = {
    "half a line": b'{"kind": "st',
    "nothing": b"",
    "null": b"null",
    "a list": b'["step", 3]',
    "a number": b"7",
    "not text": b"\xff\xfe",
    "zeros": b"\0\0\0",
    "no step": b'{"kind": "note"}',
    "no kind": b'{"step": 3}',
    "a step in words": b'{"kind": "step", "step": "three"}',
    "a step that is no whole number": b'{"kind": "step", "step": 2.5}',
    "a step that is true": b'{"kind": "step", "step": true}',
    "two lines in one": b'{"kind": "step", "step": 1}{"kind": "step", "step": 2}',
    "a loss in words": b'{"kind": "validation", "step": 2, "loss": "low", "quarters": [1, 2, 3, 4]}',
    "quarters that are none": b'{"kind": "validation", "step": 2, "loss": 1.0, "quarters": ["a"]}',
    "a validation of nothing": b'{"kind": "validation", "step": 2}',
    "a loss that no float holds": b'{"kind": "validation", "step": 2, "loss": 1%s, "quarters": [1, 2, 3, 4]}'
    % (b"0" * 400),
    "three quarters": b'{"kind": "validation", "step": 2, "loss": 1.0, "quarters": [1, 2, 3]}',
    "a stage that is none": b'{"kind": "memory", "step": 2, "stages": [null]}',
    "a control that is none": b'{"kind": "sample", "step": 2, "prompt": "", "seed": 1, "path": "a", "controls": [1]}',
    "a sample without a path": b'{"kind": "sample", "step": 2, "prompt": "a", "seed": 1}',
    "a depth that no reader follows": b"[" * 100_000,
    "a mark of byte order": b'\xef\xbb\xbf{"kind": "step", "step": 1}',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_is_left_out_and_said_and_the_old_file_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [b'{"kind": "step", "step": 1, "loss": NaN}', b'{"kind": "step", "step": 2, "a": 1}']
    path.write_bytes(b"\n".join([good[0], line, good[1], b""]))
    before = path.read_bytes()
    assert [each["step"] for each in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, resume_step=2)
    log.close()
    assert [each["step"] for each in log.kept] == [1, 2] and path.read_bytes().count(b"\n") == 2
    (sentence,) = log.left_out
    assert "damaged lines (number 2)" in sentence and "metrics.damaged.jsonl" in sentence
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before
    again = MetricsLog(path, resume_step=2)
    again.close()
    assert again.left_out == [] and str(again.kept) == str(log.kept)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no lines on 3 of the 3 steps so far, the first of them step 1"),
        (
            b'{"kind": "step", "step": 1}\n{"kind": "validation", "step": 3, "loss": 1, "quarters": [1, 1, 1, 1]}\n',
            "2 of the 3.*step 2",
        ),
        (b'{"kind": "step", "step": 1}\n{"kind": "step", "step": 3}\n{"kind": "step", "ste', "1 of the 3.*step 2"),
        (None, "3 of the 3"),
    ],
    ids=["emptied", "cut", "a line is gone", "deleted"],
)
def test_a_log_that_reaches_less_far_than_its_checkpoint_is_told(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    log = MetricsLog(path, resume_step=3)
    log.close()
    (sentence,) = log.left_out
    assert re.search(words, sentence), sentence


def test_a_log_whose_figures_were_changed_is_told_and_one_that_only_grew_is_not(tmp_path: Path) -> None:
    """A flipped bit of a digit leaves a line that any reader takes."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2):
        log.write("step", step, loss=0.1 + 0.2 * step, quarters=[1e-05, float("nan")])
    seal = log.sync()
    log.write("validation", 2, loss=0.5, quarters=[0.5] * 4)
    log.write("step", 3, loss=0.25)
    log.close()
    for _ in range(2):  # the first time, lines after the checkpoint are dropped
        log = MetricsLog(path, 2, seal=seal)
        log.close()
        assert log.left_out == [] and len(log.kept) == 3
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6", 1))
    assert seal["bytes"] == len(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    changed = path.read_bytes().replace(b'"loss": 0.3', b'"loss": 0.2', 1)
    path.write_bytes(changed)
    log = MetricsLog(path, 2, seal=seal)
    log.close()
    (sentence,) = log.left_out
    assert "is not what was written up to the checkpoint of step 2" in sentence


@pytest.mark.parametrize(("make", "resume_step"), [(Path.mkdir, 0), (Path.mkdir, 3), (os.mkfifo, 3)])
def test_a_log_that_is_no_file_is_one_clear_error(
    tmp_path: Path, make: Callable[[Path], None], resume_step: int
) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(WriteError, match=r"metrics\.jsonl (cannot|could not) be"):
        MetricsLog(tmp_path / "metrics.jsonl", resume_step)


def write_steps(
    path: Path, first: int, last: int, resume_step: int, resumed: str | None = None, given_up: str | None = None
) -> None:
    log = MetricsLog(path, resume_step, resumed, given_up)
    for step in range(first, last + 1):
        log.write("step", step, loss=float(resume_step))
    log.close()


def test_a_run_that_is_set_back_and_one_that_returns_have_each_their_own_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 4, 0)
    write_steps(path, 3, 3, 2, resumed="a-2", given_up="a-4")
    assert [line["loss"] for line in read_metrics(path)] == [0, 0, 2]
    write_steps(path, 5, 5, 4, resumed="a-4", given_up="b-3")
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 4)]
    write_steps(path, 4, 4, 3, resumed="b-3")
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0), (2, 0), (3, 2), (4, 3)]
