"""Streamed runs: killed and resumed, in several processes, with a cache of one window, and with damaged rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pixtune.data.streamed import shards
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_HELD_OUT, overrides, pixtune, pixtune_together, write_config

SETTINGS = {
    "max_train_steps": 9,
    "stream__window": 7,
    "stream__shards_at_once": 3,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "constant",
    "data_config__caption_dropout_rate": 0.3,
    "data_config__img_size": "[64,48]",
    "data_config__flip": True,
    "data_config__random_ratio": True,
    "validation__held_out_dir": DEMO_HELD_OUT,
    "validation__held_out": "auto",
    "validation__every": 4,
    "validation__num_draws": 1,
    # Adam divides by the gradient's size: with the usual epsilon, rounding in a gradient near 0 becomes a full step.
    "adam_epsilon": "1e-2",
}


def in_small_shards() -> None:
    """Has a folder's shards hold few pictures, and unequal numbers of them."""
    shards.PAIRS_IN_SHARD = 5


def ends_at_step_5() -> None:
    """Ends the process, as a power failure does, while its sixth step is computed."""
    import os

    from pixtune import train

    in_small_shards()
    before = train.train_step

    def take(run, micro_batches, step):
        if step == 5:
            os._exit(9)
        return before(run, micro_batches, step)

    train.train_step = take


def train(folder: Path, name: str, before=in_small_shards, cache: str = "cache", **changes: object) -> str:
    words = overrides(folder / name, folder / cache, **{**SETTINGS, **changes})
    outcome = pixtune("train", "--config", write_config(folder), *words, before=before)
    assert outcome.returncode == (9 if before is ends_at_step_5 else 0), outcome.stdout
    return outcome.stdout


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("stream")
    printed = train(folder, "whole")
    assert "data: a stream" in printed
    return folder


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("cache", ["there", "gone"])
def test_a_killed_run_goes_on_bit_for_bit(cache, whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    train(tmp_path, "killed", before=ends_at_step_5)
    if cache == "gone":  # and with it the pictures of the windows that the checkpoint is of
        shutil.rmtree(tmp_path / "cache")
    printed = train(tmp_path, "killed", resume_from_checkpoint="latest")
    assert "resuming after step 4" in printed
    assert same(whole / "whole", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(whole / "whole")
    assert not [*(tmp_path / "cache" / "stream").glob("pictures-*")], "pictures stay no longer than a window's encoding"


def test_several_processes_see_what_one_sees_and_any_number_goes_on(whole, tmp_path):
    words = {**SETTINGS, "max_train_steps": 4, "train_batch_size": 1}
    together = overrides(tmp_path / "out", tmp_path / "cache", **words)
    config = write_config(tmp_path)
    for outcome in pixtune_together(2, "train", "--config", config, *together, before=in_small_shards):
        assert outcome.returncode == 0, outcome.stdout
    train(tmp_path, "out", resume_from_checkpoint="latest", train_batch_size=2)
    first, second = weights(whole / "whole"), weights(tmp_path / "out")
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
