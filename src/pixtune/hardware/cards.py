"""The table of cards: what a GPU is, by name, for planning on another machine and for figures no driver tells.

Imports no torch: `pixtune plan --as "RTX 4090"` answers on any machine, at once.

Sources of the figures. Bandwidth, SMs and rates: NVIDIA's data sheets and architecture papers (GA100, GA102, AD102,
GH100, RTX Blackwell), dense, without the factor 2 of sparsity. Rates of GA102, Ada and RTX Blackwell follow from fp32's
by a fixed factor of the chip, `_geforce` and `_workstation` below. Memory: what CUDA reports on Linux, "total capacity"
in public out-of-memory messages where one was found; rows marked ~ are taken from cards of the same size and
generation. Drivers differ by 0.1 GiB, Windows shows up to 2% more.

Laptop GPUs are not here: their rates depend on the power that a maker allows, and they carry the names of larger cards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from pixtune.errors import PixtuneError
from pixtune.hardware.facts import GIB, HardwareFacts, tensor_core_formats, usable_pool_bytes
from pixtune.hardware.links import C2C_BYTES_PER_SECOND, pcie_bandwidth

HOST_BYTES = 64 * GIB
"""Assumed memory of the machine around a card."""
IDLE_BYTES = 3 * GIB // 8
"""Assumed to be taken on the card by a desktop and the driver: a 24 GB card then has 23.3 GiB for a run."""
IDLE_POOL_BYTES = 6_910_320_640
"""In use on an idle DGX Spark, from a public report (github.com/leptonai/gpud, pull request 1170)."""
SIZE_TOLERANCE = 0.1
"""Share by which a card's memory may differ from the table's before it is taken for another card of the name."""


@dataclass(frozen=True)
class Rates:
    """Dense tensor core rates with fp32 (int8: int32) accumulation, TFLOP/s; None: not on tensor cores."""

    bf16_tflops: float
    int8_tflops: float
    fp8_tflops: float | None


@dataclass(frozen=True)
class Card:
    """One GPU as it is sold."""

    name: str
    driver_name: str
    """As CUDA calls it, without the maker's name."""
    capability: tuple[int, int]
    size_gb: int
    """On the box."""
    total_gib: float
    """As CUDA reports it."""
    bandwidth_gb_per_second: float
    rates: Rates
    num_sms: int
    link: Literal["pcie", "c2c", "integrated"] = "pcie"
    pcie: tuple[int, int] = (4, 16)
    """Generation and lanes."""
    aliases: str = ""
    """Further words by which people know it."""

    @property
    def total_bytes(self) -> int:
        return round(self.total_gib * GIB)

    @property
    def memory_bandwidth_bytes_per_second(self) -> int:
        return round(self.bandwidth_gb_per_second * 1e9)

    @property
    def link_bandwidth(self) -> int | None:
        """Host to device in bytes per second, an estimate; None where there is one pool."""
        if self.link == "integrated":
            return None
        return C2C_BYTES_PER_SECOND if self.link == "c2c" else pcie_bandwidth(*self.pcie)


def _geforce(fp32_tflops: float, fp8: bool = True) -> Rates:
    """Consumer chips from Ampere on: 16-bit and fp8 products with fp32 accumulation run at half the chip's rate, int8
    at the whole. An RTX 4090 has 82.6 in fp32, 165.2 in bf16, 330.3 in fp8 and 660.6 in int8."""
    return Rates(2 * fp32_tflops, 8 * fp32_tflops, 4 * fp32_tflops if fp8 else None)


def _workstation(fp32_tflops: float, fp8: bool = True) -> Rates:
    """The same chips on professional boards: the whole rate. An RTX 6000 Ada has 91.1 and 364.3, 728.5 in 8 bits."""
    return Rates(4 * fp32_tflops, 8 * fp32_tflops, 8 * fp32_tflops if fp8 else None)


A100, H100 = Rates(312, 624, None), Rates(989, 1979, 1979)
AMPERE, GA10X, ADA, HOPPER, DATACENTER_BLACKWELL, BLACKWELL = (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)
GEN4_X8, GEN5, GEN5_X8 = (4, 8), (5, 16), (5, 8)

