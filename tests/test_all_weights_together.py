"""Processes that hold all weights together equal one that holds them alone, are resumed as any number, and export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_by_torch

from pixtune.storage.checkpoint import joined, load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.slices import whole
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, TINY_MODEL, overrides, pixtune, pixtune_together, write_config

MAX_NORM = 0.3
SETTINGS = {
    "method": "full",
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "max_grad_norm": MAX_NORM,
    "validation__num_draws": 1,
    "validation__judge_captions": "false",
    "validation__every": 4,
    "samples__prompts": "[a red ball]",
    "samples__num_steps": 2,
    "samples__every": 4,
    # Adam divides by the gradient's size: with the usual epsilon, rounding in a gradient near 0 becomes a full step.
    "adam_epsilon": "1e-2",
}
NUM_STEPS = 4


@dataclass(frozen=True)
class Runs:
    """The same run in one process, in two, and begun by two, continued by one and ended by four."""

    alone: Path
    two: Path
    changing: Path
    again: Path
    """Begun by two, and resumed by two."""
    printed: Mapping[str, str]


def write_model(folder: Path) -> Path:
    """A smaller model still, of two blocks, whose 90 features four processes cannot divide evenly."""
    from diffusers import QwenImageTransformer2DModel

    shutil.copytree(TINY_MODEL, folder)
    transformer = folder / "transformer"
    config = json.loads((transformer / "config.json").read_text())
    shutil.rmtree(transformer)
    smaller = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 30, "axes_dims_rope": [6, 12, 12]}
    torch.manual_seed(0)
    model: Any = QwenImageTransformer2DModel.from_config(config | smaller)
    model.save_pretrained(transformer)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("together")
    config, cache, model = write_config(folder), folder / "cache", write_model(folder / "model")
    held_out, pictures, printed = folder / "held_out", folder / "pictures", {}
    held_out.mkdir()
    pictures.mkdir()
    for name in ("bear.png", "bear.txt"):
        shutil.copy(DEMO_HELD_OUT / name, held_out)
    for number, path in enumerate(sorted(DEMO_TRAIN.glob("*.png"))[:12]):
        shutil.copy(path.with_suffix(".txt"), pictures)
        picture = Image.open(path)
        (picture if number % 2 else picture.crop((0, 0, picture.width, picture.height // 2))).save(pictures / path.name)

    def train(name: str, num_processes: int, steps: int) -> Path:
        settings: dict[str, object] = {**SETTINGS, "max_train_steps": steps, "train_batch_size": 4 // num_processes}
        settings |= {"distributed__shards": num_processes, "resume_from_checkpoint": "latest"}
        settings |= {"pretrained_model_name_or_path": model, "validation__held_out_dir": held_out}
        settings |= {"data_config__img_dir": pictures}
        words = ["train", "--config", config, *overrides(folder / name, cache, **settings)]
        outcomes = pixtune_together(num_processes, *words) if num_processes > 1 else [pixtune(*words)]
        printed[f"{name} {steps}"] = "".join(each.stdout for each in outcomes)
        assert not any(each.returncode for each in outcomes), printed[f"{name} {steps}"]
        return folder / name

    alone, two = train("alone", 1, NUM_STEPS), train("two", 2, NUM_STEPS)
    for name in ("changing", "again"):
        (folder / name).mkdir()
        shutil.copytree(checkpoint_path(two, 2), checkpoint_path(folder / name, 2))
    again = train("again", 2, NUM_STEPS)
    train("changing", 1, 3)
    return Runs(alone, two, train("changing", 4, NUM_STEPS), again, printed)


def tensors_of(folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer states of a checkpoint, whole."""
    files: Any = load_checkpoint(checkpoint_path(folder, step)).tensors
    stored = {**joined(files, "transformer"), **joined(files, "optimizer")}
    return {name: whole(tensor) for name, tensor in stored.items()}


