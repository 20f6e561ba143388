"""Streamed runs: killed and resumed, in several processes, with a cache of one window, and with damaged rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pixtune.data.streamed import shards
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_TRAIN, overrides, pixtune, pixtune_together, write_config

SETTINGS = {
    "max_train_steps": 6,
    "stream__window": 9,
    "stream__shards_at_once": 3,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "constant",
    "data_config__caption_dropout_rate": 0.3,
    "data_config__img_size": "[64,48]",
    "data_config__flip": True,
    "data_config__random_ratio": True,
    # Adam divides by the gradient's size: with the usual epsilon, rounding in a gradient near 0 becomes a full step.
    "adam_epsilon": "1e-2",
}


def in_small_shards() -> None:
    """Has a folder's shards hold few pictures, and unequal numbers of them."""
    shards.PAIRS_IN_SHARD = 5


def ends_in_step_4() -> None:
    """Ends the process, as a power failure does, while its fourth step is computed."""
    import os

    from pixtune import train

    in_small_shards()
    before = train.train_step

    def take(run, micro_batches, step):
        if step == 3:
            os._exit(9)
        return before(run, micro_batches, step)

    train.train_step = take


def train(folder: Path, name: str, before=in_small_shards, **changes: object) -> str:
    words = overrides(folder / name, folder / "cache", **{**SETTINGS, **changes})
    outcome = pixtune("train", "--config", write_config(folder), *words, before=before)
    assert outcome.returncode == (9 if before is ends_in_step_4 else 0), outcome.stdout
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


def in_small_shards_that_fail_later() -> None:
    """Has those shards be out of reach that the second window needs."""
    in_small_shards()
    rows, opened = shards.FolderShards.rows, list[int]()

    def fail(self, shard, start, pictures):
        opened.append(shard)
        if len(opened) > 3:
            raise TimeoutError("no route to host")
        yield from rows(self, shard, start, pictures)

    shards.FolderShards.rows = fail  # type: ignore[method-assign]


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    """Also where the cache is gone, and with it the pictures of the windows that the checkpoint is of."""
    shutil.copytree(whole / "cache", tmp_path / "cache")
    train(tmp_path, "killed", before=ends_in_step_4)
    shutil.rmtree(tmp_path / "cache")
    printed = train(tmp_path, "killed", resume_from_checkpoint="latest")
    assert "resuming after step 2" in printed
    assert same(whole / "whole", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(whole / "whole")
    assert not [*(tmp_path / "cache" / "stream").glob("pictures-*")], "pictures stay no longer than a window's encoding"


def test_several_processes_see_what_one_sees_and_any_number_goes_on(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    words = {**SETTINGS, "max_train_steps": 3, "train_batch_size": 1}
    together = overrides(tmp_path / "out", tmp_path / "cache", **words)
    config = write_config(tmp_path)
    for outcome in pixtune_together(2, "train", "--config", config, *together, before=in_small_shards):
        assert outcome.returncode == 0, outcome.stdout
    train(tmp_path, "out", resume_from_checkpoint="latest", train_batch_size=2)
    first, second = weights(whole / "whole"), weights(tmp_path / "out")
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)


def test_a_shard_out_of_reach_ends_the_run_with_its_steps_saved_and_it_goes_on_later(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    words = overrides(
        tmp_path / "out", tmp_path / "cache", **{**SETTINGS, "checkpointing_steps": 5}, stream__patience_seconds=0
    )
    outcome = pixtune("train", "--config", write_config(tmp_path), *words, before=in_small_shards_that_fail_later)
    assert outcome.returncode == 1
    assert "cannot be read from its row 0 on" in outcome.stdout and "TimeoutError: no route to host" in outcome.stdout
    saved = find_checkpoints(tmp_path / "out")
    assert [path.name for path in saved] == ["checkpoint-000002"], "what was read before is trained on, and saved"
    train(tmp_path, "out", resume_from_checkpoint="latest")
    assert same(whole / "whole", tmp_path / "out")


def test_a_cache_that_does_not_hold_all_windows_gives_the_same_weights(whole, tmp_path):
    """Encodings that no window needs now are deleted, and what a later one lacks is made again."""
    entries = [*(whole / "cache" / "stream").rglob("*.safetensors")]
    total = sum(path.stat().st_size for path in entries)
    limit = total * 0.8
    shutil.copytree(whole / "cache", tmp_path / "cache")
    train(tmp_path, "out", stream__cache_limit_gib=f"{limit / 2**30:.9f}", data_config__num_workers=0)
    left = [*(tmp_path / "cache" / "stream").rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in left) <= limit + 400 * len(left)
    assert len(left) < len(entries) and same(whole / "whole", tmp_path / "out")


def test_damaged_rows_are_skipped_and_said_up_to_a_limit(tmp_path):
    for number, picture in enumerate(sorted(DEMO_TRAIN.glob("*.png"))[:12]):
        shutil.copy(picture, tmp_path / "pictures" / picture.name) if number else (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / picture.name).with_suffix(".txt").write_text("a caption")
        if number == 0:
            (tmp_path / "pictures" / picture.name).write_bytes(b"<html>not found</html>")
    changes = {"data_config__img_dir": tmp_path / "pictures", "validation__held_out_dir": "null", "max_train_steps": 2}
    printed = train(tmp_path, "out", stream__window=12, **changes)
    assert "1 row of the stream skipped" in printed and "is not a picture that can be read" in printed


def test_a_run_goes_on_from_the_end_of_a_window_with_nothing_left_over(tmp_path):
    """Rows of one size, as many as the first window's steps take: the checkpoint holds a position alone."""
    changes = {"data_config__img_size": 64, "data_config__random_ratio": False, "data_config__num_workers": 0,
               "stream__window": 8, "data_config__flip": False}  # fmt: skip
    train(tmp_path, "whole", **changes, max_train_steps=3)
    train(tmp_path, "out", **changes, max_train_steps=2)
    train(tmp_path, "out", **changes, max_train_steps=3, resume_from_checkpoint="latest")
    assert same(tmp_path / "whole", tmp_path / "out")
