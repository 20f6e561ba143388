"""Host memory from texts of the kernel."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pixtune.hardware import meminfo
from pixtune.hardware.facts import GIB
from pixtune.hardware.meminfo import HostMemory, parse_meminfo, read_cgroup_limits, within
from tests.unit.hardware.machines import GB10


def test_a_full_page_cache_is_available() -> None:
    memory = parse_meminfo(GB10.meminfo)
    gib = [round(value / GIB, 2) for value in (memory.total_bytes, memory.available_bytes, memory.free_bytes)]
    assert gib == [119.68, 112.0, 33.0]
    assert round(memory.page_cache_bytes / GIB, 2) == 80.0  # Cached + Buffers, without the 1 GiB of shared memory


def test_this_machine_agrees_with_psutil() -> None:
    memory, other = meminfo.read_meminfo(), psutil.virtual_memory()
    assert memory.total_bytes == other.total
    assert memory.available_bytes == pytest.approx(other.available, rel=0.1)
    assert meminfo.read_process_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_without_proc_psutil_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meminfo, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(meminfo, "STATUS", tmp_path / "none")
    assert meminfo.read_meminfo().total_bytes == psutil.virtual_memory().total
    assert meminfo.read_process_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


NO_LIST = Path("/nowhere")


def group(folder: Path, version: int, limit: str, used: int, inactive: int = 0, active: int = 0) -> Path:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    folder.mkdir(exist_ok=True, parents=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    statistics = f"anon 1\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"
    (folder / "memory.stat").write_text(statistics)
    return folder


@pytest.mark.parametrize(("version", "mount"), [(1, "memory"), (2, "")])
def test_a_containers_limit_counts(tmp_path: Path, version: int, mount: str) -> None:
    group(tmp_path / mount, version, str(16 * GIB), 10 * GIB, inactive=3 * GIB, active=GIB)
    limits = read_cgroup_limits(tmp_path, NO_LIST)
    assert limits == [(16 * GIB, 6 * GIB)], "page cache can be dropped, whether it was read once or often"
    memory = within(HostMemory(64 * GIB, 50 * GIB, 20 * GIB, GIB), *limits[0])
    assert memory == HostMemory(16 * GIB, 10 * GIB, 10 * GIB, GIB)
    assert within(HostMemory(64 * GIB, 3 * GIB, 2 * GIB, GIB), *limits[0]).available_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("version", "mount", "line"),
    [(2, "", "0::/user.slice/job_7.scope"), (1, "memory", "4:cpu,memory:/user.slice/job_7.scope")],
)
def test_groups_above_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, mount: str, line: str
) -> None:
    """The machine has 64 GiB, all jobs of the user 12 of which 9 are used, and this one may have 32 of them."""
    unlimited = "max" if version == 2 else "9223372036854771712"
    root = tmp_path / "cgroup"
    group(root / mount, version, unlimited, 40 * GIB)
    group(root / mount / "user.slice", version, str(12 * GIB), 9 * GIB)
    group(root / mount / "user.slice" / "job_7.scope", version, str(32 * GIB), GIB)
    (tmp_path / "own").write_text(f"11:pids:/elsewhere\n{line}\n")
    monkeypatch.setattr(meminfo, "CGROUP", root)
    monkeypatch.setattr(meminfo, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(meminfo, "read_meminfo", lambda: HostMemory(64 * GIB, 50 * GIB, 20 * GIB, 0))
    memory = meminfo.read_host_memory()
    assert (memory.total_bytes, memory.available_bytes) == (12 * GIB, 3 * GIB)


def test_what_slows_a_process_down_limits_it_too(tmp_path: Path) -> None:
    group(tmp_path, 2, str(16 * GIB), 2 * GIB)
    (tmp_path / "memory.high").write_text(f"{12 * GIB}\n")
    assert read_cgroup_limits(tmp_path, NO_LIST) == [(12 * GIB, 2 * GIB)]
    (tmp_path / "memory.high").write_text("max\n")
    assert read_cgroup_limits(tmp_path, NO_LIST) == [(16 * GIB, 2 * GIB)]


@pytest.mark.parametrize(("version", "unlimited"), [(2, "max"), (1, "9223372036854771712")])
def test_no_limit(tmp_path: Path, version: int, unlimited: str) -> None:
    group(tmp_path / ("memory" if version == 1 else ""), version, unlimited, GIB)
    assert read_cgroup_limits(tmp_path, NO_LIST) == []
    assert read_cgroup_limits(tmp_path / "elsewhere", NO_LIST) == []


def test_a_group_that_is_not_mounted_here_is_left_out(tmp_path: Path) -> None:
    """A container with the host's list of groups sees its own group at the top, and nothing at the host's path."""
    group(tmp_path, 2, str(8 * GIB), GIB)
    (tmp_path / "own").write_text("0::/docker/5f3e\nnot a line\n0::/../../outside\n")
    assert read_cgroup_limits(tmp_path, tmp_path / "own") == [(8 * GIB, GIB)]


def test_a_text_without_the_figures_is_no_machine_without_memory() -> None:
    with pytest.raises(KeyError):
        parse_meminfo("MemTotal: 100 kB\n")
