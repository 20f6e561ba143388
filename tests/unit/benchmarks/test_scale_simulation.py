"""The simulated step, against steps that are played through by hand."""

from __future__ import annotations

import sys

import pytest

from pixtune.plan.exchange_cost import Cluster, Link
from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import scale_simulation as simulation
from scale_simulation import Work, cluster_of, simulate, timeline_seconds


def test_weights_come_beside_computing_as_many_ahead_as_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timeline_seconds([1, 1, 1], [], []) == 3
    assert timeline_seconds([1, 1, 1, 1], [0.5] * 4, []) == 4.5, "only the first one is waited for"
    assert timeline_seconds([1, 1, 1, 1], [2] * 4, []) == 9, "the link decides, and the last block is computed after it"
    monkeypatch.setattr(simulation, "SLOTS", 1)
    assert timeline_seconds([1, 1, 1, 1], [0.5] * 4, []) == 6, "one slot: nothing comes beside computing"


def test_gradients_leave_when_they_are_there_and_the_last_ones_after_it() -> None:
    assert timeline_seconds([1, 1], [], [0, 0.25]) == 2.25
    assert timeline_seconds([1, 1, 1], [], [0, 3, 3]) == 2 + 3 + 3, "the first sum is waited for by the second"
    # The fourth block's weights may come once the first is computed; the gradients of that one leave before them.
    assert timeline_seconds([1, 1, 1, 1], [0.1] * 4, [1, 0, 0, 0]) == pytest.approx(4.1)
    assert timeline_seconds([1, 1, 1, 1], [0.1] * 4, [3, 0, 0, 0]) == pytest.approx(1.1 + 3 + 0.1 + 1)


def test_one_gpu_exchanges_nothing_and_slow_links_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = simulate(Work("lora", "bf16", 0.3), cluster_of("H100", 1), 1)
    assert alone.seconds == pytest.approx(0.3) and alone.efficiency == pytest.approx(1.0)
    monkeypatch.setattr(simulation, "DEVIATION", 0.0)
    slow = Cluster(1, 8, Link(10e9, 0.0), Link(1e9, 0.0))
    step = simulate(Work("sharded", "bf16", 0.3), slow, 8)
    block_seconds = 2 * 226_492_416 * 7 / 8 / 10e9
    assert step.hidden_seconds == pytest.approx(114 * block_seconds, rel=0.02) and step.limit.startswith("the link")
    assert step.exposed_seconds == pytest.approx(2 * 23_592_962 * 4 * 7 / 8 / 10e9)
    assert simulate(Work("sharded", "4 bits", 0.3), slow, 8).seconds < step.seconds / 3


def test_tables_have_a_row_for_each_way_and_the_measured_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(simulation.table()) == 2 + 6
    monkeypatch.setattr(simulation, "MEASURED", [simulation.Measured("a", Work("lora", "bf16", 0.33), 0.33)])
    assert "| 0.3300 | +0.7% |" in simulation.check()[-1]
