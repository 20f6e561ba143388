"""OneTrainer: a JSON file of its window or presets, and JSON files of concepts and of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, is_hub_name_or_folder, model_of
from pixtune.migration.one_trainer_data import FOLDERS
from pixtune.migration.peer import NOT_HERE, WHICH_MODEL, Options, Part, Parts, Peer, flat, mappings
from pixtune.migration.reading import Source, find_second, read_second
from pixtune.migration.rules import Convert, Look, Lost, Outcome, Rule, fine, harmless, is_off, lost, only_if, used

MARKS = {
    "training_method",
    "model_type",
    "base_model_name",
    "concept_file_name",
    "output_model_format",
    "output_model_destination",
}


def _recognizes(source: Source) -> bool:
    return source.form == "JSON" and isinstance(source.tree, Mapping) and len(MARKS & set(source.tree)) >= 3


def _describes_data(tree: Any) -> str | None:
    if not isinstance(tree, list):
        return None
    items = mappings(tree)
    if any({"image", "text", "path"} <= set(each) for each in items):
        return "the JSON file of the training (with training_method and model_type)"
    return (
        "the JSON file of the training"
        if any({"prompt", "cfg_scale", "diffusion_steps"} <= set(each) for each in items)
        else None
    )


def _take_apart(source: Source, options: Options) -> Parts:
    tree = dict(source.tree)
    problems: list[tuple[str, Lost]] = []
    concepts, file = _listed(tree, "concepts", "concept_file_name", source, problems, options.dataset)
    samples, _ = _listed(tree, "samples", "sample_definition_file_name", source, problems)
    folders: list[Part] = []
    regularization: list[Part] = []
    held_out: list[str] = []
    for concept in concepts:
        kind = str(concept.get("type") or "STANDARD").upper()
        if concept.get("enabled") is False:
            problems.append(
                (f"{file}{concept.get('name') or concept.get('path')}", Lost("it is not enabled there", False))
            )
        elif concept.get("validation_concept") is True or kind == "VALIDATION":
            held_out.append(str(concept.get("path", "")))
        else:
            part = Part({"resolution": tree.get("resolution", "512"), "masked_training": tree.get("masked_training"),
                         "unmasked_weight": tree.get("unmasked_weight", 0.1), **flat(concept)}, file)  # fmt: skip
            (regularization if kind == "PRIOR_PREDICTION" else folders).append(part)
    settings = flat(tree)
    if samples:
        settings |= {"samples": [each for each in samples if each.get("enabled", True)]}
    return Parts(Part(settings), tuple(folders), tuple(regularization), tuple(filter(None, held_out)), tuple(problems))


def _listed(
    tree: dict[str, Any], inline: str, by_file: str, source: Source, problems: list[tuple[str, Lost]], given: Any = None
) -> tuple[list[Mapping[str, Any]], str]:
    """Returns a list that stands in the config or in a file that it names."""
    items, named = tree.pop(inline, None), tree.pop(by_file, None)
    if isinstance(items, list) and given is None:
        return mappings(items), f"{inline}: "
    path = given or (find_second(named, source.folder) if isinstance(named, str) else None)
    if path is None:
        if inline == "concepts" and named:
            problems.append((f"{by_file} = {named}", NOT_HERE))
        elif named:
            problems.append(
                (f"{by_file} = {named}", Lost("the file of samples is not here: write samples.prompts", False))
            )
        return [], ""
    tree = read_second(path, source.name)
    if not isinstance(tree, list):
        raise MigrationError(f"{path.name} is no list of {inline}")
    return mappings(tree), f"{path.name}: "


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    kind, name = str(written.get("model_type", "STABLE_DIFFUSION_15")), written.get("base_model_name")
    if kind in ("QWEN", "FLUX_DEV_1"):  # the name tells the variant
        word = "qwen-image" if kind == "QWEN" else "flux-dev"
        model = model_of(("base_model_name", name if _same_kind(name, word) else word), ("model_type", word))
    else:
        model = model_of(("model_type", kind), ("base_model_name", name))
    return model, str(name) if is_hub_name_or_folder(name) else model.name, f"base_model_name = {name}"


def _same_kind(name: Any, word: str) -> bool:
    return isinstance(name, str) and word.partition("-")[0] in name.casefold()


def _length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    return None, float(to.number(settings["epochs"]))


def _examples_per_step(settings: Mapping[str, Any]) -> int:
    return to.whole(settings["batch_size"]) * to.whole(settings.get("gradient_accumulation_steps", 1))


_for_lora = only_if(lambda look: look.peek("training_method") == "LORA", "all weights are trained")


def _method(value: Any, look: Look) -> Any:
    if value in ("LORA", "FINE_TUNE"):
        return "lora" if value == "LORA" else "full"
    return Outcome({"method": "lora"}, (Lost("a LoRA takes its place: embeddings and autoencoders are not trained"),))


def _peft(value: Any, look: Look) -> Any:
    return Lost("a LoRA, as here", False) if value == "LORA" else Lost("a LoRA takes its place")


def _targets(value: Any, look: Look) -> Any:
    """Returns the layers whose paths hold one of the filter's texts."""
    words = [word.strip() for word in str(value or "").split(",") if word.strip()]
    if look.get("layer_filter_regex") is True and words:
        return Outcome(
            {"lora_targets": ["all_linear"]},
            (Lost("layers are named by patterns with * here, not by regular expressions"),),
        )
    if not words or look.get("layer_filter_preset") == "full":
        return Outcome({"lora_targets": ["all_linear"]}, (Lost("layers outside the blocks get a LoRA too there"),))
    patterns = [f"*{word}*" for word in words]
    if words == ["transformer_block"]:
        patterns = ["all_linear"]
    return patterns


