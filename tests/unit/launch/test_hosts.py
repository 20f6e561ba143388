"""The hosts of a run's processes, and the figures by which all of them plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixtune.config.sections import DistributedConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.gpu_links import GpuLinks
from pixtune.launch.hosts import Machine, least_of, processes_of_this_host, with_whole_groups
from tests.unit.plan.test_training import CONFIG


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "", "MPI_LOCALNRANKS": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "0"}, 8),
        ({"LOCAL_WORLD_SIZE": "16"}, 8),
        ({"LOCAL_WORLD_SIZE": "four"}, 8),
    ],
)
def test_processes_of_a_host(environ: dict[str, str], count: int) -> None:
    assert processes_of_this_host(environ, 8) == count


def test_all_plan_by_what_all_have() -> None:
    facts = facts_as("RTX 4090")
    used = replace(facts, free_bytes=facts.free_bytes // 2, capability=(9, 0), host_available_bytes=1)
    links = GpuLinks("nvlink", 360e9, 40e9)
    slower = GpuLinks("host", 10e9, 50e9, network_is_assumed=False)
    found = least_of([Machine(facts, 4, links, True), Machine(used, 8, slower, False), Machine(facts, 4, None, True)])
    assert found == Machine(
        replace(facts, free_bytes=used.free_bytes, host_available_bytes=1),
        8,
        GpuLinks("host", 10e9, 40e9, network_is_assumed=True),
        False,
    )
    alone = Machine(facts, 1, None, True)
    assert least_of([alone]) == alone


def test_processes_that_are_spread_unevenly_have_a_copy_each_unless_they_ask() -> None:
    assert with_whole_groups(CONFIG, 16, 8) is CONFIG
    assert with_whole_groups(CONFIG, 12, 8).distributed.shards == 1
    asking = CONFIG.model_copy(update={"distributed": DistributedConfig(shards=4)})
    assert with_whole_groups(asking, 12, 8) is asking
