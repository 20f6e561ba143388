"""kohya's sd-scripts: a TOML file of arguments or a command, and a TOML or JSON file of the data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration import kohya, kohya_network
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, is_hub_name_or_folder, model_of
from pixtune.migration.peer import WHICH_MODEL, Options, Part, Parts, Peer
from pixtune.migration.reading import Source
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, is_off, lost, only_if, used

SCRIPTS = {
    "flux_train_network.py": "flux", "flux_train.py": "flux", "sdxl_train_network.py": "sdxl", "sdxl_train.py": "sdxl",
    "sd3_train_network.py": "sd3", "sd3_train.py": "sd3", "train_network.py": "sd1", "train_db.py": "sd1",
    "fine_tune.py": "sd1", "lumina_train_network.py": "lumina", "lumina_train.py": "lumina",
    "hunyuan_image_train_network.py": "hunyuan", "anima_train_network.py": "anima", "anima_train.py": "anima",
    "sdxl_train_textual_inversion.py": "sdxl", "train_textual_inversion.py": "sd1", "flux_train_control_net.py": "flux",
}  # fmt: skip
"""Training scripts, each with a word for the model."""
MARKS = {"clip_l", "t5xxl", "ae", "model_prediction_type", "apply_t5_attn_mask", "network_train_unet_only", "unet_lr"}
"""Keys that other trainers do not have."""


def _recognizes(source: Source) -> bool:
    if source.form == "command":
        return any(command.script in SCRIPTS for command in source.commands)
    if source.form == "JSON" or not isinstance(source.tree, Mapping):
        return False
    arguments = kohya.arguments_of(source, ())
    module = str(arguments.get("network_module", ""))
    return module.startswith(("networks.", "lycoris.")) or len(MARKS & set(arguments)) >= 2


def _take_apart(source: Source, options: Options) -> Parts:
    trainings = [command for command in source.commands if command.script in SCRIPTS]
    arguments = kohya.arguments_of(source, trainings)
    tree, file, missing = kohya.dataset_of(arguments, source, options)
    folders = kohya.subsets_of(tree)
    shared = {key: arguments[key] for key in _FOLDER_ARGUMENTS if key in arguments}
    if not folders and isinstance(arguments.get("train_data_dir"), str):
        folders = _by_name(arguments["train_data_dir"], shared)
        if isinstance(arguments.get("reg_data_dir"), str):
            folders += [{**each, "is_reg": True} for each in _by_name(arguments["reg_data_dir"], shared)]
    else:
        folders = [{**{key: value for key, value in shared.items() if key not in each}, **each} for each in folders]
    script = trainings[0].script if trainings else ""
    unset = [name for command in trainings for name in command.unknown_variables]
    missing += [(f"${name}", Lost("the script sets no such variable", True, True)) for name in dict.fromkeys(unset)]
    extra = {"output_dir": kohya.output_of(arguments, "sd_scripts_run")}
    if not any(key in arguments for key in kohya.NETWORK_KEYS):
        extra["method"] = ("full", f"{script or 'no network_module'}: all weights")
    rest = {key: value for key, value in arguments.items() if key not in shared}
    return Parts(
        Part({**rest, **({"script": script} if script else {})}),
        tuple(kohya.folder_part(each, file) for each in folders if not each.get("is_reg")),
        tuple(kohya.folder_part(each, file) for each in folders if each.get("is_reg")),
        lost=tuple(missing),
        extra=extra,
    )


_FOLDER_ARGUMENTS = (
    "resolution", "caption_extension", "caption_extention", "shuffle_caption", "keep_tokens", "caption_dropout_rate",
    "caption_tag_dropout_rate", "caption_prefix", "caption_suffix", "flip_aug", "color_aug", "random_crop",
    "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "alpha_mask",
    "conditioning_data_dir",
    "dataset_repeats", "secondary_separator", "keep_tokens_separator", "caption_separator", "enable_wildcard",
    "face_crop_aug_range", "token_warmup_min", "token_warmup_step", "caption_dropout_every_n_epochs",
)  # fmt: skip
"""Arguments that hold for folders where the file of the data set says nothing else."""


def _by_name(folder: str, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the folders of an older data set, whose names are "10_sks dog": repeats, and a caption for all."""
    try:
        names = sorted(each.name for each in Path(folder).expanduser().iterdir() if each.is_dir())
    except OSError:
        names = []
    found = []
    for name in names:
        if numbered := re.match(r"(\d+)_(.*)", name):
            subset = {
                "image_dir": f"{folder.rstrip('/')}/{name}",
                "num_repeats": int(numbered[1]),
                "class_tokens": numbered[2],
            }
            found.append({**shared, **subset})
    return found or [{**shared, "image_dir": folder}]


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    name, script = written.get("pretrained_model_name_or_path"), str(written.get("script", ""))
    module = str(written.get("network_module", "")).rpartition(".")[2]
    kind = str(written.get("model_type") or "")
    word = kind if kind and kind != "flux" else SCRIPTS.get(script, "")
    word = word or {"lora_flux": "flux", "oft_flux": "flux", "lora_sd3": "sd3", "lora_lumina": "lumina"}.get(module, "")
    if not word and (MARKS & {"ae", "t5xxl", "clip_l"} & set(written)):
        word = "flux"
    if word == "flux":  # then the name tells dev from schnell
        model = model_of(("pretrained_model_name_or_path", name), ("network_module", "flux"))
    else:
        model = model_of(("script", word), ("pretrained_model_name_or_path", name), ("network_module", "sd1"))
    return model, str(name) if is_hub_name_or_folder(name) else model.name, f"pretrained_model_name_or_path = {name}"


