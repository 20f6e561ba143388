"""The link between host and device and its speed, from the names and figures that a system shows."""

from __future__ import annotations

import re
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")

PCIE_SHARE = 0.8
"""Share of the line rate that a copy from pinned memory reaches: 25 of 31.5 GB/s over PCIe 4.0 x16 is the usual figure.
An estimate; where it matters, a benchmark of the link at hand decides."""
PCIE_GIGATRANSFERS = {3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
PCIE_CODING = 128 / 130
C2C_BYTES_PER_SECOND = 360 * 10**9
"""Speed of NVLink-C2C of Grace chips, host to device: 450 GB/s nominal each way, taken at the same share."""
COHERENT_CHIP = re.compile(r"\bG[HB][23]00\b")
"""Names of chips with a Grace CPU beside the GPU: GH200, GB200, GB300. GB10 is integrated and reports that itself."""


def is_coherent_chip(name: str) -> bool:
    """Returns whether a GPU, by its driver's name, reads the memory of the CPU beside it over NVLink-C2C."""
    return COHERENT_CHIP.search(name) is not None


def pcie_bandwidth(generation: int, lanes: int) -> int:
    """Returns the bytes per second that a copy from pinned memory can be expected to reach in one direction."""
    return _from_line_rate(PCIE_GIGATRANSFERS[generation], lanes)


def read_pcie_bandwidth(address: str, root: Path = PCI_DEVICES) -> int | None:
    """Reads the bandwidth of a device's slot, as `pcie_bandwidth` has it; None where the system does not show it.

    The speed is the least of what the card and the port above it can do, not the present one: an idle card runs its
    link slower. The number of lanes is the present one: a card in a narrow slot keeps that.

    Args:
        address: for example "0000:65:00.0".
    """
    device = root / address
    names = ("max_link_speed", "current_link_width")
    if not all((device / name).is_file() for name in names):
        return None
    speeds = [parse_link_speed((device / "max_link_speed").read_text(encoding="ascii"))]
    port = device.resolve().parent / "max_link_speed"
    if port.is_file():
        speeds.append(parse_link_speed(port.read_text(encoding="ascii")))
    lanes = (device / "current_link_width").read_text(encoding="ascii").strip()
    known = [speed for speed in speeds if speed is not None]
    if not known or not lanes.isdigit() or int(lanes) == 0:
        return None
    return _from_line_rate(min(known), int(lanes))


def parse_link_speed(text: str) -> float | None:
    """Reads GT/s from a line such as "16.0 GT/s PCIe"; None for "Unknown", which virtual machines show."""
    match = re.match(r"\s*([\d.]+) GT/s", text)
    return float(match[1]) if match else None


def _from_line_rate(gigatransfers_per_second: float, lanes: int) -> int:
    return round(gigatransfers_per_second * 1e9 / 8 * PCIE_CODING * lanes * PCIE_SHARE)
