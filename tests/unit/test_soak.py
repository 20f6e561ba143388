"""The soak's own judgement: it draws runs that are right, damages what it says, and finds what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pixtune.config import load_config
from tests.soak.draws import HARMS, TARGETS, draw_happening, draw_run
from tests.soak.harm import apply_harm, harmed, targets
from tests.soak.judge import Course, Ended, differing_log, faults_of, leftovers, log_of, private_words
from tests.soak.sessions import words_of

SAVED_TWICE = "step 2: saved out/checkpoint-000002\nstep 4: saved out/checkpoint-000004\n"


def test_what_is_drawn_is_a_config_and_the_same_for_a_seed(tmp_path: Path) -> None:
    seen = set()
    for number in range(60):
        drawn = draw_run(random.Random(f"1 {number}"))
        assert drawn == draw_run(random.Random(f"1 {number}"))
        seen.add((drawn.family, str(drawn.settings["method"])))
        settings = {**drawn.settings, "output_dir": tmp_path / "run", "data_config__img_dir": tmp_path}
        load_config(None, words_of(tmp_path, settings)[2:])
    assert len(seen) == 6
    happenings = [draw_happening(random.Random(number)) for number in range(200)]
    assert {harm for each in happenings for _, harm, _ in each.harms} == set(HARMS)
    assert all(any(getattr(each, name) is not None for each in happenings) for name in ("fault", "set_back", "rival"))


@pytest.mark.parametrize("kind", HARMS[:-1])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_damage_changes_what_it_says(kind: str, share: float) -> None:
    data = bytes(range(1, 200)) * 50
    after = harmed(kind, data, share)
    assert after != data
    if kind == "flip":
        assert after is not None and sum((a ^ b).bit_count() for a, b in zip(data, after, strict=True)) == 1
    if kind in ("cut", "zero"):
        assert after is not None and len(after) == (len(data) if kind == "zero" else int(share * len(data)))
    assert harmed(kind, b"", share) in (b"", None)


def test_damage_is_told_by_file_and_hits_its_target(tmp_path: Path) -> None:
    output, cache = tmp_path / "run", tmp_path / "cache"
    for path in (output / "checkpoint-000002" / "a", output / "checkpoint-000002" / "b", output / "metrics.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (cache / "x").mkdir(parents=True)
    (cache / "x" / "c.safetensors").write_text("c")
    assert [path.name for path in targets(output, cache, "checkpoint")] == ["a", "b"]
    assert [[path.name for path in targets(output, cache, what)] for what in ("cache", "metrics", "other")] == [
        ["c.safetensors"], ["metrics.jsonl"], ["metrics.jsonl"],
    ]  # fmt: skip
    assert {path.name for path in apply_harm(output, cache, ("checkpoint", "exchange", 0.1))} == {"a", "b"}
    assert (output / "checkpoint-000002" / "a").read_text() == "b"
    (gone,) = apply_harm(output, cache, ("metrics", "delete", 0.1))
    assert not gone.exists() and apply_harm(output, cache, ("metrics", "delete", 0.1)) == []
    assert set(TARGETS) == {"checkpoint", "cache", "metrics", "other"}


def test_the_step_to_go_on_from_is_the_last_one_saved_that_is_there_and_whole() -> None:
    course = Course()
    course.read(SAVED_TWICE)
    assert course.floor([2, 4]) == 4 and course.floor([2]) == 2 and course.floor([]) == 0
    course.damaged.add(4)
    assert course.floor([2, 4]) == 2
    course.read("resuming after step 2 from out/checkpoint-000002\nstep 3: saved x\n", 2)
    assert course.steps == [2, 3]
    course.read("step 4: saved x\n")
    assert course.floor([2, 4]) == 4, "it was saved anew"
    course.read("error: nothing", set_back_to=2)
    assert course.steps == [2], "it may have been set back before it ended"


@pytest.mark.parametrize(
    ("ended", "causes", "words"),
    [
        (Ended(0, "wrote x", 1.0), (), None),
        (Ended(0, "Traceback (most recent call last):\n  x\nE: y", 1.0), (), "traceback"),
        (Ended(1, "error: the disk is full", 1.0), (), "although nothing had happened"),
        (Ended(1, "error: the disk is full", 1.0, fault="1 open x"), ("an I/O error",), None),
        (Ended(1, "killed by a library", 1.0, fault="1 open x"), ("an I/O error",), "0 error lines"),
        (Ended(0, "note: 5 pictures lose", 1.0, fault="1 open x"), (), "was silent: 1 open x"),
        (Ended(0, "warning: samples failed", 1.0, fault="1 open x"), (), None),
        (Ended(130, "", 1.0, ("SIGTERM",)), (), None),
        (Ended(130, "", 1.0, ("SIGTERM",), "", 70.0), (), "took 70 s"),
        (Ended(0, "", 1.0, by_launcher=True, num_orphans=1), (), "left 1 processes behind"),
        (Ended(-9, "", 1.0, ("SIGKILL",)), (), None),
        (Ended(-11, "", 1.0), (), "exit code -11"),
    ],
)
def test_how_a_session_may_end(ended: Ended, causes: tuple[str, ...], words: str | None) -> None:
    found = "; ".join(faults_of(ended, causes))
    assert found == "" if words is None else words in found


def test_logs_are_compared_line_by_line_without_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "step", "step": 1, "loss": 0.5, "seconds": 9, "peak_gib": 3}\n{"kind": "memory", "step": 1}\n{"ki'
    )
    assert log_of(path) == [{"kind": "step", "step": 1, "loss": 0.5}]
    one, two = {"step": 1}, {"step": 2}
    assert [*differing_log([one, two], [one, two], "")] == []
    assert "has lines" in "".join(differing_log([one], [one, two], ""))
    assert "lacks lines" in "".join(differing_log([one, two], [one], ""))
    assert [*differing_log([one, two], [one], "warning: samples failed at step 2")] == []
    assert "twice" in "".join(differing_log([one], [one, one], ""))
    assert "order" in "".join(differing_log([one, two], [two, one], ""))


def test_private_words_and_leftovers_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x /secret/place y")
    assert [*private_words([tmp_path / "a.safetensors"], ["/secret"])] == ["a.safetensors holds '/secret'"]
    (tmp_path / "samples").mkdir()
    for name in (".metrics.jsonl.12.tmp", "run.lock", "samples/.000.png.3.tmp"):
        (tmp_path / name).touch()
    assert len([*leftovers(tmp_path)]) == 3
