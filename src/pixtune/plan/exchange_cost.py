"""Arithmetic of what the processes of a run exchange: bytes over links, exchanges, seconds, efficiency. No torch.

The planner, docs/scale.md and `benchmarks/scale_simulation.py` share it. Every count of bytes is of what one process
sends, which is what it receives, too: links carry both ways at once.

Exchanges cost what a ring costs (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009, section 4): all but one of N parts pass each process once to be gathered, and once to be summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

GRADIENT_BYTES = 4
"""Bytes of a value of a LoRA's gradient: fp32, as its weights."""
NUM_TOTALS = 2
"""Values that a step exchanges beside its gradients: its loss, and that of a model that predicts nothing."""


@dataclass(frozen=True)
class Link:
    """A way from each process to others."""

    bytes_per_second: float
    """Bytes that a process sends in a second, while it receives as many."""
    latency_seconds: float
    """Seconds that an exchange takes for each hop, whatever its size."""


@dataclass(frozen=True)
class Cluster:
    """Processes, one for each GPU, and the links between them."""

    num_hosts: int
    per_host: int
    """Number of processes of a host."""
    inside: Link
    """The link between GPUs of one host."""
    between: Link
    """The link of one GPU to other hosts: its share of their network cards."""

    @property
    def num_processes(self) -> int:
        return self.num_hosts * self.per_host


@dataclass(frozen=True)
class Exchange:
    """A collective operation."""

    kind: Kind
    num_bytes: int
    """Bytes of the whole tensor: gathered from all processes, or summed in each of them."""
    num_processes: int
    """Processes that take part. They are neighbours, so that hosts are filled one after the other."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that each process sends."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.num_bytes * (self.num_processes - 1) // self.num_processes


# ---- what a step exchanges


def lora_gradient_bytes(num_values: int) -> int:
    """Counts the bytes of a LoRA's gradients with what travels beside them."""
    return (num_values + NUM_TOTALS) * GRADIENT_BYTES


def lora_exchanges(num_values: int, num_processes: int) -> list[Exchange]:
    """Lists a step's exchanges where each process has the whole base: all gradients in one, whatever the accumulation.

    Args:
        num_values: number of trained values.
    """
    if num_processes == 1:
        return []
    return [Exchange("all_reduce", lora_gradient_bytes(num_values), num_processes)]


def gathering_exchanges(
    block_bytes: Sequence[int], shards: int, num_micro_batches: int = 1, kept_blocks: int = 0
) -> list[Exchange]:
    """Lists a step's exchanges that gather weights, block by block, from the processes that share them.

    A micro-batch needs each block twice: in the forward pass, and in the backward pass, in which recomputation uses the
    same weights.

    Args:
        block_bytes: bytes of each block's shared weights, padding included.
        shards: processes that share one copy.
        kept_blocks: blocks that stay whole where a pass ends, and the next one, in the other direction, begins.
    """
    if shards == 1:
        return []
    first_kept = min(kept_blocks, len(block_bytes))
    gathered = [*block_bytes[first_kept:], *reversed(block_bytes[: len(block_bytes) - first_kept])]
    return [Exchange("all_gather", each, shards) for each in gathered] * num_micro_batches


