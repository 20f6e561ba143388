"""The links by which the GPUs of a host exchange what they compute, and the network to other hosts. Imports no torch.

They are read from nvidia-smi and from the kernel's files under /sys; what these do not show is taken from the table of
cards, and said to be assumed. Speeds are what an exchange reaches in one direction, which is less than a link's rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pixtune.hardware.cards import Card, find_card
from pixtune.hardware.facts import HardwareFacts
from pixtune.hardware.links import pcie_bandwidth
from pixtune.hardware.nvidia_smi import run_nvidia_smi

LinkKind = Literal["nvlink", "pcie", "host"]

NVLINK_SHARE = 0.8
"""Share of NVLink's rate that sums and gathers of large pieces reach: about 360 of 450 GB/s where nccl-tests' ring is
reported for eight H100."""
PEER_SHARE, THROUGH_HOST_SHARE = 0.8, 0.4
"""Shares of what a copy from pinned memory reaches: from one GPU to the next through the bus, and by way of the host's
memory, which is written and read. Assumed."""
NVLINK_BYTES_PER_SECOND = {(7, 0): 25e9, (8, 6): 14.06e9, (9, 0): 25e9, (10, 0): 50e9}
"""Rate of one NVLink in one direction, from this capability on."""
NETWORK_SHARE = 0.8
ASSUMED_NETWORK_GBIT_PER_SECOND = 25
"""Network of a host with workstation cards; assumed."""
USUAL_LINKS = {
    "A100-SXM4-40GB": (300, 200), "A100-SXM4-80GB": (300, 200), "H100 80GB HBM3": (450, 400), "H200": (450, 400),
    "B200": (900, 400), "GH200 480GB": (0, 400), "GH200 144G HBM3e": (0, 400), "GB10": (0, 200),
}  # fmt: skip
"""Links that every host of such cards has, by the driver's name of the card: GB/s of all its NVLinks in one direction,
and Gbit/s of the network card beside each. From the data sheets, which give both directions, and NVIDIA's DGX systems.
Bridges that are sold apart are not among them."""
INFINIBAND, NETWORK_CARDS = Path("/sys/class/infiniband"), Path("/sys/class/net")
LINK_WORDS = {"nvlink": "NVLink", "pcie": "PCIe", "host": "PCIe by way of host memory"}


@dataclass(frozen=True)
class GpuLinks:
    """Links from each GPU to the others of its host, and from the host to others."""

    kind: LinkKind
    """"nvlink"; "pcie": one GPU reads the memory of another through the bus; "host": each copies through host memory,
    as GeForce cards do, whose drivers leave out the other way."""
    bytes_per_second: float
    """Bytes that each GPU sends in a second while it receives as many: of the slowest pair."""
    network_bytes_per_second: float
    """Bytes that all the host's network cards together send in a second while they receive as many."""
    is_assumed: bool = False
    """The links between GPUs are those of the table of cards, and were not read."""
    network_is_assumed: bool = True

    @property
    def words(self) -> str:
        """The link and its speed in words."""
        assumed = ", assumed" if self.is_assumed else ""
        return f"{LINK_WORDS[self.kind]} ({self.bytes_per_second / 1e9:.0f} GB/s each way{assumed})"

    @property
    def network_words(self) -> str:
        """The network and its speed in words."""
        assumed = ", assumed" if self.network_is_assumed else ""
        return f"the network ({8 * self.network_bytes_per_second / 1e9:.0f} Gbit/s a host{assumed})"


def links_of_card(card: Card | None, num_gpus: int, pcie_bytes_per_second: int | None = None) -> GpuLinks:
    """Returns the links of a host of such cards by the table alone.

    A bridge that is sold apart is not assumed. Data centre boards have NVLink between all GPUs of a host, and a network
    card for each.

    Args:
        card: None: one that the table does not have, with the links of a workstation's.
        num_gpus: GPUs of the host.
        pcie_bytes_per_second: bandwidth from host memory; None: the card's own.
    """
    bus = pcie_bytes_per_second or (pcie_bandwidth(*card.pcie) if card else pcie_bandwidth(4, 16))
    nvlink, network_cards = USUAL_LINKS.get(card.driver_name, (0, 0)) if card else (0, 0)
    network = NETWORK_SHARE * 1e9 / 8 * (network_cards * num_gpus or ASSUMED_NETWORK_GBIT_PER_SECOND)
    if nvlink:
        return GpuLinks("nvlink", NVLINK_SHARE * 1e9 * nvlink, network, is_assumed=True)
    has_peers = card is not None and not card.driver_name.startswith("GeForce")
    kind: LinkKind = "pcie" if has_peers else "host"
    return GpuLinks(kind, bus * (PEER_SHARE if has_peers else THROUGH_HOST_SHARE), network, is_assumed=True)


