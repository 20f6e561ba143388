"""Drift of step times on made-up series: found when it is there, explained when something measured explains it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from pixtune.tracking.steptime import BASELINE_STEPS, WINDOW_STEPS, Drift, StepTimeWatch, StepTiming

YOUNG = [StepTiming(step, 1.0, data_wait_seconds=0.01, clock_mhz=1980) for step in range(BASELINE_STEPS)]


def drifts(timings: Iterable[StepTiming], spills_to_host: bool = False) -> list[Drift]:
    watch = StepTimeWatch(spills_to_host)
    return [drift for timing in timings if (drift := watch.add(timing))]


def later(seconds: float, count: int = 3 * WINDOW_STEPS, **figures: Any) -> list[StepTiming]:
    return [StepTiming(BASELINE_STEPS + number, seconds, **figures) for number in range(count)]


def test_steady_steps_say_nothing() -> None:
    jitter = [StepTiming(step, 1.0 + 0.2 * (step % 3)) for step in range(200)]
    assert drifts(jitter) == []


def test_a_few_slow_steps_are_no_drift() -> None:
    timings = [StepTiming(step, 60.0 if step % 50 == 0 else 1.0) for step in range(400)]  # a save, a validation
    assert drifts(timings) == []


def test_slow_first_steps_are_not_the_baseline() -> None:
    compiling = [StepTiming(step, 90.0 if step < 3 else 1.0) for step in range(BASELINE_STEPS)]
    (drift,) = drifts(compiling + later(1.5))
    assert drift.ratio == pytest.approx(1.5)


def test_drift_without_evidence_names_no_cause() -> None:
    (drift,) = drifts(YOUNG + later(2.0, data_wait_seconds=0.01, clock_mhz=1970))
    assert drift.causes == () and drift.ratio == pytest.approx(2.0)
    assert "took 2.00 s each, 2.0 times as long as at first (1.00 s). No measurement explains" in drift.message


def test_a_drift_is_found_as_soon_as_the_median_has_it() -> None:
    steady = WINDOW_STEPS
    timings = YOUNG + later(1.0, steady) + later(2.0)
    watch = StepTimeWatch()
    found = [index for index, timing in enumerate(timings) if watch.add(timing)]
    assert found == [BASELINE_STEPS + steady + WINDOW_STEPS // 2 - 1]  # half the window at 2.0: the median is 1.5


def test_it_is_said_once_and_again_after_recovery() -> None:
    slow, fast = later(2.0, 100), later(1.0, 50)
    assert len(drifts(YOUNG + slow)) == 1
    assert len(drifts(YOUNG + slow + fast + slow)) == 2


def test_another_size_is_no_drift() -> None:
    small = [StepTiming(step, 0.25, "512x512") for step in range(100)]
    large = [StepTiming(step, 1.0, "1024x1024") for step in range(100, 200)]
    assert drifts(small + large) == []
    slow = [StepTiming(step, 0.5, "512x512") for step in range(200, 300)]
    assert [drift.ratio for drift in drifts(small + large + slow)] == [pytest.approx(1.5)]  # the median on its way to 2


@pytest.mark.parametrize(
    ("cause", "figures", "told"),
    [
        ("data", {"data_wait_seconds": 0.9}, "0.90 s of a step are spent waiting for data"),
        ("recompilation", {"recompilations": 1, "size": ""}, "20 of them compiled anew"),
        ("memory", {"allocation_retries": 2}, "emptied its cache 40 times"),
        ("throttling", {"clock_mhz": 1200, "temperature_celsius": 86}, "at 1200 MHz at 86 °C instead of 1980"),
    ],
)
def test_a_measured_cause_is_named(cause: str, figures: dict[str, Any], told: str) -> None:
    (drift,) = drifts(YOUNG + later(2.0, **figures))
    assert drift.causes == (cause,) and told in drift.message


def test_all_measured_causes_are_named() -> None:
    (drift,) = drifts(YOUNG + later(2.0, data_wait_seconds=0.8, clock_mhz=1400))
    assert drift.causes == ("data", "throttling")


@pytest.mark.parametrize("figures", [{"data_wait_seconds": 0.4}, {"clock_mhz": 1850}, {"free_share": 0.2}])
def test_weak_evidence_is_none(figures: dict[str, Any]) -> None:
    (drift,) = drifts(YOUNG + later(2.0, **figures), spills_to_host=True)
    assert drift.causes == ()


def test_a_full_card_spills_only_where_drivers_do_that() -> None:
    timings = YOUNG + later(10.0, free_share=0.01)
    (windows,), (linux,) = drifts(timings, spills_to_host=True), drifts(timings)
    assert windows.causes == ("spill",) and "Sysmem Fallback Policy" in windows.message
    assert linux.causes == ()


def test_recompiling_now_and_then_costs_more_than_a_median_shows() -> None:
    timings = [
        StepTiming(step, 30.0 if step % 5 == 0 else 1.0, recompilations=step % 5 == 0)
        for step in range(BASELINE_STEPS, 100)
    ]
    (drift,) = drifts(YOUNG + timings)
    assert drift.causes == ("recompilation",) and drift.ratio > 5


def test_recompilation_is_not_blamed_for_steps_without_it() -> None:
    timings = [StepTiming(step, 2.0, recompilations=step % 10 == 0) for step in range(BASELINE_STEPS, 100)]
    assert drifts(YOUNG + timings)[0].causes == ()