def _prediction(value: Any, look: Look) -> Lost:
    if value == "raw":
        return Lost("the loss is of the velocity, as here", False)
    return Lost("losses are weighed by noise level there; here all weigh the same, as with raw")


def _text_encoders(value: Any, look: Look) -> Lost:
    if to.truth(value):
        return Lost("only the transformer is trained, as here", False)
    if look.peek("cache_text_encoder_outputs"):
        return Lost("text encoders are not trained where their outputs are cached", False)
    return Lost("CLIP gets a LoRA too there; here text encoders stay as they are")


def _captions(value: Any, look: Look) -> Any:
    """Returns one caption for all pictures only where that is meant: there it serves pictures without a file."""
    if is_off(value):
        return Lost("none, as here", False)
    return Lost("it is the caption of pictures without a file there: write files, or caption_text for all")


def _loss(value: Any, look: Look) -> Any:
    name = to.text(value).casefold()
    if name in ("l2", "mse"):
        return "mse"
    if name in ("huber", "smooth_l1"):
        why = "its delta is the same for all noise levels here: see objective.huber_delta"
        return Outcome({"objective.loss": "huber"}, (Lost(why),))
    return Outcome({"objective.loss": "mse"}, (Lost("mse takes its place"),))


def _describes_data(tree: Any) -> str | None:
    return "the file of --config_file, or the script with the command" if kohya.is_dataset(tree) else None


SETTINGS: tuple[Rule, ...] = (
    Rule("network_module", "lora_targets", kohya.for_lora(lambda value, look: ["all_linear"]),
         default="networks.lora_flux", remark="all linear layers of the blocks; here attention"),
    *kohya.settings(rate=2e-6, workers=8, layers=kohya_network.of_flux),
    Rule("pretrained_model_name_or_path", "pretrained_model_name_or_path model_parts.transformer", to.base),
    *harmless("ae clip_l t5xxl vae", "encoders come with pretrained_model_name_or_path"),
    *used("script model_type", WHICH_MODEL),
    *used("train_data_dir reg_data_dir", "its folders are read: see data_config"),
    Rule("unet_lr", "learning_rate", optim.rate("optimizer_type")),
    *harmless("text_encoder_lr text_encoder_lr1 text_encoder_lr2", "text encoders are not trained"),
    Rule("network_train_unet_only", "", _text_encoders, default=False, remark="without it CLIP is trained too"),
    Rule("network_train_text_encoder_only", "", to.unless_off("only the transformer is trained here")),
    *lost("train_t5xxl", "text encoders stay as they are"),
    Rule("train_batch_size", "train_batch_size", to.whole),
    Rule("guidance_scale", "objective.guidance", to.real, default=3.5, remark="3.5 where it is left out; here 1"),
    Rule("timestep_sampling", "objective.sigma_distribution objective.shift", kohya.timesteps, default="sigma"),
    Rule("discrete_flow_shift", "", lambda value, look: Lost("see timestep_sampling", False), default=3.0),
    *kohya.LEVELS,
    Rule("model_prediction_type", "", _prediction, default="sigma_scaled"),
    Rule("t5xxl_max_token_length", "data_config.max_text_tokens", to.whole),
    Rule("loss_type", "objective.loss", _loss),
    Rule("huber_c", "objective.huber_delta",
         only_if(lambda look: look.peek("loss_type") in ("huber", "smooth_l1"), "belongs to loss_type huber")(to.real)),
    *harmless("huber_schedule huber_scale", "belongs to loss_type huber, whose delta is one number here"),
    Rule("prior_loss_weight", "prior_preservation.loss_weight",
         lambda value, look: Lost("1, as here", False) if to.number(value) == 1 else to.real(value)),
    Rule("max_token_length", "", lambda value, look: Lost("belongs to older models", False)),
    *lost("noise_offset adaptive_noise_scale multires_noise_iterations ip_noise_gamma min_snr_gamma "
          "debiased_estimation_loss scale_v_pred_loss_like_noise_pred v_pred_like_loss zero_terminal_snr "
          "initial_epoch initial_step noise_offset_random_strength ip_noise_gamma_random_strength",
          "flow matching has no offset noise and no SNR weights"),
    *harmless("multires_noise_discount clip_skip v2 v_parameterization no_half_vae tokenizer_cache_dir sample_sampler "
              "weighted_captions in_json full_path config_file apply_t5_attn_mask t5xxl_dtype validate_every_n_steps "
              "validate_every_n_epochs max_validation_steps validation_seed stop_text_encoder_training",
              "belongs to older models, or to the files"),
    Rule("validation_split", "validation.held_out", to.real),
    Rule("masked_loss", "", lambda value, look: Lost("masks are used where mask_dir or mask is given", False)),
)  # fmt: skip

