"""The table of cards: what a GPU is, by name, for planning on another machine and for figures no driver tells.

Imports no torch: `pixtune plan --as "RTX 4090"` answers on any machine, at once.

Sources of the figures. Bandwidth and SMs: NVIDIA's data sheets and architecture papers (GA100, GA102, AD102, GH100, RTX
Blackwell). Memory: what CUDA reports on Linux, "total capacity" in public out-of-memory messages where one was found;
rows marked ~ are taken from cards of the same size and generation. Drivers differ by 0.1 GiB, Windows shows up to 2%
more.

Laptop GPUs are not here: their speed depends on the power that a maker allows, and they are named like larger cards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from pixtune.errors import PixtuneError
from pixtune.hardware.facts import GIB, HOPPER, CoherentLink, HardwareFacts, usable_pool_bytes
from pixtune.hardware.links import C2C_BYTES_PER_SECOND, pcie_bandwidth

HOST_BYTES = 64 * GIB
"""Memory of the machine around a card; assumed."""
IDLE_BYTES = 3 * GIB // 8
"""Memory that a desktop and the driver take of a card; assumed. A 24 GB card then has 23.3 GiB for a run."""
IDLE_POOL_BYTES = 6_910_320_640
"""Memory in use on an idle DGX Spark, from a public report (github.com/leptonai/gpud, pull request 1170)."""
SIZE_TOLERANCE = 0.1
"""Share by which a card's memory may differ from the table's before it is taken for another card of the name."""


@dataclass(frozen=True)
class Card:
    """One GPU as it is sold."""

    name: str
    driver_name: str
    """Name that CUDA gives it, without the maker's."""
    capability: tuple[int, int]
    size_gb: int
    """Memory as printed on the box."""
    total_gib: float
    """Memory as CUDA reports it."""
    bandwidth_gb_per_second: float
    num_sms: int
    link: CoherentLink = "pcie"
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
    def link_bandwidth_bytes_per_second(self) -> int | None:
        """Bandwidth from pinned host memory to the device, an estimate; None where there is one pool."""
        if self.link == "integrated":
            return None
        return C2C_BYTES_PER_SECOND if self.link == "c2c" else pcie_bandwidth(*self.pcie)


AMPERE, GA10X, ADA, DATACENTER_BLACKWELL, BLACKWELL = (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)
GEN4_X8, GEN5, GEN5_X8 = (4, 8), (5, 16), (5, 8)

