"""Host memory: the machine's, what a container may have of it, and this process's share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files with limit, usage and statistics, and the name in the last of droppable page cache: version 2, then 1."""


@dataclass(frozen=True)
class HostMemory:
    """One reading of a machine's memory."""

    total_bytes: int
    available_bytes: int
    """Memory that can be had without swapping; page cache counts, since the kernel drops it when asked."""
    free_bytes: int
    """Memory that nobody uses. cudaMemGetInfo follows it on an integrated GPU: a machine seems full that is not."""
    page_cache_bytes: int


def read_host_memory() -> HostMemory:
    """Reads this machine's memory, no more than a container's limit allows.

    On an integrated machine use `read_meminfo` instead: containers' limits do not count what CUDA takes there.
    """
    memory, limit = read_meminfo(), read_cgroup_limit(CGROUP)
    return memory if limit is None else within(memory, *limit)


def read_meminfo() -> HostMemory:
    """Reads the whole machine's memory, as the kernel counts it."""
    if MEMINFO.exists():
        return parse_meminfo(MEMINFO.read_text(encoding="ascii"))
    import psutil  # Windows and macOS

    memory = psutil.virtual_memory()
    return HostMemory(memory.total, memory.available, memory.free, 0)


def parse_meminfo(text: str) -> HostMemory:
    """Reads the text of /proc/meminfo.

    Raises:
        KeyError: a line that every kernel since 3.14 writes is missing.
    """
    fields = _kibibytes(text)
    # Shared memory (and /dev/shm) is counted under Cached, and cannot be dropped.
    page_cache = max(0, fields["Cached"] + fields["Buffers"] - fields["Shmem"])
    return HostMemory(fields["MemTotal"], fields["MemAvailable"], fields["MemFree"], page_cache)


def within(memory: HostMemory, limit_bytes: int, used_bytes: int) -> HostMemory:
    """Narrows a machine's memory to what a container's limit leaves, where that is less."""
    room = max(0, limit_bytes - used_bytes)
    return HostMemory(
        min(memory.total_bytes, limit_bytes),
        min(memory.available_bytes, room),
        min(memory.free_bytes, room),
        memory.page_cache_bytes,
    )


def read_cgroup_limit(root: Path) -> tuple[int, int] | None:
    """Reads limit and usage of this control group in bytes, without droppable page cache; None without a limit."""
    for limit_name, used_name, statistics_name, cache_name in CGROUP_FILES:
        paths = [root / name for name in (limit_name, used_name, statistics_name)]
        if not all(path.is_file() for path in paths):
            continue
        limit, used, statistics = (path.read_text(encoding="ascii").strip() for path in paths)
        if limit == "max" or int(limit) >= 2**60:  # version 1 writes a number near 2^63 where there is no limit
            return None
        words = dict(line.split(maxsplit=1) for line in statistics.splitlines())
        return int(limit), max(0, int(used) - int(words.get(cache_name, 0)))
    return None


def read_process_bytes() -> int:
    """Reads how much memory of this process is in RAM (resident set size)."""
    if STATUS.exists():
        return _kibibytes(STATUS.read_text(encoding="utf-8", errors="replace"))["VmRSS"]
    import psutil

    return int(psutil.Process().memory_info().rss)


def _kibibytes(text: str) -> dict[str, int]:
    """Reads all lines of the form "Name:   123 kB", in bytes."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
