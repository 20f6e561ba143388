"""A new family is one file and one registry line: the toy one trains, resumes, draws and exports."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.families.toy_family import build_toy_folder
from tests.runs import overrides, pixtune, python, write_config

LORA = "pytorch_lora_weights.safetensors"


def toy(*words: object) -> str:
    """The command line with the toy family in it."""
    outcome = python("tests/families/toy_family.py", *words)
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


def test_a_family_of_one_file_goes_all_the_way(tmp_path: Path) -> None:
    model, config = build_toy_folder(tmp_path / "model"), write_config(tmp_path)

    def train(name: str, **changes: object) -> str:
        words = overrides(
            tmp_path / name, tmp_path / "cache", pretrained_model_name_or_path=model, validation__held_out=0.1,
            data_config__caption_dropout_rate=0.2, samples__prompts="[a heart]", samples__num_steps=2,
            resume_from_checkpoint="latest", **changes,
        )  # fmt: skip
        return toy("train", "--config", config, *words)

    assert "held-out loss" in train("whole", max_train_steps=4)
    train("parts", max_train_steps=2)
    assert "resuming after step 2" in train("parts", max_train_steps=4)
    whole, parts = (load_file(tmp_path / name / LORA) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(whole[key].equal(parts[key]) for key in whole)
    assert any(tensor.any() for key, tensor in whole.items() if "lora_B" in key), "nothing was learned"
    assert (tmp_path / "whole" / "report.html").is_file()

    drawn = toy(
        "sample", "--model", model, "--prompt", "a heart", "--lora", tmp_path / "whole" / LORA, "--steps", 2,
        "--width", 64, "--height", 48, "--weights-format", "fp32", "--output", tmp_path / "pictures",
    )  # fmt: skip
    assert "000-seed0.png" in drawn
    toy("export", tmp_path / "whole" / "checkpoint-000004", "--output", tmp_path / "again")
    again = load_file(tmp_path / "again" / LORA)
    assert all(again[key].equal(whole[key]) for key in whole)


def test_an_unregistered_family_is_refused_by_its_kind(tmp_path: Path) -> None:
    model = build_toy_folder(tmp_path / "model")
    words = overrides(tmp_path / "run", tmp_path / "cache", pretrained_model_name_or_path=model)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1 and "ToyPipeline" in outcome.stdout and "Traceback" not in outcome.stdout