def _schedule(value: Any, look: Look) -> Any:
    return optim.schedule(str(value).casefold(), look)


def _warm_up(value: Any, look: Look) -> Any:
    """Returns optimizer steps: there a number above 1 counts batches, and one up to 1 is a share of the run."""
    amount = float(to.number(value))
    if amount <= 1:
        return to.warm_up()(amount if amount < 1 else 0.999999, look) if amount else 0
    return max(1, round(amount / to.count(look.get("gradient_accumulation_steps", 1))))


def _optimizer(value: Any, look: Look) -> Any:
    return optim.optimizer(str(value).replace("_", ""), look)


def _average(value: Any, look: Look) -> Any:
    """Returns the decay of a step: there it is of an update, every few steps."""
    if str(value).upper() == "OFF":
        return Lost("no average, as here", False)
    decay, steps = to.share(look.get("ema_decay", 0.999)), to.count(look.get("ema_update_step_interval", 5))
    values: dict[str, Any] = {"ema.decay": round(decay ** (1 / steps), 6)}
    return Outcome({**values, "ema.on_host": True} if str(value).upper() == "CPU" else values)


def _every(ours: str, unit_key: str) -> Convert:
    def convert(value: Any, look: Look) -> Any:
        unit = str(look.get(unit_key, "")).upper()
        if unit == "STEP":
            return to.at_least_one(value)
        if unit == "EPOCH":
            return to.every_epochs(ours)(value, look)
        if unit in ("NEVER", "ALWAYS"):
            return Lost("never, by this key", False)
        return Lost(f"it counts {unit.lower() or 'time'}s and {ours} counts steps", False)

    return convert


def _timesteps(value: Any, look: Look) -> Any:
    kind = str(value).upper()
    bias, weight = to.real(look.get("noising_bias", 0.0)), to.real(look.get("noising_weight", 0.0))
    shift = "model" if look.get("dynamic_timestep_shifting") is True else to.shift_of(look.get("timestep_shift", 1.0))
    if kind == "UNIFORM":
        return to.levels("uniform", shift)
    if kind == "LOGIT_NORMAL":
        return to.levels("logit_normal", shift, logit_mean=bias, logit_std=weight + 1)
    if kind == "HEAVY_TAIL":
        return to.levels("mode", shift, mode_scale=weight)
    near = to.levels("logit_normal", shift)
    return Outcome(near.values, (Lost("there is no such distribution of noise levels; logit_normal takes its place"),))


