"""SimpleTuner: config.json, and multidatabackend.json for the data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, is_hub_name_or_folder, model_of
from pixtune.migration.peer import NOT_HERE, WHICH_MODEL, Options, Part, Parts, Peer, flat, mappings
from pixtune.migration.reading import Source, find_second, read_second
from pixtune.migration.rules import Look, Lost, Outcome, Rule, fine, harmless, lost, only_if, used
from pixtune.migration.samples import guidance, only_with_prompts, prompts
from pixtune.migration.simpletuner_data import FOLDERS

NOT_PICTURES = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS: Mapping[str, list[str]] = {
    "all": [*ATTENTION, *TEXT_ATTENTION],
    "mmdit": [*ATTENTION, *TEXT_ATTENTION],
    "context": TEXT_ATTENTION,
    "context+ffs": [*TEXT_ATTENTION, "ff_context.net.0.proj", "ff_context.net.2"],
    "all+ffs": ["attention_mlp"],
    "ai-toolkit": ["all_linear"],
    "tiny": ["single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"],
    "nano": ["single_transformer_blocks.7.proj_out"],
}
"""Layers of FLUX by the words that it has for them."""


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in tree.items()}


def _recognizes(source: Source) -> bool:
    if source.form == "command" or not isinstance(source.tree, Mapping):
        return False
    keys = set(_plain(source.tree))
    return "model_family" in keys or "data_backend_config" in keys


def _describes_data(tree: Any) -> str | None:
    marks = {"dataset_type", "instance_data_dir", "caption_strategy", "cache_dir_vae"}
    is_data = isinstance(tree, list) and any(marks & set(each) for each in mappings(tree))
    return "config.json" if is_data else None


def _take_apart(source: Source, options: Options) -> Parts:
    settings = _plain(source.tree)
    named = settings.pop("data_backend_config", None)
    path = options.dataset or (find_second(named, source.folder) if isinstance(named, str) else None)
    problems: list[tuple[str, Lost]] = []
    backends = mappings(read_second(path, source.name)) if path is not None else []
    if path is not None and not backends:
        raise MigrationError(f"{path.name} describes no data set: a list of mappings is expected")
    if path is None and named:
        problems.append((f"data_backend_config = {named}", NOT_HERE))
    file = f"{path.name}: " if path is not None else ""
    by_id = {str(each.get("id")): each for each in backends}
    folders, held_out = [], []
    for backend in backends:
        kind = backend.get("dataset_type", "image")
        if backend.get("disabled") or backend.get("disable"):
            problems.append((f"{file}{backend.get('id')}", Lost("it is disabled there", False)))
        elif kind == "eval":
            held_out.append(str(backend.get("instance_data_dir", "")))
        elif kind not in ("image", "video") or backend.get("conditioning_type"):
            why = "encodings are cached here by themselves" if kind in NOT_PICTURES else "see control_dir or mask_dir"
            problems.append((f"{file}{backend.get('id')}", Lost(why, False)))
        else:
            folders.append(Part({**_shared(settings), **flat(backend), **_conditioning(backend, by_id)}, file))
    return Parts(Part(settings), tuple(folders), held_out=tuple(filter(None, held_out)), lost=tuple(problems))


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what holds for data sets that say nothing else."""
    keys = (
        "resolution",
        "resolution_type",
        "caption_strategy",
        "instance_prompt",
        "prepend_instance_prompt",
        "only_instance_prompt",
    )
    return {key: settings[key] for key in keys if key in settings}


