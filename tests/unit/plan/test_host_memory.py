"""Host memory is a limit like the device's: of the machine, of control groups, or the config's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, DistributedConfig
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts, within_host_limit
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import Rung, table_bytes
from pixtune.plan.situation import HOST_WORK_BYTES, situation_of
from pixtune.plan.training import TrainingPlan, plan_training
from tests.full_size import full_size_footprint

CONFIG = TrainConfig(
    pretrained_model_name_or_path="model", output_dir=Path("out"), max_train_steps=1,
    data_config=DataConfig(img_dir=Path("data")),
)  # fmt: skip
PC = replace(facts_as("H100"), host_total_bytes=16 * GIB, host_available_bytes=12 * GIB, host_process_bytes=2 * GIB)


def plan_for(facts: HardwareFacts, num_processes: int = 1, **changes: object) -> TrainingPlan:
    config = CONFIG.model_copy(update=changes)
    return plan_training(facts, full_size_footprint(config), config, num_processes=num_processes)


def test_a_rung_takes_what_was_counted_by_hand() -> None:
    """Qwen-Image: 32 rows of 60 blocks' 12 modulations, twice, and two layers of 18432 x 3072, in bf16."""
    config = CONFIG.model_copy(update={"rank": 64})
    situation = situation_of(PC, full_size_footprint(config), demands_of(config), num_processes=4)
    tables = 2 * (2 * 32 * 60 * 12 * 3072 + 2 * 18432 * 3072)
    trained = 60 * 4 * 64 * 2 * 3072
    assert situation.on_host(Rung("fp8", 32)) == 4 * (tables + HOST_WORK_BYTES) + 8 * trained


@pytest.mark.parametrize(("num_rows", "num_examples"), [(32, 1), (32, 4), (128, 4)])
def test_a_table_s_part_of_the_device_is_what_was_counted_by_hand(num_rows: int, num_examples: int) -> None:
    """Qwen-Image in bf16: a step's rows and one of clean pictures, what a block's two layers make, a layer's weights.

    Where GPU and host have one memory, the tables and the two layers on their way are in it, too.
    """
    footprint = replace(full_size_footprint(CONFIG), examples_per_step=num_examples)
    row, made, layer = 60 * 12 * 3072, num_rows * 12 * 3072, 18432 * 3072
    on_device = 2 * ((num_examples + 1) * row + made + layer)
    rung = Rung("fp8", num_rows)
    assert table_bytes(rung, footprint, "bf16") == on_device
    assert table_bytes(rung, footprint, "fp32") == 2 * on_device
    in_one = replace(footprint, one_pool=True)
    assert table_bytes(rung, in_one, "bf16") == on_device + 2 * (2 * num_rows * row + 2 * layer)
    for each in (footprint, in_one):
        assert table_bytes(Rung("fp8"), each, "bf16") == 0, "the layers' weights are there instead"


def test_eight_processes_on_a_host_of_16_gb_are_refused_with_the_figure() -> None:
    """Streaming at 7.4 GiB takes about 3 GiB of host memory each, and of 12 GiB one has to stay free."""
    assert plan_for(PC, gpu_memory_limit_gib=7.4).streamed_blocks
    with pytest.raises(PlanError, match=r"for 8 processes beside .*, and 11\.0 GiB of the 12\.0 GiB avail") as caught:
        plan_for(PC, 8, gpu_memory_limit_gib=7.9, distributed=DistributedConfig(shards=1))
    words = str(caught.value).split()
    needed, missing = float(words[words.index("needs") + 1]), float(words[words.index("are") - 2])
    one = plan_for(PC, gpu_memory_limit_gib=7.4)
    assert needed == pytest.approx(8 * (one.expected_host_bytes / GIB + 0.125) + 0.18, rel=0.3)
    assert missing == pytest.approx(needed - 11, abs=0.11)
    together = plan_for(PC, 8, gpu_memory_limit_gib=7.9)
    assert together.shards > 1 and not together.offload_inputs, "their GPUs hold together what the host cannot"


def test_all_processes_share_the_limit() -> None:
    limited = within_host_limit(PC, 10 * GIB, num_processes=3)
    assert (limited.host_total_bytes, limited.host_available_bytes) == (10 * GIB, 4 * GIB), "they have 6 already"
    assert within_host_limit(limited, 10 * GIB, num_processes=3) == limited
    assert within_host_limit(PC, 4 * GIB, num_processes=3).host_available_bytes == 0
    assert within_host_limit(PC, 64 * GIB) == PC and within_host_limit(PC, None, 8) == PC
    unknown = replace(PC, host_total_bytes=0, host_available_bytes=0)
    assert within_host_limit(unknown, 10 * GIB).host_available_bytes == 8 * GIB
    spark = facts_as("DGX Spark")
    assert within_host_limit(spark, GIB) == spark, "one pool has other limits"


def test_a_run_keeps_within_the_limit_or_is_refused() -> None:
    roomy = replace(PC, host_available_bytes=100 * GIB, host_total_bytes=128 * GIB)
    free = plan_for(roomy, gpu_memory_limit_gib=15.3)
    held = plan_for(roomy, gpu_memory_limit_gib=15.3, host_memory_limit_gib=4.0)
    assert held.expected_host_bytes < GIB < free.expected_host_bytes, "2 GiB are there already, and 1 stays free"
    with pytest.raises(PlanError, match="missing"):
        plan_for(roomy, gpu_memory_limit_gib=7.4, host_memory_limit_gib=4.0)
    with pytest.raises(PlanError, match=r"for 2 processes.*With one process instead of 2 it fits"):
        plan_for(roomy, 2, gpu_memory_limit_gib=15.3, host_memory_limit_gib=6.0)
