"""Values that mean something else by trainer, each worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixtune.errors import MigrationError
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import model_of
from pixtune.migration.rules import Look, Lost, Outcome, WrongValue
from tests.unit.migration.importing import left, take, take_text, values

FLUX = model_of(("model", "black-forest-labs/FLUX.1-dev"))
LOOK = Look({}, {}, FLUX)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a caption")
    return folder


# ---- epochs, where the pictures are on this machine


def test_epochs_become_steps_with_repeats_batch_and_accumulation(pictures, tmp_path):
    (tmp_path / "data.toml").write_text(
        f"[general]\nbatch_size = 2\n[[datasets]]\nimage_directory = {json.dumps(str(pictures))}\nresolution = 512\n"
        "num_repeats = 3\n"
    )
    command = (
        "accelerate launch src/musubi_tuner/qwen_image_train_network.py --dit a.safetensors --dataset_config data.toml "
        "--network_module networks.lora_qwen_image --network_dim 8 --gradient_accumulation_steps 2 "
        "--max_train_epochs 6 --save_every_n_epochs 2 --lr_warmup_steps 0.1 --lr_scheduler cosine"
    )
    imported = take_text(command, tmp_path)
    found = values(imported)
    # an epoch is 10 pictures x 3 = 30 turns, of 4 examples a step: 8 steps, the last one not full
    assert found["num_train_epochs"] == 6
    assert found["checkpointing_steps"] == 16
    assert found["lr_warmup_share"] == 0.1
    assert "folder of pictures" not in "".join(left(imported, "to fill in"))


def test_epochs_stay_to_be_filled_in_where_a_folder_is_elsewhere(pictures, tmp_path):
    (tmp_path / "data.toml").write_text(
        f"resolutions = [512]\n[[directory]]\npath = {json.dumps(str(pictures))}\n[[directory]]\npath = 'not/here'\n"
    )
    text = (
        "output_dir='o'\ndataset='data.toml'\nepochs=3\nsave_every_n_epochs=2\nwarmup_steps=0\n"
        "[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\ndtype='bfloat16'\n[adapter]\ntype='lora'\nrank=4\n"
        "[optimizer]\ntype='adamw'\nlr=1e-4\n"
    )
    imported = take_text(text, tmp_path)
    assert imported.value_of("checkpointing_steps") is None
    assert any("PICTURES x REPEATS / BATCH x 2" in each for each in left(imported, "to fill in"))


HELD_OUT = (
    "output_dir='o'\nepochs=3\neval_datasets=[{evals}]\n[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\n[adapter]\n"
    "type='lora'\nrank=4\n[optimizer]\ntype='adamw'\n"
)


def test_held_out_data_sets_of_diffusion_pipe_are_read_where_they_are(tmp_path):
    """Named alone or with a name of their own; a directory without a path names none."""
    (tmp_path / "one.toml").write_text(
        "resolutions=[512]\n[[directory]]\npath='data/a'\n[[directory]]\nnum_repeats=1\n[[directory]]\npath='data/b'\n"
    )
    for evals in ("{name='x', config='one.toml'}", "'one.toml'"):
        imported = take_text(HELD_OUT.format(evals=evals), tmp_path)
        assert imported.value_of("validation.held_out_dir") == "data/a"
        assert any("data/b" in each for each in map(str, imported.leftovers)), "one folder can be held out, and two are"
    imported = take_text(HELD_OUT.format(evals="{name='x', config='away.toml'}"), tmp_path)
    assert imported.value_of("validation.held_out_dir") is None
    assert any("write validation.held_out_dir" in each for each in left(imported, "to fill in"))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(MigrationError, match=r"list\.json"):
        take_text(HELD_OUT.format(evals="'list.json'"), tmp_path)


def test_samples_by_epochs_in_a_real_folder(pictures):
    imported = take_text(
        f"accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev "
        f"--instance_data_dir='{pictures}' --instance_prompt='a' --train_batch_size=4 --validation_prompt='b' "
        "--validation_epochs=4 --max_train_steps=9"
    )
    assert imported.value_of("samples.every") == 12  # 3 steps an epoch


# ---- alpha and rank


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("accelerate launch flux_kontext_train_network.py --dit k.safetensors --network_module networks.lora_flux "
         "--network_dim 64", 1.0),
        ("accelerate launch flux_kontext_train_network.py --dit k.safetensors --network_module networks.lora_flux "
         "--network_dim 64 --network_alpha 0", None),
        ("accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
         "--network_module networks.lora_flux --network_dim 64", 1.0),
        ("accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path FLUX.1-dev --rank 64", 4.0),
        (json.dumps({"model_family": "flux", "lora_rank": 64, "data_backend_config": "x"}), None),
        (json.dumps({"training_method": "LORA", "model_type": "FLUX_DEV_1", "base_model_name": "flux-dev",
                     "concept_file_name": "c", "lora_rank": 64}), 1.0),
        ("[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\n[adapter]\ntype='lora'\nrank=64\n[optimizer]\n"
         "type='adamw'\n", None),
    ],
)  # fmt: skip
def test_an_alpha_that_is_left_out(text, alpha):
    """None: the rank, as here, in diffusion-pipe and in SimpleTuner."""
    found = values(take_text(text))
    assert found["rank"] == 64
    assert found.get("lora_alpha") == alpha


# ---- numbers, sizes


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1024, 1024), ("768", 768), ("1024x1024", 1024), ([1216, 832], 1006), ("960,544", 723), ([1280, 720, 33], 960)],
)
def test_the_side_of_an_area(value, expected):
    assert to.side(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("512,768", [512, 768]), ([512, 512], 512), ([[1280, 720], 512], [960, 512]), (512, 512), ("1024x1024", 1024)],
)
def test_several_sizes(value, expected):
    assert to.sides(value) == expected


@pytest.mark.parametrize("value", ["", "x", None, True, float("nan"), float("inf"), [1], {"a": 1}])
def test_what_is_no_number(value):
    with pytest.raises(WrongValue):
        to.number(value)


def test_numbers_in_texts():
    assert (to.number("1e-4"), to.number("1."), to.whole("16"), to.real(3)) == (1e-4, 1, 16, 3.0)
    with pytest.raises(WrongValue, match="whole"):
        to.whole(1.5)


@pytest.mark.parametrize(
    ("factor", "shift"), [(1, "none"), (1.0, "none"), (3, 1.098612), (2.2, 0.788457), (0.5, -0.693147)]
)
def test_a_shift_is_a_logarithm(factor, shift):
    assert to.shift_of(factor) == shift


@pytest.mark.parametrize("factor", [0, -1])
def test_a_shift_of_nothing(factor):
    with pytest.raises(WrongValue):
        to.shift_of(factor)


# ---- optimizers


@pytest.mark.parametrize(
    ("name", "eight_bits"),
    [("AdamW", False), ("adamw8bit", True), ("bitsandbytes.optim.AdamW8bit", True), ("PagedAdamW8bit", True),
     ("torch.optim.AdamW", False), ("ADAMW_8BIT", True), ("adamw_bf16", False), ("adamw_optimi", False)],
)  # fmt: skip
def test_names_of_adamw(name, eight_bits):
    assert optim.optimizer(name, LOOK) == Outcome({"adam8bit": eight_bits})


@pytest.mark.parametrize(
    ("name", "ours"),
    [("prodigyopt", "prodigy"), ("Prodigy", "prodigy"),
     ("prodigyplus.ProdigyPlusScheduleFree", "prodigy_schedule_free"),
     ("AdamWScheduleFree", "adamw_schedule_free"), ("SCHEDULE_FREE_ADAMW", "adamw_schedule_free"),
     ("Adafactor", "adafactor")],
)  # fmt: skip
def test_names_of_optimizers_that_are_here(name, ours):
    assert optim.optimizer(name, LOOK) == Outcome({"optimizer": ours})


@pytest.mark.parametrize("arguments", ["[]", '["relative_step=True"]', '["scale_parameter=False"]'])
def test_adafactor_finds_its_rate_in_kohyas_trainers_unless_it_is_told_not_to(arguments):
    """The rate is learning_rate here."""
    for given, changes in ((arguments, True), ('["relative_step=False"]', False)):
        imported = take_text(
            "pretrained_model_name_or_path='flux1-dev.safetensors'\nclip_l='c'\nt5xxl='t'\nae='a'\n"
            f"network_module='networks.lora_flux'\noptimizer_type='adafactor'\noptimizer_args={given}\n"
        )
        assert imported.value_of("optimizer") == "adafactor"
        assert any("relative_step of" in each for each in left(imported, "changes the result")) == changes


def test_keys_that_the_optimizer_does_not_read_are_left_out():
    text = (
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
        "--network_module networks.lora_flux --network_dim 4 --optimizer_type {} --lr_scheduler cosine "
        "--optimizer_args {}"
    )
    plus = take_text(text.format("prodigyplus.ProdigyPlusScheduleFree", "d_coef=2 d0=1e-5 slice_p=11"))
    found = values(plus)
    assert (found["optimizer"], found["prodigy.d_coef"], found["prodigy.d0"]) == ("prodigy_schedule_free", 2, 1e-5)
    assert {"lr_scheduler", "prodigy.slice"} & set(found) == set()
    assert any("lr_scheduler = cosine" in each for each in left(plus, "changes the result"))
    adamw = take_text(text.format("AdamW8bit", "d_coef=2 weight_decay=0.1"))
    assert values(adamw)["adam_weight_decay"] == 0.1
    assert "prodigy.d_coef" not in values(adamw)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        ("prodigy", "d_coef=2", (0.0, False, False)),
        ("prodigy", "weight_decay=0.1 use_bias_correction=True safeguard_warmup=True", (0.1, True, True)),
        ("adafactor", "relative_step=False", (0.0, None, None)),
        ("adamw", "eps=1e-7", (None, None, None)),
    ],
)
def test_what_other_optimizers_begin_with_there(optimizer, arguments, expected):
    imported = take_text(
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
        f"--network_module networks.lora_flux --optimizer_type {optimizer} --optimizer_args {arguments}"
    )
    keys = ("adam_weight_decay", "prodigy.bias_correction", "prodigy.safeguard_warmup")
    assert tuple(imported.value_of(key) for key in keys) == expected


def test_an_optimizer_for_the_other_method():
    """All weights are not trained by Prodigy here: AdamW, with a rate of its own."""
    imported = take_text(
        "[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\n[optimizer]\ntype='Prodigy'\nlr=1\nd_coef=2\n"
    )
    assert (imported.value_of("optimizer"), imported.value_of("learning_rate")) == (None, 1e-4)
    assert any("not for method: full" in each for each in left(imported, "changes the result"))


@pytest.mark.parametrize("name", ["lion", "automagic", "CAME", "SGDNesterov", "dadaptadam"])
def test_another_optimizer_is_lost_with_a_word_on_the_rate(name):
    lost = optim.optimizer(name, LOOK)
    assert isinstance(lost, Lost)
    assert lost.changes_result
    assert "rate" in lost.why


def test_the_rate_of_an_optimizer_that_finds_its_own():
    look = Look({"optimizer": "dadaptadam"}, {}, FLUX)
    outcome = optim.rate("optimizer")(1.0, look)
    assert outcome.values == {"learning_rate": 1e-4}
    assert outcome.lost[0].changes_result
    assert optim.rate("optimizer")(1.0, LOOK) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [["betas=0.9,0.99", "weight_decay=0.02", "d_coef=2", "amsgrad=1"],
     "betas=(0.9, 0.99) weight_decay=0.02 d_coef=2 amsgrad=1",
     "weight_decay=0.02,betas=0.9,0.99,d_coef=2,amsgrad=1",
     {"betas": [0.9, 0.99], "weight_decay": 0.02, "d_coef": 2, "amsgrad": 1}],
)  # fmt: skip
def test_arguments_of_optimizers_in_every_notation(arguments):
    outcome = optim.optimizer_arguments(arguments, LOOK)
    assert outcome.values == {
        "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.02, "prodigy.d_coef": 2.0
    }  # fmt: skip
    assert "amsgrad=1" in outcome.lost[0].why


# ---- noise levels


def test_the_mean_of_logits_has_the_other_sign_in_diffusers():
    """There a high value is a late place in the schedule, which begins at noise; here it is a high noise level."""
    look = Look({"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 2}, {}, FLUX)
    assert to.sd3_density(look) == {"sigma_distribution": "logit_normal", "logit_mean": -0.5, "logit_std": 2.0}


@pytest.mark.parametrize(
    ("kind", "distribution", "shift"),
    [("uniform", "uniform", "none"), ("sigmoid", "logit_normal", "none"), ("shift", "logit_normal", 1.098612),
     ("flux_shift", "logit_normal", "model")],
)  # fmt: skip
def test_timestep_sampling_of_kohyas_trainers(kind, distribution, shift):
    found = values(
        take_text(
            "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
            f"--network_module networks.lora_flux --timestep_sampling {kind} --discrete_flow_shift 3 --guidance_scale 1"
        )
    )
    assert (found["objective.sigma_distribution"], found["objective.shift"]) == (distribution, shift)


# ---- defaults there that are others here


def test_defaults_of_each_trainer_are_written_out():
    bare: dict[str, dict[str, Any]] = {
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
        "--network_module networks.lora_flux": {
            "learning_rate": 2e-6, "max_train_steps": 1600, "lora_alpha": 1.0,
            "objective.guidance": 3.5, "train_batch_size": 1,
        },
        "accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path FLUX.1-dev "
        "--instance_data_dir x": {
            "num_train_epochs": 1, "train_batch_size": 4, "adam_weight_decay": 1e-4, "lora_alpha": 4.0, "rank": 4,
            "data_config.img_size": 512, "objective.guidance": 3.5, "report_to": "tensorboard",
        },
        json.dumps({"model_family": "flux", "data_backend_config": "x"}): {
            "train_batch_size": 4, "learning_rate": 4e-7, "num_train_epochs": 1, "objective.shift": 1.098612,
            "checkpoints_total_limit": 5,
        },
        json.dumps({"training_method": "LORA", "model_type": "FLUX_DEV_1", "base_model_name": "flux-dev",
                    "concept_file_name": "c"}): {
            "learning_rate": 3e-6, "lora_alpha": 1.0, "num_train_epochs": 100, "lr_warmup_steps": 200,
            "lora_targets": ["all_linear"],
        },
    }  # fmt: skip
    ours = {"rank": 16, "train_batch_size": 1, "num_train_epochs": None}
    for text, expected in bare.items():
        found = values(take_text(text))
        for key, value in expected.items():
            assert found.get(key, ours.get(key)) == value, (text[:60], key)


def test_a_default_says_that_it_is_one():
    imported = take_text(json.dumps({"model_family": "flux", "data_backend_config": "x"}))
    line = next(line for line in imported.lines if line.key == "learning_rate")
    assert line.origin == "default of SimpleTuner: learning_rate = 4e-07"


def test_the_model_can_be_given(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_family": "flux", "data_backend_config": "x"}))
    assert take(file, model="models/mine").value_of("pretrained_model_name_or_path") == "models/mine"


@pytest.mark.parametrize(
    ("name", "expected"), [("a/b.safetensors", "a/b.safetensors"), ("", None), ("runs/epoch50", None)]
)
def test_a_lora_to_begin_with(name, expected):
    imported = take_text(
        "[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\n[optimizer]\ntype='adamw'\n[adapter]\ntype='lora'\n"
        f"rank=4\ninit_from_existing='{name}'\n"
    )
    assert imported.value_of("init_lora") == expected
    assert any("init_lora" in each for each in left(imported, "to fill in")) == (name == "runs/epoch50")


@pytest.mark.parametrize(
    ("name", "base", "file"),
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev", None),
        ("models/FLUX.1-dev", "models/FLUX.1-dev", None),
        ("models/flux1-dev.safetensors", "black-forest-labs/FLUX.1-dev", "models/flux1-dev.safetensors"),
        ("models/flux1-dev.gguf", "black-forest-labs/FLUX.1-dev", "models/flux1-dev.gguf"),
        ("models/flux1-dev.ckpt", "black-forest-labs/FLUX.1-dev", None),
    ],
)
def test_a_base_that_is_one_file(name, base, file):
    """Its other parts are those of the model on the hub; what no file of a transformer is, is listed."""
    for text in (
        f"accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path={name}",
        f"accelerate launch flux_train_network.py --pretrained_model_name_or_path={name} "
        "--network_module=networks.lora_flux",
        json.dumps({"model_family": "flux", "data_backend_config": "x", "pretrained_model_name_or_path": name}),
        json.dumps({"training_method": "LORA", "model_type": "FLUX_DEV_1", "base_model_name": name,
                    "concept_file_name": "c"}),
        f"job: extension\nconfig: {{name: a, process: [{{type: sd_trainer, model: {{name_or_path: '{name}'}}}}]}}",
    ):  # fmt: skip
        imported = take_text(text)
        assert (imported.value_of("pretrained_model_name_or_path"), imported.value_of("model_parts.transformer")) == (
            base,
            file,
        ), text
        assert any(name in each for each in left(imported, "changes the result")) == name.endswith("ckpt")


FLAVOURS = {
    ("qwen_image", None): "Qwen/Qwen-Image",
    ("qwen_image", "v1.0"): "Qwen/Qwen-Image",
    ("qwen_image", "v1.1"): "Qwen/Qwen-Image",
    ("qwen_image", "2.0"): "Qwen/Qwen-Image-2512",
    ("qwen_image", "edit-v1"): "Qwen/Qwen-Image-Edit",
    ("qwen_image", "edit-v2"): "Qwen/Qwen-Image-Edit-2509",
    ("qwen_image", "edit-v2+"): "Qwen/Qwen-Image-Edit-2511",
    ("flux", "dev"): "black-forest-labs/FLUX.1-dev",
    ("flux", "krea"): "black-forest-labs/FLUX.1-Krea-dev",
    ("flux", "schnell"): "black-forest-labs/FLUX.1-schnell",
    ("flux", "kontext"): "black-forest-labs/FLUX.1-Kontext-dev",
}
"""What HUGGINGFACE_PATHS in SimpleTuner's helpers/models names; it had no v1.1, 2.0 and edit-v2+ when read for this."""


