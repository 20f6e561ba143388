"""diffusers' example scripts: the command `accelerate launch train_dreambooth_lora_flux.py --...`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, is_hub_name_or_folder, model_of
from pixtune.migration.peer import WHICH_MODEL, Options, Part, Parts, Peer
from pixtune.migration.reading import Source
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost, only_if, used
from pixtune.migration.samples import guidance, only_with_prompts, prompts

SCRIPT = re.compile(r"train_(dreambooth|text_to_image|control|cogvideox|flux|qwen)\w*\.py")
FLUX_LAYERS = [
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
"""Layers that train_dreambooth_lora_flux.py adapts."""
OF_FOLDER = (
    "instance_data_dir", "dataset_name", "image_column", "caption_column", "cond_image_column", "instance_prompt",
    "repeats", "resolution", "random_flip", "center_crop", "dataset_config_name", "aspect_ratio_buckets",
)  # fmt: skip
"""Arguments that say how a folder of pictures is read."""


def _recognizes(source: Source) -> bool:
    return source.form == "command" and any(SCRIPT.fullmatch(command.script) for command in source.commands)


def _take_apart(source: Source, options: Options) -> Parts:
    trainings = [command for command in source.commands if SCRIPT.fullmatch(command.script)]
    if len(trainings) > 1:
        names = " and ".join(command.script for command in trainings)
        raise MigrationError(f"{source.name} starts {len(trainings)} trainings ({names}): keep one")
    command = trainings[0]
    arguments = dict(command.arguments)
    if "mixed_precision" in command.launcher:
        arguments.setdefault("mixed_precision", command.launcher["mixed_precision"])
    folder = {key: arguments.pop(key) for key in OF_FOLDER if key in arguments}
    missing = [(f"${name}", Lost("the script sets no such variable", True, True)) for name in command.unknown_variables]
    is_lora = "_lora" in command.script
    extra: dict[str, Any] = {} if is_lora else {"method": ("full", f"{command.script}: all weights")}
    if "dataset_name" in folder:
        extra["data_config.cache_dir"] = ("./cache", "a folder for the pictures of dataset_name and their encodings")
    named = "instance_data_dir" in folder or "dataset_name" in folder
    return Parts(
        Part({"script": command.script, **arguments}),
        (Part(folder),) if named else (),
        lost=tuple(missing),
        extra=extra,
    )


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    name, script = written.get("pretrained_model_name_or_path"), str(written["script"])
    word = re.sub(r"^train_(dreambooth|text_to_image)(_lora)?_?|\.py$", "", script) or "sd1"
    model = model_of(("pretrained_model_name_or_path", name), ("script", word if word != "advanced" else "sdxl"))
    return model, str(name) if is_hub_name_or_folder(name) else model.name, f"pretrained_model_name_or_path = {name}"


def _length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    if settings.get("max_train_steps"):
        return to.whole(settings["max_train_steps"]), None
    return None, float(to.number(settings.get("num_train_epochs", 1)))


def _examples_per_step(settings: Mapping[str, Any]) -> int:
    return to.whole(settings["train_batch_size"]) * to.whole(settings.get("gradient_accumulation_steps", 1))


_for_lora = only_if(lambda look: "_lora" in look.peek("script", ""), "all weights are trained")


def _targets(value: Any, look: Look) -> Any:
    if value != "by script":
        return [word.strip() for word in to.text(value).split(",") if word.strip()]
    if look.model.layers == "double":
        return ["to_k", "to_q", "to_v", "to_out.0"]
    return [*FLUX_LAYERS, *(["proj_mlp"] if "kontext" in look.peek("script") else [])]


def _epochs(value: Any, look: Look) -> Any:
    if look.written.get("max_train_steps"):
        return Lost("max_train_steps wins over it there", False)
    return to.at_least_one(value)


def _optimizer(value: Any, look: Look) -> Any:
    if look.get("use_8bit_adam") is True and str(value).casefold() == "adamw":
        return Outcome({"adam8bit": True})
    return optim.optimizer(value, look)


_of_prodigy = only_if(lambda look: optim.is_prodigy(look.peek("optimizer")), "belongs to Prodigy")


def _levels(value: Any, look: Look) -> Any:
    return to.levels(**to.sd3_density(look), shift="none")


def _guidance(value: Any, look: Look) -> Any:
    return to.real(value) if look.model.guided else Lost("the model has no such input", False)


_only_with_prior = only_if(
    lambda look: look.peek("with_prior_preservation") is True, "belongs to with_prior_preservation"
)


def _caption(value: Any, look: Look) -> Any:
    if look.get("caption_column"):
        return Lost("captions are those of caption_column", False)
    return Outcome({"caption_text": to.text(value)})


def _square(value: Any, look: Look) -> Any:
    if look.get("aspect_ratio_buckets"):
        return Lost("pictures are put into buckets, as here", False)
    return Lost("pictures are cropped to squares there; here each is in a bucket of its own ratio")


def _resume(value: Any, look: Look) -> Any:
    return (
        "latest"
        if value == "latest"
        else Lost("a run goes on from its own checkpoints: resume_from_checkpoint=latest", False)
    )


SETTINGS: tuple[Rule, ...] = (
    Rule("pretrained_model_name_or_path", "pretrained_model_name_or_path model_parts.transformer", to.base),
    *used("script revision variant", WHICH_MODEL),
    Rule("output_dir", "output_dir", to.text, default="trained-lora"),
    Rule("rank", "rank", _for_lora(to.whole), default=4),
    Rule("lora_alpha", "lora_alpha", _for_lora(to.real), default=4.0, remark="4 where it is left out; here the rank"),
    *lost("lora_dropout", "a LoRA has no dropout here"),
    Rule("lora_layers", "lora_targets", _for_lora(_targets), default="by script",
         remark="attention and feed-forward of the double blocks for FLUX"),
    Rule("max_train_steps", "max_train_steps", to.whole),
    Rule("num_train_epochs", "num_train_epochs", _epochs, default=1),
    Rule("train_batch_size", "train_batch_size", to.whole, default=4),
    Rule("gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
    Rule("seed", "seed", to.whole),
    Rule("mixed_precision", "mixed_precision", to.precision),
    Rule("optimizer", "optimizer adam8bit", _optimizer, default="AdamW"),
    *harmless("use_8bit_adam", "see optimizer"),
    Rule("learning_rate", "learning_rate", optim.rate("optimizer"), default=1e-4),
    Rule("lr_scheduler", "lr_scheduler", optim.schedule),
    Rule("lr_warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up("lr_scheduler", ("constant", "")),
         default=500, remark="500 where it is left out, and without effect there on the schedule constant"),
    Rule("lr_num_cycles", "lr_num_cycles", to.whole),
    Rule("lr_power", "lr_power", to.real),
    *lost("scale_lr", "multiply learning_rate by the batch, the accumulation and the number of GPUs"),
    Rule("adam_beta1", "adam_beta1", to.real),
    Rule("adam_beta2", "adam_beta2", to.real),
    Rule("adam_weight_decay", "adam_weight_decay", to.real, default=1e-4),
    Rule("adam_epsilon", "adam_epsilon", to.real),
    Rule("prodigy_use_bias_correction", "prodigy.bias_correction", _of_prodigy(to.truth), default=True),
    Rule("prodigy_safeguard_warmup", "prodigy.safeguard_warmup", _of_prodigy(to.truth), default=True),
    *harmless("prodigy_decouple", "weight decay is decoupled here always"),
    *lost("prodigy_beta3", "it is the root of adam_beta2 here"),
    Rule("max_grad_norm", "max_grad_norm", to.real),
    Rule("weighting_scheme", "objective.weighting_scheme", to.sd3_weighting),
    Rule("weighting_scheme", "objective.sigma_distribution objective.shift", _levels, default="none",
         remark="levels are drawn evenly there and are not shifted, unless it names a distribution"),
    *harmless("logit_mean logit_std mode_scale", "see weighting_scheme"),
    Rule("guidance_scale", "objective.guidance", _guidance, default=3.5, remark="3.5 where it is left out; here 1"),
    Rule("max_sequence_length", "data_config.max_text_tokens",
         lambda value, look: Lost("512, as here", False) if to.number(value) == 512 else to.whole(value)),
    Rule("dataloader_num_workers", "data_config.num_workers", to.whole),
    *lost("train_text_encoder train_text_encoder_ti train_text_encoder_frac", "text encoders stay as they are"),
    *harmless("text_encoder_lr adam_weight_decay_text_encoder", "text encoders are not trained"),
    # ---- prior preservation
    Rule("with_prior_preservation", "", lambda value, look: Lost("see class_prompt", False)),
    Rule("class_prompt", "prior_preservation.prompts", _only_with_prior(to.texts)),
    Rule("num_class_images", "prior_preservation.num_pictures", _only_with_prior(to.whole), default=100),
    Rule("prior_loss_weight", "prior_preservation.loss_weight", _only_with_prior(to.real)),
    *harmless("class_data_dir sample_batch_size prior_generation_precision",
              "the base draws these pictures, into output_dir/prior"),
    # ---- saving and samples
    Rule("checkpointing_steps", "checkpointing_steps", to.at_least_one),
    Rule("checkpoints_total_limit", "checkpoints_total_limit", to.at_least_one),
    Rule("resume_from_checkpoint", "resume_from_checkpoint", _resume),
    Rule("validation_prompt", "samples.prompts", prompts),
    Rule("validation_epochs", "samples.every", only_with_prompts(to.every_epochs("samples.every")), default=50,
         remark="turned into steps"),
    Rule("validation_steps", "samples.every", only_with_prompts(to.at_least_one)),
    Rule("num_validation_images", "samples.seeds",
         only_with_prompts(lambda value, look: list(range(max(1, to.whole(value))))), default=4,
         remark="as many seeds"),
    Rule("validation_guidance_scale", "samples.guidance_scale", only_with_prompts(guidance)),
    *harmless("validation_image", "see samples.controls"),
    *harmless("final_validation_prompt skip_final_inference", "samples are drawn after the last step always"),
    # ---- the rest
    Rule("report_to", "report_to", to.tracker, default="tensorboard"),
    Rule("tracker_name", "tracker_project_name", to.text),
    Rule("do_fp8_training", "quantize", to.truth_or("16 bits where they fit")),
    *lost("bnb_quantization_config_path", "the planner takes 8 or 4 bits by the memory there is"),
    *harmless("gradient_checkpointing offload cache_latents allow_tf32 enable_xformers_memory_efficient_attention "
              "enable_npu_flash_attention use_aspect_ratio_bucketing remote_text_encoder fsdp_text_encoder "
              "set_grads_to_none", "the planner fits model and encoders into memory by itself"),
    *harmless("logging_dir push_to_hub hub_token hub_model_id cache_dir local_rank upcast_before_saving",
              "not about the training"),
)  # fmt: skip

FOLDERS: tuple[Rule, ...] = (
    Rule("instance_data_dir", "img_dir", to.text),
    Rule("dataset_name", "dataset", to.text),
    Rule("image_column", "image_column", to.text),
    Rule("caption_column", "caption_column", to.text),
    Rule("cond_image_column", "control_column", to.text),
    Rule("instance_prompt", "caption_text", _caption,
         remark="the caption of all pictures, unless caption_column has theirs"),
    Rule("repeats", "repeats", to.real),
    Rule("resolution", "img_size", to.side, default=512),
    Rule("random_flip", "flip", to.truth_or("no mirror images, as here")),
    Rule("center_crop", "", _square, default=False),
    Rule("(small pictures are enlarged)", "upscale", default=True),
    *harmless("aspect_ratio_buckets dataset_config_name", "buckets are made from the pictures' own ratios here"),
)  # fmt: skip

DIFFUSERS = Peer(
    name="diffusers' scripts",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=_length,
    examples_per_step=_examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    files="A shell script with the command `accelerate launch train_dreambooth_lora_flux.py --...`, or the command "
    "itself between quotes.",
    misses=("Training CLIP, and pushing to the hub.",),
    remarks=(
        "`instance_prompt` is the caption of all pictures.",
        "`guidance_scale` is 3.5 and the batch 4 where they are left out.",
    ),
)
