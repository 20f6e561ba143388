"""Reads a device of this machine. Decisions take `facts.HardwareFacts`; only this file asks the machine for them."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtune.hardware.cards import find_card
from pixtune.hardware.facts import (
    MEMORY_FRACTION,
    CoherentLink,
    HardwareFacts,
    installed_version,
    tensor_core_formats,
    usable_pool_bytes,
)
from pixtune.hardware.links import C2C_BYTES_PER_SECOND, is_coherent_chip, read_pcie_bandwidth
from pixtune.hardware.meminfo import HostMemory, read_host_memory, read_meminfo
from pixtune.late import LateModule

if TYPE_CHECKING:
    import torch
else:
    torch = LateModule("torch")

DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def read_facts(device: torch.device, memory_fraction: float = MEMORY_FRACTION) -> HardwareFacts:
    """Reads the facts of one device of this machine. Starts CUDA if it is a GPU.

    Args:
        memory_fraction: most that `free_bytes` may be of a pool shared with the CPU; no meaning elsewhere.
    """
    if device.type != "cuda":
        return cpu_facts(read_host_memory(), platform.processor() or platform.machine())
    properties = torch.cuda.get_device_properties(device)
    return device_facts(
        properties,
        free_bytes=torch.cuda.mem_get_info(device)[0],
        host=read_meminfo() if properties.is_integrated else read_host_memory(),
        memory_fraction=memory_fraction,
        pcie_bytes_per_second=read_pcie_bandwidth(pci_address(properties)),
    )


def cpu_facts(host: HostMemory, name: str) -> HardwareFacts:
    """A machine without a GPU, or one that shall not use it."""
    return HardwareFacts(
        "cpu", name, (0, 0), 0, 0,
        host_total_bytes=host.total_bytes, host_available_bytes=host.available_bytes,
        page_cache_bytes=host.page_cache_bytes, torch_version=installed_version("torch"), machine=platform.machine(),
    )  # fmt: skip


def device_facts(
    properties: Any, free_bytes: int, host: HostMemory, memory_fraction: float, pcie_bytes_per_second: int | None
) -> HardwareFacts:
    """The facts of a GPU from what torch and the kernel say.

    Args:
        properties: what `torch.cuda.get_device_properties` returns.
        free_bytes: what cudaMemGetInfo says; not used on an integrated GPU, where page cache misleads it.
        pcie_bytes_per_second: of the card's slot, if the system shows it.
    """
    integrated = bool(properties.is_integrated)
    link = kind_of_link(properties.name, integrated)
    capability, card = (properties.major, properties.minor), find_card(properties.name, properties.total_memory)
    host_total, host_available = host.total_bytes, host.available_bytes
    if integrated:
        free_bytes = usable_pool_bytes(properties.total_memory, host.available_bytes, memory_fraction)
    elif link == "c2c":
        # The driver adds the GPU's memory to the system's as a node of its own, so the kernel's figures hold it too.
        # Where a driver is set up not to, this is careful by the size of the card.
        host_total = max(0, host_total - properties.total_memory)
        host_available = max(0, host_available - free_bytes)
    return HardwareFacts(
        device="cuda",
        name=properties.name,
        capability=capability,
        total_bytes=properties.total_memory,
        free_bytes=free_bytes,
        integrated=integrated,
        coherent_link=link,
        host_total_bytes=host_total,
        host_available_bytes=host_available,
        page_cache_bytes=host.page_cache_bytes,
        memory_bandwidth_bytes_per_second=card.memory_bandwidth_bytes_per_second if card else None,
        link_bandwidth_bytes_per_second=link_bandwidth(
            link, pcie_bytes_per_second, card.link_bandwidth if card else None
        ),
        cuda_version=torch.version.cuda,
        driver_version=read_driver_version(),
        cudnn_version=cudnn_version(torch.backends.cudnn.version()),
        torch_version=torch.__version__,
        machine=platform.machine(),
        num_sms=properties.multi_processor_count,
        tensor_core_formats=tensor_core_formats(capability),
    )


def kind_of_link(name: str, integrated: bool) -> CoherentLink:
    """By the device's own property and its name; never by capability, which a GH200 shares with an H100."""
    if integrated:
        return "integrated"
    return "c2c" if is_coherent_chip(name) else "pcie"


def link_bandwidth(link: CoherentLink, pcie_bytes_per_second: int | None, of_the_card: int | None) -> int | None:
    """Bytes per second from host to device: the slot's where it is shown, else what the card could do at best."""
    if link == "integrated":
        return None
    if link == "c2c":
        return C2C_BYTES_PER_SECOND
    return pcie_bytes_per_second or of_the_card


def pci_address(properties: Any) -> str:
    """As the kernel writes it: "0000:65:00.0"."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def read_driver_version(path: Path = DRIVER_VERSION) -> str | None:
    """The NVIDIA kernel module's version; None where there is none (or none of Linux)."""
    return parse_driver_version(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def parse_driver_version(text: str) -> str | None:
    """From the text of /proc/driver/nvidia/version: "580.95.05"."""
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else None


def cudnn_version(number: int | None) -> str | None:
    """cuDNN's version number in words: 91900 is "9.19.0", 8907 (before 9) "8.9.7"."""
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"