# fmt: off
CARDS = (
    # Ampere, consumer. The papers give fp32 with the boost clock.
    Card("RTX 3060", "GeForce RTX 3060", GA10X, 12, 11.75, 360, _geforce(12.7, fp8=False), 28),
    Card("RTX 3060 Ti", "GeForce RTX 3060 Ti", GA10X, 8, 7.78, 448, _geforce(16.2, fp8=False), 38),  # ~
    Card("RTX 3070", "GeForce RTX 3070", GA10X, 8, 7.78, 448, _geforce(20.3, fp8=False), 46),
    Card("RTX 3070 Ti", "GeForce RTX 3070 Ti", GA10X, 8, 7.78, 608, _geforce(21.7, fp8=False), 48),  # ~
    Card("RTX 3080", "GeForce RTX 3080", GA10X, 10, 9.77, 760, _geforce(29.8, fp8=False), 68),
    Card("RTX 3080 12 GB", "GeForce RTX 3080", GA10X, 12, 11.75, 912, _geforce(30.6, fp8=False), 70),  # ~
    Card("RTX 3080 Ti", "GeForce RTX 3080 Ti", GA10X, 12, 11.75, 912, _geforce(34.1, fp8=False), 80),
    Card("RTX 3090", "GeForce RTX 3090", GA10X, 24, 23.69, 936, _geforce(35.6, fp8=False), 82),
    Card("RTX 3090 Ti", "GeForce RTX 3090 Ti", GA10X, 24, 23.68, 1008, _geforce(40.0, fp8=False), 84),  # ~
    # Ada, consumer
    Card("RTX 4060", "GeForce RTX 4060", ADA, 8, 7.75, 272, _geforce(15.1), 24, pcie=GEN4_X8),
    Card("RTX 4060 Ti", "GeForce RTX 4060 Ti", ADA, 8, 7.75, 288, _geforce(22.1), 34, pcie=GEN4_X8),  # ~
    Card("RTX 4060 Ti 16 GB", "GeForce RTX 4060 Ti", ADA, 16, 15.70, 288, _geforce(22.1), 34, pcie=GEN4_X8),  # ~
    Card("RTX 4070", "GeForce RTX 4070", ADA, 12, 11.70, 504, _geforce(29.1), 46),  # ~
    Card("RTX 4070 Super", "GeForce RTX 4070 SUPER", ADA, 12, 11.70, 504, _geforce(35.5), 56),  # ~
    Card("RTX 4070 Ti", "GeForce RTX 4070 Ti", ADA, 12, 11.70, 504, _geforce(40.1), 60),  # ~
    Card("RTX 4070 Ti Super", "GeForce RTX 4070 Ti SUPER", ADA, 16, 15.70, 672, _geforce(44.1), 66),  # ~
    Card("RTX 4080", "GeForce RTX 4080", ADA, 16, 15.70, 717, _geforce(48.7), 76),
    Card("RTX 4080 Super", "GeForce RTX 4080 SUPER", ADA, 16, 15.70, 736, _geforce(52.2), 80),  # ~
    Card("RTX 4090", "GeForce RTX 4090", ADA, 24, 23.64, 1008, _geforce(82.6), 128),
    Card("RTX 4090 D", "GeForce RTX 4090 D", ADA, 24, 23.64, 1008, _geforce(73.5), 114),  # ~
    # Blackwell, consumer
    Card("RTX 5060", "GeForce RTX 5060", BLACKWELL, 8, 7.6, 448, _geforce(19.2), 30, pcie=GEN5_X8),  # ~
    Card("RTX 5060 Ti", "GeForce RTX 5060 Ti", BLACKWELL, 8, 7.6, 448, _geforce(23.7), 36, pcie=GEN5_X8),  # ~
    Card("RTX 5060 Ti 16 GB", "GeForce RTX 5060 Ti", BLACKWELL, 16, 15.45, 448, _geforce(23.7), 36, pcie=GEN5_X8),
    Card("RTX 5070", "GeForce RTX 5070", BLACKWELL, 12, 11.5, 672, _geforce(30.9), 48, pcie=GEN5),  # ~
    Card("RTX 5070 Ti", "GeForce RTX 5070 Ti", BLACKWELL, 16, 15.45, 896, _geforce(43.9), 70, pcie=GEN5),  # ~
    Card("RTX 5080", "GeForce RTX 5080", BLACKWELL, 16, 15.45, 960, _geforce(56.3), 84, pcie=GEN5),  # ~
    Card("RTX 5090", "GeForce RTX 5090", BLACKWELL, 32, 31.36, 1792, _geforce(104.8), 170, pcie=GEN5),
    # Workstation. Rates of RTX PRO: the advertised fp4 figure with sparsity is 32 times fp32's.
    Card("RTX A4000", "RTX A4000", GA10X, 16, 15.73, 448, _workstation(19.2, fp8=False), 48),
    Card("RTX A4500", "RTX A4500", GA10X, 20, 19.7, 640, _workstation(23.7, fp8=False), 56),  # ~
    Card("RTX A5000", "RTX A5000", GA10X, 24, 23.68, 768, _workstation(27.8, fp8=False), 64),
    Card("RTX A6000", "RTX A6000", GA10X, 48, 47.5, 768, _workstation(38.7, fp8=False), 84),
    Card("RTX 4000 Ada", "RTX 4000 Ada Generation", ADA, 20, 19.6, 360, _workstation(26.7), 48),  # ~
    Card("RTX 4500 Ada", "RTX 4500 Ada Generation", ADA, 24, 23.5, 432, _workstation(39.6), 60),  # ~
    Card("RTX 5000 Ada", "RTX 5000 Ada Generation", ADA, 32, 31.3, 576, _workstation(65.3), 100),  # ~
    Card("RTX 6000 Ada", "RTX 6000 Ada Generation", ADA, 48, 47.5, 960, _workstation(91.1), 142),  # 44.4 with ECC
    Card("RTX PRO 4000", "RTX PRO 4000 Blackwell", BLACKWELL, 24, 23.4, 672, _workstation(36.8), 70, pcie=GEN5),  # ~
    Card("RTX PRO 4500", "RTX PRO 4500 Blackwell", BLACKWELL, 32, 31.3, 896, _workstation(52.7), 82, pcie=GEN5),  # ~
    Card("RTX PRO 5000", "RTX PRO 5000 Blackwell", BLACKWELL, 48, 47.3, 1344, _workstation(66.9), 110, pcie=GEN5),  # ~
    Card("RTX PRO 6000", "RTX PRO 6000 Blackwell Workstation Edition", BLACKWELL, 96, 94.97, 1792, _workstation(126),
         188, pcie=GEN5),
    Card("RTX PRO 6000 Max-Q", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", BLACKWELL, 96, 94.97, 1792,
         _workstation(109.7), 188, pcie=GEN5),
    Card("RTX PRO 6000 Server", "RTX PRO 6000 Blackwell Server Edition", BLACKWELL, 96, 94.97, 1597, _workstation(120),
         188, pcie=GEN5),
    # Data centre. ECC is on and costs the GDDR6 boards a sixteenth.
    Card("A10", "A10", GA10X, 24, 22.06, 600, _workstation(31.2, fp8=False), 72),
    Card("A10G", "A10G", GA10X, 24, 22.06, 600, Rates(70, 140, None), 80),
    Card("A30", "A30", AMPERE, 24, 23.5, 933, Rates(165, 330, None), 56),  # ~
    Card("A40", "A40", GA10X, 48, 44.43, 696, _workstation(37.4, fp8=False), 84),
    Card("L4", "L4", ADA, 24, 22.03, 300, _workstation(30.3), 58),
    Card("L40", "L40", ADA, 48, 44.42, 864, _geforce(90.5), 142),  # ~
    Card("L40S", "L40S", ADA, 48, 44.42, 864, _workstation(91.6), 142),
    Card("A100 80 GB", "A100-SXM4-80GB", AMPERE, 80, 79.15, 2039, A100, 108, aliases="SXM SXM4"),
    Card("A100 40 GB", "A100-SXM4-40GB", AMPERE, 40, 39.39, 1555, A100, 108, aliases="SXM SXM4"),
    Card("A100 80 GB PCIe", "A100 80GB PCIe", AMPERE, 80, 79.15, 1935, A100, 108),
    Card("A100 40 GB PCIe", "A100-PCIE-40GB", AMPERE, 40, 39.39, 1555, A100, 108),
    Card("H100", "H100 80GB HBM3", HOPPER, 80, 79.11, 3352, H100, 132, pcie=GEN5, aliases="SXM SXM5 HBM3"),
    Card("H100 PCIe", "H100 PCIe", HOPPER, 80, 79.11, 2039, Rates(756, 1513, 1513), 114, pcie=GEN5),
    Card("H100 NVL", "H100 NVL", HOPPER, 94, 93.1, 3938, Rates(835, 1671, 1671), 132, pcie=GEN5),
    Card("H200", "H200", HOPPER, 141, 139.8, 4800, H100, 132, pcie=GEN5, aliases="SXM HBM3e"),
    Card("H200 NVL", "H200 NVL", HOPPER, 141, 139.8, 4800, Rates(835, 1671, 1671), 132, pcie=GEN5),
    Card("B200", "B200", DATACENTER_BLACKWELL, 180, 178.35, 7672, Rates(2250, 4500, 4500), 148, pcie=GEN5),
    # Grace beside or around the GPU
    Card("GH200", "GH200 480GB", HOPPER, 96, 94.5, 4000, H100, 132, link="c2c", aliases="Grace Hopper 480 GB"),
    Card("GH200 144 GB", "GH200 144G HBM3e", HOPPER, 144, 141.0, 4900, H100, 132, link="c2c",  # ~
         aliases="Grace Hopper HBM3e"),
    # GB10: 1 PFLOP in fp4 with sparsity as advertised, an eighth of it in dense bf16. Public measurements of bf16
    # products reach about 100.
    Card("GB10", "GB10", (12, 1), 128, 119.68, 273, Rates(125, 250, 250), 48, link="integrated",
         aliases="DGX Spark Grace Blackwell"),
)
# fmt: on

