"""contract.md section 1: the commands, typed as they stand there."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from pixtune.errors import NotYetError
from tests.contract.not_yet import needs, refused_keys, without
from tests.runs import DEMO_TRAIN, ROOT, overrides, pixtune, python, run, write_config

ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
LORA_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"


@dataclass(frozen=True)
class Command:
    """A row: the words behind `accelerate launch` or `python`, and the small stand-ins for model and data."""

    script: str
    config: str
    model: str = "tiny-qwen-image"
    typed_here: bool = False
    """Run as it is typed, by the launcher, which starts a Python for it. It does the same for each script, so the other
    scripts are run without it, in a process that has imported the libraries already."""

    @property
    def path(self) -> Path:
        return ROOT / "train_configs" / f"{self.config}.yaml"

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        script = [self.script, "--config", f"./train_configs/{self.config}.yaml", *words]
        return run([*ACCELERATE_LAUNCH, *script]) if self.typed_here else python(*script)


COMMANDS = {
    "C1": Command("train.py", "train_lora", typed_here=True),
    "C2": Command("train_4090.py", "train_lora_4090"),
    "C3": Command("train_4090.py", "train_dgx_spark"),
    "C4": Command("train_qwen_edit_lora.py", "train_lora_qwen_edit", "tiny-qwen-image-edit"),
    "C5": Command("train_flux_lora.py", "train_flux_config", "tiny-flux"),
    "C6": Command("train_full_qwen_image.py", "train_full_qwen_image"),
    "C7": Command("train.py", "train_aarch64_optimized"),
}
REFUSED = {row: refused_keys(command.path) for row, command in COMMANDS.items()}


def train_small(command: Command, scene: Path, folder: Path, left_out: list[str]) -> Path:
    """Runs a row's command with small stand-ins for what names the real model and data; returns its output folder.

    Raises:
        NotYetError: the command refuses its config's keys.
    """
    with_controls = {
        "data_config__img_dir": scene / "edit" / "images",
        "data_config__control_dir": scene / "edit" / "control",
        "data_config__control_size": 64,
    }
    pictures = {"data_config__img_dir": scene / "pictures"}
    words = overrides(
        folder / "run", folder / "cache", pretrained_model_name_or_path=ROOT / "assets" / command.model,
        max_train_steps=1, resume_from_checkpoint="null", lr_warmup_steps=0, samples__num_steps=1,
        validation__num_draws=1, **(with_controls if "edit" in command.config else pictures),
    )  # fmt: skip
    outcome = command.run([*words, *without(left_out)])
    if outcome.returncode and "this version of pixtune cannot do these yet" in outcome.stdout:
        raise NotYetError(outcome.stdout)
    assert outcome.returncode == 0, outcome.stdout
    return folder / "run"


def check_result(command: Command, output: Path) -> None:
    """What the row promises is there: a model, or a LoRA of the config's rank and base for both programs."""
    assert (output / "report.html").is_file()
    if command.config == "train_full_qwen_image":
        assert (output / "model" / "model_index.json").is_file()
        return
    with safe_open(output / LORA_FILE, framework="pt") as file:
        assert all(name.startswith("transformer.") and ".lora_" in name for name in file.keys())  # noqa: SIM118
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] == 4
    assert metadata["pixtune.base_model"] == command.model
    with safe_open(output / COMFYUI_FILE, framework="pt") as file:
        # How ComfyUI names the layers of each model: tests/unit/trained/test_export.py.
        assert all(name.startswith(("diffusion_model.", "transformer.")) for name in file.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Row -> output folder of its command as written, which is run once."""
    return cache(lambda row: train_small(COMMANDS[row], scene, tmp_path_factory.mktemp(row), []))


@pytest.mark.parametrize("row", [pytest.param(row, marks=needs(*REFUSED[row])) for row in COMMANDS])
def test_a_command_as_written(trained: Callable[[str], Path], row: str) -> None:
    check_result(COMMANDS[row], trained(row))


@pytest.mark.parametrize("row", [row for row in COMMANDS if REFUSED[row]])
def test_a_command_without_what_this_version_lacks(scene: Path, tmp_path: Path, row: str) -> None:
    check_result(COMMANDS[row], train_small(COMMANDS[row], scene, tmp_path, REFUSED[row]))


C11 = (
    'python -c "from utils.cuda_utils import get_optimal_settings; import json; '
    'print(json.dumps(get_optimal_settings(), indent=2))"'
)
C12 = (
    'python -c "from utils.unified_memory import is_unified_memory_system, get_memory_config; '
    'print(is_unified_memory_system(), get_memory_config())"'
)


def printed_by(command: str) -> str:
    """What a `python -c` of the document prints."""
    outcome = run([sys.executable, *shlex.split(command)[1:]])
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


def test_c11_prints_the_settings_for_this_gpu() -> None:
    settings = json.loads(printed_by(C11))
    assert list(settings) == [
        "use_flash_attention_3", "use_fp8", "use_tf32", "use_flash_attention_2", "cuda_version", "compute_capability",
    ]  # fmt: skip


def test_c12_prints_detection_and_preset() -> None:
    detected, preset = printed_by(C12).split(maxsplit=1)
    assert detected in ("True", "False")
    assert f"'memory_pool': '{'unified' if detected == 'True' else 'standard'}'" in preset


def test_c8_validate_dataset_has_an_exit_code(tmp_path: Path) -> None:
    script = [sys.executable, "utils/validate_dataset.py", "--path"]
    assert run([*script, str(DEMO_TRAIN)]).returncode == 0
    (tmp_path / "lonely.png").write_bytes(next(DEMO_TRAIN.glob("*.png")).read_bytes())
    outcome = run([*script, str(tmp_path)])
    assert outcome.returncode == 1
    assert "lonely" in outcome.stdout


def test_other_commands_do_not_train() -> None:
    """Nothing but the command line and `bench/` imports the loop (tests/unit/test_layout.py). On the command line one
    function does, which `pixtune train` and the root scripts call. `pixtune bench` times the loop's steps on pictures
    of its own and keeps nothing that was trained (tests/unit/bench/test_steps.py)."""
    tree = ast.parse((ROOT / "src" / "pixtune" / "cli.py").read_text(encoding="utf-8"))
    code = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for name, text in code.items() if "from pixtune.train import" in text} == {"run_config"}
    callers = {name for name, text in code.items() if "run_config(" in text} - {"run_config"}
    assert callers == {"train", "run_script"}


def test_errors_are_one_block_without_a_traceback(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache", rankk=4, learning_rate="fast", data_config__img_dir="/nope")
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stdout
    for fault in ("rankk", "did you mean", "learning_rate", "fast", "/nope"):
        assert fault in outcome.stdout, f"{fault} is missing in:\n{outcome.stdout}"
    assert not (tmp_path / "run").exists()


def test_sample_and_export_work_on_what_training_wrote(trained: Callable[[str], Path], tmp_path: Path) -> None:
    output = trained("C1")
    drawn = pixtune(
        "sample", "red heart, twemoji style", "--lora", output, "--output", tmp_path / "pictures", "--steps", 2,
        "--width", 64, "--height", 96, "--weights-format", "fp32",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stdout
    assert Image.open(tmp_path / "pictures" / "000-seed0.png").size == (64, 96)
    exported = pixtune("export", output / "checkpoint-000001", "--output", tmp_path / "exported")
    assert exported.returncode == 0, exported.stdout
    for name in (LORA_FILE, COMFYUI_FILE):
        assert read(tmp_path / "exported" / name) == read(output / name)


def read(path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Metadata and values of a safetensors file, without the time at which it was written."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "modelspec.date"}
        return metadata, {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118
