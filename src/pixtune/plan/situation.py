"""Situation of a run: the machine, what its parts weigh and what it demands, against which rungs are weighed. No torch.

A rung is one way of holding a run in memory. LoRA runs have one ladder of rungs (`rungs.py`), runs that train all
weights another (`all_weights.py`); what a rung must fit is the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from pixtune.hardware.cards import find_card
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host, within_host_limit
from pixtune.hardware.gpu_links import GpuLinks, LinkKind, links_of_card
from pixtune.plan.demands import Demands
from pixtune.plan.exchange_cost import Cluster, Link
from pixtune.plan.footprint import Footprint, with_fused_mlps
from pixtune.plan.optimizers import EXACT, KERNEL, SMALL

CONTEXT_BYTES = round(0.86 * GIB)
"""Memory of a process outside torch's allocator: CUDA context, code of kernels and libraries, captured steps. On an
H100 0.5 GiB at the start and 0.85 at the end of a run with cuDNN's attention and captured steps."""
RESERVE_BYTES = GIB // 4
"""Reserve of the allocator over what it has given out, however little that is."""
NCCL_BYTES = GIB // 2
"""Memory that NCCL takes for each group of processes that exchange, outside torch's allocator: buffers for each channel
to each neighbour. Assumed."""
LATENCY_SECONDS: dict[LinkKind, float] = {"nvlink": 8e-6, "pcie": 15e-6, "host": 30e-6}
NETWORK_LATENCY_SECONDS = 30e-6
"""Seconds that an exchange takes for each hop, whatever its size. Assumed."""
SMALL_CARD_BYTES = 30 * GIB
"""Device memory up to which a LoRA's optimizer has 8-bit states, as the documented profile of 24 GB cards has them."""
HOST_WORK_BYTES = GIB // 8
"""Host memory of a process for batches on their way, and for pieces of weights that are read or written."""
WRITTEN_BYTES = 8
"""Bytes per trained weight in host memory while a LoRA's files are made: its own, and a copy."""
TABLES = 2
"""Modulation tables of a training step in host memory: one is filled while the other one is in use."""


class AnyRung(Protocol):
    """A rung of either ladder. All sizes are bytes of one process."""

    def peak_bytes(self, situation: Situation) -> int:
        """Returns the peak of what torch's allocator gives out in a training step."""

    def beside_bytes(self, situation: Situation) -> int:
        """Returns what a step needs beside its peak: fragments between activations, and room for captured steps."""

    def host_bytes(self, situation: Situation) -> int:
        """Returns the page-locked host memory."""


