"""metrics.jsonl across crashes and resumes."""

from __future__ import annotations

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
