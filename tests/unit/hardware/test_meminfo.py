"""Host memory from texts of the kernel."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pixtune.hardware import meminfo
from pixtune.hardware.facts import GIB
from pixtune.hardware.meminfo import HostMemory, parse_meminfo, read_cgroup_limit, within
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


def group(root: Path, version: int, limit: str, used: int, cache: int) -> Path:
    names = meminfo.CGROUP_FILES[0 if version == 2 else 1]
    for name, text in zip(names[:3], (limit, str(used), f"anon 1\n{names[3]} {cache}\n"), strict=True):
        path = root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path: Path, version: int) -> None:
    limit = read_cgroup_limit(group(tmp_path, version, str(16 * GIB), used=10 * GIB, cache=4 * GIB))
    assert limit == (16 * GIB, 6 * GIB)  # the cache can be dropped
    memory = within(HostMemory(64 * GIB, 50 * GIB, 20 * GIB, GIB), *limit)
    assert memory == HostMemory(16 * GIB, 10 * GIB, 10 * GIB, GIB)
    assert within(HostMemory(64 * GIB, 3 * GIB, 2 * GIB, GIB), *limit).available_bytes == 3 * GIB


@pytest.mark.parametrize(("version", "unlimited"), [(2, "max"), (1, "9223372036854771712")])
def test_no_limit(tmp_path: Path, version: int, unlimited: str) -> None:
    assert read_cgroup_limit(group(tmp_path, version, unlimited, GIB, 0)) is None
    assert read_cgroup_limit(tmp_path / "elsewhere") is None


def test_a_text_without_the_figures_is_no_machine_without_memory() -> None:
    with pytest.raises(KeyError):
        parse_meminfo("MemTotal: 100 kB\n")
