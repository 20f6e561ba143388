"""Chooses the rungs that a plan is compared with: those next to it, and other ways that fit. See neighbours.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pixtune.hardware.facts import GIB
from pixtune.plan import all_weights
from pixtune.plan.rungs import (
    STREAM_SLOTS,
    Rung,
    allowed_formats,
    first_that_fits,
    fit_host,
    ladder,
    table_rows,
)
from pixtune.plan.seconds import step_seconds
from pixtune.plan.situation import CONTEXT_BYTES, RESERVE_BYTES, Situation

BOLDER = 1.03
"""Memory over the usable one up to which a rung is tried though the planner says that it does not fit: its estimates
are promised to be right within 3%."""
MUCH_SLOWER = 1.3
"""Estimated time over the plan's from which on another way is not tried."""
OTHER_WAYS = 2
CHOSEN, SAME_FORMAT, MORE_BITS, FEWER_BITS = "chosen", "same format", "more bits", "fewer bits"


@dataclass(frozen=True)
class Candidate:
    """A rung to be measured for a limit."""

    rung: Rung
    relation: str
    """Its weights' format beside that of the plan: `CHOSEN`, `SAME_FORMAT`, `MORE_BITS` or `FEWER_BITS`."""
    why: str
    """Reason why it is tried, in words."""


def way_of(rung: Rung) -> tuple[object, ...]:
    """Returns what two rungs share that differ in numbers alone."""
    return (
        rung.weights_format, rung.kept_transposes, rung.modulation_rows > 0, rung.selective, rung.offload_inputs,
        rung.recomputed_blocks > 0, rung.streamed_blocks > 0,
    )  # fmt: skip


def candidates(situation: Situation) -> list[Candidate]:
    """Returns the plan of a run, first, and the rungs that it is compared with; empty: nothing fits."""
    chosen = first_that_fits(situation)
    if chosen is None:
        return []
    slowest = MUCH_SLOWER * step_seconds(chosen, situation)

    def fastest(rungs: Iterable[Rung]) -> list[Rung]:
        """Returns them by their estimated time, those left out that are much slower, or that the host cannot hold."""
        held = filter(None, (fit_host(rung, situation) for rung in rungs if rung != chosen))
        timed = [(step_seconds(rung, situation), rung) for rung in held]
        return [rung for seconds, rung in sorted(timed, key=lambda each: each[0]) if seconds <= slowest]

    own = [rung for rung in ladder(situation) if rung.weights_format == chosen.weights_format]
    fitting = [rung for rung in own if situation.fits_device(rung)]
    found = [Candidate(chosen, CHOSEN, "the plan")]
    bold = [rung for rung in own if situation.usable_bytes < situation.needed(rung) <= BOLDER * situation.usable_bytes]
    found += [Candidate(rung, SAME_FORMAT, "within 3% of fitting") for rung in fastest(bold)[:1]]
    ways = {way_of(chosen)}
    for rung in fastest(fitting):
        if way_of(rung) not in ways and len(ways) <= OTHER_WAYS:
            ways.add(way_of(rung))
            found.append(Candidate(rung, SAME_FORMAT, "another way that fits"))
    formats = allowed_formats(situation)
    place = formats.index(chosen.weights_format)
    for weights_format in formats[:place][-1:]:
        more = (rung for rung in every_recomputation(weights_format, situation) if situation.fits_device(rung))
        found += [Candidate(rung, MORE_BITS, "slower by the ladder's order") for rung in fastest(more)[:1]]
    for weights_format in formats[place + 1 :][:1]:
        fewer = (r for r in ladder(situation) if r.weights_format == weights_format and situation.fits_device(r))
        found += [Candidate(rung, FEWER_BITS, "fewer bits, if not slower") for rung in fastest(fewer)[:1]]
    return found


def one_of_each_way(situation: Situation) -> list[Candidate]:
    """Returns the plan and one rung of every way of the ladder that differs from it: to try that all of them run."""
    chosen = first_that_fits(situation)
    if chosen is None:
        return []
    ways = {way_of(rung): rung for rung in reversed(list(ladder(situation))) if way_of(rung) != way_of(chosen)}
    return [
        Candidate(chosen, CHOSEN, "the plan"), *(Candidate(rung, SAME_FORMAT, "tried") for rung in ways.values()),
    ]  # fmt: skip


def every_recomputation(weights_format: str, situation: Situation) -> Iterator[Rung]:
    """Yields ways of holding a format that the ladder leaves out, since 8 bits are held to be faster than these."""
    blocks, rows = situation.footprint.num_blocks, table_rows(situation.footprint)
    for offload in (False, True):
        for count in range(1, blocks + 1):
            yield Rung(weights_format, rows, True, count, offload, reprojected_blocks=blocks - count)
    for count in range(STREAM_SLOTS + 1, blocks + 1):
        yield Rung(weights_format, rows, True, blocks, True, count)


# ---- what is built, and what runs on it


@dataclass(frozen=True)
class Build:
    """What rungs share that run on one loaded and compiled transformer."""

    weights_format: str
    kept_transposes: bool
    modulation_rows: int
    selective: bool
    streamed_blocks: int

    @classmethod
    def of(cls, rung: Rung) -> Build:
        return cls(
            rung.weights_format, rung.kept_transposes, rung.modulation_rows, rung.selective, rung.streamed_blocks
        )


@dataclass
class Job:
    """A rung to be measured once, for all limits that want it."""

    rung: Rung
    limits_gib: list[float] = field(default_factory=list)


def jobs_of(wanted: Mapping[float, Sequence[Candidate]]) -> dict[Build, list[Job]]:
    """Sorts the rungs of all limits by what they are built on: first what plans are built on, if time should be short.

    Args:
        wanted: candidates of each limit in GiB.
    """
    jobs: dict[Rung, Job] = {}
    for limit_gib, found in wanted.items():
        for candidate in found:
            jobs.setdefault(candidate.rung, Job(candidate.rung)).limits_gib.append(limit_gib)
    chosen = {found[0].rung for found in wanted.values()}
    builds: dict[Build, list[Job]] = {}
    for job in sorted(jobs.values(), key=lambda each: each.rung not in chosen):
        builds.setdefault(Build.of(job.rung), []).append(job)
    return builds


# ---- limits


def with_limit(situation: Situation, limit_gib: float) -> Situation:
    """Returns the situation of the same run under a limit of its process's device memory."""
    return situation.under(replace(situation.demands, memory_limit_bytes=round(limit_gib * GIB)))


def least_limit(situation: Situation) -> float:
    """Returns the smallest limit in GiB, to a tenth, that the planner does not refuse."""
    choose = all_weights.first_that_fits if situation.footprint.trains_all else first_that_fits
    low, high = 0, round(10 * situation.facts.total_bytes / GIB)
    while high - low > 1:
        middle = (low + high) // 2
        fits = choose(with_limit(situation, middle / 10)) is not None
        low, high = (low, middle) if fits else (middle, high)
    return high / 10


def limit_of_the_fastest(situation: Situation) -> float:
    """Returns the limit in GiB from which on the first rung of the ladder fits."""
    return (situation.needed(next(ladder(situation))) + CONTEXT_BYTES + RESERVE_BYTES) / GIB
