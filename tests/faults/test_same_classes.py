"""The configs of models that have the classes of others: on a plan's paper at full size, and run on small ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from pixtune.commands.plan import make_report
from pixtune.config import load_config
from tests.runs import DEMO_TRAIN, ROOT, pixtune
from tests.shallow import shallow_model
from tests.soak.draws import write_adapter

CONFIGS = {
    "train_qwen_image_2512": "tiny-qwen-image",
    "train_flux_krea": "tiny-flux",
    "train_flux_schnell": "tiny-flux",
}
MODELS = {"train_qwen_image_2512": "Qwen-Image-2512", "train_flux_krea": "FLUX.1-Krea-dev",
          "train_flux_schnell": "FLUX.1-schnell"}  # fmt: skip
CARDS = ("RTX 4090", "H100 SXM")


def config_path(stem: str) -> Path:
    return ROOT / "train_configs" / f"{stem}.yaml"


@pytest.mark.parametrize("stem", CONFIGS)
def test_its_model_is_known_by_name_and_its_run_fits(stem: str) -> None:
    config = load_config(config_path(stem), ["training_adapter.path=null"], folders_must_exist=False)
    assert config.pretrained_model_name_or_path.endswith(MODELS[stem])
    assert (config.training_adapter.path is None) and not any(make_report(config, card).too_large for card in CARDS)


@pytest.mark.parametrize("stem", CONFIGS)
def test_it_trains_a_small_model_of_its_classes(stem: str, tmp_path: Path, warm_cache: Path) -> None:
    """FLUX.1-schnell's has no guidance, and noise levels that are not shifted."""
    model = tmp_path / "model"
    shutil.copytree(shallow_model(CONFIGS[stem]), model)
    words: dict[str, object] = {
        "pretrained_model_name_or_path": model, "output_dir": tmp_path / "run", "data_config.img_dir": DEMO_TRAIN,
        "data_config.cache_dir": warm_cache, "data_config.img_size": 64, "max_train_steps": 2,
        "mixed_precision": "'no'", "validation.held_out": 0, "samples.prompts": "['a cat']", "samples.width": 64,
        "samples.height": 64, "samples.num_steps": 1, "data_config.max_text_tokens": 24,
    }  # fmt: skip
    if stem == "train_flux_schnell":
        for part, changes in (
            ("transformer/config.json", {"guidance_embeds": False}),
            ("scheduler/scheduler_config.json", {"use_dynamic_shifting": False, "shift": 1.0}),
        ):
            values = json.loads((model / part).read_text())
            (model / part).write_text(json.dumps({**values, **changes}))
        words |= {"random_weights": "true", "training_adapter.path": write_adapter(tmp_path / "adapter.safetensors")}
    outcome = pixtune("train", "--config", config_path(stem), *(f"{key}={value}" for key, value in words.items()))
    assert outcome.returncode == 0, outcome.stdout
    assert ("trained beside adapter.safetensors" in outcome.stdout) == (stem == "train_flux_schnell")
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["pixtune.step"] == "2"
