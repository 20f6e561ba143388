"""What goes wrong while training: the disk, the numbers, the folder. Nothing is lost and nothing half-written stays."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from pixtune import assembly
from pixtune import train as training
from pixtune.config import load_config
from pixtune.errors import ConfigError
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import find_checkpoints
from tests.runs import DEMO_TRAIN, TINY_MODEL, overrides, pixtune, write_config


def limit_file_size() -> None:
    """The next file larger than this cannot be written: what a full disk does, for this process alone."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead of ending the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_disk_full_at_a_checkpoint_keeps_the_earlier_one_and_says_so(tmp_path: Path, warm_cache: Path) -> None:
    config, output_dir = write_config(tmp_path), tmp_path / "run"
    model = {"pretrained_model_name_or_path": TINY_MODEL}  # a LoRA of two blocks is smaller than the limit
    words = overrides(output_dir, warm_cache, max_train_steps=2, **model)
    assert pixtune("train", "--config", config, *words).returncode == 0
    before = [path.name for path in find_checkpoints(output_dir)]

    words = overrides(output_dir, warm_cache, max_train_steps=4, resume_from_checkpoint="latest", rank=4, **model)
    outcome = pixtune("train", "--config", config, *words, before=limit_file_size)
    assert outcome.returncode == 1, outcome.stdout
    assert "could not be written" in outcome.stdout
    assert "Traceback" not in outcome.stdout
    assert [path.name for path in find_checkpoints(output_dir)] == before
    assert load_checkpoint(find_checkpoints(output_dir)[-1]).step == 2
    assert not list(output_dir.glob(".checkpoint-*")), "half-written"

    outcome = pixtune("train", "--config", config, *words)
    assert outcome.returncode == 0, outcome.stdout
    assert find_checkpoints(output_dir)[-1].name == "checkpoint-000004"


def limit_file_size_more() -> None:
    """Not even an entry of the cache can be written."""
    limit_file_size()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))


def test_disk_full_while_caching_leaves_no_part_of_an_entry(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache")
    outcome = pixtune("train", "--config", write_config(tmp_path), *words, before=limit_file_size_more)
    assert outcome.returncode == 1, outcome.stdout
    assert "Traceback" not in outcome.stdout
    assert "cache" in outcome.stdout
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tmp"]
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 0, outcome.stdout


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_pictures(tmp_path: Path, warm_cache: Path) -> None:
    words = overrides(
        tmp_path / "run", warm_cache, learning_rate="1e30", max_train_steps=40, checkpointing_steps=20,
        logging_steps=1, max_grad_norm="1e30",
    )  # fmt: skip
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1, outcome.stdout
    assert "nan" in outcome.stdout or "inf" in outcome.stdout
    assert ".png" in outcome.stdout
    for path in find_checkpoints(tmp_path / "run"):
        tensors = load_checkpoint(path).tensors["pytorch_lora_weights"]
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_all_bad_files_are_reported_together_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = sorted(DEMO_TRAIN.glob("*.png"))[0]
    for stem, data in {
        "cut": good.read_bytes()[:400],
        "empty": b"",
        "text": b"hello",
        "fine": good.read_bytes(),
    }.items():
        (folder / f"{stem}.png").write_bytes(data)
        (folder / f"{stem}.txt").write_text("a caption")
    words = overrides(tmp_path / "run", tmp_path / "cache", data_config__img_dir=folder)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1
    assert "empty.png" in outcome.stdout
    assert "text.png" in outcome.stdout
    assert "cut.png" in outcome.stdout
    assert "fine.png" not in outcome.stdout
    assert not (tmp_path / "run").exists()


def test_a_new_start_does_not_overwrite_a_finished_run(tmp_path: Path, warm_cache: Path) -> None:
    config, words = write_config(tmp_path), overrides(tmp_path / "run", warm_cache, max_train_steps=1)
    assert pixtune("train", "--config", config, *words).returncode == 0
    outcome = pixtune("train", "--config", config, *words)
    assert outcome.returncode == 1
    assert "already holds a run" in outcome.stdout


def test_a_missing_optimizer_package_is_told_before_weights_are_loaded(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("loaded first, which takes minutes at full size")

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    monkeypatch.setattr(assembly, "load_planned", load)
    with pytest.raises(ConfigError, match=r"(?s)8 bits.*pip install bitsandbytes.*adam8bit: false"):
        assembly.assemble(
            load_config(None, overrides(tmp_path / "run", warm_cache, adam8bit="true")), training.forward_backward
        )
