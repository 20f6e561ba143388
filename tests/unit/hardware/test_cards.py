"""The table of cards: it agrees with itself and with figures from elsewhere, and is found by the names people use."""

from __future__ import annotations

import pytest

from pixtune.errors import PixtuneError
from pixtune.hardware.cards import CARDS, Card, card_named, facts_as, find_card
from pixtune.hardware.facts import GIB
from tests.unit.hardware.machines import MACHINES, Machine

SIZES_GB = {8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 128, 141, 144, 180, 192, 288}
"""Memories with which NVIDIA has made cards of these generations."""


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_can_be_true(card: Card) -> None:
    assert card.size_gb in SIZES_GB
    assert 0.9 < card.total_gib * (1 if card.size_gb < 90 else GIB / 1e9) / card.size_gb <= 1.07
    assert 3 < card.bandwidth_gb_per_second / card.num_sms < 55  # GB/s: an RTX 6000 Ada's, a B200's
    assert find_card(f"NVIDIA {card.driver_name}", card.total_bytes) is card


def test_names_are_unique() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090 D", "RTX 4090 D"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16 GB"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("3080", "RTX 3080"),
        ("h100", "H100"),
        ("H100 SXM", "H100"),
        ("H100 PCIe", "H100 PCIe"),
        ("A100", "A100 80 GB"),
        ("A100 40GB", "A100 40 GB"),
        ("L40", "L40"),
        ("l40s", "L40S"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
        ("a6000", "RTX A6000"),
        ("RTX PRO 6000 Blackwell", "RTX PRO 6000"),
        ("GH200", "GH200"),
        ("DGX Spark", "GB10"),
        ("gb10", "GB10"),
    ],
)
def test_the_names_people_use(asked: str, found: str) -> None:
    assert card_named(asked).name == found


@pytest.mark.parametrize("asked", ["4090 Laptop", "RTX 9999", "MI300X", "", "GTX 1080"])
def test_no_card_is_taken_for_another(asked: str) -> None:
    with pytest.raises(PixtuneError, match=r"is in the table\. Near it: "):
        card_named(asked)


def test_the_error_names_what_was_meant() -> None:
    with pytest.raises(PixtuneError, match="Near it: RTX 4090, RTX 4090 D"):
        card_named("RTX 4090 Laptop")


@pytest.mark.parametrize(
    ("name", "gib"),
    [("RTX 4060", 7.4), ("RTX 3060", 11.4), ("RTX 4080", 15.3), ("RTX 4090", 23.3), ("RTX 5090", 31), ("A6000", 47)],
)
def test_an_idle_card_has_what_the_benchmarks_give_to_one_of_its_size(name: str, gib: float) -> None:
    assert facts_as(name).free_bytes == pytest.approx(gib * GIB, abs=0.15 * GIB)


def test_a_spark_is_one_pool() -> None:
    facts = facts_as("DGX Spark", host_bytes=512 * GIB)
    assert facts.integrated and facts.coherent_link == "integrated" and facts.machine == "aarch64"
    assert facts.host_total_bytes == facts.total_bytes == pytest.approx(128_501_256_192, rel=1e-3)
    assert 104 * GIB < facts.free_bytes < 107.8 * GIB  # an idle one has about 113 GiB available
    assert facts.link_bandwidth_bytes_per_second is None


def test_the_host_around_a_card_is_given() -> None:
    facts = facts_as("RTX 3090", host_bytes=32 * GIB)
    assert facts.host_total_bytes == 32 * GIB and facts.host_available_bytes == 28 * GIB
    assert not facts.integrated and facts.link_bandwidth_bytes_per_second == pytest.approx(25.2e9, rel=0.01)


@pytest.mark.parametrize("machine", [m for m in MACHINES if m.capability >= (8, 0)], ids=lambda m: m.name)
def test_made_up_machines_are_the_tables_cards(machine: Machine) -> None:
    card = find_card(machine.name, machine.total_bytes)
    assert card is not None and (card.capability, card.num_sms) == (machine.capability, machine.num_sms)
    assert facts_as(machine.name).tensor_core_formats == facts_as(card.name).tensor_core_formats