def _strength(value: Any, look: Look) -> Any:
    if is_off(value):
        return Lost("off, as here", False)
    delta = to.real(look.get("huber_delta", 1.0))
    mixed = not is_off(look.get("mse_strength", 1.0))
    lost_ones = (Lost("losses are not mixed here, and huber takes the place of both"),) if mixed else ()
    return Outcome({"objective.loss": "huber", "objective.huber_delta": delta}, lost_ones)


def _encoder(value: Any, look: Look) -> Lost:
    return Lost("it stays as it is here", to.truth(value))


def _prompts(value: Any, look: Look) -> Any:
    items = mappings(value)
    texts = [str(each.get("prompt", "")) for each in items if each.get("prompt")]
    if not texts:
        return Lost("no samples are asked for", False)
    if look.model.edits:
        return Lost("an edit model needs control pictures of each prompt: write samples", False)
    first = items[0]
    values: dict[str, Any] = {
        "samples.prompts": texts,
        "samples.width": to.whole(first.get("width", 512)),
        "samples.height": to.whole(first.get("height", 512)),
        "samples.seeds": [to.whole(first.get("seed", 42))],
        "samples.num_steps": to.whole(first.get("diffusion_steps", 20)),
        "samples.guidance_scale": max(1.0, to.real(first.get("cfg_scale", 7.0))),
    }
    if first.get("negative_prompt"):
        values["samples.negative_prompt"] = str(first["negative_prompt"])
    settings = {
        tuple(str(each.get(key)) for key in ("width", "height", "seed", "diffusion_steps", "cfg_scale"))
        for each in items
    }
    why = "prompts have different settings, and the first one's are taken for all"
    return Outcome(values, (Lost(why, False),) if len(settings) > 1 else ())


def _sample_every(value: Any, look: Look) -> Any:
    if not look.written.get("samples"):
        return Lost("no samples are asked for", False)
    return _every("samples.every", "sample_after_unit")(value, look)


