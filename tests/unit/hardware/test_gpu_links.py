"""Links between GPUs as nvidia-smi and the kernel show them; what they do not show is said to be assumed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pixtune.hardware.cards import CARDS, card_named, facts_as
from pixtune.hardware.gpu_links import (
    NETWORK_SHARE,
    NVLINK_SHARE,
    PEER_SHARE,
    THROUGH_HOST_SHARE,
    USUAL_LINKS,
    links_of_card,
    parse_matrix,
    read_gpu_links,
    read_network,
)
from pixtune.hardware.nvidia_smi import run_nvidia_smi

HGX = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tSYS\t0-47\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tSYS\t48-95\t1\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\tSYS\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
PAIRS = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity
GPU0\t X \tNV4\tSYS\tSYS\t0-15
GPU1\tNV4\t X \tSYS\tSYS\t0-15
GPU2\tSYS\tSYS\t X \tNV4\t16-31
GPU3\tSYS\tSYS\tNV4\t X \t16-31
"""
BUS = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tPHB\t0-15\nGPU1\tPHB\t X \t0-15\n"
PEERS = " \tGPU0\tGPU1\t\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"
NO_PEERS = PEERS.replace("OK\t", "CNS\t").replace("\tOK", "\tCNS")
NOTHING = (Path("/not/there"), Path("/not/there"))


def answering(matrix: str | None, peers: str | None = None) -> object:
    def ask(words: Sequence[str]) -> str | None:
        return {"-m": matrix, "-p2p": peers}[words[1]]

    return ask


@pytest.mark.parametrize(
    ("card", "num_gpus", "matrix", "peers", "kind", "bytes_per_second"),
    [
        ("H100", 4, HGX, None, "nvlink", NVLINK_SHARE * 450e9),
        ("H100", 2, HGX, None, "nvlink", NVLINK_SHARE * 450e9),
        ("RTX 3090", 2, PAIRS, None, "nvlink", NVLINK_SHARE * 4 * 14.06e9),
        ("RTX A6000", 2, BUS, PEERS, "pcie", PEER_SHARE * 25.2e9),
        ("RTX 4090", 2, BUS, NO_PEERS, "host", THROUGH_HOST_SHARE * 25.2e9),
        ("RTX A6000", 2, BUS, None, "host", THROUGH_HOST_SHARE * 25.2e9),
    ],
)
def test_what_nvidia_smi_shows(
    card: str, num_gpus: int, matrix: str, peers: str | None, kind: str, bytes_per_second: float
) -> None:
    links = read_gpu_links(facts_as(card), num_gpus, answering(matrix, peers), NOTHING)  # type: ignore[arg-type]
    assert (links.kind, links.is_assumed, links.network_is_assumed) == (kind, False, True)
    assert links.bytes_per_second == pytest.approx(bytes_per_second, rel=0.01)


def test_the_slowest_pair_counts() -> None:
    """Bridges join two and two; the way between the pairs is the bus."""
    links = read_gpu_links(facts_as("RTX 3090"), 4, answering(PAIRS, None), NOTHING)  # type: ignore[arg-type]
    assert links.kind == "host"


@pytest.mark.parametrize(
    "printed",
    [
        None,
        "",
        "No devices were found",
        "\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n",
        "GPU0 GPU1\nGPU0\n",
        "\x00\x1b[4m",
        BUS,
    ],
    ids=range(7),
)
def test_what_is_not_shown_is_of_the_table_and_said_to_be_assumed(printed: str | None) -> None:
    links = read_gpu_links(facts_as("H200"), 8, answering(printed), NOTHING)  # type: ignore[arg-type]
    assert links == links_of_card(card_named("H200"), 8, facts_as("H200").link_bandwidth_bytes_per_second)
    assert links.kind == "nvlink" and "assumed" in links.words and "assumed" in links.network_words


def test_a_missing_or_broken_nvidia_smi_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (FileNotFoundError(), PermissionError(), subprocess.TimeoutExpired("nvidia-smi", 20)):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", fail)
        assert run_nvidia_smi(["topo", "-m"]) is None
        assert read_gpu_links(facts_as("RTX 4090"), 2, roots=NOTHING).kind == "host"


def test_every_card_has_links_and_the_table_names_cards() -> None:
    names = {card.driver_name for card in CARDS}
    assert names >= USUAL_LINKS.keys()
    for card in CARDS:
        links = links_of_card(card, 2)
        assert links.bytes_per_second > 1e9 and links.network_bytes_per_second > 1e9 and links.is_assumed
    assert links_of_card(None, 2).kind == "host"
    assert links_of_card(card_named("H100"), 8).network_bytes_per_second == NETWORK_SHARE * 8 * 400e9 / 8
    assert links_of_card(card_named("RTX 4090"), 8).network_bytes_per_second == NETWORK_SHARE * 25e9 / 8


def test_rows_are_told_from_the_header_and_from_network_cards() -> None:
    assert parse_matrix(HGX, 4) == ["NV18"] * 12
    assert parse_matrix(PAIRS, 4).count("SYS") == 8
    assert parse_matrix(HGX, 5) == [] and parse_matrix(HGX, 1) == []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_network_cards_are_added_up_and_those_that_are_down_left_out(tmp_path: Path) -> None:
    infiniband, cards = tmp_path / "infiniband", tmp_path / "net"
    assert read_network(infiniband, cards) is None
    for name, speed, state in (("eth0", "10000", "up"), ("eth1", "25000", "up"), ("eth2", "100000", "down")):
        write(cards / name / "speed", speed)
        write(cards / name / "operstate", state)
        (cards / name / "device").mkdir()
    write(cards / "docker0" / "speed", "400000")
    write(cards / "docker0" / "operstate", "up")
    write(cards / "eth3" / "operstate", "up")
    assert read_network(infiniband, cards) == NETWORK_SHARE * 25e9 / 8
    for number, state in enumerate(("4: ACTIVE", "4: ACTIVE", "1: DOWN")):
        write(infiniband / f"mlx5_{number}" / "ports" / "1" / "state", state)
        write(infiniband / f"mlx5_{number}" / "ports" / "1" / "rate", "400 Gb/sec (4X NDR)\n")
    assert read_network(infiniband, cards) == NETWORK_SHARE * 800e9 / 8
