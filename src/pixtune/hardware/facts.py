"""A machine as plain values, so that decisions can be tested without it. Imports no torch.

`read.read_facts` reads this machine; `cards.facts_as` makes the facts of another one from the table of cards.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from packaging.version import Version

from pixtune.errors import PixtuneError

OLDEST_TORCH = "2.10.0a0"
REPORTED_PACKAGES = ("pixtune", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
MEMORY_FRACTION = 0.9
"""Largest share that a run takes of a pool shared with the CPU, unless the config's `memory_fraction` differs."""

GIB = 2**30
HOPPER = (9, 0)
LEAST_FLOOR_BYTES = 4 * GIB
FLOOR_SHARE = 16
PROCESS_HOST_BYTES = 3 * GIB
"""Host memory of a run before it has loaded anything: Python with its libraries and CUDA's own side. Assumed."""
LEAST_HOST_FLOOR_BYTES = GIB
"""Memory of a GPU's host that stays free at least: page-locked memory cannot be swapped out, and the desktop and the
page cache need some."""

CoherentLink = Literal["pcie", "c2c", "integrated", "none"]

TENSOR_CORE_FORMATS = {"bf16": (8, 0), "int8": (8, 0), "fp8": (8, 9)}
"""Oldest capability whose tensor cores are used for a format. Turing (7.5) has int8 too, but no bf16 beside it, and
nothing here was ever run on it."""


@dataclass(frozen=True)
class HardwareFacts:
    """One device and its host."""

    device: str
    """"cuda" or "cpu"."""
    name: str
    capability: tuple[int, int]
    """Compute capability; (0, 0) without a GPU."""
    total_bytes: int
    """Device memory as the driver reports it; 0 without a GPU."""
    free_bytes: int
    """Memory that a run may take: free device memory; of a pool shared with the CPU what `usable_pool_bytes` leaves."""
    coherent_link: CoherentLink = "none"
    """"integrated": CPU and GPU share one pool of memory, and the device reports it itself (DGX Spark). "c2c": two
    pools, and each side reads the other's (GH200). "pcie": copies. "none": no GPU."""
    host_total_bytes: int = 0
    """Host memory without what a container may not have, and without the GPU's own; on an integrated machine the
    pool."""
    host_available_bytes: int = 0
    """Host memory that processes can get without swapping; page cache counts, since it can be dropped."""
    memory_bandwidth_bytes_per_second: int | None = None
    """Nominal bandwidth of device memory, from the table of cards; None for a card that is not in it."""
    link_bandwidth_bytes_per_second: int | None = None
    """Bandwidth from pinned host memory to the device, estimated from the kind of link; None if unknown or one pool."""
    machine: str = ""
    """"x86_64", "aarch64", ..."""
    num_sms: int = 0
    """Streaming multiprocessors; 0 without a GPU, and where nobody asked."""
    host_process_bytes: int = PROCESS_HOST_BYTES
    """Host memory that each process of the run has already, encodings that are kept in memory included."""
    l2_cache_bytes: int = 0
    """The GPU's cache; 0 without a GPU, and where nobody asked."""

    @property
    def integrated(self) -> bool:
        """Whether CPU and GPU share one pool of memory."""
        return self.coherent_link == "integrated"

    @property
    def tensor_core_formats(self) -> tuple[str, ...]:
        """Formats among "bf16", "int8" and "fp8" that this GPU's tensor cores are used for."""
        return tuple(name for name, oldest in TENSOR_CORE_FORMATS.items() if self.capability >= oldest)


def pool_floor_bytes(pool_bytes: int) -> int:
    """Returns what a plan leaves untouched of a pool shared with the CPU: a sixteenth, at least 4 GiB (7.5 of 119.7).

    A machine with one pool does not run out of memory, it hangs: the kernel's out-of-memory killer does not count what
    CUDA took, and containers' limits do not either. So the rest of the system must never have to fight for its pages:
    desktop and services, the page cache of a checkpoint that is being written, and what kernels and libraries load in
    the course of a run. The watchdog stops a run at half of this (`unified.MemoryWatchdog`), which leaves the other
    half for estimates that were too low.
    """
    return max(LEAST_FLOOR_BYTES, pool_bytes // FLOOR_SHARE)


def usable_pool_bytes(pool_bytes: int, available_bytes: int, memory_fraction: float = MEMORY_FRACTION) -> int:
    """Returns what a run may take of one pool: what is available less the floor, at most the fraction of the pool."""
    return max(0, min(available_bytes - pool_floor_bytes(pool_bytes), round(pool_bytes * memory_fraction)))


def host_room_bytes(facts: HardwareFacts) -> int | None:
    """Returns what a plan may take of the memory of a GPU's host: what is available less a sixteenth, at least 1 GiB.

    None means that there is no such bound: CPU and GPU share one pool, or nothing is known of the host.
    """
    if facts.integrated or not facts.host_total_bytes:
        return None
    floor = max(LEAST_HOST_FLOOR_BYTES, facts.host_total_bytes // FLOOR_SHARE)
    return max(0, facts.host_available_bytes - floor)


def within_host_limit(facts: HardwareFacts, limit_bytes: int | None, num_processes: int = 1) -> HardwareFacts:
    """Returns the facts of a host of which all processes of a run together may take only so much.

    Args:
        limit_bytes: None: whatever is available.
    """
    if limit_bytes is None or facts.integrated:
        return facts
    left = max(0, limit_bytes - num_processes * facts.host_process_bytes)
    total = min(facts.host_total_bytes or limit_bytes, limit_bytes)
    available = min(facts.host_available_bytes, left) if facts.host_total_bytes else left
    return replace(facts, host_total_bytes=total, host_available_bytes=available)


def missing_on_host(facts: HardwareFacts, num_bytes: int) -> int:
    """Returns how many of `num_bytes` the host cannot give."""
    room = host_room_bytes(facts)
    return 0 if room is None or not num_bytes else max(0, num_bytes - room)


def package_versions() -> dict[str, str]:
    """Returns the versions that a result depends on, Python's included."""
    versions = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        versions[name] = installed_version(name) or "not installed"
    return versions


@cache
def installed_version(name: str) -> str | None:
    """Returns a package's version from its metadata, without importing it; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_torch() -> None:
    """Checks torch's version here, since no dependency list of pixtune names torch.

    Raises:
        PixtuneError: it is older than what pixtune was built for.
    """
    import torch

    if is_too_old(torch.__version__):
        raise PixtuneError(
            f"torch {torch.__version__} is installed, pixtune needs {OLDEST_TORCH} or newer. Install one for your GPU "
            "as its vendor or pytorch.org says; pixtune never replaces it."
        )


def is_too_old(torch_version: str) -> bool:
    """Returns whether pixtune refuses a version of torch."""
    return Version(torch_version) < Version(OLDEST_TORCH)