SETTINGS: tuple[Rule, ...] = (
    Rule("base_model_name", "pretrained_model_name_or_path model_parts.transformer", to.base),
    Rule("transformer.model_name", "model_parts.transformer pretrained_model_name_or_path", to.transformer),
    *used("model_type", WHICH_MODEL),
    Rule("workspace_dir", "output_dir", to.text, default="workspace/run"),
    *harmless("output_model_destination output_model_format output_dtype",
              "files of the result are in output_dir, for diffusers and ComfyUI"),
    Rule("training_method", "method", _method, default="FINE_TUNE",
         remark="FINE_TUNE where it is left out; here a LoRA"),
    # ---- LoRA
    Rule("peft_type", "", _for_lora(_peft)),
    Rule("lora_rank", "rank", _for_lora(to.whole), default=16),
    Rule("lora_alpha", "lora_alpha", _for_lora(to.real), default=1.0, remark="1 where it is left out; here the rank"),
    Rule("layer_filter", "lora_targets", _for_lora(_targets), default="",
         remark="all linear layers where it is left out; here attention"),
    *harmless("layer_filter_preset layer_filter_regex", "see layer_filter"),
    Rule("lora_model_name", "init_lora", to.lora_file),
    Rule("lora_decompose", "adapter.kind",
         lambda value, look: "dora" if to.truth(value) else Lost("a plain LoRA, as here", False)),
    *harmless("lora_weight_dtype lora_decompose_* lokr_* oft_* loha_* bundle_additional_embeddings dora_oft",
              "a LoRA is fp32 here"),
    # ---- length and rate
    Rule("epochs", "num_train_epochs", to.whole, default=100),
    Rule("batch_size", "train_batch_size", to.whole, default=1),
    Rule("gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
    Rule("learning_rate", "learning_rate", optim.rate("optimizer.optimizer"), default=3e-6),
    Rule("transformer.learning_rate", "learning_rate", optim.rate("optimizer.optimizer")),
    Rule("learning_rate_scheduler", "lr_scheduler", _schedule),
    Rule("learning_rate_warmup_steps", "lr_warmup_steps lr_warmup_share", _warm_up, default=200,
         remark="200 where it is left out; here 0; counts batches there"),
    Rule("learning_rate_cycles", "lr_num_cycles", lambda value, look: max(1, round(to.number(value)))),
    Rule("learning_rate_min_factor", "lr_floor", lambda value, look: to.share(value)),
    *lost("custom_learning_rate_scheduler scheduler_params learning_rate_scaler",
          "the schedules here are those of lr_scheduler, and the rate is not scaled"),
    Rule("clip_grad_norm", "max_grad_norm", to.real, null=0.0),
    Rule("optimizer.optimizer", "optimizer adam8bit", _optimizer, default="ADAMW"),
    Rule("optimizer.beta1", "adam_beta1", to.real),
    Rule("optimizer.beta2", "adam_beta2", to.real),
    Rule("optimizer.eps", "adam_epsilon", to.real),
    Rule("optimizer.weight_decay", "adam_weight_decay", to.real),
    *optim.defaults_of_others("optimizer.optimizer"),
    Rule("optimizer.d0", "prodigy.d0", to.real),
    Rule("optimizer.d_coef", "prodigy.d_coef", to.real),
    Rule("optimizer.growth_rate", "prodigy.growth_rate", optim.growth),
    Rule("optimizer.slice_p", "prodigy.slice", to.whole),
    Rule("optimizer.safeguard_warmup", "prodigy.safeguard_warmup", to.truth),
    Rule("optimizer.use_bias_correction", "prodigy.bias_correction", to.truth),
    Rule("optimizer.momentum", "muon.momentum", to.real),
    Rule("optimizer.nesterov", "muon.nesterov", to.truth),
    Rule("optimizer.ns_steps", "muon.ns_steps", to.whole),
    *harmless("optimizer.relative_step", "see optimizer.optimizer"),
    *harmless("optimizer.stochastic_rounding optimizer.fused optimizer.fused_back_pass optimizer.foreach "
              "optimizer.__version optimizer.optim_bits optimizer.min_8bit_size optimizer.percentile_clipping "
              "optimizer.block_wise optimizer.is_paged optimizer.d_limiter optimizer.factored* "
              "optimizer.split_groups* optimizer.use_schedulefree optimizer.use_stableadamw "
              "optimizer.weight_decay_by_lr optimizer.rms_rescaling optimizer.centered_wd* optimizer.state_precision "
              "optimizer.orthogonal_gradient optimizer.decouple optimizer.muon_* optimizer.weight_lr_power "
              "optimizer.quant_block_size", "belongs to other optimizers, or is about memory"),
    *lost("optimizer.*", "the optimizer has no such argument here"),
    Rule("train_dtype", "mixed_precision", to.precision),
    # ---- noise levels and loss
    Rule("timestep_distribution", "objective.sigma_distribution objective.shift", _timesteps, default="UNIFORM"),
    *harmless("noising_weight noising_bias timestep_shift dynamic_timestep_shifting", "see timestep_distribution"),
    Rule("min_noising_strength", "objective.min_sigma", to.real),
    Rule("max_noising_strength", "objective.max_sigma", to.real),
    Rule("transformer.guidance_scale", "objective.guidance",
         lambda value, look: to.real(value) if look.model.guided else Lost("no such input", False)),
    Rule("huber_strength", "objective.loss", _strength),
    *harmless("huber_delta", "see huber_strength"),
    Rule("mse_strength", "", fine(0, 1, otherwise="the loss has no factor here")),
    *lost("mae_strength log_cosh_strength", "the loss is mse or huber"),
    Rule("loss_weight_fn", "", fine("CONSTANT", otherwise="losses are weighed by objective.weighting_scheme alone")),
    *harmless("vb_loss_strength loss_weight_strength loss_scaler", "see loss_weight_fn"),
    *lost("offset_noise_weight generalized_offset_noise perturbation_noise_weight "
          "rescale_noise_scheduler_to_zero_terminal_snr force_v_prediction force_epsilon_prediction "
          "dropout_probability cep_gamma", "flow matching has no such thing here"),
    # ---- captions and text encoders
    Rule("text_encoder.dropout_probability", "data_config.caption_dropout_rate", to.real),
    Rule("text_encoder.train", "", _encoder, default=True),
    Rule("text_encoder_2.train", "", _encoder),
    Rule("text_encoder_sequence_length", "data_config.max_text_tokens",
         only_if(lambda look: not look.model.guided, "CLIP reads 77 tokens")(to.whole)),
    Rule("text_encoder_2_sequence_length", "data_config.max_text_tokens",
         lambda value, look: to.whole(value) if look.model.guided else Lost( "there is no such encoder", False)),
    # ---- masks
    *used("masked_training unmasked_weight", "see the folders"),
    *lost("masked_prior_preservation_weight", "the base is no target outside of masks"),
    *harmless("unmasked_probability normalize_masked_area_loss custom_conditioning_image",
              "belongs to masked_training: masks count always, and losses are normalized by their area"),
    # ---- average
    Rule("ema", "ema.decay", _average),
    *harmless("ema_decay ema_update_step_interval non_ema_sampling", "see ema"),
    # ---- formats and memory
    Rule("transformer.weight_dtype", "quantize", to.quantization),
    Rule("transformer.train", "",
         lambda value, look: Lost("the transformer is what is trained", not to.truth(value))),
    *harmless("transformer.* text_encoder.* text_encoder_2.* vae.* weight_dtype fallback_train_dtype quantization.* "
              "gradient_checkpointing layer_offload_fraction enable_activation_offloading async_offloading "
              "enable_async_offloading compile attention_mechanism enable_autocast_cache train_device temp_device "
              "force_circular_padding svd_*", "the planner fits model and encoders into memory by itself"),
    # ---- saving, samples, logs
    Rule("save_every", "checkpointing_steps", _every("checkpointing_steps", "save_every_unit")),
    Rule("save_after", "checkpointing_steps", _every("checkpointing_steps", "save_after_unit")),
    Rule("backup_after", "checkpointing_steps", _every("checkpointing_steps", "backup_after_unit")),
    Rule("rolling_backup_count", "checkpoints_total_limit",
         only_if(lambda look: look.peek("rolling_backup") is True, "all are kept, as here")(to.whole)),
    *harmless("save_every_unit save_after_unit backup_after_unit rolling_backup backup_before_save save_skip_first "
              "save_filename_prefix continue_last_backup",
              "a saved LoRA and a backup are the same here: see checkpointing_steps"),
    Rule("samples", "samples.prompts", _prompts),
    Rule("sample_after", "samples.every", _sample_every),
    *harmless("sample_after_unit sample_skip_first sample_*_format samples_to_tensorboard",
              "not needed for samples here"),
    Rule("tensorboard", "report_to",
         lambda value, look: "tensorboard" if to.truth(value) else Lost("no tracker, as here", False), default=True),
    *harmless("tensorboard_*", "start it with tensorboard --logdir"),
    *harmless("resolution aspect_ratio_bucketing image_caching text_caching latent_caching "
              "clear_cache_before_training cache_dir frames concepts caching_threads dataloader_threads "
              "prefetch_next_batch only_cache",
              "see data_config; pictures are bucketed and cached here by themselves"),
    *harmless("validation validate_after validate_after_unit",
              "losses are measured on held-out pictures where there are some"),
    *harmless("unet.* prior.* text_encoder_3* text_encoder_4* text_encoder_2_* text_encoder_layer_skip "
              "effnet_encoder.* decoder* unconditional_transformer.* embedding* additional_embeddings "
              "preserve_embedding_norm", "belongs to other models"),
    *harmless("debug_* multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce "
              "async_gradient_reduce* prevent_overwrites include_train_config optimizer_defaults* cloud.* secrets.* "
              "__version concept_file_name sample_definition_file_name", "not about the training"),
)  # fmt: skip

ONE_TRAINER = Peer(
    name="OneTrainer",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=_length,
    examples_per_step=_examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    describes_data=_describes_data,
    files="The JSON file of a training or a preset; the files of `concept_file_name` and `sample_definition_file_name` "
    "are found by themselves.",
    misses=(
        "Changes of colour, rotation and masks drawn in the window; forty-five optimizers; embeddings.",
        "Backups and samples by minutes.",
    ),
    remarks=(
        "`lora_alpha` is 1 and `learning_rate_warmup_steps` is 200 where they are left out.",
        "`ema_decay` is of every fifth step there; the import writes the decay of one step.",
    ),
)
