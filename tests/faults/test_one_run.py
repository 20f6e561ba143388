"""What a run goes on from is its own: its folder, its checkpoints in their order, its base model, its length."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path, find_checkpoints
from pixtune.storage.files import file_digest
from pixtune.tracking.metrics import read_metrics
from tests import processes
from tests.runs import DEMO_TRAIN, environment, overrides, pixtune, write_config
from tests.shallow import shallow_model

LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The output folder of a run of four steps, saved after two and four."""
    output_dir = tmp_path_factory.mktemp("four_steps") / "run"
    outcome = train(output_dir, warm_cache, checkpointing_steps=2)
    assert outcome.returncode == 0, outcome.stdout
    assert not (output_dir / "run.lock").exists()
    return output_dir


@pytest.fixture
def output_dir(tmp_path: Path, four_steps: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(four_steps, tmp_path / "run"))


def train(output_dir: Path, cache: Path, **changes: object) -> Any:
    words = overrides(output_dir, cache, **{"lr_scheduler": "constant", "logging_steps": 1, **changes})
    return pixtune("train", "--config", write_config(output_dir.parent), *words)


def resume(output_dir: Path, cache: Path, **changes: object) -> Any:
    return train(output_dir, cache, **{"resume_from_checkpoint": "latest", **changes})


def steps_in(output_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in find_checkpoints(output_dir)]


# ---- one run, one folder


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(tmp_path: Path, warm_cache: Path) -> None:
    output_dir, config = tmp_path / "run", write_config(tmp_path)
    settings: dict[str, Any] = {"max_train_steps": 5000, "checkpointing_steps": 5, "logging_steps": 1}
    words = overrides(output_dir, warm_cache, **settings, resume_from_checkpoint="latest")
    first = processes.start(["-m", "pixtune.cli", "train", "--config", str(config), *words], environment())
    deadline = time.monotonic() + 120
    while not steps_in(output_dir):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.01)
    for changes in ({"resume_from_checkpoint": "latest"}, {"learning_rate": 1e-2}):
        second = train(output_dir, warm_cache, **{**settings, "max_train_steps": 20, **changes})
        assert second.returncode == 1 and "Traceback" not in second.stdout
        assert f"{output_dir} is in use by a run on " in second.stdout and "last seen at step" in second.stdout
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (output_dir / "run.lock").exists()
    steps = steps_in(output_dir)[-1] + 1
    third = resume(output_dir, warm_cache, **{**settings, "max_train_steps": steps})
    assert third.returncode == 0, third.stdout
    assert steps_in(output_dir)[-1] == steps and not (output_dir / "run.lock").exists()
    logged = [line["step"] for line in read_metrics(output_dir / "metrics.jsonl") if line["kind"] == "step"]
    assert logged == list(range(1, steps + 1))


# ---- the order of checkpoints