def full_exchanges(
    block_weights: Sequence[int],
    shards: int,
    num_processes: int,
    weight_bytes: float = 2,
    gradient_bytes: float = 4,
    num_micro_batches: int = 1,
    keeps_gathered: bool = False,
) -> list[Exchange]:
    """Lists a step's exchanges where weights, gradients and optimizer states are shared (ZeRO's third stage).

    Weights are gathered for both passes, and gradients are summed into their shards after each block's backward pass.
    Between copies of all weights (hybrid sharding), each process then sums its shards' gradients.

    Args:
        block_weights: number of each block's weights.
        shards: processes that share one copy.
        weight_bytes, gradient_bytes: bytes of a value as it travels.
        keeps_gathered: the backward pass finds the weights where the forward pass has left them.
    """
    sizes = [round(weight_bytes * each) for each in block_weights]
    gathers = gathering_exchanges(sizes, shards, num_micro_batches)
    if keeps_gathered:
        gathers = gathers[: len(gathers) // 2]
    gradients = [round(gradient_bytes * each) for each in block_weights]
    sums = [Exchange("reduce_scatter", each, shards) for each in gradients] if shards > 1 else []
    copies = num_processes // shards
    across = [Exchange("all_reduce", each // shards, copies) for each in gradients] if copies > 1 else []
    return gathers + (sums + across) * num_micro_batches


def sent_bytes(exchanges: Sequence[Exchange]) -> int:
    """Adds up the bytes that each process sends in a step."""
    return sum(each.sent_bytes for each in exchanges)


# ---- how long it takes


def exchange_seconds(exchange: Exchange, cluster: Cluster, neighbours: bool = True) -> float:
    """Returns the seconds of an exchange that nothing else disturbs.

    Where several hosts take part, it is done in two levels, as NCCL does it: each GPU of a host exchanges its part with
    those of the same place in others, and the GPUs of a host complete each other's. For short messages the number of
    hops decides; a tree has 2 log2(N) of them where a ring has 2 (N - 1), so the shorter way counts.

    Args:
        neighbours: whether hosts are filled one after the other; else each process is on a host of its own, as copies
            are that hybrid sharding keeps on different hosts.
    """
    if exchange.num_processes == 1:
        return 0.0
    inside = min(exchange.num_processes, cluster.per_host) if neighbours else 1
    hosts = -(-exchange.num_processes // inside)
    rounds = 2 if exchange.kind == "all_reduce" else 1
    seconds = 0.0
    for num, num_bytes, link in ((inside, exchange.num_bytes, cluster.inside),
                                 (hosts, exchange.num_bytes / inside, cluster.between)):  # fmt: skip
        hops = min(num - 1, math.ceil(math.log2(num)) if exchange.kind == "all_reduce" else num - 1)
        seconds += rounds * (num_bytes * (num - 1) / num / link.bytes_per_second + hops * link.latency_seconds)
    return seconds


def exchanges_seconds(exchanges: Sequence[Exchange], cluster: Cluster, neighbours: bool = True) -> float:
    """Returns the seconds of exchanges that follow each other."""
    return sum(exchange_seconds(each, cluster, neighbours) for each in exchanges)


def wait_for_slowest(deviation_seconds: float, num_processes: int) -> float:
    """Returns the expected seconds by which the slowest of N processes is later than their mean.

    The expected maximum of N normal values (Blom, "Statistical estimates and transformed beta-variables", 1958,
    equation 6.10.1): a step that ends in an exchange takes as long as its slowest process.

    Args:
        deviation_seconds: standard deviation of one process's step.
    """
    if num_processes == 1 or deviation_seconds == 0:
        return 0.0
    return deviation_seconds * NormalDist().inv_cdf((num_processes - 0.375) / (num_processes + 0.25))


@dataclass(frozen=True)
class ScaledStep:
    """The seconds of a step of several processes, and of one that exchanges nothing."""

    compute_seconds: float
    """Seconds of the step of one process alone."""
    hidden_seconds: float
    """Seconds of exchanges that may go on while the process computes."""
    exposed_seconds: float
    """Seconds of exchanges that it waits for."""
    wait_seconds: float
    """Seconds that it waits for the slowest process."""

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.hidden_seconds) + self.exposed_seconds + self.wait_seconds

    @property
    def efficiency(self) -> float:
        """Share of the time that computes what one process alone would."""
        return self.compute_seconds / self.seconds

    @property
    def limit(self) -> str:
        """The largest of what makes a step longer, in words."""
        parts = {
            "the link: blocks come later than they are needed": max(0.0, self.hidden_seconds - self.compute_seconds),
            "the exchange of gradients": self.exposed_seconds,
            "the slowest process": self.wait_seconds,
        }
        return max(parts, key=lambda name: parts[name])
