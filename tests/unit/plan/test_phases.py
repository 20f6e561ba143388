"""Memory of a run's phases, by hand at full size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, EmaConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.plan.encoders import PLAINLY, EncoderSizes
from pixtune.plan.phases import Surroundings, idle_bytes, phases_of
from pixtune.plan.training import plan_training
from tests.full_size import full_size_footprint

CONFIG = TrainConfig(
    pretrained_model_name_or_path="model",
    output_dir=Path("out"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("data")),
)


@pytest.mark.parametrize(
    ("changes", "bytes_per_trained_weight"),
    [
        ({"adam8bit": False}, 4 + 8),
        ({"adam8bit": True}, 4 + 2.03125),
        ({"method": "full", "adam8bit": True}, 2.03125),
    ],
)
def test_between_steps_weights_and_optimizer_states_remain(
    changes: dict[str, object], bytes_per_trained_weight: float
) -> None:
    """Trained weights that are all of them are counted once."""
    config = CONFIG.model_copy(update=changes)
    footprint = full_size_footprint(config)
    plan = plan_training(facts_as("H200"), footprint, config)
    expected = 2 * footprint.num_weights + bytes_per_trained_weight * footprint.trained_weights
    # Vectors below 4096 numbers have states of 32 bits.
    assert idle_bytes(plan, footprint) == pytest.approx(expected, rel=2e-4)
    assert idle_bytes(plan, footprint) < plan.expected_peak_bytes


def test_what_stays_on_the_device_is_counted_in_each_phase_after_it() -> None:
    footprint = full_size_footprint(CONFIG)
    plan = plan_training(facts_as("H200"), footprint, CONFIG)
    sizes = EncoderSizes(14 * GIB, GIB, caption_tokens=0, picture_pixels=10**6, encoding_bytes_per_pixel=3000)
    around = Surroundings(sizes, PLAINLY, 1024 * 1024, footprint.num_tokens)
    leave, stay = (
        phases_of(plan, footprint, replace(around, text_in_loop=loop, pictures_in_loop=loop)) for loop in (False, True)
    )
    assert [phase.name for phase in stay] == ["captions encoded", "pictures encoded", "training step", "sampling"]
    more = [there.device_bytes - gone.device_bytes for gone, there in zip(leave, stay, strict=True)]
    assert more == [0, 14 * GIB, 15 * GIB, 14 * GIB], "sampling needs the autoencoder in any case"
    assert [phases[1].holds for phases in (leave, stay)] == ["autoencoder", "autoencoder, text encoder"]
    tiled = phases_of(plan, footprint, replace(around, encoders=replace(PLAINLY, tile_pixels=512)))
    assert (tiled[1].holds, tiled[1].device_bytes) == ("autoencoder, tiles of 512 pixels", GIB + 3000 * 512**2)
    assert [phase.device_bytes for phase in leave[:3]] == [14 * GIB, GIB + 3 * 10**9, plan.expected_peak_bytes]


def test_a_run_without_encoders_and_samples_is_its_training_step() -> None:
    footprint = full_size_footprint(CONFIG)
    plan = plan_training(facts_as("H200"), footprint, CONFIG)
    (only,) = phases_of(plan, footprint, Surroundings(EncoderSizes(0, 0), PLAINLY))
    assert (only.name, only.device_bytes) == ("training step", plan.expected_peak_bytes)


@pytest.mark.parametrize("on_host", [False, True])
def test_an_average_and_a_frozen_lora_are_counted(on_host: bool) -> None:
    """The average takes 4 bytes a trained weight and a piece of 32 MiB, on the host two pieces of the device."""
    config = CONFIG.model_copy(update={"ema": EmaConfig(decay=0.99, on_host=on_host), "disable_quantization": True})
    plain = full_size_footprint(CONFIG)
    footprint = replace(full_size_footprint(config), frozen_weights=10**8)
    piece, average = 32 * 2**20, 4 * plain.trained_weights
    more = 2 * 10**8 + (2 * piece if on_host else piece + average)
    before, after = (plan_training(facts_as("H200"), each, config) for each in (plain, footprint))
    assert idle_bytes(after, footprint) - idle_bytes(before, plain) == more
    rounded = 2 * 10**8  # what compiled blocks keep of it, at most
    assert more <= after.expected_peak_bytes - before.expected_peak_bytes <= more + rounded
    assert after.expected_host_bytes - before.expected_host_bytes == average * on_host
    pool = replace(footprint, one_pool=True)
    assert (pool.average_bytes, pool.average_host_bytes) == ((2 * piece if on_host else piece) + average, 0)
