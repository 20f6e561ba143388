"""The facts of machines that are not here, from what torch and the kernel would say of them."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixtune.errors import PixtuneError
from pixtune.hardware import facts, links, machine, read
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.hardware.meminfo import parse_meminfo, read_host_memory
from tests.unit.hardware import machines
from tests.unit.hardware.machines import MACHINES, Machine

EXPECTED = {  # link, formats of its tensor cores, memory GB/s, host to device GB/s (None: one pool)
    machines.GB10: ("integrated", ("bf16", "int8", "fp8"), 273, None),
    machines.GH200: ("c2c", ("bf16", "int8", "fp8"), 4000, 360),
    machines.H100: ("pcie", ("bf16", "int8", "fp8"), 3352, 50.4),
    machines.RTX_4090: ("pcie", ("bf16", "int8", "fp8"), 1008, 25.2),
    machines.RTX_3090: ("pcie", ("bf16", "int8"), 936, 25.2),
    machines.RTX_5090: ("pcie", ("bf16", "int8", "fp8"), 1792, 50.4),
    machines.RTX_3060: ("pcie", ("bf16", "int8"), 360, 25.2),
    machines.RTX_4070: ("pcie", ("bf16", "int8", "fp8"), 504, 25.2),
    machines.RTX_4060: ("pcie", ("bf16", "int8", "fp8"), 272, 12.6),
    machines.T4: ("pcie", (), None, None),
}


def facts_of(machine: Machine, slot: int | None = None) -> HardwareFacts:
    return read.gpu_facts(
        machine.name,
        machine.capability,
        machine.total_bytes,
        machine.device_free_bytes,
        parse_meminfo(machine.meminfo),
        read.kind_of_link(machine.name, machine.integrated),
        pcie_bytes_per_second=slot,
    )


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_what_a_machine_is(machine: Machine) -> None:
    found = facts_of(machine)
    link, formats, memory_gb, link_gb = EXPECTED[machine]
    assert (found.integrated, found.coherent_link) == (machine is machines.GB10, link)
    assert found.tensor_core_formats == formats
    assert (found.capability, found.total_bytes) == (machine.capability, machine.total_bytes)
    assert found.memory_bandwidth_bytes_per_second == (memory_gb and memory_gb * 10**9)
    assert found.link_bandwidth_bytes_per_second == (link_gb and pytest.approx(link_gb * 1e9, rel=0.01))


@pytest.mark.parametrize("machine", [m for m in MACHINES if not m.integrated], ids=lambda machine: machine.name)
def test_a_card_with_memory_of_its_own_is_asked_itself(machine: Machine) -> None:
    assert facts_of(machine).free_bytes == machine.device_free_bytes


def test_a_pool_is_as_free_as_the_kernel_says_not_as_cuda_says() -> None:
    """cudaMemGetInfo sees 33 GiB, since page cache fills the rest; 112 can be had, and 7.48 stay for the system."""
    found = facts_of(machines.GB10)
    assert found.free_bytes == pytest.approx((112 - 119.68 / 16) * GIB, rel=1e-4)
    assert found.host_total_bytes == pytest.approx(119.68 * GIB, rel=1e-6)


@pytest.mark.parametrize(
    ("available_gib", "fraction", "expected_gib"),
    [
        (120, 0.9, 108),  # the fraction decides
        (120, 0.5, 60),
        (60, 0.9, 60 - 7.5),  # what others left decides
        (7, 0.9, 0),  # nothing, and no negative number
    ],
)
def test_usable_part_of_a_pool(available_gib: float, fraction: float, expected_gib: float) -> None:
    usable = facts.usable_pool_bytes(120 * GIB, round(available_gib * GIB), fraction)
    assert usable == pytest.approx(expected_gib * GIB)


def test_a_small_pool_keeps_four_gib() -> None:
    assert facts.pool_floor_bytes(16 * GIB) == 4 * GIB


def test_the_memory_of_a_gh200s_gpu_is_not_counted_as_host_memory() -> None:
    found = facts_of(machines.GH200)
    assert found.host_total_bytes == pytest.approx((574 - 94.5) * GIB, rel=1e-6)
    assert found.host_available_bytes == pytest.approx((540 - 94) * GIB, rel=1e-6)


def test_the_slot_counts_before_the_table() -> None:
    slot = links.pcie_bandwidth(generation=3, lanes=16)
    assert facts_of(machines.RTX_4090, slot=slot).link_bandwidth_bytes_per_second == slot == pytest.approx(12.6e9, 0.01)


def test_cards_that_share_a_name_are_told_by_their_memory() -> None:
    modified = machines.discrete("NVIDIA GeForce RTX 4090", (8, 9), 47.4, 128)
    assert facts_of(modified).memory_bandwidth_bytes_per_second is None
    laptop = machines.discrete("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 15.7, 76)
    assert facts_of(laptop).memory_bandwidth_bytes_per_second is None


def test_the_variable_of_another_program_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_MEMORY", "true")
    assert facts_of(machines.H100).integrated is False


def test_facts_of_this_machines_cpu() -> None:
    found = read.read_facts(torch.device("cpu"))
    assert (found.device, found.capability, found.total_bytes, found.tensor_core_formats) == ("cpu", (0, 0), 0, ())
    assert 0 < found.host_available_bytes <= found.host_total_bytes
    assert found.machine == platform.machine()


def test_reading_a_gpu_asks_torch_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spark = machines.GB10
    (tmp_path / "meminfo").write_text(spark.meminfo)
    monkeypatch.setattr("pixtune.hardware.meminfo.MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: spark.properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (spark.device_free_bytes, spark.total_bytes))
    found = read.read_facts(torch.device("cuda", 0), memory_fraction=0.5)
    assert found.free_bytes == round(0.5 * spark.total_bytes) and found.num_sms == spark.num_sms
    assert found.l2_cache_bytes == 50 * 2**20
    assert (found.name, found.coherent_link) == ("NVIDIA GB10", "integrated")


@pytest.mark.parametrize(
    ("line", "capability", "free_gib", "link", "num_sms"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 512, 8.9", (8, 9), 23.49, "pcie", 128),
        ("NVIDIA H100 80GB HBM3, 81559, 4, 9.0", (9, 0), 79.64, "pcie", 132),
        ("NVIDIA H200, 143771, 0, 9.0", (9, 0), 140.4, "pcie", 132),
        ("NVIDIA GeForce RTX 6090, 40960, 0, 13.0", (13, 0), 40, "pcie", 0),
        ("NVIDIA GH200 480GB, 96768, 0, 9.0", (9, 0), 94.5, "c2c", 132),
        ("NVIDIA GB10, [N/A], [N/A], 12.1", (12, 1), None, "integrated", 48),
    ],
)
def test_nvidia_smi_tells_what_a_gpu_is(
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    capability: tuple[int, int],
    free_gib: float | None,
    link: str,
    num_sms: int,
) -> None:
    asked: list[tuple[str, ...]] = []

    def query(*words: str) -> list[str]:
        asked.append(words)
        return [*(value.strip() for value in line.split(",")), "00000000:65:00.0"]

    slots: dict[str, int] = {"0000:65:00.0": 7 * 10**9}
    monkeypatch.setattr(read, "query", query)
    monkeypatch.setattr(read, "read_pcie_bandwidth", slots.get)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = read.read_facts_without_cuda()
    assert asked[0][0] == "3", "the GPU of a run, which is not the machine's first"
    assert found is not None and line.startswith(found.name)
    assert (found.capability, found.coherent_link) == (capability, link)
    assert found.num_sms == num_sms, "estimates of time rest on it"
    if free_gib is not None:
        assert found.free_bytes == pytest.approx(free_gib * GIB, rel=1e-3)
    if link == "pcie":
        assert found.host_total_bytes == read_host_memory().total_bytes
        assert found.link_bandwidth_bytes_per_second == 7 * 10**9, "the slot's, which has fewer lanes than the card"


def test_gpus_that_are_hidden_from_a_run_are_none_for_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "query", lambda *words: pytest.fail("asked nvidia-smi"))
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert read.read_facts_without_cuda() is None


def test_without_nvidia_smi_there_are_no_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read.read_facts_without_cuda() is None


# ---- versions


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build  (x@y)\n", "580.95.05"),
        ("", None),
    ],
)
def test_driver_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert machine.read_driver_version(tmp_path / "version") == version
    assert machine.read_driver_version(tmp_path / "none") is None


def test_cudnn_version() -> None:
    numbers = (91900, 92600, 8907, None)
    assert [machine.cudnn_version(number) for number in numbers] == ["9.19.0", "9.26.0", "8.9.7", None]


@pytest.mark.parametrize(("version", "old"), [("2.9.1", True), ("2.10.0a0+cu130", False), ("2.13.0+cpu", False)])
def test_oldest_torch(monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    assert facts.is_too_old(version) is old
    monkeypatch.setattr(torch, "__version__", version)
    if old:
        with pytest.raises(PixtuneError, match=rf"torch {version} is installed, pixtune needs 2\.10"):
            facts.check_torch()
    else:
        facts.check_torch()


def test_facts_and_cards_need_no_torch() -> None:
    """`pixtune plan --as` has three seconds; torch alone takes longer on a slow disk."""
    code = (
        "import sys; from pixtune.hardware.cards import facts_as; facts_as('RTX 4090'); "
        "import pixtune.plan.training, pixtune.hardware.meminfo; print('torch' in sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "False"


# ---- links


def slot(root: Path, device_speed: str, port_speed: str | None, lanes: str) -> Path:
    """A PCI tree with one device below a port."""
    port = root / "devices" / "0000:00:01.0"
    device = port / "0000:65:00.0"
    device.mkdir(parents=True)
    (device / "max_link_speed").write_text(f"{device_speed}\n")
    (device / "current_link_width").write_text(f"{lanes}\n")
    if port_speed is not None:
        (port / "max_link_speed").write_text(f"{port_speed}\n")
    listing = root / "listing"
    listing.mkdir()
    (listing / "0000:65:00.0").symlink_to(device)
    return listing


@pytest.mark.parametrize(
    ("device_speed", "port_speed", "lanes", "gigabytes"),
    [
        ("32.0 GT/s PCIe", "32.0 GT/s PCIe", "16", 50.4),
        ("32.0 GT/s PCIe", "16.0 GT/s PCIe", "16", 25.2),  # a new card in an older board
        ("16.0 GT/s PCIe", None, "8", 12.6),
        ("Unknown", "Unknown", "16", None),  # a virtual machine
        ("16.0 GT/s PCIe", None, "0", None),
    ],
)
def test_a_slot_is_as_fast_as_its_slower_side(
    tmp_path: Path, device_speed: str, port_speed: str | None, lanes: str, gigabytes: float | None
) -> None:
    listing = slot(tmp_path, device_speed, port_speed, lanes)
    found = links.read_pcie_bandwidth("0000:65:00.0", listing)
    assert found == (gigabytes and pytest.approx(gigabytes * 1e9, rel=0.01))
    assert links.read_pcie_bandwidth("0000:66:00.0", listing) is None


def test_address_as_the_kernel_writes_it() -> None:
    assert read.pci_address(machines.H100.properties) == "0000:65:00.0"


@pytest.mark.parametrize(
    ("name", "coherent"),
    [
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA GB200", True),
        ("NVIDIA H200", False),
        ("NVIDIA GB10", False),
        ("NVIDIA B200", False),
    ],
)
def test_chips_with_a_grace_beside_them(name: str, coherent: bool) -> None:
    assert links.is_coherent_chip(name) is coherent