def read_gpu_links(
    facts: HardwareFacts,
    num_gpus: int,
    ask: Callable[[Sequence[str]], str | None] = run_nvidia_smi,
    roots: tuple[Path, Path] = (INFINIBAND, NETWORK_CARDS),
) -> GpuLinks:
    """Reads the links of this host's GPUs; what the system does not show is that of the table of cards.

    Args:
        facts: one of the GPUs; all are taken to be alike.
        ask: runs nvidia-smi with some words, and returns what it printed.
        roots: folders of the kernel's InfiniBand and network cards.
    """
    table = links_of_card(find_card(facts.name, facts.total_bytes), num_gpus, facts.link_bandwidth_bytes_per_second)
    if (network := read_network(*roots)) is not None:
        table = replace(table, network_bytes_per_second=network, network_is_assumed=False)
    joined = parse_matrix(ask(["topo", "-m"]) or "", num_gpus)
    if not joined:
        return table
    links = min(int(word[2:]) if re.fullmatch(r"NV\d+", word) else 0 for word in joined)
    if links:
        newest = max((each for each in NVLINK_BYTES_PER_SECOND if each <= facts.capability), default=(7, 0))
        speed = NVLINK_SHARE * links * NVLINK_BYTES_PER_SECOND[newest]
        return replace(table, kind="nvlink", bytes_per_second=speed, is_assumed=False)
    peers = parse_matrix(ask(["topo", "-p2p", "r"]) or "", num_gpus)
    has_peers = bool(peers) and all(word == "OK" for word in peers)
    bus = facts.link_bandwidth_bytes_per_second or pcie_bandwidth(4, 16)
    return replace(
        table,
        kind="pcie" if has_peers else "host",
        bytes_per_second=bus * (PEER_SHARE if has_peers else THROUGH_HOST_SHARE),
        is_assumed=False,
    )


def parse_matrix(printed: str, num_gpus: int) -> list[str]:
    """Returns the words for all pairs of the first GPUs in a table of `nvidia-smi topo`; empty where it has none.

    Lines begin with a GPU's name, and have a word for each GPU: "NV18", "PIX", "SYS"; "OK", "CNS"; "X" for itself.
    """
    rows = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines():
        words = line.split()
        if words and re.fullmatch(r"GPU\d+", words[0]) and len(words) > 1 and not words[1].startswith("GPU"):
            rows.append(words[1:])
    rows = rows[:num_gpus]
    if len(rows) < max(num_gpus, 2) or any(len(row) < num_gpus or row[at] != "X" for at, row in enumerate(rows)):
        return []
    return [row[place] for number, row in enumerate(rows) for place in range(num_gpus) if place != number]


def read_network(infiniband: Path = INFINIBAND, network_cards: Path = NETWORK_CARDS) -> float | None:
    """Reads the bytes per second that all network cards of this host reach together; None where none shows its rate.

    InfiniBand cards count alone where there are any: beside them, Ethernet is for the host's own needs.
    """
    bits = 0.0
    for port in sorted(infiniband.glob("*/ports/*")):
        if "ACTIVE" in _read(port / "state") and (rate := re.match(r"([\d.]+) Gb/sec", _read(port / "rate"))):
            bits += 1e9 * float(rate[1])
    if not bits:
        speeds = []
        for card in sorted(network_cards.glob("*")):
            speed = _read(card / "speed").strip()
            if (card / "device").exists() and _read(card / "operstate").strip() == "up" and speed.isdigit():
                speeds.append(1e6 * int(speed))
        bits = max(speeds, default=0.0)  # several Ethernet cards may be bonded, or lead elsewhere
    return NETWORK_SHARE * bits / 8 if bits else None


def _read(path: Path) -> str:
    """Reads a file of the kernel; empty where there is none, or it refuses: a card that is down has no speed."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