def test_a_run_that_is_set_back_keeps_what_it_saves(output_dir: Path, warm_cache: Path) -> None:
    outcome = resume(
        output_dir, warm_cache, resume_from_checkpoint="checkpoint-000002", max_train_steps=3,
        checkpoints_total_limit=1,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout
    assert "set back to step 2: checkpoint-000004" in outcome.stdout and steps_in(output_dir) == [3]
    lineage = load_checkpoint(checkpoint_path(output_dir, 3)).lineage
    assert [session.last_step for session in lineage.sessions] == [2, 3]
    assert all(session.identity["base"] for session in lineage.sessions)


def test_latest_goes_on_from_the_last_whole_checkpoint_with_a_damaged_log(output_dir: Path, warm_cache: Path) -> None:
    whole = load_file(output_dir / LORA_FILE)
    file = checkpoint_path(output_dir, 4) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    log = output_dir / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe\n" + log.read_bytes().replace(b"\n", b"\nnull\n", 1))
    outcome = resume(output_dir, warm_cache)
    assert outcome.returncode == 0, outcome.stdout
    assert "optimizer.safetensors is damaged" in outcome.stdout and "going on after step 2 " in outcome.stdout
    assert "metrics.jsonl has damaged lines (number 1, 3)" in outcome.stdout
    assert all(whole[name].equal(tensor) for name, tensor in load_file(output_dir / LORA_FILE).items())


def test_fewer_steps_than_the_checkpoint_has_change_nothing(output_dir: Path, warm_cache: Path) -> None:
    before = {path: file_digest(path) for path in output_dir.rglob("*") if path.is_file()}
    outcome = resume(output_dir, warm_cache, max_train_steps=3)
    assert outcome.returncode == 1 and "nothing is left to train" in outcome.stdout
    assert before == {path: file_digest(path) for path in output_dir.rglob("*") if path.is_file()}


# ---- the same run


def test_another_base_model_is_refused_before_anything_is_encoded_and_allowed_by_name(
    output_dir: Path, warm_cache: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(shallow_model("tiny-qwen-image"), tmp_path / "other"))
    (weights,) = (other / "transformer").glob("*.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    changed = {"pretrained_model_name_or_path": other, "max_train_steps": 5}
    refused = resume(output_dir, tmp_path / "cache", **changed)
    assert refused.returncode == 1 and "base_model: another than the checkpoint's" in refused.stdout
    assert "captions:" not in refused.stdout and not (tmp_path / "cache").exists()
    outcome = resume(output_dir, warm_cache, **changed, resume_with_changes_in="[base_model]")
    assert outcome.returncode == 0, outcome.stdout
    assert "changed by resume_with_changes_in: base_model: another than the checkpoint's" in outcome.stdout
    state = json.loads((checkpoint_path(output_dir, 5) / "state.json").read_text())
    (_, session) = state["lineage"]["sessions"]
    assert session["changes"][0].startswith("base_model: ") and session["identity"]["base"] == state["record"]["base"]
    assert resume(output_dir, warm_cache, **changed).returncode == 0, "from then on it is this run's"


def test_other_pictures_are_refused_before_they_are_encoded(output_dir: Path, warm_cache: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(DEMO_TRAIN, tmp_path / "pictures", ignore=shutil.ignore_patterns(".*")))
    (edited, *_) = sorted(pictures.glob("*.txt"))
    edited.write_text("another caption")
    refused = resume(output_dir, warm_cache, max_train_steps=5, data_config__img_dir=pictures)
    assert refused.returncode == 1 and "data: the data set has changed" in refused.stdout
    assert "captions:" not in refused.stdout and "resume_with_changes_in='[data]'" in refused.stdout


def test_a_lower_rate_is_taken_from_the_next_step_on(output_dir: Path, warm_cache: Path) -> None:
    outcome = resume(
        output_dir, warm_cache, max_train_steps=5, learning_rate=1e-5, resume_with_changes_in="[learning_rate]"
    )
    assert outcome.returncode == 0, outcome.stdout
    assert "The learning rate goes from 0.001 at step 4 to 1e-05 at step 5." in outcome.stdout
    rates = [line["learning_rate"] for line in read_metrics(output_dir / "metrics.jsonl") if line["kind"] == "step"]
    assert rates == [1e-3] * 4 + [1e-5]


# ---- a checkpoint whose weights yield no number


def test_a_poisoned_checkpoint_never_displaces_the_last_good_one(tmp_path: Path, warm_cache: Path) -> None:
    """The rate of step 3 is a million. The held-out loss after it is no number, and the run ends before it is saved."""
    output_dir = tmp_path / "run"
    poison: dict[str, Any] = {
        "learning_rate": 1e6, "lr_scheduler": "piecewise_constant", "lr_step_rules": "'0.000000001:2,1'",
        "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_steps": 8,
    }  # fmt: skip
    held_out = {"validation__held_out": 0.05, "validation__every": 3, "validation__num_draws": 1}
    outcome = train(output_dir, warm_cache, **poison, **held_out)
    assert outcome.returncode == 1 and "goes on from checkpoint-000002." in outcome.stdout, outcome.stdout
    lower = {**poison, **held_out, "learning_rate": 1e-3}
    good = resume(output_dir, warm_cache, **lower, resume_with_changes_in="[learning_rate]")
    assert good.returncode == 0, good.stdout
