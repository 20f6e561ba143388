"""Shapes that configs are published in, and that an import once failed at or misread."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from pixtune.config.load import load_config
from pixtune.errors import MigrationError
from pixtune.trained.targets import ranks_of_layers, resolve_targets
from tests.runs import ROOT
from tests.unit.migration.importing import left, take_text, values

SIMPLETUNER = {"model_family": "flux", "data_backend_config": "x", "max_train_steps": 5, "validation_steps": 5}


def linears_of_flux() -> list[str]:
    (file,) = (ROOT / "assets" / "tiny-flux" / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) == 2]  # noqa: SIM118
    return [name.removesuffix(".weight") for name in names]


def test_a_prompt_with_a_character_beyond_16_bits():
    imported = take_text(json.dumps({**SIMPLETUNER, "validation_prompt": "🟫 with a sign"}, ensure_ascii=False))
    assert imported.value_of("samples.prompts") == ["🟫 with a sign"]


def test_such_a_character_as_json_escapes_it():
    """As any program writes it that calls pixtune with JSON: two escapes for one character."""
    words = ["pretrained_model_name_or_path=m", "output_dir=o", "max_train_steps=1", "data_config.img_dir=x"]
    words.append(f"samples.prompts={json.dumps(['🟫', 'é'])}")
    assert load_config(None, words, folders_must_exist=False).samples.prompts == ("🟫", "é")


@pytest.mark.parametrize(
    "call",
    [
        'accelerate launch "$TRAINER" --pretrained_model_name_or_path "$MODEL_DIR" --rank 16',
        '"$TOOL" launch --num_processes 1 "${TRAINER}" \\\n  --pretrained_model_name_or_path "$MODEL_DIR" --rank 16',
        'screen -dmS run \\\n  "$TOOL" launch $TRAINER --pretrained_model_name_or_path $MODEL_DIR --rank 16',
    ],
)
def test_a_script_whose_path_is_in_a_variable(call):
    text = (
        "set -e\n"
        "export ROOT=/srv\n"
        'export MODEL_DIR="$ROOT/models/FLUX.1-Kontext-dev"\n'
        'export TRAINER="$ROOT/examples/train_dreambooth_lora_flux_kontext.py"\n'
        'test -f "$TRAINER" || { echo "missing: $TRAINER"; false; }\n' + call + "\n"
    )
    imported = take_text(text)
    assert (imported.peer, imported.value_of("rank")) == ("diffusers' scripts", 16)
    assert imported.value_of("pretrained_model_name_or_path") == "/srv/models/FLUX.1-Kontext-dev"


@pytest.mark.parametrize(
    "call", ["python C:\\t\\flux_train_network.py", 'set S=C:\\t\\flux_train_network.py\npython "%S%"']
)
def test_paths_of_windows(call):
    arguments = (
        '--pretrained_model_name_or_path D:\\m\\flux1-dev.safetensors ^\n  --clip_l c --train_data_dir "F:\\new\\it"'
    )
    found = values(take_text(f"@echo off\n{call} {arguments}\n"))
    assert found["model_parts.transformer"] == "D:\\m\\flux1-dev.safetensors"
    assert found["data_config.img_dir"] == "F:\\new\\it"


def test_variables_with_defaults_that_hold_others():
    """What nothing here sets is to be filled in; what a command prints is not known, since none is run."""
    imported = take_text(
        'ROOT="$(cd "$(dirname "$0")/.." && pwd)"\nNAME="${NAME:-it}"\nOUT="${OUT:-$ROOT/out/${NAME}}"\n'
        'MODEL="${MODEL:-$HOME/flux1-dev.safetensors}"\naccelerate launch flux_train_network.py '
        '--pretrained_model_name_or_path="$MODEL" --clip_l c --output_dir="$OUT" --output_name="$NAME"\n'
    )
    assert imported.value_of("output_dir") == "$ROOT/out/it/it"
    assert imported.value_of("model_parts.transformer") == "$HOME/flux1-dev.safetensors"
    named = " ".join(left(imported, "to fill in"))
    assert "$ROOT" in named and "$HOME" in named


def ai_toolkit(
    prompts: list[str], arch: str = "flux_kontext", name: str = "black-forest-labs/FLUX.1-Kontext-dev"
) -> str:
    process = {
        "type": "sd_trainer", "datasets": [{"folder_path": "x"}], "train": {"steps": 5},
        "model": {"name_or_path": name, "arch": arch}, "sample": {"prompts": prompts, "width": 1024, "seed": 42},
    }  # fmt: skip
    return json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}})


def test_controls_behind_prompts():
    found = values(take_text(ai_toolkit(["make it smile  --ctrl_img /p/a.jpg", "an afro --ctrl_img /p/b.jpg"])))
    assert found["samples.prompts"] == ["make it smile", "an afro"]
    assert found["samples.controls"] == [["/p/a.jpg"], ["/p/b.jpg"]]
    assert (found["samples.width"], found["samples.seeds"]) == (1024, [42])


def test_layers_by_the_beginnings_of_their_paths():
    """A text that begins a path there does not stand in the middle of another one, and one without an end goes on."""
    tree = json.loads(ai_toolkit(["a"], "flux", "FLUX.1-dev"))
    words = ["transformer.transformer_blocks.1", "transformer.single_transformer_blocks.2.proj_out", "norm_out"]
    process = tree["config"]["process"][0]
    process["network"] = {"type": "lora", "linear": 4, "network_kwargs": {"only_if_contains": words}}
    parameters = {"eta_min": 1e-5, "warmup_steps": 7, "power": 2}
    process["train"] |= {"lr": 1e-4, "lr_scheduler": "cosine", "lr_scheduler_params": parameters}
    found = values(take_text(json.dumps(tree)))
    linears = linears_of_flux()
    assert set(resolve_targets(linears, found["lora_targets"], {})) == {
        name for name in linears if any(word in f"transformer.{name}" for word in words)
    }
    assert (found["lr_floor"], found["lr_warmup_steps"], found["lr_power"]) == (pytest.approx(0.1), 7, 2)


def test_other_options_behind_prompts_win_over_the_keys_for_all():
    text = ai_toolkit(["a cat --w 512 --seed 7 --steps 9 --cfg 2.5 --m 0.5", "a -- dash"], "flux", "FLUX.1-dev")
    found = values(take_text(text))
    assert found["samples.prompts"] == ["a cat", "a -- dash"]
    assert (found["samples.width"], found["samples.seeds"], found["samples.num_steps"]) == (512, [7], 9)
    assert (found["samples.guidance_scale"], found["samples.strengths"]) == (2.5, [0.5])


def sd_scripts(*arguments: str) -> str:
    words = " ".join(f'"{argument}"' for argument in arguments)
    return (
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors --clip_l c "
        f"--network_module networks.lora_flux --network_dim 16 --network_args {words}"
    )


def test_blocks_and_ranks_of_sd_scripts():
    """Its words beside FLUX's own layers: which are adapted, and at which rank."""
    words = ("train_double_block_indices=1", "train_single_block_indices=0,2-3", "single_mod_dim=0", "img_mlp_dim=4")
    found = values(take_text(sd_scripts(*words)))
    linears = linears_of_flux()
    adapted = resolve_targets(linears, found["lora_targets"], {})
    single = [f"single_transformer_blocks.{number}." for number in (0, 2, 3)]
    assert set(adapted) == {
        name
        for name in linears
        if name.startswith("transformer_blocks.1.")
        or (name.startswith(tuple(single)) and not name.endswith("norm.linear"))
    }
    ranks = ranks_of_layers(adapted, found["adapter.rank_pattern"], {})
    assert ranks == {"transformer_blocks.1.ff.net.0.proj": 4, "transformer_blocks.1.ff.net.2": 4}