MAKERS_WORDS = {"nvidia", "geforce", "gpu", "generation", "edition", "workstation", "blackwell"}
"""Words of a name that tell no card from another here."""


def find_card(driver_name: str, total_bytes: int) -> Card | None:
    """The card that a driver calls so and that has about this much memory; None if the table has none.

    A slice of a card (MIG), a laptop's GPU or a board with another amount of memory is not taken for its namesake.
    """
    name = driver_name.removeprefix("NVIDIA ").casefold()
    sizes = {abs(card.total_bytes / total_bytes - 1): card for card in CARDS if card.driver_name.casefold() == name}
    return sizes[min(sizes)] if sizes and min(sizes) <= SIZE_TOLERANCE else None


def card_named(name: str) -> Card:
    """The card that a person means: "4090", "rtx4090", "RTX 3060 12GB", "h100", "DGX Spark".

    Every word must fit the card; of several the one with the fewest further words is meant, then the first in the
    table.

    Raises:
        PixtuneError: no card fits; lists the nearest.
    """
    asked = _words(name)
    fitting = [card for card in CARDS if asked and asked <= _words_of(card)]
    if fitting:
        return min(fitting, key=lambda card: len(_words(card.name) - asked))
    raise PixtuneError(
        f"no card named {name!r} is in the table. Near it: {', '.join(_near(name))}. Give a name as on the box, or "
        "leave it out to plan for this machine."
    )