def assert_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        difference = (other[name] - tensor).abs() - 1e-3 * tensor.abs()
        assert other[name].shape == tensor.shape and (difference <= 1e-4 * scale).all(), name


def logged(folder: Path, kind: str, key: str) -> Tensor:
    return torch.tensor([line[key] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind])


def test_two_processes_equal_one_with_twice_the_batch(runs: Runs) -> None:
    """With accumulation, two sizes of pictures, and gradients that are clipped by the norm of all their parts."""
    assert "pictures in 2 sizes" in runs.printed[f"two {NUM_STEPS}"]
    assert runs.printed[f"two {NUM_STEPS}"].count("wrote ") == 1
    norms = [logged(folder, "step", "grad_norm") for folder in (runs.alone, runs.two)]
    assert (norms[0] > 2 * MAX_NORM).all(), "nothing was clipped"
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
    for step in (2, NUM_STEPS):
        assert_alike(tensors_of(runs.alone, step), tensors_of(runs.two, step))


def test_losses_and_samples_between_steps_are_those_of_one_process(runs: Runs) -> None:
    """The first process measures and draws, and the others gather the weights with it."""
    for kind in ("validation", "training_pictures"):
        before, after = (logged(folder, kind, "loss") for folder in (runs.alone, runs.two))
        assert len(before) == 2
        torch.testing.assert_close(after, before, rtol=1e-4, atol=0)
    pictures = sorted(path.relative_to(runs.alone) for path in runs.alone.glob("samples/*/*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        one, two = (np.asarray(Image.open(folder / picture)).astype(int) for folder in (runs.alone, runs.two))
        assert np.abs(one - two).max() <= 2


def test_a_resumed_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    one, two = tensors_of(runs.two, NUM_STEPS), tensors_of(runs.again, NUM_STEPS)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_another_number_of_processes_goes_on_with_the_same_batches(runs: Runs) -> None:
    sessions = load_checkpoint(checkpoint_path(runs.changing, NUM_STEPS)).lineage.sessions
    assert [(each.last_step, each.identity["num_processes"]) for each in sessions] == [(2, 2), (3, 1), (4, 4)]
    losses = logged(runs.alone, "step", "loss"), logged(runs.changing, "step", "loss")
    torch.testing.assert_close(losses[1], losses[0][2:], rtol=1e-4, atol=0)
    assert_alike(tensors_of(runs.alone, NUM_STEPS), tensors_of(runs.changing, NUM_STEPS))


def test_checkpoints_are_pieces_that_torch_reads_itself(runs: Runs) -> None:
    path = checkpoint_path(runs.two, NUM_STEPS)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}, "no pickle"
    parts = [load_file(file) for file in sorted(path.glob("transformer-*.safetensors"))]
    ours = tensors_of(runs.two, NUM_STEPS)
    num_numbers = sum(tensor.numel() for tensor in load_file(runs.two / MODEL).values())
    assert [sum(tensor.numel() for tensor in part.values()) for part in parts] == [
        pytest.approx(num_numbers / 2, rel=0.01)
    ] * 2
    stock = {name: torch.empty_like(tensor) for name, tensor in ours.items()}
    load_by_torch(stock, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(stock[name].equal(tensor) for name, tensor in ours.items())


MODEL = Path("model/transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["two", "changing"])
def test_the_exported_folder_is_that_of_one_process(runs: Runs, name: str) -> None:
    from diffusers import QwenImageTransformer2DModel

    folder: Path = getattr(runs, name)
    stock: Any = QwenImageTransformer2DModel.from_pretrained(folder / "model" / "transformer")
    saved = tensors_of(folder, NUM_STEPS)
    assert all(tensor.equal(saved[name]) for name, tensor in stock.state_dict().items())
    mine, others = folder / "model", runs.alone / "model"
    assert {path.relative_to(mine) for path in mine.rglob("*")} == {
        path.relative_to(others) for path in others.rglob("*")
    }
    config = Path("transformer/config.json")
    assert json.loads((mine / config).read_text()) == json.loads((others / config).read_text())
