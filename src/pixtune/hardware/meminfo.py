"""Host memory: the machine's, what a container may have of it, and this process's share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""Version 1 writes a number near 2^63 where there is no limit."""


@dataclass(frozen=True)
class CgroupFiles:
    """Files of one version of control groups."""

    mount: str
    """Folder of the groups that limit memory, below `CGROUP`."""
    limits: tuple[str, ...]
    """Files with a limit each; the least counts."""
    used: str
    prefix: str
    """Beginning of names in memory.stat that count a group with those below it."""


VERSIONS = (
    CgroupFiles("", ("memory.max", "memory.high"), "memory.current", ""),  # above "high" a process is slowed down
    CgroupFiles("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
)


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
    memory = read_meminfo()
    for limit_bytes, used_bytes in read_cgroup_limits(CGROUP, OWN_CGROUPS):
        memory = within(memory, limit_bytes, used_bytes)
    return memory


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


def read_cgroup_limits(root: Path, own_cgroups: Path) -> list[tuple[int, int]]:
    """Reads limit and usage in bytes of this process's control group and of all above it that have a limit.

    Page cache is not counted as used, since the kernel drops it before it refuses memory.

    Args:
        root: where control groups are mounted. In a container it is most often the container's own group.
        own_cgroups: file with this process's groups, as the kernel numbers them.
    """
    lines = own_cgroups.read_text(encoding="utf-8").splitlines() if own_cgroups.is_file() else []
    found = []
    for files in VERSIONS:
        mount = root / files.mount
        names = [name for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2)
                 if (files.mount or "") in controllers.split(",")]  # fmt: skip
        folders = {mount}
        for name in names:
            own = mount / name.lstrip("/")
            folders |= {folder for folder in (own, *own.parents) if mount in (folder, *folder.parents)}
        found += [limit for folder in sorted(folders) if (limit := _read_limit(folder, files)) is not None]
    return found


def _read_limit(folder: Path, files: CgroupFiles) -> tuple[int, int] | None:
    """Reads one group's least limit, and its usage without page cache; None without a limit."""
    texts = [path.read_text(encoding="ascii").strip() for name in files.limits if (path := folder / name).is_file()]
    limits = [int(text) for text in texts if text != "max" and int(text) < UNLIMITED]
    used, statistics = folder / files.used, folder / "memory.stat"
    if not limits or not used.is_file() or not statistics.is_file():
        return None
    words = dict(line.split(maxsplit=1) for line in statistics.read_text(encoding="ascii").splitlines() if " " in line)
    cache = sum(int(words.get(f"{files.prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return min(limits), max(0, int(used.read_text(encoding="ascii")) - cache)


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