def facts_as(name: str, host_bytes: int = HOST_BYTES) -> HardwareFacts:
    """Facts of a card from the table, as if it stood idle in this machine's place.

    Args:
        name: as `card_named` takes it.
        host_bytes: memory of the host around it; a machine with one pool has only that.

    Raises:
        PixtuneError: no such card.
    """
    card = card_named(name)
    free_bytes, host_available = card.total_bytes - IDLE_BYTES, host_bytes - host_bytes // 8
    if card.link == "integrated":
        host_bytes, host_available = card.total_bytes, card.total_bytes - IDLE_POOL_BYTES
        free_bytes = usable_pool_bytes(card.total_bytes, host_available)
    return HardwareFacts(
        device="cuda",
        name=f"NVIDIA {card.driver_name}",
        capability=card.capability,
        total_bytes=card.total_bytes,
        free_bytes=free_bytes,
        integrated=card.link == "integrated",
        coherent_link=card.link,
        host_total_bytes=host_bytes,
        host_available_bytes=host_available,
        memory_bandwidth_bytes_per_second=card.memory_bandwidth_bytes_per_second,
        link_bandwidth_bytes_per_second=card.link_bandwidth,
        machine="x86_64" if card.link == "pcie" else "aarch64",
        num_sms=card.num_sms,
        tensor_core_formats=tensor_core_formats(card.capability),
    )


def _words(text: str) -> frozenset[str]:
    """Lower-case words, letters and digits apart, so that "RTX4090" and "rtx 4090" are the same."""
    return frozenset(re.findall(r"[a-z]+|\d+", text.casefold())) - MAKERS_WORDS


def _words_of(card: Card) -> frozenset[str]:
    return _words(f"{card.name} {card.driver_name} {card.aliases} {card.size_gb} GB")


def _near(name: str, num_names: int = 5) -> list[str]:
    """Names with most words in common, then those spelled most alike."""
    asked = _words(name)
    shared = [card.name for card in CARDS if asked & _words(card.name) - {"rtx", "gb", "ti"}]
    alike = get_close_matches(name.upper(), [card.name for card in CARDS], num_names, cutoff=0.3)
    return list(dict.fromkeys([*shared[:num_names], *alike]))[:num_names] or [card.name for card in CARDS[:num_names]]
