"""metrics.jsonl across crashes and resumes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

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
