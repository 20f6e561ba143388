"""The hosts of a run's processes: how many run on each, and what all of them have, by which they plan alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import HardwareFacts
from pixtune.hardware.gpu_links import GpuLinks, read_gpu_links

LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"
)  # fmt: skip
"""Variables by which launchers tell it: torchrun, which `accelerate launch` uses, and MPI's."""


def processes_of_this_host(environ: Mapping[str, str], num_processes: int) -> int:
    """Returns the number of the run's processes on this host; all of them where no launcher tells it.

    Args:
        num_processes: those of all hosts.
    """
    told = next((environ[name] for name in LOCAL_SIZES if environ.get(name, "").isdigit()), "")
    count = int(told or num_processes)
    return count if 1 <= count <= num_processes else num_processes


@dataclass(frozen=True)
class Machine:
    """One process's view of the machine that it runs on."""

    facts: HardwareFacts
    num_processes: int
    """Processes of the run on this host."""
    links: GpuLinks | None
    can_compile: bool


def read_machine(facts: HardwareFacts, num_processes: int, can_compile: bool) -> Machine:
    """Reads this process's view of its machine.

    Args:
        facts: its GPU's.
        num_processes: processes of the run, on all hosts.
    """
    local = processes_of_this_host(os.environ, num_processes)
    links = read_gpu_links(facts, local) if num_processes > 1 and facts.device == "cuda" else None
    return Machine(facts, local, links, can_compile)


def least_of(machines: Sequence[Machine]) -> Machine:
    """Returns a machine that has what all processes have: the least memory of each kind, and the slowest links.

    Formats and recomputed blocks are then the same in all of them, as parts of one copy have to be.
    """
    first, every = machines[0], [each.facts for each in machines]
    facts = replace(
        first.facts,
        total_bytes=min(each.total_bytes for each in every),
        free_bytes=min(each.free_bytes for each in every),
        host_available_bytes=min(each.host_available_bytes for each in every),
        capability=min(each.capability for each in every),
        num_sms=min(each.num_sms for each in every),
        host_process_bytes=max(each.host_process_bytes for each in every),
    )
    known = [each.links for each in machines if each.links is not None]
    slowest = min(known, key=lambda links: links.bytes_per_second, default=None)
    if slowest is not None:
        network = min(known, key=lambda links: links.network_bytes_per_second)
        slowest = replace(
            slowest,
            network_bytes_per_second=network.network_bytes_per_second,
            network_is_assumed=network.network_is_assumed,
        )
    return Machine(
        facts, max(each.num_processes for each in machines), slowest, all(each.can_compile for each in machines)
    )


def with_whole_groups(config: TrainConfig, num_processes: int, per_host: int) -> TrainConfig:
    """Returns the config under which processes that are spread unevenly over hosts have a copy each, unless it asks."""
    if num_processes % per_host == 0 or config.distributed.shards is not None:
        return config
    return config.model_copy(update={"distributed": config.distributed.model_copy(update={"shards": 1})})