@dataclass(frozen=True)
class Situation:
    """Everything that a rung has to fit. `situation_of` builds it."""

    facts: HardwareFacts
    footprint: Footprint
    demands: Demands
    compiled: bool = True
    """Blocks are compiled."""
    num_processes: int = 1
    """Processes on one host, each with a GPU of its own: they share the host's memory."""
    num_tables: int = TABLES
    """Modulation tables in host memory."""
    num_hosts: int = 1
    """Hosts with as many processes each."""
    links: GpuLinks | None = None
    """Links between the processes' GPUs as they were read; None: those of the table of cards count."""
    step_form: str | None = KERNEL
    """Form of a step over all weights, of `plan.optimizers.STEP_FORMS`; None: that of runs that know none."""

    @property
    def unified(self) -> bool:
        """Whether CPU and GPU are treated as one pool of memory."""
        return self.demands.is_unified(self.facts)

    @property
    def usable_bytes(self) -> int:
        """Memory that torch's allocator may use."""
        exchanging = NCCL_BYTES if self.facts.device == "cuda" and self.all_processes > 1 else 0
        return max(usable_bytes(self.facts, self.demands) - exchanging, 0)

    @property
    def known_links(self) -> GpuLinks:
        """Links between the GPUs; of the table of cards where they were not read."""
        if self.links is not None:
            return self.links
        facts = self.facts
        card = find_card(facts.name, facts.total_bytes) if facts.total_bytes else None
        return links_of_card(card, self.num_processes, facts.link_bandwidth_bytes_per_second)

    @property
    def cluster(self) -> Cluster:
        """All processes, with the links between them."""
        links = self.known_links
        return Cluster(
            self.num_hosts,
            self.num_processes,
            Link(links.bytes_per_second, LATENCY_SECONDS[links.kind]),
            Link(links.network_bytes_per_second / self.num_processes, NETWORK_LATENCY_SECONDS),
        )

    @property
    def all_processes(self) -> int:
        """Number of processes of all hosts."""
        return self.num_processes * self.num_hosts

    @property
    def size_bytes(self) -> int:
        """Device memory, or the limit that the run demands."""
        limit = self.demands.memory_limit_bytes
        return self.facts.total_bytes if limit is None else min(self.facts.total_bytes, limit)

    @property
    def optimizer(self) -> str:
        """A LoRA's optimizer; where all weights are trained it is part of a rung, and this is the most exact one."""
        if self.demands.optimizer is not None:
            return self.demands.optimizer
        is_small = self.facts.device == "cuda" and self.size_bytes <= SMALL_CARD_BYTES
        return SMALL if is_small and not self.footprint.trains_all else EXACT

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the states of `optimizer`."""
        return self.footprint.state_bytes(self.optimizer)

    def under(self, demands: Demands) -> Situation:
        """Returns the same run on the same machine with other demands."""
        return situation_of(
            self.facts, self.footprint, demands, self.compiled, self.num_processes, self.num_tables, self.num_hosts,
            self.links, self.step_form,
        )  # fmt: skip

    def peak(self, rung: AnyRung) -> int:
        """Returns the peak of a training step in bytes."""
        return rung.peak_bytes(self)

    def beside(self, rung: AnyRung) -> int:
        """Returns the bytes that a step needs beside its peak."""
        return rung.beside_bytes(self)

    def needed(self, rung: AnyRung) -> int:
        """Returns the device memory that a rung takes, in bytes."""
        return self.peak(rung) + self.beside(rung)

    def fits_device(self, rung: AnyRung) -> bool:
        """Returns whether each process's GPU holds a rung."""
        return self.needed(rung) <= self.usable_bytes

    def on_host(self, rung: AnyRung) -> int:
        """Returns the host memory of all processes together, in bytes, beside what they have already.

        One of them writes the files of a LoRA, which are scaled and renamed in host memory.
        """
        written = 0 if self.footprint.trains_all else WRITTEN_BYTES * self.footprint.trained_weights
        return self.num_processes * (rung.host_bytes(self) + HOST_WORK_BYTES) + written

    def missing_on_host(self, rung: AnyRung) -> int:
        """Returns how many bytes of that the host cannot give."""
        return missing_on_host(self.facts, self.on_host(rung))

    def fits_host(self, rung: AnyRung) -> bool:
        """Returns whether the host holds a rung of every process."""
        return not self.missing_on_host(rung)

    def fits(self, rung: AnyRung) -> bool:
        """Returns whether GPU and host hold a rung."""
        return self.fits_device(rung) and self.fits_host(rung)


def situation_of(
    facts: HardwareFacts,
    footprint: Footprint,
    demands: Demands,
    compiled: bool = True,
    num_processes: int = 1,
    num_tables: int = TABLES,
    num_hosts: int = 1,
    links: GpuLinks | None = None,
    step_form: str | None = KERNEL,
) -> Situation:
    """Builds the situation of a run; its footprint becomes the one that it has on this machine."""
    on_gpu = facts.device == "cuda"
    fused = with_fused_mlps(footprint, facts) if on_gpu and compiled else footprint
    here = in_its_pool(fused, facts, demands)
    host = within_host_limit(facts, demands.host_limit_bytes, num_processes) if on_gpu else facts
    return Situation(host, here, demands, compiled, num_processes, num_tables, num_hosts, links, step_form)


def in_its_pool(footprint: Footprint, facts: HardwareFacts, demands: Demands) -> Footprint:
    """Returns the footprint on a machine that may have one pool of memory for CPU and GPU."""
    return replace(footprint, one_pool=facts.device == "cuda" and demands.is_unified(facts))


def usable_bytes(facts: HardwareFacts, demands: Demands) -> int:
    """Returns the device memory that torch's allocator may use."""
    usable = facts.free_bytes
    if demands.is_unified(facts):
        usable = min(usable, round(facts.total_bytes * demands.memory_fraction))
    if demands.memory_limit_bytes is not None:
        usable = min(usable, demands.memory_limit_bytes - CONTEXT_BYTES)
    return max(usable - RESERVE_BYTES, 0)
