"""Runs that would learn nothing end and say why; those that learn slowly do not, and checks change no bit of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixtune import assembly
from pixtune import train as training
from pixtune.config import load_config
from pixtune.errors import TrainingError
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.storage.safetensors_writer import TensorFile
from pixtune.tracking.metrics import read_metrics
from pixtune.trained import export, methods, optim
from pixtune.trained.export import DIFFUSERS_FILE
from tests.runs import DEMO_HELD_OUT, overrides, write_config


def train(folder: Path, cache: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"max_train_steps": 4, "data_config__num_workers": 0, "guard__must_learn_within": 3, **changes}
    assert training.train(load_config(write_config(folder), overrides(folder / "run", cache, **settings))).finished
    return folder / "run"


def ending_of(folder: Path, cache: Path, **changes: Any) -> str:
    with pytest.raises(TrainingError) as raised:
        train(folder, cache, **changes)
    return str(raised.value)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """A run without any check, validation or sample."""
    return train(tmp_path_factory.mktemp("undisturbed"), warm_cache, guard__must_learn_within=0)


def freeze(of: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of some names are set back after each step, as if nothing stepped them."""
    step = optim.clipped_step

    def frozen(optimizer: Any, parameters: Any, *others: Any) -> Any:
        before = {name: weight.detach().clone() for name, weight in parameters.items() if of(name)}
        norm = step(optimizer, parameters, *others)
        for name, weight in before.items():
            parameters[name].data.copy_(weight)
        return norm

    monkeypatch.setattr(optim, "clipped_step", frozen)


def test_frozen_up_matrices_end_the_run_at_the_step_by_which_they_must_have_moved(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(lambda name: ".lora_B." in name, monkeypatch)
    told = ending_of(tmp_path, warm_cache, max_train_steps=9)
    assert told.startswith("step 3: none of the weights that must move first has moved in 3 steps"), told
    assert "transformer_blocks.0.attn" in told and "gradients are not zero, so the weights are frozen" in told
    assert "resume_from_checkpoint=latest guard.must_learn_within=0" in told
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000003"], "it is kept"
    train(tmp_path, warm_cache, guard__must_learn_within=0, resume_from_checkpoint="latest")


def test_one_frozen_layer_is_named_and_down_matrices_need_not_move(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(lambda name: "blocks.1.attn.to_q.lora_B" in name or ".lora_A." in name, monkeypatch)
    told = ending_of(tmp_path, warm_cache)
    assert "1 of " in told and "blocks.1.attn.to_q.lora_B" in told and "lora_A" not in told


def test_a_layer_that_no_gradient_reaches_ends_the_run_after_its_first_step(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block's output for the text is used by nobody either, and is no reason."""
    assemble = assembly.assemble

    def cut(*arguments: Any) -> Any:
        run, services = assemble(*arguments)
        run.trained.parameters["transformer_blocks.0.attn.to_v.lora_B.default.weight"].requires_grad_(False)
        return run, services

    monkeypatch.setattr(assembly, "assemble", cut)
    told = ending_of(tmp_path, warm_cache)
    assert told.startswith("step 1: no gradient reaches 1 of "), told
    assert "transformer_blocks.0.attn.to_v.lora_B" in told and "cuts gradients off" in told
    assert find_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-12},
        {"lora_targets": "[all_linear]"},
        {"learning_rate": 1e-4, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
        {"lr_scheduler": "piecewise_constant", "lr_step_rules": "'0:3,1'"},
        {
            "mixed_precision": "bf16",
            "learning_rate": 1e-5,
            "checkpointing_steps": 1,
            "ema__decay": 0.9999,
            "ema__warm_up": "false",
            "max_train_steps": 2,
        },
    ],
    ids=[
        "tiny rate",
        "layers of the last block that nothing reads",
        "warm-up",
        "no rate until the last step",
        "an average too slow to show in bf16",
    ],
)
def test_slow_runs_are_no_alarm(tmp_path: Path, warm_cache: Path, changes: dict[str, Any]) -> None:
    train(tmp_path, warm_cache, **{"checkpointing_steps": 2, **changes})


def without_effect(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * (".lora_B." not in name) for name, tensor in tensors.items()}


def without_a_block(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "blocks.0" not in name}


def without_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:0] for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(without_effect, "other numbers"), (without_a_block, "is not the LoRA"), (without_rows, "cannot be used")],
)
def test_a_saved_file_that_does_not_do_what_the_weights_do_ends_the_run(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], words: str
) -> None:
    build = export.diffusers_file

    def spoiled(weights: Any, about: Any) -> Any:
        return build(spoil(weights), about)

    monkeypatch.setattr(methods, "diffusers_file", spoiled)
    told = ending_of(tmp_path, warm_cache, checkpointing_steps=2)
    assert told.startswith("step 2: ") and words in told, told
    assert find_checkpoints(tmp_path / "run")


def test_a_saved_scale_that_is_another_ends_the_run(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = methods.LoraWeights._describe

    def half(self: Any, step: int) -> Any:
        about = describe(self, step)
        return replace(about, scheme=replace(about.settings, alpha=about.settings.alpha / 2))

    monkeypatch.setattr(methods.LoraWeights, "_describe", half)
    told = ending_of(tmp_path, warm_cache)
    assert "scale 0.5, not 1, of " in told


def test_checks_validation_and_samples_change_no_bit(tmp_path: Path, warm_cache: Path, undisturbed: Path) -> None:
    (held_out := tmp_path / "held_out").mkdir()
    for path in sorted(DEMO_HELD_OUT.iterdir())[:8]:  # four pictures with their captions
        shutil.copy(path, held_out)
    watched = train(
        tmp_path, warm_cache, checkpointing_steps=2, validation__held_out_dir=held_out,
        validation__num_draws=1, validation__every=2, samples__prompts="[a]", samples__num_steps=1, samples__every=2,
    )  # fmt: skip
    own, other = (load_file(folder / DIFFUSERS_FILE) for folder in (watched, undisturbed))
    assert own.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in own.items())
    losses = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]
              for folder in (watched, undisturbed)]  # fmt: skip
    assert losses[0] == losses[1]


def test_all_weights_are_read_back_too(tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixtune.trained.full_weights import FullWeights

    truest: Any = FullWeights.checkpoint_files

    def spoiled(self: Any, step: int) -> Any:
        files = truest(self, step).items()
        return {stem: TensorFile({name: 0 * tensor for name, tensor in file.tensors.items()}, file.metadata)
                for stem, file in files}  # fmt: skip

    monkeypatch.setattr(FullWeights, "checkpoint_files", spoiled)
    told = ending_of(tmp_path, warm_cache, method="full", rank=16, learning_rate=1e-5)
    assert told.startswith("step 4: ") and "16 of" not in told and "other numbers" in told
