"""Reports when steps become slower than at the beginning of the run, and why, where a measurement shows it.

Steps are compared with the run's own baseline, size by size, since a batch of large pictures is no drift. A cause is
named only on evidence of its own; where there is none, the drift is reported without one.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BASELINE_STEPS = 16
"""Number of steps of one size whose median is the baseline. Nearly half of them may compile without changing it."""
WINDOW_STEPS = 20
DRIFT_RATIO = 1.3
RECOVERED_RATIO = 1.15
"""Ratio below which a reported drift is over, so that the next one is reported again."""
CLOCK_SHARE = 0.9
"""Share of the baseline's clock below which the card is throttling."""
FULL_SHARE = 0.03
"""Share of free device memory below which the driver of Windows moves memory to the host instead of refusing."""
RECOMPILING_STEPS = 3


@dataclass(frozen=True)
class StepTiming:
    """Measurements of one step. Only `step` and `seconds` are needed; each other figure can show one cause."""

    step: int
    seconds: float
    size: str = ""
    """Description of the batch, for example "1024x1024 x2"; steps of one size cost alike."""
    data_wait_seconds: float = 0.0
    """Part of `seconds` that was spent waiting for the next batch."""
    recompilations: int = 0
    """Number of graphs that were compiled in this step."""
    allocation_retries: int = 0
    """Number of times in this step that the allocator had to give memory back to the driver and ask again, as a
    difference of `num_alloc_retries` in torch's memory statistics."""
    free_share: float | None = None
    """Free share of device memory, as the driver sees it."""
    clock_mhz: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class Drift:
    """The report that steps have become slower."""

    step: int
    ratio: float
    """Median of the last steps over their baselines."""
    causes: tuple[str, ...]
    """Causes that were measured, among "data", "recompilation", "memory", "spill" and "throttling"; may be none."""
    message: str


@dataclass(frozen=True)
class Baseline:
    """Cost of a step of one size at the beginning of the run."""

    seconds: float
    data_wait_seconds: float
    clock_mhz: float | None


@dataclass(frozen=True)
class Measured:
    """A step beside its baseline."""

    timing: StepTiming
    baseline: Baseline

    @property
    def ratio(self) -> float:
        return self.timing.seconds / self.baseline.seconds


class StepTimeWatch:
    """Takes the timing of each step and returns a drift when one begins; None while it lasts or where there is none.

    Args:
        spills_to_host: whether this system's driver moves GPU memory to the host when it is full (Windows and WSL),
            which shows as slowness instead of an error.
    """

    def __init__(self, spills_to_host: bool = False) -> None:
        self._spills_to_host = spills_to_host
        self._young: dict[str, list[StepTiming]] = defaultdict(list)
        self._baselines: dict[str, Baseline] = {}
        self._window: deque[Measured] = deque(maxlen=WINDOW_STEPS)
        self._drifting = False

    def add(self, timing: StepTiming) -> Drift | None:
        """Returns the drift that has begun with this step, or None."""
        baseline = self._baselines.get(timing.size)
        if baseline is None:
            self._learn(timing)
            return None
        self._window.append(Measured(timing, baseline))
        if len(self._window) < WINDOW_STEPS:
            return None
        ratio = slowness(self._window)
        if self._drifting:
            self._drifting = ratio >= RECOVERED_RATIO
            return None
        if ratio < DRIFT_RATIO:
            return None
        self._drifting = True
        return explain(tuple(self._window), ratio, self._spills_to_host)

    def wants_clock(self, size: str, seconds: float) -> bool:
        """Returns whether the clock of such a step is worth reading: its baseline is being learnt, or it is slow."""
        baseline = self._baselines.get(size)
        return baseline is None or seconds >= DRIFT_RATIO * baseline.seconds

    def _learn(self, timing: StepTiming) -> None:
        young = self._young[timing.size]
        young.append(timing)
        if len(young) == BASELINE_STEPS:
            self._baselines[timing.size] = baseline_of(self._young.pop(timing.size))


def baseline_of(timings: Sequence[StepTiming]) -> Baseline:
    """Takes medians, so that steps which compiled or read a cold cache do not count."""
    return Baseline(
        statistics.median(timing.seconds for timing in timings),
        statistics.median(timing.data_wait_seconds for timing in timings),
        _median([timing.clock_mhz for timing in timings]),
    )


