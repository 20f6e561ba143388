"""The arithmetic of exchanges, against a ring that is played through and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pixtune.plan.exchange_cost import (
    Cluster,
    Exchange,
    Link,
    ScaledStep,
    exchange_seconds,
    exchanges_seconds,
    full_exchanges,
    gathering_exchanges,
    lora_exchanges,
    sent_bytes,
    wait_for_slowest,
)

FAST, SLOW = Link(100e9, 5e-6), Link(10e9, 20e-6)


def play_ring_all_reduce(num_processes: int, parts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Sums `parts[process][part]` over a ring, message by message; returns the sums and the parts each has sent."""
    sent = 0
    for shift in range(num_processes - 1):  # sums travel on
        messages = [(p, (p - shift) % num_processes) for p in range(num_processes)]
        values = [parts[p][part] for p, part in messages]
        for (p, part), value in zip(messages, values, strict=True):
            parts[(p + 1) % num_processes][part] += value
        sent += 1
    for shift in range(num_processes - 1):  # whole sums travel on
        messages = [(p, (p + 1 - shift) % num_processes) for p in range(num_processes)]
        values = [parts[p][part] for p, part in messages]
        for (p, part), value in zip(messages, values, strict=True):
            parts[(p + 1) % num_processes][part] = value
        sent += 1
    return parts, sent


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_a_process_sends_what_a_ring_has_it_send(num_processes: int) -> None:
    parts = [[(p + 1) * 10**part % 97 for part in range(num_processes)] for p in range(num_processes)]
    expected = [sum(column) for column in zip(*parts, strict=True)]
    summed, sent_parts = play_ring_all_reduce(num_processes, [list(row) for row in parts])
    assert summed == [expected] * num_processes
    part_bytes = 1000
    exchange = Exchange("all_reduce", num_processes * part_bytes, num_processes)
    assert exchange.sent_bytes == sent_parts * part_bytes
    assert Exchange("all_gather", num_processes * part_bytes, num_processes).sent_bytes == sent_parts * part_bytes / 2


def test_a_lora_is_one_exchange_and_a_shared_base_two_a_block() -> None:
    (only,) = lora_exchanges(1_000_000, 4)
    assert only == Exchange("all_reduce", 4_000_008, 4)
    assert lora_exchanges(1_000_000, 1) == gathering_exchanges([100], 1) == []
    twice = gathering_exchanges([100, 300], 2, num_micro_batches=3)
    assert len(twice) == 2 * 2 * 3 and sent_bytes(twice) == 3 * 2 * (50 + 150)
    kept = gathering_exchanges([100, 300], 2, kept_blocks=1)
    assert [each.num_bytes for each in kept] == [300, 100], "the first is there from the backward pass before"
    assert gathering_exchanges([100, 300], 2, kept_blocks=3) == []


def test_all_weights_travel_three_times_and_gradients_of_copies_once_more() -> None:
    step = full_exchanges([1000, 1000], shards=4, num_processes=4)
    kinds = [each.kind for each in step]
    assert kinds.count("all_gather") == 4 and kinds.count("reduce_scatter") == 2 and len(kinds) == 6
    assert sent_bytes(step) == (4 * 2000 + 2 * 4000) * 3 // 4
    hybrid = full_exchanges([1000, 1000], shards=4, num_processes=8)
    added = [each for each in hybrid if each not in step]
    assert [(each.kind, each.num_bytes, each.num_processes) for each in added] == [("all_reduce", 1000, 2)] * 2
    replicated = full_exchanges([1000], shards=1, num_processes=8)
    assert [(each.kind, each.num_bytes) for each in replicated] == [("all_reduce", 4000)]


def test_seconds_are_bytes_over_the_link_and_hops() -> None:
    one_host = Cluster(1, 8, FAST, SLOW)
    gather = exchange_seconds(Exchange("all_gather", 800_000_000, 8), one_host)
    assert gather == pytest.approx(700e6 / 100e9 + 7 * 5e-6)
    summed = exchange_seconds(Exchange("all_reduce", 800_000_000, 8), one_host)
    assert summed == pytest.approx(2 * (700e6 / 100e9 + 3 * 5e-6))  # log2(8) hops
    hosts = Cluster(4, 8, FAST, SLOW)
    both = exchange_seconds(Exchange("all_reduce", 800_000_000, 32), hosts)
    assert both == pytest.approx(summed + 2 * (75e6 / 10e9 + 2 * 20e-6))
    apart = exchange_seconds(Exchange("all_reduce", 800_000_000, 4), hosts, neighbours=False)
    assert apart == pytest.approx(2 * (600e6 / 10e9 + 2 * 20e-6))
    assert exchanges_seconds([Exchange("all_gather", 800_000_000, 8)] * 3, one_host) == pytest.approx(3 * gather)


@pytest.mark.parametrize("num_processes", [2, 8, 1024])
def test_the_slowest_of_many_is_as_late_as_drawn_ones(num_processes: int) -> None:
    drawn = np.random.default_rng(1).normal(0, 1, (4000, num_processes)).max(axis=1).mean()
    assert wait_for_slowest(1.0, num_processes) == pytest.approx(
        drawn, rel=0.05, abs=0.04
    )  # Blom: 0.59 for 0.56 of two
    assert wait_for_slowest(1.0, 1) == 0.0


def test_a_step_is_limited_by_what_takes_longest() -> None:
    hidden = ScaledStep(1.0, hidden_seconds=0.9, exposed_seconds=0.0, wait_seconds=0.0)
    assert hidden.efficiency == 1.0
    bound = ScaledStep(1.0, hidden_seconds=2.0, exposed_seconds=0.1, wait_seconds=0.2)
    assert math.isclose(bound.efficiency, 1 / 2.3) and bound.limit.startswith("the link")
    assert ScaledStep(1.0, 0.0, 0.1, 0.2).limit == "the slowest process"


def test_weights_that_stay_gathered_come_once_for_each_micro_batch() -> None:
    twice, once = (full_exchanges([10, 30], 2, 4, num_micro_batches=3, keeps_gathered=keeps) for keeps in (False, True))
    gathers = [each.num_bytes for each in once if each.kind == "all_gather"]
    assert sorted(gathers) == [20, 20, 20, 60, 60, 60]
    assert [each for each in twice if each.kind != "all_gather"] == [each for each in once if each.kind != "all_gather"]
