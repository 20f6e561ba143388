"""Several processes equal one with the batch of all of them, and only the first writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from pixtune.data.cache import DiskStore
from pixtune.plan.exchange_cost import lora_exchanges
from pixtune.plan.rungs import STREAM_SLOTS
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.files import text_digest
from pixtune.tracking.metrics import read_metrics
from tests.exchanges import VARIABLE, read_exchanges, write_exchanges_down
from tests.runs import (
    DEMO_HELD_OUT,
    ROOT,
    TINY_MODEL,
    environment,
    overrides,
    pixtune,
    pixtune_together,
    python,
    write_config,
)

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
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    outcome = python(*command, "--config", config, *words, env=env)
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


def assert_same_weights(one: Path, two: Path) -> None:
    mine, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert mine.keys() == theirs.keys()
    assert any(tensor.any() for name, tensor in mine.items() if "lora_B" in name), "nothing was learned"
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-6)


SPOILED = "held_out/yawning-face.png"
"""A picture with two turns in those steps."""


def spoil_an_encoding(cache: Path) -> None:
    """Makes the latents of a picture no numbers, as an encoder that overflows would."""
    store, ledger = DiskStore(cache / "entries"), json.loads((cache / "ledger.json").read_text())
    (parts,) = (parts for item, parts in ledger.items() if f"{SPOILED} at " in item)
    digest = text_digest(json.dumps(parts, sort_keys=True))
    store.write(digest, {name: torch.full_like(tensor, torch.nan) for name, tensor in store.read(digest).items()})


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Also in the steps that both skip, since an example of one of them has a loss that is no number."""
    config = write_config(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    cache = tmp_path / "cache"
    train_alone(
        config, overrides(tmp_path / "filling", cache, **{**SETTINGS, "max_train_steps": 1})
    )  # entries of this run alone
    spoil_an_encoding(cache)
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


NUM_PICTURES = 8
ONE_STEP_AT_A_TIME = {
    "adam_epsilon": SETTINGS["adam_epsilon"],
    "gradient_accumulation_steps": 2,
    "data_config__random_ratio": "true",
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "guard__must_learn_within": 0,  # whose passes would be counted among those of steps
}
BATCH = 4
"""Pictures of a micro-batch of all processes together."""


def step_together(
    output: Path, words: list[str], num_processes: int, last_step: int, shards: int | None
) -> list[list[tuple[str, int]]]:
    """Goes on to a step in so many processes; returns what each of them has exchanged."""
    exchanges = output.with_name(f"{output.name} to {last_step}")
    exchanges.mkdir()
    words = [
        *words, f"output_dir={output}", f"max_train_steps={last_step}", f"train_batch_size={BATCH // num_processes}",
        "resume_from_checkpoint=latest", f"distributed.shards={'null' if shards is None else shards}",
    ]  # fmt: skip
    outcomes = pixtune_together(
        num_processes, "train", *words, before=write_exchanges_down, **{VARIABLE: str(exchanges)}
    )  # fmt: skip
    assert [each.returncode for each in outcomes] == [0] * num_processes, outcomes[0].stdout
    assert "Traceback" not in "".join(each.stdout for each in outcomes)
    return [read_exchanges(exchanges, rank) for rank in range(num_processes)]


def test_a_run_goes_on_in_other_numbers_of_processes_and_shards(tmp_path: Path) -> None:
    """2 processes that hold one copy of the base, then 1, then 4: in two copies, and beside that each with its own.

    With accumulation, and pictures of several sizes. Bytes and exchanges of a step are those of the arithmetic.
    """
    config, pictures = write_config(tmp_path), tmp_path / "pictures"
    alone, parts, copies = (tmp_path / name for name in ("alone", "parts", "copies"))
    pictures.mkdir()
    for picture in sorted(DEMO_HELD_OUT.glob("*.png"))[:NUM_PICTURES]:
        for path in (picture, picture.with_suffix(".txt")):
            shutil.copy(path, pictures)
    whole = {"pretrained_model_name_or_path": TINY_MODEL, "data_config__img_dir": pictures}  # more blocks than slots
    given = overrides(alone, tmp_path / "cache", **ONE_STEP_AT_A_TIME, **whole)
    train_alone(config, [*given, "max_train_steps=4", f"train_batch_size={BATCH}"])
    words = ["--config", str(config), *given]
    found = step_together(parts, words, 2, 2, shards=2)
    num_trained = sum(each.numel() for each in load_file(alone / "pytorch_lora_weights.safetensors").values())
    (exchange,) = lora_exchanges(num_trained, 2)
    for mine in found:
        assert mine == found[0], "all processes gather the same blocks in the same order"
        ends = [place for place, (kind, _) in enumerate(mine) if kind == "all_reduce"]
        assert [mine[place][1] for place in ends] == [exchange.num_bytes] * 2, "one exchange of gradients a step"
        num_blocks = json.loads((TINY_MODEL / "transformer" / "config.json").read_text())["num_layers"]
        gathers = [kind for kind, _ in mine[ends[0] + 1 : ends[1]]]
        assert gathers == ["all_gather_into_tensor"] * 2 * 2 * (num_blocks - STREAM_SLOTS), "2 passes, 2 micro-batches"
    assert step_together(parts, words, 1, 3, shards=None) == [[]], "one process exchanges nothing"
    shutil.copytree(parts, copies)
    hybrid = step_together(parts, words, 4, 4, shards=2)
    replicas = step_together(copies, words, 4, 4, shards=1)
    assert replicas == [[("all_reduce", exchange.num_bytes)]] * 4
    assert {mine[-1] for mine in hybrid} == {("all_reduce", exchange.num_bytes)}

    weights, others = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (parts, copies))
    assert all(torch.equal(weights[name], others[name]) for name in weights), "parts of weights are the weights"
    assert_same_weights(alone, parts)
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]
        for folder in (alone, parts)
    ]
    assert len(losses[0]) == 4 and len(set(losses[0])) == 4
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)
    last = load_checkpoint(checkpoint_path(parts, 4))
    assert [each.identity["num_processes"] for each in last.lineage.sessions] == [2, 1, 4]
    assert last.record["plan"]["shards"] == 2
