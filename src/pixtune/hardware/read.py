"""Reads a device of this machine. Decisions take `facts.HardwareFacts`; this file alone asks the machine for them."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from pixtune.hardware.cards import facts_as, find_card
from pixtune.hardware.facts import MEMORY_FRACTION, PROCESS_HOST_BYTES, CoherentLink, HardwareFacts, usable_pool_bytes
from pixtune.hardware.links import C2C_BYTES_PER_SECOND, is_coherent_chip, read_pcie_bandwidth
from pixtune.hardware.meminfo import HostMemory, read_host_memory, read_meminfo, read_process_bytes
from pixtune.hardware.nvidia_smi import own_gpu, query
from pixtune.late import LateModule

if TYPE_CHECKING:
    import torch
else:
    torch = LateModule("torch")


def read_facts(device: torch.device, memory_fraction: float = MEMORY_FRACTION) -> HardwareFacts:
    """Reads the facts of one device of this machine. Starts CUDA if it is a GPU.

    Args:
        memory_fraction: most that `free_bytes` may be of a pool shared with the CPU; no meaning elsewhere.
    """
    if device.type != "cuda":
        return cpu_facts(read_host_memory(), platform.processor() or platform.machine())
    properties = torch.cuda.get_device_properties(device)
    integrated = bool(properties.is_integrated)
    return gpu_facts(
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(device)[0],
        host=read_meminfo() if integrated else read_host_memory(),
        link=kind_of_link(properties.name, integrated),
        memory_fraction=memory_fraction,
        pcie_bytes_per_second=read_pcie_bandwidth(pci_address(properties)),
        num_sms=properties.multi_processor_count,
        l2_cache_bytes=properties.L2_cache_size,
        host_process_bytes=read_process_bytes(),
    )


def read_facts_without_cuda() -> HardwareFacts | None:
    """Reads the facts of the GPU that a run would use from nvidia-smi; None where there is none.

    A GPU in the CPU's pool has no memory of its own to report ("[N/A]"): it is taken from the table of cards.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None  # hidden from a run, not from nvidia-smi
    values = query(own_gpu(os.environ), "name", "memory.total", "memory.used", "compute_cap", "pci.bus_id")
    if values is None:
        return None
    name, total_mib, used_mib, capability, bus = values
    if not total_mib.isdigit():
        return facts_as(name.removeprefix("NVIDIA "))
    major, minor = map(int, capability.split("."))
    total_bytes, used_bytes = int(total_mib) << 20, int(used_mib) << 20
    link = kind_of_link(name, integrated=False)
    slot = read_pcie_bandwidth(bus.lower()[-len("0000:65:00.0") :])  # the kernel's domains have four digits
    free_bytes = total_bytes - used_bytes
    return gpu_facts(
        name, (major, minor), total_bytes, free_bytes, read_host_memory(), link, pcie_bytes_per_second=slot
    )


def cpu_facts(host: HostMemory, name: str) -> HardwareFacts:
    """Makes the facts of a machine without a GPU, or of one that is not to use it."""
    return HardwareFacts(
        "cpu", name, (0, 0), 0, 0,
        host_total_bytes=host.total_bytes, host_available_bytes=host.available_bytes, machine=platform.machine(),
    )  # fmt: skip


def gpu_facts(
    name: str,
    capability: tuple[int, int],
    total_bytes: int,
    free_bytes: int,
    host: HostMemory,
    link: CoherentLink,
    memory_fraction: float = MEMORY_FRACTION,
    pcie_bytes_per_second: int | None = None,
    num_sms: int = 0,
    l2_cache_bytes: int = 0,
    host_process_bytes: int = PROCESS_HOST_BYTES,
) -> HardwareFacts:
    """Makes the facts of a GPU from what the driver and the kernel report.

    Args:
        name: as the driver has it.
        free_bytes: of the device; not used on an integrated GPU, where page cache misleads cudaMemGetInfo.
        pcie_bytes_per_second: bandwidth of the card's slot, if the system shows it.
        num_sms: 0: as the table of cards has it, or unknown.
    """
    card = find_card(name, total_bytes)
    host_total, host_available = host.total_bytes, host.available_bytes
    if link == "integrated":
        free_bytes = usable_pool_bytes(total_bytes, host.available_bytes, memory_fraction)
    elif link == "c2c":
        # The driver adds the GPU's memory to the system's as a node of its own, so the kernel's figures hold it too.
        # Where a driver is set up not to, this is careful by the size of the card.
        host_total = max(0, host_total - total_bytes)
        host_available = max(0, host_available - free_bytes)
    return HardwareFacts(
        device="cuda",
        name=name,
        capability=capability,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        coherent_link=link,
        host_total_bytes=host_total,
        host_available_bytes=host_available,
        memory_bandwidth_bytes_per_second=card.memory_bandwidth_bytes_per_second if card else None,
        link_bandwidth_bytes_per_second=link_bandwidth(
            link, pcie_bytes_per_second, card.link_bandwidth_bytes_per_second if card else None
        ),
        machine=platform.machine(),
        num_sms=num_sms or (card.num_sms if card else 0),
        l2_cache_bytes=l2_cache_bytes,
        host_process_bytes=host_process_bytes,
    )


def kind_of_link(name: str, integrated: bool) -> CoherentLink:
    """Returns how host and device are joined, going by the device's own property and its name.

    Never by capability, which a GH200 shares with an H100.
    """
    if integrated:
        return "integrated"
    return "c2c" if is_coherent_chip(name) else "pcie"


def link_bandwidth(link: CoherentLink, pcie_bytes_per_second: int | None, of_the_card: int | None) -> int | None:
    """Returns bytes per second from host to device: the slot's where it is shown, else what the card can at best."""
    if link == "integrated":
        return None
    if link == "c2c":
        return C2C_BYTES_PER_SECOND
    return pcie_bytes_per_second or of_the_card


def pci_address(properties: Any) -> str:
    """Returns a device's address as the kernel writes it: "0000:65:00.0"."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