@pytest.mark.parametrize(("word", "only"), [("train_blocks=single", "single_transformer_blocks."),
                                            ("train_single_block_indices=none", "transformer_blocks.")])  # fmt: skip
def test_blocks_of_one_kind(word, only):
    linears = linears_of_flux()
    adapted = resolve_targets(linears, take_text(sd_scripts(word)).value_of("lora_targets"), {})
    assert set(adapted) == {name for name in linears if name.startswith(only)}


def test_groups_of_ranks_name_all_layers_of_the_blocks_once():
    words = [f"{name}_dim=2" for name in ("img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "single",
                                          "single_mod")]  # fmt: skip
    found = values(take_text(sd_scripts(*words, "split_qkv=True", "loraplus_lr_ratio=4")))
    linears = [name for name in linears_of_flux() if "transformer_blocks." in name]
    assert ranks_of_layers(linears, found["adapter.rank_pattern"], {}) == dict.fromkeys(linears, 2)
    assert found["lora_targets"] == ["all_linear"]


@pytest.mark.parametrize(
    "word", ["train_single_block_indices=4-2", "train_double_block_indices=0-99999", "train_blocks=triple",
             "train_single_block_indices=a", "single_dim=x", "single_dim=-4"]
)  # fmt: skip
def test_ranges_of_blocks_that_are_none(word):
    with pytest.raises(MigrationError, match="network_args"):
        take_text(sd_scripts(word))


def test_no_layer_at_all():
    with pytest.raises(MigrationError, match="leave no layer"):
        take_text(sd_scripts("train_blocks=single", "train_single_block_indices=none"))


def musubi(optimizer: str, *lines: str) -> str:
    network = 'network_module = "networks.lora_qwen_image"\nnetwork_dim = 8\n' if "lora" in lines else ""
    rest = "\n".join(line for line in lines if line != "lora")
    return f'dit = "qwen_image_bf16.safetensors"\n{network}optimizer_type = "{optimizer}"\n{rest}\n'


def test_muon_for_all_weights():
    """A rate of unscaled steps becomes one of steps as large as AdamW's; one that is AdamW's own stays."""
    arguments = 'optimizer_args = ["muon_momentum=0.9", "ns_steps=6", "adam_betas=(0.9, 0.95)"]'
    found = values(take_text(musubi("MuonWithAdamW", "learning_rate = 0.02", arguments)))
    assert (found["optimizer"], found["method"]) == ("muon", "full")
    assert (found["muon.momentum"], found["muon.ns_steps"], found["adam_beta2"]) == (0.9, 6, 0.95)
    # 0.02 of an orthogonal matrix of 3072 rows moves a weight by 0.02 / sqrt(3072); ours by 0.2 times the rate.
    assert found["learning_rate"] == pytest.approx(0.02 / 3072**0.5 / 0.2, abs=1e-6)
    assert values(take_text(musubi("muon", "learning_rate = 1e-4")))["learning_rate"] == 1e-4


def test_muon_for_a_lora_is_adamw_with_a_rate_of_its_own():
    imported = take_text(
        musubi("MuonWithAdamW", "lora", "learning_rate = 0.015", 'network_args = ["exclude_mod=False"]')
    )
    found = values(imported)
    assert (found.get("optimizer"), found["learning_rate"]) == (None, 1e-4)
    assert found["lora_targets"] == ["all_linear"]
    assert any("not for method: lora" in each for each in left(imported, "changes the result"))
