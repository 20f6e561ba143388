"""Made-up machines: what torch, the kernel and the driver would say of them. None of this was read on such a machine,
but for the formats; figures of memory are those of `cards.py`'s sources."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from pixtune.hardware.facts import GIB


@dataclass(frozen=True)
class Machine:
    """A GPU with its host."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    integrated: bool
    num_sms: int
    host_gib: float
    available_gib: float
    cached_gib: float = 4.0
    device_free_bytes: int = 0
    """What cudaMemGetInfo says."""

    @property
    def properties(self) -> SimpleNamespace:
        """As `torch.cuda.get_device_properties` returns them."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            total_memory=self.total_bytes,
            is_integrated=int(self.integrated),
            multi_processor_count=self.num_sms,
            L2_cache_size=50 * 2**20,
            pci_domain_id=0,
            pci_bus_id=0x65,
            pci_device_id=0,
        )

    @property
    def meminfo(self) -> str:
        """As /proc/meminfo has it; 1 GiB of what is cached is shared memory."""
        lines = {
            "MemTotal": self.host_gib,
            "MemFree": self.available_gib - self.cached_gib + 1,
            "MemAvailable": self.available_gib,
            "Buffers": 0.25,
            "Cached": self.cached_gib - 0.25 + 1,
            "SwapCached": 0,
            "Shmem": 1,
            "SwapTotal": 16,
        }
        text = "".join(f"{name + ':':<16}{round(gib * 2**20):>10} kB\n" for name, gib in lines.items())
        return text + "HugePages_Total:       0\nDirectMap4k:      525312 kB\n"


def discrete(name: str, capability: tuple[int, int], gib: float, num_sms: int, host_gib: float = 64.0) -> Machine:
    total = round(gib * GIB)
    return Machine(name, capability, total, False, num_sms, host_gib, host_gib - 6, device_free_bytes=total - GIB // 2)


GB10 = Machine(
    "NVIDIA GB10", (12, 1), 128_501_256_192, True, 48, 119.68, 112.0, cached_gib=80.0, device_free_bytes=33 * GIB
)
GH200 = Machine("NVIDIA GH200 480GB", (9, 0), round(94.5 * GIB), False, 132, 574.0, 540.0, device_free_bytes=94 * GIB)
H100 = discrete("NVIDIA H100 80GB HBM3", (9, 0), 79.11, 132, 1024.0)
RTX_4090 = discrete("NVIDIA GeForce RTX 4090", (8, 9), 23.64, 128)
RTX_3090 = discrete("NVIDIA GeForce RTX 3090", (8, 6), 23.69, 82)
RTX_5090 = discrete("NVIDIA GeForce RTX 5090", (12, 0), 31.36, 170)
RTX_3060 = discrete("NVIDIA GeForce RTX 3060", (8, 6), 11.75, 28)
RTX_4070 = discrete("NVIDIA GeForce RTX 4070", (8, 9), 11.70, 46)
RTX_4060 = discrete("NVIDIA GeForce RTX 4060", (8, 9), 7.75, 24, 32.0)
T4 = discrete("Tesla T4", (7, 5), 14.6, 40)
MACHINES = (GB10, GH200, H100, RTX_4090, RTX_3090, RTX_5090, RTX_3060, RTX_4070, RTX_4060, T4)
