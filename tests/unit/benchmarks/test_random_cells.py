"""benchmarks/random_cells.py: what is drawn, how cells share GPUs, and what is made of what a run left."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.plan.training import TrainingPlan
from tests.runs import ROOT

Result = dict[str, Any]


@pytest.fixture
def random_cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("random_cells")


# ---- drawing


def test_equal_seeds_draw_equal_cells_within_the_ranges(random_cells: ModuleType) -> None:
    cells = [random_cells.draw_cell(7, number) for number in range(300)]
    assert cells == [random_cells.draw_cell(7, number) for number in range(300)]
    assert cells[:20] != [replace(random_cells.draw_cell(8, number), seed=7) for number in range(20)]
    assert len({cell.name for cell in cells}) == 300
    assert {cell.model for cell in cells} == set(importlib.import_module("architectures").ARCHITECTURES)
    assert {cell.method for cell in cells} == {"lora", "full"}
    assert {cell.num_controls for cell in cells if "edit-25" in cell.model} == {1, 2, 3}
    assert {cell.num_controls for cell in cells if cell.model in ("flux", "qwen-image")} == {0}
    assert {cell.adam8bit for cell in cells} == {False}, "without bitsandbytes there are no 8-bit states"
    for cell in cells:
        assert 5.5 <= cell.limit_gib <= 100 and 4 <= cell.rank <= 256 and 1 <= cell.batch_size <= 8
        assert 256 <= cell.size <= 2048 and cell.size % 16 == 0
        assert cell.steps * cell.accumulation >= 6 and cell.steps >= 3
    for least, largest in ((5.5, 8), (60, 100)):  # even in the logarithm: 13% and 18% of all
        assert 0.05 < sum(least <= cell.limit_gib <= largest for cell in cells) / 300 < 0.3
    assert {cell.adam8bit for cell in (random_cells.draw_cell(7, number, True) for number in range(30))} == {
        None, True, False,
    }  # fmt: skip


def test_a_cells_command_is_a_run_of_what_was_drawn(random_cells: ModuleType, tmp_path: Path) -> None:
    """The config is read as a run reads it, and planned as a run plans it."""
    cell = next(
        cell
        for cell in (random_cells.draw_cell(3, number) for number in range(400))
        if cell.num_controls == 2 and len(cell.shapes) > 1 and cell.batch_size > 1 and cell.method == "lora"
    )
    command = random_cells.prepare(cell, tmp_path)
    place = command.index("--config")
    config = load_config(Path(command[place + 1]), command[place + 2 :])
    assert (config.rank, config.batch_size, config.gpu_memory_limit_gib) == (
        cell.rank, cell.batch_size, cell.limit_gib,
    )  # fmt: skip
    assert config.adam8bit is False and config.random_weights and config.data_config.img_size == cell.size
    assert isinstance(config.data_config.control_dir, tuple) and len(config.data_config.control_dir) == 2
    pictures = sorted((tmp_path / "images").glob("*.png"))
    assert len(pictures) == cell.batch_size * len(cell.shapes), "each shape has whole batches"
    roomy = replace(facts_as("H200"), host_available_bytes=200 * GIB, host_total_bytes=200 * GIB)
    plan = random_cells.plan_cell([*command, "gpu_memory_limit_gib=100"], roomy)
    assert 0 < plan.expected_peak_bytes < 100 * GIB and plan.captures > 0
    with pytest.raises(PlanError, match="missing"):
        random_cells.plan_cell([*command, "gpu_memory_limit_gib=3"], roomy)


def test_refused_cells_are_kept_and_others_drawn(
    random_cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(command: list[str], facts: object) -> str:
        if "gpu_memory_limit_gib=1" in " ".join(command):  # 10 to 19 GiB, and 100
            raise PlanError("this run needs about 9.0 GiB, and 7.5 GiB of it are usable: 1.5 GiB are missing.")
        return "a plan"

    monkeypatch.setattr(random_cells, "prepare", lambda cell, folder: ["command", *cell.words()])
    monkeypatch.setattr(random_cells, "plan_cell", plan)

    def prepared() -> list[Any]:
        return list(random_cells.prepare_all(1, 8, tmp_path, tmp_path / "scratch", facts_as("H200"), False))

    first = prepared()
    refused = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(first) == 8 and refused and {result["outcome"] for result in refused} == {"refused"}
    assert "refused: 1.5 GiB missing" in random_cells.row(refused[0])
    ran = first[0].cell
    (tmp_path / f"{ran.name}.json").write_text(json.dumps({"outcome": "ran"}))
    (tmp_path / "scratch").rename(tmp_path / "older")
    assert [each.cell for each in prepared()] == [each.cell for each in first[1:]], "what has run is not run again"


# ---- several at once


@pytest.mark.parametrize(
    ("limit_gib", "host_gib", "running", "gpu"),
    [
        (90, 10, [], 0),
        (90, 10, [(0, 50, 10)], 1),
        (90, 10, [(0, 50, 10), (1, 30, 10)], 1),  # 140 GiB would be too much, 120 are not
        (90, 10, [(0, 50, 10), (1, 45, 10)], None),
        (20, 10, [(0, 50, 10), (1, 30, 10)], 1),
        (20, 10, [(0, 50, 10), (1, 30, 10), (1, 30, 10)], 0),
        (20, 10, [(0, 50, 10), (0, 30, 10), (1, 100, 10), (1, 5, 10)], None),
        (20, 70, [(0, 50, 40)], None),  # host memory
        (20, 170, [], 0),  # alone it may try
    ],
)
def test_cells_share_a_gpu_while_there_is_room(
    random_cells: ModuleType, limit_gib: float, host_gib: float, running: list[Any], gpu: int | None
) -> None:
    room = random_cells.Room(num_gpus=2, parallel=2, host_gib=100)
    assert room.gpu_for(limit_gib, host_gib, running) == gpu


class FakeProcess:
    """A run that ends at a moment of the fake clock."""

    def __init__(self, now: Callable[[], float], ends: float, return_code: int = 0) -> None:
        self.now, self.ends, self.return_code, self.killed = now, ends, return_code, False

    def poll(self) -> int | None:
        return self.return_code if self.killed or self.now() >= self.ends else None

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return self.return_code


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def test_the_longest_come_first_and_what_takes_too_long_is_ended(
    random_cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, started = Clock(), []
    monkeypatch.setattr(random_cells.time, "monotonic", clock.now)
    monkeypatch.setattr(random_cells.time, "sleep", clock.sleep)
    plan = any_plan()

    def start(waiting: Any, gpu: int, threads: int) -> Any:
        started.append((waiting.cell.number, clock.seconds))
        hangs = waiting.cell.number == 2
        process = FakeProcess(clock.now, clock.seconds + (1e9 if hangs else waiting.cell.seconds))
        log = {1: "error: torch.OutOfMemoryError", 3: "step 2 ran out of memory (CUDA) and is taken again: less"}
        (waiting.folder / "log").write_text(log.get(waiting.cell.number, "fine"))
        process.return_code = int(waiting.cell.number == 1)
        return random_cells.Running(waiting.cell, plan, gpu, process, waiting.folder, clock.seconds)

    monkeypatch.setattr(random_cells, "start", start)
    monkeypatch.setattr(random_cells, "describe", dict)
    cell = random_cells.draw_cell(1, 0)
    base = replace(cell, method="lora", limit_gib=60.0, size=512, accumulation=1, num_controls=0, shapes=((1.0, 100),))
    waiting = []
    for number, batch_size in enumerate((1, 2, 4, 8, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        waiting.append(random_cells.Waiting(replace(base, number=number, batch_size=batch_size), plan, folder, ()))
    results: dict[int, Result] = {}
    room = random_cells.Room(num_gpus=1, parallel=4, host_gib=1000)  # two of 60 GiB fit a GPU
    left = random_cells.run_all(
        waiting, room, lambda: 450 - clock.now(), lambda cell, result: results.update({cell.number: result})
    )
    assert [number for number, _ in started] == [3, 2, 4, 1], "by their tokens"
    assert [cell.number for cell in left] == [0], "it would not have ended in time"
    assert {number: result["outcome"] for number, result in results.items()} == {
        3: "ran", 2: "unfinished", 4: "ran", 1: "out of memory",
    }  # fmt: skip
    assert [number for number in results if results[number]["shortages"]] == [3]
    assert not any((tmp_path / str(number)).exists() for number in (1, 2, 3, 4))


# ---- what a run left


def any_plan() -> TrainingPlan:
    from pixtune.plan.training import plan_training
    from tests.full_size import full_size_footprint

    words = ["pretrained_model_name_or_path=model", "output_dir=out", "data_config.img_dir=x", "max_train_steps=1"]
    config = load_config(None, [*words, "gpu_memory_limit_gib=60"], folders_must_exist=False)
    return plan_training(facts_as("H200"), full_size_footprint(config, "flux"), config)


@pytest.mark.parametrize(
    ("return_code", "log", "expected"),
    [
        (0, "out of memory once, and then not", "ran"),
        (1, "Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory", "out of memory"),
        (1, "error: this run needs about 9 GiB, and 7 GiB are usable: 2 GiB are missing.", "refused"),
        (1, "Traceback ...\nKeyError: 'missing'", "failed"),
        (-9, "", "failed"),
        (None, "anything", "unfinished"),
    ],
)
def test_how_a_run_ended(random_cells: ModuleType, return_code: int | None, log: str, expected: str) -> None:
    assert random_cells.outcome(return_code, log) == expected


def test_the_summary_counts(random_cells: ModuleType) -> None:
    plan = any_plan().to_dict()
    cell = random_cells.asdict(random_cells.draw_cell(1, 0))

    def result(how: str, error: float | None, process_gib: float | None, **history: Any) -> Result:
        captures = {"planned": 4, "made": 1, "savings": [], "stopped": None, **history}
        memory = {"captures": captures, "process_peak_gib": process_gib} if error is not None else {}
        return {
            "cell": {**cell, "limit_gib": 10.0}, "outcome": how, "memory": memory, "plan": plan, "log": [],
            "shortages": [], "measured_peak_gib": error and 9.0, "expected_peak_gib": 9.0, "error_percent": error,
        }  # fmt: skip

    results = [
        result("ran", 1.0, 9.9), result("ran", -2.0, 10.5, savings=["2 more of 57 blocks recomputed"]),
        result("ran", 0.5, None, made=0, stopped="they could not be captured (it failed)"),
        result("ran", 0.1, 9.0, planned=0, made=0),
        result("out of memory", None, None), result("unfinished", None, None),
    ]  # fmt: skip
    results[1]["shortages"] = results[4]["shortages"] = ["step 3 ran out of memory (CUDA) and is taken again"]
    assert random_cells.summary(results) == [
        "4 ran, 1 out of memory, 1 unfinished",
        "ended without out-of-memory: 4 of 5, 1 of them went on with less after memory was short",
        "captured where planned: 2 of 3, 1 of them after saving memory",
        "planned peak against measured, 4 cells: median 1.0%, 95th percentile 2.0%, worst 2.0%",
        "process within its limit: 2 of 3, at most 105.0% of it",
    ]
    words = [random_cells.captured(each) for each in results]
    assert words == [
        "1", "1, 2 more of 57 blocks recomputed", "no: they could not be captured (it failed)", "not planned", "", "",
    ]  # fmt: skip
    assert {random_cells.row(each).count("|") for each in results} == {len(random_cells.COLUMNS) + 1}


def test_what_a_run_wrote_is_read(random_cells: ModuleType, tmp_path: Path) -> None:
    """From its own plan in the checkpoint; a run that broke off has the plan that it was started with."""
    cell, plan = random_cells.draw_cell(1, 0), any_plan()
    lines: list[Result] = [
        {"kind": "step", "step": 1, "seconds": 9.0, "peak_memory_gib": 8.0},
        {"kind": "step", "step": 2, "seconds": 1.0, "peak_memory_gib": 8.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = random_cells.read_result(cell, plan, tmp_path)
    assert broken["plan"] == plan.to_dict() and broken["steps_taken"] == 2 and broken["measured_peak_gib"] == 8.0
    lines.append({"kind": "memory", "step": 2, "stages": [], "measured_peak_gib": 10.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoint-000002").mkdir()
    own = {**plan.to_dict(), "expected_peak_bytes": 11 * GIB}
    (tmp_path / "checkpoint-000002" / "state.json").write_text(json.dumps({"record": {"plan": own}}))
    whole = random_cells.read_result(cell, plan, tmp_path)
    assert (whole["expected_peak_gib"], whole["error_percent"]) == (11.0, 10.0)
