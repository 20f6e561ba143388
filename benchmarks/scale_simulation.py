"""Simulates a step of a run on many GPUs, block by block: python benchmarks/scale_simulation.py

Each GPU computes its blocks one after the other; a link brings the weights of the next ones beside it, as many ahead as
there are slots, and takes the gradients away. The step ends with the exchange of a LoRA's gradients, or with the last
sum of all weights', and waits for the slowest GPU. What is sent, and how long it takes, are those of
`pixtune.plan.exchange_cost`; how long a GPU computes is measured (benchmarks/RESULTS.md) and given.

Prints the table of docs/scale.md; with `--check` the simulated beside the measured two GPUs of MEASURED.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from pixtune.hardware.cards import card_named
from pixtune.hardware.gpu_links import links_of_card
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

NUM_BLOCKS = 60
BLOCK_WEIGHTS = 226_492_416
"""Weights of a block of Qwen-Image without its modulation, which is computed ahead (`plan/footprint.py`)."""
MODULATED_BLOCK_WEIGHTS = 339_738_624
"""Those with it, which are trained where all weights are."""
LORA_VALUES = 23_592_960
"""Weights of a LoRA of rank 16 on Qwen-Image's attention projections."""
BYTES_PER_WEIGHT = {"bf16": 2.0, "8 bits": 1.0015, "4 bits": 0.5640}
"""Bytes of a block's frozen weight with its scales (`plan/footprint.py: block_weight_bytes`)."""
FORWARD_SHARE = 0.33
"""Share of a LoRA's step that is its forward pass; the backward pass multiplies as often, and attends more."""
SLOTS = 3
"""Whole blocks that a GPU holds at a time (`engine/sharded_blocks.py`)."""
LATENCY_SECONDS = {"inside": 5e-6, "between": 15e-6}
"""Time of a hop within a host and between two, beside its bytes: the usual figures of NCCL's own tests."""
DEVIATION = 0.01
"""Standard deviation of a GPU's step, as a share of it: clocks and reading differ. Assumed."""
WORDS = {"lora": "LoRA, whole base", "sharded": "LoRA, base in parts", "full": "all weights"}


@dataclass(frozen=True)
class Work:
    """A step of one GPU alone."""

    kind: str
    """"lora", "sharded" or "full"."""
    weights_format: str
    compute_seconds: float


@dataclass(frozen=True)
class Measured:
    """A row of the check: what two GPUs took."""

    words: str
    work: Work
    """With the seconds that one GPU took, or the same two that exchange nothing."""
    seconds: float
    """Seconds a step of the two."""


MEASURED = [
    # Medians of two H200 (NVLink, NCCL without multicast): benchmarks/RESULTS.md, "Two GPUs". One GPU's seconds of the
    # same work stand in `Work`.
    Measured("LoRA, a copy each, bf16", Work("lora", "bf16", 0.3280), 0.3301),
    Measured("LoRA, a copy each, 8 bits, before gradients lay in one buffer", Work("lora", "8 bits", 0.2399), 0.2464),
    Measured("LoRA, a copy each, 8 bits", Work("lora", "8 bits", 0.2579), 0.2603),
    Measured("LoRA, parts gathered by NCCL, bf16, recomputed", Work("sharded", "bf16", 0.434), 0.489),
    Measured("LoRA, parts read by copy engines, bf16, recomputed", Work("sharded", "bf16", 0.434), 0.5120),
]


def block_exchanges(work: Work, shards: int, num_processes: int) -> tuple[list[Exchange], list[Exchange]]:
    """Returns a step's gathers of blocks, and what is exchanged beside them or at its end."""
    if work.kind == "lora":
        return [], lora_exchanges(LORA_VALUES, num_processes)
    if work.kind == "sharded":
        part = round(BYTES_PER_WEIGHT[work.weights_format] * BLOCK_WEIGHTS)
        gathers = gathering_exchanges([part] * NUM_BLOCKS, shards, kept_blocks=SLOTS)
        return gathers, lora_exchanges(LORA_VALUES, num_processes)
    every = full_exchanges([MODULATED_BLOCK_WEIGHTS] * NUM_BLOCKS, shards, num_processes, gradient_bytes=2)
    gathers = [each for each in every if each.kind == "all_gather"]
    return gathers, [each for each in every if each.kind != "all_gather"]


def timeline_seconds(compute: Sequence[float], gathers: Sequence[float], sums: Sequence[float]) -> float:
    """Plays a step through: the seconds until all blocks are computed and everything is sent.

    Args:
        compute: seconds of each pass over a block, in their order.
        gathers: seconds to bring that block's weights; empty where they are there.
        sums: seconds to take its gradients away once it is computed; empty, or one for each pass (0: none).
    """
    done: list[float] = []
    link_free = 0.0
    waiting: list[tuple[float, float]] = []
    """Sums that wait for the link: when they may begin, and how long they take."""
    for number, seconds in enumerate(compute):
        ready = 0.0
        if gathers:
            slot_free = done[number - SLOTS] if number >= SLOTS else 0.0
            while waiting and waiting[0][0] <= max(link_free, slot_free):  # what came first is sent first
                begins, lasts = waiting.pop(0)
                link_free = max(link_free, begins) + lasts
            link_free = ready = max(link_free, slot_free) + gathers[number]
        done.append(max(ready, done[-1] if done else 0.0) + seconds)
        if sums and sums[number]:
            waiting.append((done[-1], sums[number]))
    for begins, lasts in waiting:
        link_free = max(link_free, begins) + lasts
    return max(done[-1], link_free)