def slowness(window: Sequence[Measured]) -> float:
    """Returns how slow the last steps are, as a multiple of their baselines.

    It is the median, but the mean where several steps compiled anew, which costs minutes in a few steps and would not
    show in a median.
    """
    ratios = [measured.ratio for measured in window]
    recompiling = sum(measured.timing.recompilations > 0 for measured in window)
    return statistics.fmean(ratios) if recompiling >= RECOMPILING_STEPS else statistics.median(ratios)


def explain(window: Sequence[Measured], ratio: float, spills_to_host: bool) -> Drift:
    """Builds the drift of a window of steps, with its measured causes."""
    findings = [(cause, finding) for cause, find in CAUSES.items() if (finding := find(window, spills_to_host))]
    seconds = statistics.fmean(measured.timing.seconds for measured in window)
    before = statistics.fmean(measured.baseline.seconds for measured in window)
    reason = " ".join(finding for _, finding in findings) or (
        "No measurement explains it: neither data, recompilation, memory nor clock. Look for other programs on this "
        "machine."
    )
    last = window[-1].timing.step
    return Drift(
        last,
        ratio,
        tuple(cause for cause, _ in findings),
        f"step {last}: the last {len(window)} steps took {seconds:.2f} s each, {ratio:.1f} times as long as at first "
        f"({before:.2f} s). {reason}",
    )


def _data(window: Sequence[Measured], spills_to_host: bool) -> str | None:
    """Finds that waiting for data makes up at least half of the additional time."""
    wait = statistics.fmean(measured.timing.data_wait_seconds for measured in window)
    longer_wait = wait - statistics.fmean(measured.baseline.data_wait_seconds for measured in window)
    longer = statistics.fmean(measured.timing.seconds - measured.baseline.seconds for measured in window)
    if longer_wait < longer / 2:
        return None
    return (
        f"{wait:.2f} s of a step are spent waiting for data: the cache's disk is slow or busy. Put the cache on a "
        "local disk, or raise data_config.num_workers."
    )


def _recompilation(window: Sequence[Measured], spills_to_host: bool) -> str | None:
    """Finds that only steps that compile are slow."""
    compiling = [measured for measured in window if measured.timing.recompilations]
    others = [measured.ratio for measured in window if not measured.timing.recompilations]
    if not compiling or (others and statistics.median(others) >= DRIFT_RATIO):
        return None
    sizes = sorted({measured.timing.size for measured in compiling} - {""})
    return (
        f"{len(compiling)} of them compiled anew{' for ' + ', '.join(sizes) if sizes else ''}. Fewer bucket sizes "
        "compile less often; TORCH_LOGS=recompiles shows why it happens."
    )


def _memory(window: Sequence[Measured], spills_to_host: bool) -> str | None:
    """Finds that the allocator had to give memory back and ask again."""
    retries = sum(measured.timing.allocation_retries for measured in window)
    if not retries:
        return None
    return (
        f"The GPU's memory is all but full: the allocator emptied its cache {retries} times. Lower train_batch_size or "
        "img_size, or let more be recomputed (disable_gradient_checkpointing: false)."
    )


def _spill(window: Sequence[Measured], spills_to_host: bool) -> str | None:
    """Finds that the driver has no room left, on a system where it then uses the host's memory."""
    shares = [measured.timing.free_share for measured in window if measured.timing.free_share is not None]
    if not spills_to_host or not shares or min(shares) >= FULL_SHARE:
        return None
    return (
        f"Only {100 * min(shares):.0f}% of the GPU's memory is free, and the driver of Windows then moves memory "
        "to the host over PCIe. Free some, and set the NVIDIA Control Panel's 'CUDA - Sysmem Fallback Policy' to "
        "'Prefer No Sysmem Fallback': runs then fail at once instead of crawling."
    )


def _throttling(window: Sequence[Measured], spills_to_host: bool) -> str | None:
    """Finds that the clock is lower than at first."""
    now = _median([measured.timing.clock_mhz for measured in window])
    before = _median([measured.baseline.clock_mhz for measured in window])
    if now is None or before is None or now >= CLOCK_SHARE * before:
        return None
    temperature = _median([measured.timing.temperature_celsius for measured in window])
    heat = "" if temperature is None else f" at {temperature:.0f} °C"
    return (
        f"The GPU runs at {now:.0f} MHz{heat} instead of {before:.0f}: heat or a power limit slows it. Look at "
        "its cooling; `nvidia-smi -q -d PERFORMANCE` names the reason."
    )


CAUSES: dict[str, Callable[[Sequence[Measured], bool], str | None]] = {
    "data": _data,
    "recompilation": _recompilation,
    "memory": _memory,
    "spill": _spill,
    "throttling": _throttling,
}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