# fmt: off
CARDS = (
    # Ampere, consumer
    Card("RTX 3060", "GeForce RTX 3060", GA10X, 12, 11.75, 360, 28),
    Card("RTX 3060 Ti", "GeForce RTX 3060 Ti", GA10X, 8, 7.78, 448, 38),  # ~
    Card("RTX 3070", "GeForce RTX 3070", GA10X, 8, 7.78, 448, 46),
    Card("RTX 3070 Ti", "GeForce RTX 3070 Ti", GA10X, 8, 7.78, 608, 48),  # ~
    Card("RTX 3080", "GeForce RTX 3080", GA10X, 10, 9.77, 760, 68),
    Card("RTX 3080 12 GB", "GeForce RTX 3080", GA10X, 12, 11.75, 912, 70),  # ~
    Card("RTX 3080 Ti", "GeForce RTX 3080 Ti", GA10X, 12, 11.75, 912, 80),
    Card("RTX 3090", "GeForce RTX 3090", GA10X, 24, 23.69, 936, 82),
    Card("RTX 3090 Ti", "GeForce RTX 3090 Ti", GA10X, 24, 23.68, 1008, 84),  # ~
    # Ada, consumer
    Card("RTX 4060", "GeForce RTX 4060", ADA, 8, 7.75, 272, 24, pcie=GEN4_X8),
    Card("RTX 4060 Ti", "GeForce RTX 4060 Ti", ADA, 8, 7.75, 288, 34, pcie=GEN4_X8),  # ~
    Card("RTX 4060 Ti 16 GB", "GeForce RTX 4060 Ti", ADA, 16, 15.70, 288, 34, pcie=GEN4_X8),  # ~
    Card("RTX 4070", "GeForce RTX 4070", ADA, 12, 11.70, 504, 46),  # ~
    Card("RTX 4070 Super", "GeForce RTX 4070 SUPER", ADA, 12, 11.70, 504, 56),  # ~
    Card("RTX 4070 Ti", "GeForce RTX 4070 Ti", ADA, 12, 11.70, 504, 60),  # ~
    Card("RTX 4070 Ti Super", "GeForce RTX 4070 Ti SUPER", ADA, 16, 15.70, 672, 66),  # ~
    Card("RTX 4080", "GeForce RTX 4080", ADA, 16, 15.70, 717, 76),
    Card("RTX 4080 Super", "GeForce RTX 4080 SUPER", ADA, 16, 15.70, 736, 80),  # ~
    Card("RTX 4090", "GeForce RTX 4090", ADA, 24, 23.64, 1008, 128),
    Card("RTX 4090 D", "GeForce RTX 4090 D", ADA, 24, 23.64, 1008, 114),  # ~
    # Blackwell, consumer
    Card("RTX 5060", "GeForce RTX 5060", BLACKWELL, 8, 7.6, 448, 30, pcie=GEN5_X8),  # ~
    Card("RTX 5060 Ti", "GeForce RTX 5060 Ti", BLACKWELL, 8, 7.6, 448, 36, pcie=GEN5_X8),  # ~
    Card("RTX 5060 Ti 16 GB", "GeForce RTX 5060 Ti", BLACKWELL, 16, 15.45, 448, 36, pcie=GEN5_X8),
    Card("RTX 5070", "GeForce RTX 5070", BLACKWELL, 12, 11.5, 672, 48, pcie=GEN5),  # ~
    Card("RTX 5070 Ti", "GeForce RTX 5070 Ti", BLACKWELL, 16, 15.45, 896, 70, pcie=GEN5),  # ~
    Card("RTX 5080", "GeForce RTX 5080", BLACKWELL, 16, 15.45, 960, 84, pcie=GEN5),  # ~
    Card("RTX 5090", "GeForce RTX 5090", BLACKWELL, 32, 31.36, 1792, 170, pcie=GEN5),
    # Workstation
    Card("RTX A4000", "RTX A4000", GA10X, 16, 15.73, 448, 48),
    Card("RTX A4500", "RTX A4500", GA10X, 20, 19.7, 640, 56),  # ~
    Card("RTX A5000", "RTX A5000", GA10X, 24, 23.68, 768, 64),
    Card("RTX A6000", "RTX A6000", GA10X, 48, 47.5, 768, 84),
    Card("RTX 4000 Ada", "RTX 4000 Ada Generation", ADA, 20, 19.6, 360, 48),  # ~
    Card("RTX 4500 Ada", "RTX 4500 Ada Generation", ADA, 24, 23.5, 432, 60),  # ~
    Card("RTX 5000 Ada", "RTX 5000 Ada Generation", ADA, 32, 31.3, 576, 100),  # ~
    Card("RTX 6000 Ada", "RTX 6000 Ada Generation", ADA, 48, 47.5, 960, 142),  # 44.4 with ECC
    Card("RTX PRO 4000", "RTX PRO 4000 Blackwell", BLACKWELL, 24, 23.4, 672, 70, pcie=GEN5),  # ~
    Card("RTX PRO 4500", "RTX PRO 4500 Blackwell", BLACKWELL, 32, 31.3, 896, 82, pcie=GEN5),  # ~
    Card("RTX PRO 5000", "RTX PRO 5000 Blackwell", BLACKWELL, 48, 47.3, 1344, 110, pcie=GEN5),  # ~
    Card("RTX PRO 6000", "RTX PRO 6000 Blackwell Workstation Edition", BLACKWELL, 96, 94.97, 1792, 188, pcie=GEN5),
    Card("RTX PRO 6000 Max-Q", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", BLACKWELL, 96, 94.97, 1792, 188,
         pcie=GEN5),
    Card("RTX PRO 6000 Server", "RTX PRO 6000 Blackwell Server Edition", BLACKWELL, 96, 94.97, 1597, 188, pcie=GEN5),
    # Data centre. ECC is on and costs the GDDR6 boards a sixteenth.
    Card("A10", "A10", GA10X, 24, 22.06, 600, 72),
    Card("A10G", "A10G", GA10X, 24, 22.06, 600, 80),
    Card("A30", "A30", AMPERE, 24, 23.5, 933, 56),  # ~
    Card("A40", "A40", GA10X, 48, 44.43, 696, 84),
    Card("L4", "L4", ADA, 24, 22.03, 300, 58),
    Card("L40", "L40", ADA, 48, 44.42, 864, 142),  # ~
    Card("L40S", "L40S", ADA, 48, 44.42, 864, 142),
    Card("A100 80 GB", "A100-SXM4-80GB", AMPERE, 80, 79.15, 2039, 108, aliases="SXM SXM4"),
    Card("A100 40 GB", "A100-SXM4-40GB", AMPERE, 40, 39.39, 1555, 108, aliases="SXM SXM4"),
    Card("A100 80 GB PCIe", "A100 80GB PCIe", AMPERE, 80, 79.15, 1935, 108),
    Card("A100 40 GB PCIe", "A100-PCIE-40GB", AMPERE, 40, 39.39, 1555, 108),
    Card("H100", "H100 80GB HBM3", HOPPER, 80, 79.11, 3352, 132, pcie=GEN5, aliases="SXM SXM5 HBM3"),
    Card("H100 PCIe", "H100 PCIe", HOPPER, 80, 79.11, 2039, 114, pcie=GEN5),
    Card("H100 NVL", "H100 NVL", HOPPER, 94, 93.1, 3938, 132, pcie=GEN5),
    Card("H200", "H200", HOPPER, 141, 139.8, 4800, 132, pcie=GEN5, aliases="SXM HBM3e"),
    Card("H200 NVL", "H200 NVL", HOPPER, 141, 139.8, 4800, 132, pcie=GEN5),
    Card("B200", "B200", DATACENTER_BLACKWELL, 180, 178.35, 7672, 148, pcie=GEN5),
    # Grace beside or around the GPU
    Card("GH200", "GH200 480GB", HOPPER, 96, 94.5, 4000, 132, link="c2c", aliases="Grace Hopper 480 GB"),
    Card("GH200 144 GB", "GH200 144G HBM3e", HOPPER, 144, 141.0, 4900, 132, link="c2c",  # ~
         aliases="Grace Hopper HBM3e"),
    Card("GB10", "GB10", (12, 1), 128, 119.68, 273, 48, link="integrated", aliases="DGX Spark Grace Blackwell"),
)
# fmt: on