@pytest.mark.parametrize(("family", "flavour"), FLAVOURS)
def test_flavours_of_simpletuner_are_models_of_their_own(family, flavour):
    given = {"model_family": family, "data_backend_config": "x"} | ({"model_flavour": flavour} if flavour else {})
    assert take_text(json.dumps(given)).value_of("pretrained_model_name_or_path") == FLAVOURS[family, flavour]


LOKR = {
    "ai-toolkit": (
        "job: extension\nconfig: {name: a, process: [{type: sd_trainer, model: {name_or_path: FLUX.1-dev}, network: "
        "{type: lokr, lokr_full_rank: true, lokr_factor: 8, linear: 9999999999, linear_alpha: 9999999999}}]}",
        ("lokr", "none", 8),
    ),
    "diffusion-pipe": (
        "[model]\ntype='flux'\ndiffusers_path='FLUX.1-dev'\n[optimizer]\ntype='adamw'\n[adapter]\ntype='lokr'\n"
        "rank=16\ndecompose_both=true\ndecompose_factor=-1\n",
        ("lokr", "both", 65536),
    ),
    "musubi-tuner": (
        "accelerate launch flux_kontext_train_network.py --dit k.safetensors --network_module networks.lokr "
        "--network_dim 8 --network_args factor=4",
        ("lokr", "larger", 4),
    ),
    "sd-scripts": (
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
        "--network_module lycoris.kohya --network_dim 10000 --network_args algo=lokr factor=16",
        ("lokr", "none", 16),
    ),
}


@pytest.mark.parametrize("name", LOKR)
def test_a_lokr(name):
    text, expected = LOKR[name]
    imported = take_text(text)
    assert tuple(imported.value_of(f"adapter.{key}") for key in ("kind", "lokr_low_rank", "lokr_factor")) == expected
    assert imported.value_of("lora_alpha") is None


def test_a_dora():
    imported = take_text(
        json.dumps({"model_family": "flux", "data_backend_config": "x", "use_dora": True, "init_lora": "a.safetensors"})
    )
    assert (imported.value_of("adapter.kind"), imported.value_of("init_lora")) == ("dora", None)
    assert any("init_lora" in each for each in left(imported, "changes the result"))


def test_another_adapter_becomes_a_lora_with_a_word():
    imported = take_text(
        "accelerate launch flux_kontext_train_network.py --dit k.safetensors --network_module networks.loha "
        "--network_dim 8"
    )
    assert imported.value_of("adapter.kind") is None
    assert any("a LoRA takes its place" in each for each in left(imported, "changes the result"))
