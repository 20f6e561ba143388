"""musubi-tuner: a TOML file of arguments or a command, and a TOML file of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration import kohya, kohya_network
from pixtune.migration.models import Model, model_of
from pixtune.migration.peer import WHICH_MODEL, Options, Part, Parts, Peer, mappings
from pixtune.migration.reading import Source
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost, used

SCRIPTS = (
    "qwen_image", "qwen_image_21", "flux_kontext", "flux_2", "wan", "hv", "hv_1_5", "fpack", "zimage", "krea2",
    "ideogram4",
    "kandinsky5", "hidream_o1", "minimax_h3", "ltx2", "mage_flow",
)  # fmt: skip
"""Beginnings of the names of its scripts."""
MODULES = (
    "lora_qwen_image", "lora_wan", "lora_framepack", "lora_zimage", "lora_flux_2", "lora_krea2", "lora_kandinsky",
    "lora_hv_1_5", "lora_ideogram4",
)  # fmt: skip


def _is_script(script: str) -> bool:
    return any(script in (f"{name}_train_network.py", f"{name}_train.py") for name in SCRIPTS)


def _recognizes(source: Source) -> bool:
    if source.form == "command":
        return any(_is_script(command.script) for command in source.commands)
    if not isinstance(source.tree, Mapping):
        return False
    arguments = kohya.arguments_of(source, ())
    module = str(arguments.get("network_module", "")).rpartition(".")[2]
    return "dit" in arguments or module in MODULES


def _take_apart(source: Source, options: Options) -> Parts:
    trainings = [command for command in source.commands if _is_script(command.script)]
    arguments = kohya.arguments_of(source, trainings)
    tree, file, missing = kohya.dataset_of(arguments, source, options)
    folders = kohya.subsets_of(tree)
    script = trainings[0].script if trainings else ""
    caching = [
        (command.script, kohya.BY_ITSELF) for command in source.commands if kohya.CACHING.fullmatch(command.script)
    ]
    unset = [name for command in trainings for name in command.unknown_variables]
    missing += [(f"${name}", Lost("the script sets no such variable", True, True)) for name in dict.fromkeys(unset)]
    extra = {"output_dir": kohya.output_of(arguments, "musubi_run")}
    if not any(key in arguments for key in kohya.NETWORK_KEYS):
        extra["method"] = ("full", f"{script or 'no network_module'}: all weights")
    return Parts(
        Part({**arguments, **({"script": script} if script else {})}),
        tuple(kohya.folder_part(each, file) for each in folders),
        lost=(*missing, *caching),
        extra=extra,
    )


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    version = written.get("model_version") or (
        "edit-2509" if written.get("edit_plus") else "edit" if written.get("edit") else ""
    )
    script, module = str(written.get("script", "")), str(written.get("network_module", ""))
    if "qwen_image" in f"{script} {module}" and "_21" not in script:
        word = "" if version in ("", "original") else f"-{version}"
        named = f"qwen-image{word}"
        if not word and isinstance(written.get("dit"), str):
            named = written["dit"] if "2512" in written["dit"] else named
        model = model_of(("model_version", named))
    elif "flux_kontext" in script or module.endswith("lora_flux"):
        model = model_of(("network_module", "flux kontext"))
    else:
        model = model_of(
            ("script", script.removesuffix(".py")), ("network_module", module), ("dit", written.get("dit"))
        )
    return model, model.name, f"dit = {written.get('dit', 'not given')}"


def _targets(value: Any, look: Look) -> Any:
    return ["attention_mlp"]


def _control_size(value: Any, look: Look) -> Any:
    """Returns the size of controls: that of the target, unless another is given."""
    if not look.peek("control_directory"):
        return Lost("there are no controls", False)
    return Outcome({"data_config.control_size": to.side(look.get("resolution") if value == "resolution" else value)})


def _describes_data(tree: Any) -> str | None:
    if not kohya.is_dataset(tree) or any("subsets" in each for each in mappings(tree["datasets"])):
        return None
    return "the file of --config_file, or the script with the command"


SETTINGS: tuple[Rule, ...] = (
    Rule("network_module", "lora_targets", kohya.for_lora(_targets), default="networks.lora",
         remark="all linear layers of the blocks but the modulation; here attention"),
    *kohya.settings(rate=2e-6, workers=8, layers=kohya_network.of_musubi_tuner),
    Rule("dit", "model_parts.transformer pretrained_model_name_or_path", to.transformer),
    *harmless("vae text_encoder text_encoder1 text_encoder2 clip t5",
              "encoders come with pretrained_model_name_or_path"),
    *used("model_version edit edit_plus script model_type", WHICH_MODEL),
    Rule("timestep_sampling", "objective.sigma_distribution objective.shift", kohya.timesteps, default="sigma"),
    *kohya.LEVELS,
    Rule("guidance_scale", "objective.guidance", to.real),
    Rule("mask_min_weight", "data_config.weight_outside_mask", to.real),
    *lost("mask_gamma", "masks count as they are"),
    *lost("muon_adam_lr", "all weights have one rate"),
    *harmless("use_mask_loss muon_model_type cute", "not needed here"),
    *lost("remove_first_image_from_target explorative_*", "one target a picture is trained on"),
)  # fmt: skip

FOLDERS: tuple[Rule, ...] = (
    Rule("image_directory", "img_dir", to.text),
    Rule("image_jsonl_file", "",
         lambda value, look: Lost("write its rows as metadata_file, with img_dir", True, True)),
    Rule("control_directory", "control_dir", to.text,
         remark="several controls are numbered there (a_0.png, a_1.png); here each has a folder"),
    Rule("control_resolution", "data_config.control_size", _control_size, default="resolution",
         remark="the target's size where it is left out"),
    *lost("no_resize_control qwen_image_edit_no_resize_control flux_kontext_no_resize_control",
          "controls are brought near to data_config.control_size"),
    Rule("qwen_image_edit_control_resolution", "data_config.control_size", _control_size),
    Rule("mask_directory", "mask_dir", to.text),
    Rule("caption_extension", "caption_type", to.extension),
    Rule("resolution", "img_size", to.side, default=[960, 544], remark="the side of a square of the same area"),
    Rule("batch_size", "train_batch_size", to.whole),
    Rule("num_repeats", "repeats", to.real),
    Rule("enable_bucket", "", to.in_buckets("one shape"), default=False),
    Rule("bucket_no_upscale", "upscale", lambda value, look: not to.truth(value), default=False,
         remark="the opposite"),
    *harmless("cache_directory", "data_config.cache_dir is one folder for all"),
    *lost("video_directory video_jsonl_file multiple_target", "pictures are trained on, one target each"),
    *harmless("target_frames frame_extraction frame_stride frame_sample max_frames source_fps fp_* architecture",
              "belongs to videos"),
)  # fmt: skip

MUSUBI_TUNER = Peer(
    name="musubi-tuner",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=kohya.length,
    examples_per_step=kohya.examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    describes_data=_describes_data,
    files="The TOML file of `--config_file`, or a script with the command `accelerate launch ..._train_network.py`; "
    "the file of `--dataset_config` is found by itself.",
    misses=("Video models, LoHa, LoRA+ and LoRA layers by regular expressions.",),
    remarks=("`network_alpha` is 1 where it is left out, which scales a LoRA of rank 16 by 1/16.",),
)
