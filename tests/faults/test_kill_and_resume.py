"""A run that is killed at any moment goes on bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixtune.storage.checkpoint_state import checkpoint_path, find_checkpoints
from pixtune.tracking.metrics import read_metrics
from tests import processes
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, environment, overrides, pixtune, write_config

NUM_STEPS = 20
SETTINGS = {
    "max_train_steps": NUM_STEPS,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "gradient_accumulation_steps": 2,
    "data_config__caption_dropout_rate": 0.3,
    "data_config__img_dir": "null",
    "data_config__img_size": "[64,48]",
    "data_config__folders": json.dumps(
        [
            {"img_dir": str(DEMO_TRAIN), "repeats": 0.5, "flip": True, "img_size_shares": [3, 1]},
            {
                "img_dir": str(DEMO_HELD_OUT),
                "repeats": 1.5,
                "img_size": 64,
                "caption_text": "one, two, three",
                "shuffle_tags": True,
                "tag_dropout_rate": 0.2,
                "caption_variants": 3,
                "caption_prefix": "sks",
                "loss_weight": 0.5,
            },
        ]
    ),
    "logging_steps": 1,
    "objective__loss": "huber",
    "objective__min_sigma": 0.1,
    "validation__held_out": 0.05,
    "validation__every": 5,
    "validation__num_draws": 1,
}
OF_A_SESSION = ("first_step", "drift", "memory")
"""Kinds of lines on how fast and large a process was, which a run in several has more of."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The output folder of one run in one go."""
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(output_dir.parent)
    outcome = pixtune("train", "--config", config, *overrides(output_dir / "run", warm_cache, **SETTINGS))
    assert outcome.returncode == 0, outcome.stdout
    return output_dir / "run"


State = tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]


def final_state(output_dir: Path) -> State:
    """Weights, optimizer tensors, the loss log without its clocks, and what of the optimizer is no tensor."""
    folder = checkpoint_path(output_dir, NUM_STEPS)
    log = [
        {key: value for key, value in line.items() if not key.endswith("seconds")}
        for line in read_metrics(output_dir / "metrics.jsonl")
        if line["kind"] not in OF_A_SESSION
    ]
    record = json.loads((folder / "state.json").read_text())["record"]
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return weights, load_file(folder / "optimizer.safetensors"), log, record["optimizer_plain"]


def assert_same_state(one: Path, other: Path) -> None:
    weights, optimizer, log, plain = final_state(one)
    other_weights, other_optimizer, other_log, other_plain = final_state(other)
    for mine, theirs in ((weights, other_weights), (optimizer, other_optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine), "tensors differ"
    assert log == other_log
    assert plain == other_plain


def assert_results_of(output_dir: Path, step: int) -> None:
    """LoRA and report in the folder are those of this step, in which nobody has to look for a checkpoint."""
    own = load_file(output_dir / "pytorch_lora_weights.safetensors")
    saved = load_file(checkpoint_path(output_dir, step) / "pytorch_lora_weights.safetensors")
    assert own.keys() == saved.keys() and all(own[name].equal(saved[name]) for name in own)
    with safe_open(output_dir / "comfyui_lora.safetensors", framework="pt") as file:
        assert file.metadata()["pixtune.step"] == str(step)
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert f"<dt>Steps so far</dt><dd>{step}</dd><dd class=quiet>of {NUM_STEPS}</dd>" in page


def start(output_dir: Path, warm_cache: Path) -> processes.Started:
    config = write_config(output_dir.parent)
    words = overrides(output_dir, warm_cache, **SETTINGS, resume_from_checkpoint="latest")
    return processes.start(["-m", "pixtune.cli", "train", "--config", str(config), *words], environment())


def steps_done(output_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(output_dir / "metrics.jsonl")), default=0)


def wait_for_step(process: processes.Started, output_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while steps_done(output_dir) < step:
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(
    tmp_path: Path, warm_cache: Path, uninterrupted: Path
) -> None:
    output_dir = tmp_path / "run"
    moments = random.Random(time.time_ns())
    kills = []
    for earliest in (2, 9):
        process = start(output_dir, warm_cache)
        wait_for_step(process, output_dir, earliest)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills.append((steps_done(output_dir), [path.name for path in find_checkpoints(output_dir)]))
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    last = start(output_dir, warm_cache)
    printed, _ = last.communicate(timeout=120)
    assert last.returncode == 0, printed
    assert "resuming after step" in printed, f"started anew instead of resuming; kills: {kills}"
    assert_same_state(output_dir, uninterrupted)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_saves_the_very_step_and_goes_on(
    tmp_path: Path, warm_cache: Path, uninterrupted: Path, stop_signal: signal.Signals
) -> None:
    output_dir = tmp_path / "run"
    process = start(output_dir, warm_cache)
    wait_for_step(process, output_dir, 4)
    process.send_signal(stop_signal)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    stopped_at = int(find_checkpoints(output_dir)[-1].name.removeprefix("checkpoint-"))
    assert stopped_at == steps_done(output_dir) < NUM_STEPS, printed
    assert_results_of(output_dir, stopped_at)
    last = start(output_dir, warm_cache)
    printed, _ = last.communicate(timeout=120)
    assert last.returncode == 0, printed
    assert_same_state(output_dir, uninterrupted)


def test_a_cold_start_is_not_the_uninterrupted_run(tmp_path: Path, warm_cache: Path, uninterrupted: Path) -> None:
    """The comparison can fail: other steps give other weights."""
    output_dir = tmp_path / "run"
    words = overrides(output_dir, warm_cache, **{**SETTINGS, "seed": 43})
    assert pixtune("train", "--config", write_config(tmp_path), *words).returncode == 0
    with pytest.raises(AssertionError):
        assert_same_state(output_dir, uninterrupted)


def test_a_finished_run_resumed_changes_nothing(warm_cache: Path, uninterrupted: Path) -> None:
    before = final_state(uninterrupted)
    words = overrides(uninterrupted, warm_cache, **SETTINGS, resume_from_checkpoint="latest")
    outcome = pixtune("train", "--config", write_config(uninterrupted.parent), *words)
    assert outcome.returncode == 0, outcome.stdout
    assert f"finished already, at step {NUM_STEPS} of {NUM_STEPS}: nothing was trained" in outcome.stdout
    assert f"output_dir={uninterrupted}-2" in outcome.stdout
    assert "->" not in outcome.stdout.splitlines()[-1], "a run that has learnt nothing does not look like a success"
    after = final_state(uninterrupted)
    assert before[2:] == after[2:]
    assert all(before[0][name].equal(after[0][name]) for name in before[0])


def test_resuming_with_other_settings_is_refused_by_key(warm_cache: Path, uninterrupted: Path) -> None:
    words = overrides(
        uninterrupted, warm_cache, **{**SETTINGS, "learning_rate": 0.5, "seed": 7}, resume_from_checkpoint="latest"
    )
    outcome = pixtune("train", "--config", write_config(uninterrupted.parent), *words)
    assert outcome.returncode == 1
    assert "learning_rate: was 0.001, is 0.5" in outcome.stdout
    assert "seed: was 42, is 7" in outcome.stdout