MAKERS_WORDS = {"nvidia", "geforce", "gpu", "generation", "edition", "workstation", "blackwell"}
"""Words of a name that tell no card from another here."""


def find_card(driver_name: str, total_bytes: int) -> Card | None:
    """Finds the card that a driver calls so and that has about this much memory; None if the table has none.

    A slice of a card (MIG), a laptop's GPU or a board with another amount of memory is not taken for its namesake.
    """
    name = driver_name.removeprefix("NVIDIA ").casefold()
    sizes = {abs(card.total_bytes / total_bytes - 1): card for card in CARDS if card.driver_name.casefold() == name}
    return sizes[min(sizes)] if sizes and min(sizes) <= SIZE_TOLERANCE else None


def card_named(name: str) -> Card:
    """Finds the card that a person means: "4090", "rtx4090", "RTX 3060 12GB", "h100", "DGX Spark".

    Every word must fit the card; of several the one with the fewest further words is meant, then the first in the
    table.

    Raises:
        PixtuneError: no card fits; lists the nearest.
    """
    asked = _words(name)
    fitting = [
        card
        for card in CARDS
        if asked and asked <= _words(f"{card.name} {card.driver_name} {card.aliases} {card.size_gb} GB")
    ]
    if fitting:
        return min(fitting, key=lambda card: len(_words(card.name) - asked))
    raise PixtuneError(
        f"no card named {name!r} is in the table. Near it: {', '.join(_near(name))}. Give a name as on the box. For a "
        "card that is not there: a larger one of its generation, with gpu_memory_limit_gib=ITS_MEMORY."
    )


def facts_as(name: str, host_bytes: int = HOST_BYTES) -> HardwareFacts:
    """Makes the facts of a card from the table, as if it stood idle in this machine's place.

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
        coherent_link=card.link,
        host_total_bytes=host_bytes,
        host_available_bytes=host_available,
        memory_bandwidth_bytes_per_second=card.memory_bandwidth_bytes_per_second,
        link_bandwidth_bytes_per_second=card.link_bandwidth_bytes_per_second,
        machine="x86_64" if card.link == "pcie" else "aarch64",
        num_sms=card.num_sms,
    )


def _words(text: str) -> frozenset[str]:
    """Splits a name into lower-case words, letters and digits apart: "RTX4090" and "rtx 4090" are the same."""
    return frozenset(re.findall(r"[a-z]+|\d+", text.casefold())) - MAKERS_WORDS


def _near(name: str, num_names: int = 5) -> list[str]:
    """Lists the names with the most words in common, then those spelled most alike."""
    asked = _words(name)
    shared = [card.name for card in CARDS if asked & _words(card.name) - {"rtx", "gb", "ti"}]
    alike = get_close_matches(name.upper(), [card.name for card in CARDS], num_names, cutoff=0.3)
    return list(dict.fromkeys([*shared[:num_names], *alike]))[:num_names] or [card.name for card in CARDS[:num_names]]