def _conditioning(backend: Mapping[str, Any], by_id: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the folders of controls and masks that a data set is paired with."""
    names = backend.get("conditioning_data") or []
    paired = [by_id[name] for name in (names if isinstance(names, list) else [names]) if name in by_id]
    found: dict[str, Any] = {}
    controls = [
        each["instance_data_dir"]
        for each in paired
        if each.get("conditioning_type") != "mask" and "instance_data_dir" in each
    ]
    masks = [
        each["instance_data_dir"]
        for each in paired
        if each.get("conditioning_type") == "mask" and "instance_data_dir" in each
    ]
    if controls:
        found["conditioning_data.folders"] = controls
    if masks:
        found["conditioning_data.masks"] = masks[0]
    return found


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    family, flavour = str(written.get("model_family", "")), str(written.get("model_flavour") or "")
    words = {"edit-v2": "edit-2509", "edit-v2+": "edit-2511", "2.0": "2512"}  # `models.py` knows the others
    named = f"{family}-{words.get(flavour, flavour)}" if family in ("flux", "qwen_image") else family
    if family == "flux" and flavour in ("", "dev", "libreflux", "fluxbooru"):
        named = "flux-dev"
    path = written.get("pretrained_model_name_or_path")
    model = model_of(("model_family", named), ("pretrained_model_name_or_path", path))
    origin = (
        f"pretrained_model_name_or_path = {path}"
        if path
        else f"model_family = {family}, model_flavour = {flavour or 'none'}"
    )
    return model, str(path) if is_hub_name_or_folder(path) else model.name, origin


def _length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    steps, epochs = settings.get("max_train_steps"), settings.get("num_train_epochs")
    return (to.whole(steps) if steps else None), (float(to.number(epochs)) if epochs else None)


def _examples_per_step(settings: Mapping[str, Any]) -> int:
    return to.whole(settings["train_batch_size"]) * to.whole(settings.get("gradient_accumulation_steps", 1))


_for_lora = only_if(lambda look: str(look.peek("model_type", "lora")) != "full", "all weights are trained")


def _epochs(value: Any, look: Look) -> Any:
    if "num_train_epochs" not in look.written and look.written.get("max_train_steps"):
        return Lost("max_train_steps decides", False)
    return to.at_least_one(value)


def _targets(value: Any, look: Look) -> Any:
    if look.model.layers != "double_single":
        return list(ATTENTION)
    word = str(value)
    if word in TARGETS:
        return TARGETS[word]
    return Outcome({"lora_targets": TARGETS["all"]}, (Lost("the layers of all take its place"),))


def _lora_type(value: Any, look: Look) -> Any:
    return (
        Lost("a LoRA, as here", False)
        if value == "standard"
        else Lost("a LoRA takes the place of LyCORIS: write adapter.kind: lokr if lycoris_config says so")
    )


def _timesteps(value: Any, look: Look) -> Any:
    """Returns how noise levels are drawn, from all keys of the flow."""
    std = to.real(look.get("flow_sigmoid_scale", 1.0))
    if look.get("flow_schedule_auto_shift") is True:
        shift: float | str = "model"
    else:
        factor = to.number(look.get("flow_schedule_shift", 3.0))
        shift = to.shift_of(factor) if factor > 0 else "none"
    if look.get("flow_use_uniform_schedule") is True:
        return to.levels("uniform", shift)
    found = to.levels("logit_normal", shift, logit_std=std)
    if look.get("flow_use_beta_schedule") is True:
        return Outcome(
            found.values, (Lost("there is no beta distribution of noise levels; logit_normal takes its place"),)
        )
    return found


def _clipping(value: Any, look: Look) -> Any:
    if look.get("grad_clip_method", "value") == "norm":
        return to.real(value)
    return Lost("it limits each number of a gradient there; here the norm of all is limited to 1")


def _average(value: Any, look: Look) -> Any:
    if not to.truth(value):
        return Lost("no average, as here", False)
    values = {"ema.decay": to.real(look.get("ema_decay", 0.995))}
    return Outcome({**values, "ema.on_host": True} if look.get("ema_device", "cpu") == "cpu" else values)


def _resume(value: Any, look: Look) -> Any:
    return (
        "latest"
        if value == "latest"
        else Lost("a run goes on from its own checkpoints: resume_from_checkpoint=latest", False)
    )


SETTINGS: tuple[Rule, ...] = (
    Rule("pretrained_model_name_or_path", "pretrained_model_name_or_path model_parts.transformer", to.base),
    *used("model_family model_flavour", WHICH_MODEL),
    Rule("pretrained_transformer_model_name_or_path", "model_parts.transformer", to.transformer),
    *lost("pretrained_vae_model_name_or_path", "write its folder as model_parts.vae"),
    Rule("output_dir", "output_dir", to.text, default="output/models"),
    Rule("model_type", "method", to.chosen({"lora": "lora", "full": "full"}), default="lora"),
    Rule("lora_type", "", _for_lora(_lora_type)),
    Rule("lora_rank", "rank", _for_lora(to.whole), default=16),
    Rule("lora_alpha", "lora_alpha", _for_lora(to.real)),
    Rule("lora_dropout", "", _for_lora(to.unless_off("a LoRA has no dropout here")), default=0.1,
         remark="0.1 where it is left out; here there is none"),
    Rule("flux_lora_target", "lora_targets", _for_lora(_targets), default="all"),
    Rule("init_lora", "init_lora", to.lora_file),
    Rule("use_dora", "adapter.kind",
         lambda value, look: "dora" if to.truth(value) else Lost("a plain LoRA, as here", False)),
    *lost("singlora_ramp_up_steps controlnet control", "a plain LoRA is trained, from its usual beginning"),
    *lost("tread_config", "every block sees every token"),
    *harmless("lora_init_type peft_lora_mode lycoris_config init_lokr_norm lora_format slider_strength",
              "see lora_type"),
    Rule("num_train_epochs", "num_train_epochs", _epochs, default=1),
    Rule("max_train_steps", "max_train_steps", to.at_least_one),
    Rule("train_batch_size", "train_batch_size", to.whole, default=4),
    Rule("gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
    Rule("seed", "seed", to.whole),
    Rule("mixed_precision", "mixed_precision", to.precision),
    Rule("optimizer", "optimizer adam8bit", optim.optimizer, default="adamw_bf16"),
    Rule("learning_rate", "learning_rate", optim.rate("optimizer"), default=4e-7),
    Rule("lr_scheduler", "lr_scheduler", optim.schedule),
    Rule("lr_warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up("lr_scheduler", ("constant",)),
         remark="without effect there on the schedule constant"),
    Rule("lr_num_cycles", "lr_num_cycles", to.whole),
    Rule("lr_power", "lr_power", to.real),
    *lost("lr_end", "lr_floor is the share of the rate that schedules end at"),
    *lost("lr_scale lr_scale_sqrt", "the rate is not scaled"),
    Rule("adam_beta1", "adam_beta1", to.real),
    Rule("adam_beta2", "adam_beta2", to.real),
    Rule("optimizer_beta1", "adam_beta1", to.real),
    Rule("optimizer_beta2", "adam_beta2", to.real),
    Rule("adam_weight_decay", "adam_weight_decay", to.real),
    Rule("adam_epsilon", "adam_epsilon", to.real),
    Rule("optimizer_config", "adam_weight_decay",
         lambda value, look: optim.optimizer_arguments(value, look) if value else Lost("none", False)),
    *optim.defaults_of_others("optimizer"),
    Rule("max_grad_norm", "max_grad_norm", _clipping, default=2.0),
    *harmless("grad_clip_method", "see max_grad_norm"),
    # ---- noise levels and loss
    Rule("flow_schedule_shift", "objective.shift objective.sigma_distribution", _timesteps, default=3.0,
         remark="3 where it is left out"),
    *harmless("flow_sigmoid_scale flow_use_uniform_schedule flow_use_beta_schedule flow_beta_schedule_alpha "
              "flow_beta_schedule_beta flow_schedule_auto_shift", "see flow_schedule_shift"),
    Rule("flux_guidance_value", "objective.guidance",
         lambda value, look: to.real(value) if look.model.guided else Lost("no such input", False)),
    Rule("flux_guidance_mode", "", fine("constant", otherwise="guidance is one value here: objective.guidance")),
    *harmless("flux_guidance_min flux_guidance_max", "see flux_guidance_mode"),
    Rule("loss_type", "objective.loss", to.chosen({"l2": "mse", "huber": "huber", "smooth_l1": "huber"})),
    Rule("huber_c", "objective.huber_delta",
         only_if(lambda look: look.peek("loss_type") in ("huber", "smooth_l1"), "belongs to loss_type huber")(to.real)),
    *harmless("huber_schedule", "belongs to loss_type huber, whose delta is one number here"),
    *lost("snr_gamma use_soft_min_snr noise_offset input_perturbation flux_fast_schedule crepa_enabled "
          "scheduled_sampling_max_step_offset distillation_method layersync_enabled",
          "flow matching has no such thing here"),
    Rule("flux_attention_masked_training", "", to.unless_off("FLUX attends to padding here, as its pipeline does")),
    # ---- average
    Rule("use_ema", "ema.decay", _average),
    *harmless("ema_decay ema_device ema_cpu_only ema_update_interval ema_foreach_disable ema_validation",
              "see use_ema"),
    # ---- captions
    Rule("caption_dropout_probability", "data_config.caption_dropout_rate", to.real),
    Rule("tokenizer_max_length", "data_config.max_text_tokens", to.whole),
    *used("resolution resolution_type caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt",
          "it holds for data sets that say nothing else: see data_config"),
    *lost("minimum_image_size target_downsample_size maximum_image_size max_upscale_threshold",
          "pictures of all sizes are used: leave some out by data_config.exclude"),
    *harmless("aspect_bucket_rounding aspect_bucket_alignment aspect_bucket_* crop*",
              "buckets are made from the size by themselves"),
    # ---- saving
    Rule("checkpointing_steps", "checkpointing_steps", to.at_least_one),
    Rule("checkpoint_step_interval", "checkpointing_steps", to.at_least_one),
    Rule("checkpoint_epoch_interval", "checkpointing_steps", to.every_epochs("checkpointing_steps"),
         remark="turned into steps"),
    Rule("checkpoints_total_limit", "checkpoints_total_limit", to.at_least_one, default=5),
    Rule("resume_from_checkpoint", "resume_from_checkpoint", _resume),
    # ---- samples
    Rule("validation_prompt", "samples.prompts", prompts),
    Rule("validation_negative_prompt", "samples.negative_prompt",
         only_with_prompts(lambda value, look: to.text(value) or Lost("none", False))),
    Rule("validation_steps", "samples.every", only_with_prompts(to.at_least_one)),
    Rule("validation_step_interval", "samples.every", only_with_prompts(to.at_least_one)),
    Rule("validation_epoch_interval", "samples.every", only_with_prompts(to.every_epochs("samples.every"))),
    Rule("validation_num_inference_steps", "samples.num_steps", only_with_prompts(to.whole)),
    Rule("validation_guidance", "samples.guidance_scale", only_with_prompts(guidance)),
    Rule("validation_seed", "samples.seeds", only_with_prompts(lambda value, look: [to.whole(value)])),
    Rule("validation_resolution", "samples.width samples.height samples.sizes",
         only_with_prompts(to.width_and_height)),
    Rule("user_prompt_library", "", lambda value, look: Lost("write its prompts as samples.prompts", False, True)),
    *harmless("validation_* num_validation_images num_eval_images evaluation_type eval_*",
              "not needed for samples here"),
    # ---- logs, memory, speed
    Rule("report_to", "report_to", to.tracker),
    Rule("tracker_project_name", "tracker_project_name", to.text),
    Rule("base_model_precision", "quantize", to.quantization),
    *lost("quantize_activations", "products in 8 bits are what quantize does"),
    *harmless("text_encoder_*precision quantize_via base_model_default_dtype keep_vae_loaded fuse_qkv_projections "
              "fused_qkv_projections gradient_checkpointing* offload_* enable_group_offload group_offload_* ramtorch* "
              "musubi_blocks_to_swap enable_model_cpu_offload attention_mechanism sageattention_usage vae_* "
              "fuse_optimizer optimizer_offload_gradients optimizer_release_gradients optimizer_cpu_offload_method "
              "gradient_precision dynamo_* set_grads_to_none disable_tf32 fully_unload_text_encoder",
              "the planner fits model and encoders into memory by itself"),
    *harmless("push_* hub_* model_card_* tracker_* webhook_* publishing_config post_* logging_dir disable_benchmark "
              "disable_bucket_pruning compress_disk_cache ignore_final_epochs skip_file_discovery "
              "override_dataset_config data_backend_sampling delete_* dataloader_* write_batch_size read_batch_size "
              "image_processing_batch_size max_workers torch_num_threads preserve_data_backend_cache "
              "allow_dataset_oversubscription metadata_update_interval print_* debug_* cache_dir* "
              "conditioning_multidataset_sampling num_processes accelerator_cache_clear_interval "
              "i_know_what_i_am_doing save_text_encoder train_text_encoder text_encoder_lr text_encoder_limit "
              "parquet_* ignore_missing_files disable_segmented_timestep_sampling sana_* hidream_* t5_padding "
              "prediction_type revision variant user_prompt_* accelerate_* mixed_precision_* text_cache_* lora_init_* "
              "job_id __*", "not about the training, or done here by itself"),
)  # fmt: skip

SIMPLETUNER = Peer(
    name="SimpleTuner",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=_length,
    examples_per_step=_examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    describes_data=_describes_data,
    files="`config.json`; the file of `data_backend_config` is found by itself.",
    misses=(
        "LyCORIS but for LoKr, TREAD, distillation and forty optimizers.",
        "Data in S3, CSV and web shards; FSDP and DeepSpeed.",
    ),
    remarks=(
        "`repeats: 0` there is `repeats: 1` here.",
        "`max_grad_norm` limits single numbers there unless `grad_clip_method` is `norm`.",
    ),
)