FOLDERS: tuple[Rule, ...] = (
    Rule("image_dir", "img_dir", to.text),
    Rule("metadata_file", "",
         lambda value, look: Lost("write its rows as {image, caption} JSONL and give it as metadata_file", True, True)),
    Rule("conditioning_data_dir", "mask_dir", to.text, remark="masks, with masked_loss"),
    Rule("alpha_mask", "mask", lambda value, look: "alpha" if to.truth(value) else Lost("no masks, as here", False)),
    Rule("caption_extension", "caption_type", to.extension, default=".caption",
         remark=".caption where it is left out; here .txt"),
    Rule("caption_extention", "caption_type", to.extension),
    Rule("class_tokens", "", _captions),
    Rule("caption_prefix", "caption_prefix",
         lambda value, look: to.text(value).rstrip(", ") or Lost("none, as here", False)),
    *lost("caption_suffix", "write it into the captions"),
    Rule("shuffle_caption", "shuffle_tags", to.truth_or("tags stay in order, as here")),
    Rule("keep_tokens", "keep_tags", to.whole),
    Rule("caption_dropout_rate", "caption_dropout_rate", to.real),
    Rule("caption_tag_dropout_rate", "tag_dropout_rate", to.real),
    *lost("caption_dropout_every_n_epochs token_warmup_step enable_wildcard keep_tokens_separator secondary_separator",
          "captions are shuffled and dropped by shares alone"),
    *harmless("token_warmup_min caption_separator", "tags are the parts of a caption between commas"),
    Rule("resolution", "img_size", to.sides, default=512),
    Rule("batch_size", "train_batch_size", to.whole),
    Rule("num_repeats", "repeats", to.real),
    Rule("dataset_repeats", "repeats", to.real),
    Rule("flip_aug", "flip", to.truth_or("no mirror images, as here")),
    *lost("color_aug random_crop face_crop_aug_range skip_image_resolution",
          "pictures are only cropped to their buckets here"),
    Rule("enable_bucket", "", to.in_buckets("squares"), default=False),
    Rule("bucket_no_upscale", "upscale", lambda value, look: not to.truth(value), default=False,
         remark="the opposite"),
    *harmless("min_bucket_reso max_bucket_reso bucket_reso_steps cache_info resize_interpolation",
              "buckets are made from the size by themselves"),
    *harmless("is_reg", "see prior_preservation.folder"),
)  # fmt: skip

SD_SCRIPTS = Peer(
    name="sd-scripts",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=kohya.length,
    examples_per_step=kohya.examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    describes_data=_describes_data,
    files="The TOML file of `--config_file`, or a script with the command `accelerate launch flux_train_network.py "
    "...` (fluxgym writes one); the file of `--dataset_config` is found by itself.",
    misses=(
        "A LoRA for CLIP, rates by block, ranks by regular expressions, LoRA+, "
        "wildcards in captions, and merging LoRAs while training.",
        "SDXL, SD 1 to 3, Lumina and HunyuanImage.",
    ),
    remarks=(
        "`guidance_scale` is 3.5 and `model_prediction_type` is `sigma_scaled` where they are left out: sd-scripts' "
        "own guide recommends 1.0 and `raw`, which are what happens here.",
        "Folders named `10_name` have their repeats by that name.",
    ),
)
