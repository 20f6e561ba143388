"""Two processes equal one with twice the batch, and only the first writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pixtune.data.cache import DiskStore
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_HELD_OUT, ROOT, environment, overrides, pixtune, run, write_config

CHARACTER = ROOT / "assets" / "demo-character"
FOLDERS = [
    {"img_dir": str(CHARACTER / "images"), "mask_dir": str(CHARACTER / "masks"), "loss_weight": 0.5, "flip": True},
    {"img_dir": str(DEMO_HELD_OUT), "repeats": 1.5, "shuffle_tags": True},
]
SETTINGS = {
    "data_config__img_dir": "null",
    "data_config__folders": json.dumps(FOLDERS),
    "ema__decay": 0.5,
    "max_train_steps": 6,
    "logging_steps": 2,
    "data_config__caption_dropout_rate": 0.3,
    # Adam divides by the gradient's size: with the usual epsilon, rounding in a gradient near 0 becomes a full step.
    "adam_epsilon": "1e-2",
}


def train_alone(config: Path, words: list[str]) -> None:
    outcome = pixtune("train", "--config", config, *words)
    assert outcome.returncode == 0, outcome.stdout


def train_in_two(config: Path, words: list[str]) -> str:
    """torch's launcher on the CPU, where processes talk through gloo (`accelerate launch` would need MPI there)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    outcome = run([*command, "--config", str(config), *words], env=env)
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


def assert_same_weights(one: Path, two: Path) -> None:
    mine, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert mine.keys() == theirs.keys()
    assert any(tensor.any() for name, tensor in mine.items() if "lora_B" in name), "nothing was learned"
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-6)


def spoil_one_encoding(cache: Path) -> None:
    """Makes the latents of one picture no numbers, as an encoder that overflows would."""
    store = DiskStore(cache / "entries")
    digests = sorted(path.stem for path in (cache / "entries").rglob("*.safetensors"))
    (digest, *_) = (digest for digest in digests if "mean" in store.read(digest))
    store.write(digest, {name: torch.full_like(tensor, torch.nan) for name, tensor in store.read(digest).items()})


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Also in the steps that both skip, since an example of one of them has a loss that is no number."""
    config = write_config(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    cache = tmp_path / "cache"
    train_alone(
        config, overrides(tmp_path / "filling", cache, **{**SETTINGS, "max_train_steps": 1})
    )  # entries of this run alone
    spoil_one_encoding(cache)
    train_alone(config, overrides(one, cache, **SETTINGS, train_batch_size=4))
    printed = train_in_two(config, overrides(two, cache, **SETTINGS, train_batch_size=2))
    assert printed.count("wrote ") == 1, printed
    assert not [*tmp_path.rglob("*.tmp")]

    assert_same_weights(one, two)
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    skipped = [[line for line in lines if line["kind"] == "skipped"] for lines in metrics]
    assert skipped[0] == skipped[1] and skipped[0], "the same examples and sigmas, whichever process had them"
    assert {each["name"] for line in skipped[0] for each in line["examples"]} == {skipped[0][0]["examples"][0]["name"]}
    losses = [[line["loss"] or -1.0 for line in lines if "loss" in line] for lines in metrics]
    assert len(losses[0]) == 6 and losses[0].count(-1.0) == len(skipped[0])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)

    longer = {**SETTINGS, "max_train_steps": 8, "resume_from_checkpoint": "latest"}
    words = overrides(two, cache, **longer, train_batch_size=2)
    refused = pixtune("train", "--config", config, *words)
    assert refused.returncode == 1 and "num_processes: was 2, is 1 (a batch of all" in refused.stdout
    for folder in (one, two):  # the run of two goes on in one: the same batches, since the product is the same
        train_alone(config, overrides(folder, cache, **longer, train_batch_size=4))
    assert_same_weights(one, two)
    sessions = load_checkpoint(checkpoint_path(two, 8)).lineage.sessions
    assert [(each.last_step, each.identity["num_processes"]) for each in sessions] == [(6, 2), (8, 1)]
    assert not [*tmp_path.rglob("run.lock")]
