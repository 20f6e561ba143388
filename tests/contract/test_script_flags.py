"""contract.md C13: each of the five scripts takes every flag of section 2 and hands it to the same training.

A script is run in this process up to the training, which is replaced by something that keeps the config. What the
flags then do is the same for all scripts: test_key_effects.py. A real run of each script: test_commands.py.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pixtune.train
from pixtune.config.schema import TrainConfig
from pixtune.errors import PixtuneError
from pixtune.launch.stop import StopRequest
from pixtune.run import TrainResult
from pixtune.storage.resume import flatten
from tests.contract.key_effects import EFFECTS
from tests.contract.not_yet import needs
from tests.contract.observe import words
from tests.runs import ROOT, overrides, write_config

MODELS = {
    "train.py": "tiny-qwen-image",
    "train_4090.py": "tiny-qwen-image",
    "train_qwen_edit_lora.py": "tiny-qwen-image-edit",
    "train_flux_lora.py": "tiny-flux",
    "train_full_qwen_image.py": "tiny-qwen-image",
}
FLAGS = (
    "unified_memory", "disable_cpu_offload", "pin_memory", "disable_quantization", "quantize", "adam8bit",
    "disable_gradient_checkpointing", "cuda_features.enable_flash_attention_3", "cuda_features.enable_fp8_training",
    "cuda_features.enable_tf32_compute", "cuda_features.enable_cudnn_sdp", "precompute_text_embeddings",
    "precompute_image_embeddings", "save_cache_on_disk", "use_fastsafetensors", "fastsafetensors_num_threads",
    "memory_fraction", "expandable_segments",
)  # fmt: skip
"""The table of section 2."""

Start = Callable[..., TrainConfig]


@pytest.fixture
def start(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs a script with `key=value` words; returns the config that reached the training."""
    reached: list[TrainConfig] = []

    def keep(config: TrainConfig, stop: StopRequest) -> TrainResult:
        reached.append(config)
        return TrainResult(finished=True, step=1, output_dir=config.output_dir)

    def start(script: str, *arguments: str) -> TrainConfig:
        model = {"pretrained_model_name_or_path": ROOT / "assets" / MODELS[script]}
        settings = overrides(tmp_path / "run", tmp_path / "cache", data_config__img_dir=scene / "pictures", **model)
        command = [script, "--config", str(write_config(tmp_path)), *settings, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        if isinstance(ended.value.__cause__, PixtuneError):
            raise ended.value.__cause__
        assert ended.value.code in (0, None)
        return reached[-1]

    monkeypatch.setattr(pixtune.train, "train", keep)
    return start


def test_these_are_the_scripts() -> None:
    assert {path.name for path in ROOT.glob("train*.py")} == MODELS.keys()


@pytest.mark.parametrize("flag", [pytest.param(flag, marks=needs(flag)) for flag in FLAGS])
@pytest.mark.parametrize("script", MODELS)
def test_c13_every_script_takes_every_flag(script: str, flag: str, start: Start, scene: Path, tmp_path: Path) -> None:
    for value in EFFECTS[flag].values:
        arguments = words({flag: value}, scene, tmp_path)
        assert flatten(start(script, *arguments).model_dump())[flag] == value


def test_c6_trains_all_weights_whatever_the_config_says(start: Start) -> None:
    assert start("train_full_qwen_image.py", "method=lora").method == "full"
    assert start("train.py").method == "lora"