def simulate(work: Work, cluster: Cluster, shards: int) -> ScaledStep:
    """Returns the seconds of a step of all GPUs of a cluster.

    Args:
        shards: GPUs that hold one copy together, neighbours; 1: each has its own.
    """
    num_processes = cluster.num_processes
    gathers, others = block_exchanges(work, shards, num_processes)
    forward = FORWARD_SHARE * work.compute_seconds / NUM_BLOCKS
    backward = (1 - FORWARD_SHARE) * work.compute_seconds / NUM_BLOCKS
    compute = [forward] * NUM_BLOCKS + [backward] * NUM_BLOCKS
    at_end, sums = 0.0, list[float]()
    if work.kind == "full":
        per_block = [each for each in others if each.num_processes == shards or shards == 1]
        across = [each for each in others if each.num_processes != shards and shards > 1]
        seconds = exchanges_seconds(per_block, cluster) + exchanges_seconds(across, cluster, neighbours=False)
        sums = [0.0] * NUM_BLOCKS + [seconds / NUM_BLOCKS] * NUM_BLOCKS
    else:
        at_end = exchanges_seconds(others, cluster)
    seconds_of = [exchange_seconds(each, cluster) for each in gathers]
    if work.kind == "sharded" and seconds_of:  # each pass begins with blocks that the one before has left
        half = len(seconds_of) // 2
        seconds_of = [*[0.0] * SLOTS, *seconds_of[:half], *[0.0] * SLOTS, *seconds_of[half:]]
    hidden = timeline_seconds(compute, seconds_of, sums)
    waits = wait_for_slowest(DEVIATION * work.compute_seconds, num_processes)
    return ScaledStep(work.compute_seconds, hidden, at_end, waits)


def cluster_of(card: str, num_gpus: int, per_host: int = 8) -> Cluster:
    """Returns hosts of such cards, with the links of the planner's table."""
    per_host = min(per_host, num_gpus)
    links = links_of_card(card_named(card), per_host)
    inside = Link(links.bytes_per_second, LATENCY_SECONDS["inside"])
    between = Link(links.network_bytes_per_second / per_host, LATENCY_SECONDS["between"])
    return Cluster(num_gpus // per_host, per_host, inside, between)


def table() -> list[str]:
    """Returns the lines of the table of docs/scale.md."""
    works = [
        (Work("lora", "bf16", 0.330), 1), (Work("lora", "8 bits", 0.255), 1), (Work("sharded", "bf16", 0.330), 8),
        (Work("sharded", "4 bits", 0.330), 8), (Work("full", "bf16", 0.678), 8),
        (Work("full", "bf16", 0.678), 0),
    ]  # fmt: skip
    heads = ("H100, 8 a host", "format", "one GPU, s", "parts", "sent a step, GB", "exchanges", "8", "64", "1,024")
    lines = [f"| {' | '.join(heads)} | limit at 1,024 |", "|---" * (len(heads) + 1) + "|"]
    for work, parts in works:
        cells, limit = [], ""
        for num in (8, 64, 1024):
            step = simulate(work, cluster_of("H100", num), parts or num)
            cells.append(f"{100 * step.efficiency:.1f}%")
            limit = step.limit
        gathers, others = block_exchanges(work, parts or 64, 64)
        sent = sent_bytes([*gathers, *others]) / 1e9
        held = {1: "1", 0: "all GPUs"}.get(parts, str(parts))
        words = [WORDS[work.kind], work.weights_format, f"{work.compute_seconds:.2f}", held]
        words += [f"{sent:.2f}", str(len(gathers) + len(others)), *cells, limit]
        lines.append(f"| {' | '.join(words)} |")
    return lines


def check() -> list[str]:
    """Returns the simulated steps of two H200 beside the measured ones."""
    lines = ["| two H200 | alone, s | simulated, s | measured, s | difference |", "|---" * 5 + "|"]
    cluster = cluster_of("H200", 2)
    for row in MEASURED:
        step = simulate(row.work, cluster, 2 if row.work.kind == "sharded" else 1)
        apart = f"{100 * (step.seconds / row.seconds - 1):+.1f}%"
        lines.append(
            f"| {row.words} | {row.work.compute_seconds:.3f} | {step.seconds:.4f} | {row.seconds:.4f} | {apart} |"
        )
    return lines


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="two GPUs, simulated and measured")
    print("\n".join(check() if parser.parse_args().check else table()))


if __name__ == "__main__":
    main()
