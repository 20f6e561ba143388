"""ai-toolkit: one YAML or JSON file, whose first `process` is the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import adapters
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, is_hub_name_or_folder, model_of
from pixtune.migration.peer import WHICH_MODEL, Options, Part, Parts, Peer, flat, mappings
from pixtune.migration.reading import Source
from pixtune.migration.rules import Look, Lost, Outcome, Rule, fine, harmless, is_off, lost, only_if, used
from pixtune.migration.samples import guidance, only_with_prompts, prompts_with_options

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer", "fine_tune")


def _recognizes(source: Source) -> bool:
    tree = source.tree
    config = tree.get("config") if isinstance(tree, Mapping) else None
    return isinstance(config, Mapping) and isinstance(config.get("process"), list)


def _take_apart(source: Source, options: Options) -> Parts:
    config = source.tree["config"]
    processes = mappings(config["process"])
    if not processes:
        raise MigrationError(f"{source.name} is of ai-toolkit and its config.process holds no training")
    process = processes[0]
    kind = process.get("type", "sd_trainer")
    if kind not in TRAINERS:
        raise MigrationError(
            f"{source.name} is a job of ai-toolkit of the type {kind!r:.60}, which trains no LoRA on pictures with "
            f"captions: the types {', '.join(TRAINERS)} are read"
        )
    datasets = mappings(process.get("datasets", []))
    settings = flat({key: value for key, value in process.items() if key != "datasets"})
    settings |= flat({key: value for key, value in config.items() if key != "process"})
    settings |= flat({key: value for key, value in source.tree.items() if key != "config"})
    folder, name = settings.pop("training_folder", "output"), settings.pop("name", "ai_toolkit_run")
    others = [("config.process[1]", Lost("one training a config is possible: import the others by themselves"))]
    return Parts(
        Part(settings),
        tuple(
            Part(flat(each), _label(number, datasets)) for number, each in enumerate(datasets) if not each.get("is_reg")
        ),
        tuple(Part(flat(each), _label(number, datasets)) for number, each in enumerate(datasets) if each.get("is_reg")),
        lost=tuple(others[: len(processes) - 1]),
        extra={"output_dir": (f"{folder}/{name}", f"training_folder = {folder}, name = {name}")},
    )


def _label(number: int, datasets: Sequence[Any]) -> str:
    return f"datasets[{number}]." if len(datasets) > 1 else "datasets."


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    name = written.get("model.name_or_path")
    flags = {"is_flux": "flux", "is_xl": "sdxl", "is_v3": "sd3", "is_pixart": "pixart", "is_lumina2": "lumina"}
    by_flag = [(f"model.{flag}", word) for flag, word in flags.items() if written.get(f"model.{flag}") is True]
    arch = str(written.get("model.arch") or "").partition(":")[0]
    if arch == "flux" or by_flag == [("model.is_flux", "flux")]:  # then the name tells dev from schnell and Flex
        model = model_of(("model.name_or_path", name), ("model.arch", "flux"))
    else:
        model = model_of(("model.arch", arch), *by_flag, ("model.name_or_path", name))
    return model, str(name) if is_hub_name_or_folder(name) else model.name, f"model.name_or_path = {name}"


def _length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    return to.whole(settings["train.steps"]), None


def _examples_per_step(settings: Mapping[str, Any]) -> int:
    return to.whole(settings.get("train.batch_size", 1)) * to.whole(settings.get("train.gradient_accumulation", 1))


def _steps(value: Any, look: Look) -> int:
    """Returns optimizer steps: with the older `gradient_accumulation_steps` each micro-batch counts as one."""
    return math.ceil(float(to.number(value)) / max(1, to.whole(look.peek("train.gradient_accumulation_steps", 1))))


_for_lora = only_if(
    lambda look: any(key.startswith("network.") for key in look.written), "without a network all weights are trained"
)


def _network(value: Any, look: Look) -> Any:
    found = adapters.kind(to.text(value))
    if found.values.get("adapter.kind") != "lokr":
        return found
    whole = look.get("network.lokr_full_rank", False) is True
    factor = adapters.factor(look.get("network.lokr_factor", -1), look)
    return Outcome(
        {**found.values, "adapter.lokr_low_rank": "none" if whole else "larger", "adapter.lokr_factor": factor}
    )


def _targets(value: Any, look: Look) -> Any:
    """Returns the layers of the adapter: all in the blocks, or those whose paths hold a text."""
    if is_off(value):
        return ["all_linear"]
    prefix = "transformer."  # all paths begin with it there, so that what begins with it is the beginning of one
    return [f"{word.removeprefix(prefix)}*" if word.startswith(prefix) else f"*{word}*" for word in to.texts(value)]


def _floor(value: Any, look: Look) -> Any:
    """Returns the share of the rate that a schedule falls to, from the lowest rate."""
    rate = to.real(look.get("train.lr", 1e-6))
    return to.share(min(to.real(value) / rate, 1.0)) if rate else Lost("the rate is 0", False)


def _timesteps(value: Any, look: Look) -> Any:
    kind = to.text(value).casefold()
    if kind == "sigmoid":
        return to.levels("sigmoid", "none")
    if kind in ("shift", "flux_shift", "lumina2_shift"):
        return to.levels("uniform", "model")
    if kind == "linear":
        return to.levels("uniform", "none")
    near = (
        to.levels("uniform", "none")
        if kind in ("weighted", "next_sample", "one_step")
        else to.levels("logit_normal", "none")
    )
    why = {
        "weighted": "levels are drawn evenly, as there; its weights of their losses have no counterpart",
        "lognorm_blend": "logit_normal is the nearest distribution",
    }.get(kind, "there is no such way of drawing noise levels")
    return Outcome(near.values, (Lost(why),))


def _quantize(value: Any, look: Look) -> Any:
    if not to.truth(value):
        return Outcome({"quantize": False})
    return to.quantization(str(look.get("model.qtype", "qfloat8")).partition("|")[0], look)


def _average(value: Any, look: Look) -> Any:
    if not to.truth(value):
        return Lost("no average, as here", False)
    return Outcome({"ema.decay": to.real(look.get("train.ema_config.ema_decay", 0.999))})


def _trigger(value: Any, look: Look) -> Any:
    word = to.text(value)
    if not word:
        return Lost("no trigger word, as here", False)
    why = "[trigger] inside a caption file is not replaced here: write the word there"
    return Outcome({"trigger_words": [word], "data_config.caption_prefix": word}, (Lost(why),))


def _unloaded(value: Any, look: Look) -> Any:
    """Returns one caption for all pictures: without its text encoder it trains on the trigger word, or on no text."""
    if not to.truth(value) or look.peek("train.cache_text_embeddings"):
        return Lost("encoders leave the GPU after encoding here always", False)
    return Outcome({"data_config.caption_text": str(look.get("trigger_word") or "")})


def _rate(value: Any, look: Look) -> Any:
    """Returns the rate; below 0.1 it is 1 for Prodigy there."""
    if optim.is_prodigy(look.peek("train.optimizer")) and to.number(value) < 0.1:
        return Outcome({"learning_rate": 1.0}, (Lost("below 0.1 it is 1 for Prodigy there", False),))
    return optim.rate("train.optimizer")(value, look)


def _adapter(value: Any, look: Look) -> Any:
    if is_off(value):
        return Lost("none, as here", False)
    path = to.text(value)
    if path.count("/") == 1 and not path.endswith(".safetensors"):
        return Lost("a training adapter is a file here: download it, and give its path as training_adapter.path")
    return path


def _regularization_weight(value: Any, look: Look) -> Any:
    return Lost("it counts where is_reg folders are", False) if to.number(value) == 1 else to.real(value)


def _masks_weight(value: Any, look: Look) -> Any:
    if not look.peek("mask_path") and not look.peek("alpha_mask"):
        return Lost("there are no masks", False)
    return to.real(value)


def _loss(value: Any, look: Look) -> Any:
    name = to.text(value).casefold()
    if name in ("mse", "l2"):
        return "mse"
    if name in ("huber", "pseudo_huber"):
        return "huber"
    return Outcome({"objective.loss": "mse"}, (Lost("mse takes its place"),))


SETTINGS: tuple[Rule, ...] = (
    Rule("type", "", lambda value, look: Lost("the training that is read", False),
         remark="sd_trainer, diffusion_trainer"),
    Rule("trigger_word", "data_config.caption_prefix trigger_words", _trigger),
    # ---- network
    Rule("network.type", adapters.KEYS, _for_lora(_network)),
    Rule("network.rank", "rank", adapters.rank),
    Rule("network.linear", "rank", adapters.rank),
    Rule("network.alpha", "lora_alpha", to.real),
    Rule("network.linear_alpha", "lora_alpha", _for_lora(to.real), default=1.0,
         remark="1 where it is left out; here the rank"),
    Rule("network.network_kwargs.only_if_contains", "lora_targets", _for_lora(_targets), default=[],
         remark="all linear layers of the blocks there; here attention"),
    *lost("network.network_kwargs.ignore_if_contains", "name the layers that are meant in lora_targets"),
    *lost("network.dropout", "a LoRA has no dropout here"),
    *harmless("network.conv network.conv_alpha", "these models have no convolutions to adapt"),
    *harmless("network.lokr_full_rank network.lokr_factor", "belongs to type lokr"),
    *harmless("network.transformer_only network.split_multistage_loras", "only the transformer is trained here"),
    # ---- saving
    Rule("save.save_every", "checkpointing_steps", _steps, default=1000),
    Rule("save.max_step_saves_to_keep", "checkpoints_total_limit", to.at_least_one, default=5),
    *harmless("save.dtype save.save_dtype save.save_format",
              "LoRA files are safetensors in fp32, for diffusers and ComfyUI"),
    *harmless("save.push_to_hub save.hf_repo_id save.hf_private", "nothing is uploaded here"),
    # ---- training
    Rule("train.batch_size", "train_batch_size", to.whole, default=1),
    Rule("train.steps", "max_train_steps", _steps, default=1000,
         remark="divided by the older gradient_accumulation_steps, with which each micro-batch counts as a step"),
    Rule("train.gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
    Rule("train.gradient_accumulation", "gradient_accumulation_steps", to.whole),
    Rule("train.optimizer", "optimizer adam8bit", optim.optimizer, default="adamw"),
    Rule("train.lr", "learning_rate", _rate, default=1e-6),
    Rule("train.unet_lr", "learning_rate", _rate),
    Rule("train.optimizer_params.weight_decay", "adam_weight_decay", to.real),
    Rule("train.optimizer_params.betas", "adam_beta1 adam_beta2",
         lambda value, look: optim.optimizer_arguments({"betas": value}, look)),
    Rule("train.optimizer_params.eps", "adam_epsilon", to.real, default=1e-6),
    Rule("train.optimizer_params.d0", "prodigy.d0", to.real),
    Rule("train.optimizer_params.d_coef", "prodigy.d_coef", to.real),
    Rule("train.optimizer_params.use_bias_correction", "prodigy.bias_correction", to.truth),
    Rule("train.optimizer_params.safeguard_warmup", "prodigy.safeguard_warmup", to.truth),
    *harmless("train.optimizer_params.decouple", "weight decay is decoupled here always"),
    *lost("train.optimizer_params.*", "the optimizer has no such argument here"),
    *optim.defaults_of_others("train.optimizer"),
    Rule("train.lr_scheduler", "lr_scheduler", optim.schedule),
    Rule("train.lr_scheduler_params.num_warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up()),
    Rule("train.lr_scheduler_params.warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up()),
    Rule("train.lr_scheduler_params.power", "lr_power", to.real),
    Rule("train.lr_scheduler_params.num_cycles", "lr_num_cycles", to.whole),
    Rule("train.lr_scheduler_params.eta_min", "lr_floor", _floor, remark="over the rate"),
    *lost("train.lr_scheduler_params.*", "the schedule has no such argument here"),
    Rule("train.max_grad_norm", "max_grad_norm", to.real, default=1.0),
    Rule("train.dtype", "mixed_precision", to.precision),
    Rule("train.timestep_type", "objective.sigma_distribution objective.shift", _timesteps, default="sigmoid"),
    Rule("train.linear_timesteps", "", to.unless_off("its weights of noise levels have no counterpart")),
    Rule("train.linear_timesteps2", "", to.unless_off("its weights of noise levels have no counterpart")),
    Rule("train.content_or_style", "",
         fine("balanced", otherwise="more noise (content) or less (style) is preferred: move objective.logit_mean")),
    Rule("train.min_denoising_steps", "", to.unless_off("write objective.max_sigma = 1 - it / 1000")),
    Rule("train.max_denoising_steps", "", fine(999, 1000, otherwise="write objective.min_sigma = 1 - it / 1000")),
    Rule("train.loss_type", "objective.loss", _loss),
    Rule("train.ema_config.use_ema", "ema.decay", _average),
    *harmless("train.ema_config.ema_decay", "see use_ema"),
    *lost("train.ema_config.*", "the average has a decay alone"),
    Rule("train.reg_weight", "prior_preservation.loss_weight", _regularization_weight),
    Rule("train.train_text_encoder", "", to.unless_off("text encoders stay as they are")),
    Rule("train.train_unet", "", lambda value, look: Lost("the transformer is what is trained", not to.truth(value))),
    Rule("train.unload_text_encoder", "data_config.caption_text", _unloaded,
         remark="alone, it trains on the trigger word in place of captions"),
    *lost("train.noise_offset train.min_snr_gamma train.snr_gamma",
          "flow matching has no offset noise and no SNR weights"),
    *lost("train.diff_output_preservation train.blank_prompt_preservation train.do_differential_guidance "
          "train.do_guidance_loss train.inverted_mask_prior train.do_prior_divergence train.correct_pred_norm "
          "train.short_and_long_captions train.bypass_guidance_embedding train.do_cfg train.force_consistent_noise "
          "train.start_step", "prior_preservation keeps what the model knows, and nothing else does"),
    *harmless("train.diff_output_preservation_multiplier train.diff_output_preservation_class "
              "train.blank_prompt_preservation_multiplier train.differential_guidance_scale "
              "train.guidance_loss_target train.inverted_mask_prior_multiplier",
              "belongs to a loss that is listed where it is on"),
    *harmless("train.gradient_checkpointing",
              "the planner recomputes as little as memory allows; the result is the same"),
    *harmless("train.cache_text_embeddings", "captions are encoded once here always"),
    *harmless("train.noise_scheduler train.num_train_timesteps", "flow matching is what these models are trained by"),
    *harmless("train.xformers train.sdp train.attention_backend",
              "the fastest attention that passes its trial is taken"),
    *harmless("train.skip_first_sample train.force_first_sample train.disable_sampling train.text_encoder_lr "
              "train.embedding_lr train.adapter_lr train.refiner_lr train.train_refiner train.merge_network_on_save "
              "train.switch_boundary_every train.single_item_batching", "without effect on these weights"),
    # ---- model
    Rule("model.name_or_path", "pretrained_model_name_or_path model_parts.transformer", to.base),
    *used("model.arch model.is_flux", WHICH_MODEL),
    Rule("model.quantize", "quantize", _quantize),
    Rule("model.qtype", "",
         lambda value, look: Lost("there are no accuracy recovery adapters") if "|" in str(value) else Outcome()),
    *harmless("model.quantize_te model.qtype_te model.low_vram model.layer_offloading* model.compile model.dtype "
              "model.text_encoder_bits model.vae_dtype model.te_dtype model.vae_device model.te_device "
              "model.split_model_over_gpus model.split_model_other_module_param_count_scale model.attn_masking "
              "model.use_flux_cfg model.quantize_kwargs*",
              "the planner fits model and encoders into memory by itself"),
    Rule("model.assistant_lora_path", "training_adapter.path", _adapter),
    *lost("model.lora_path model.unet_path model.vae_path model.te_name_or_path model.refiner_name_or_path "
          "model.inference_lora_path", "a model is one folder here"),
    *harmless("model.extras_name_or_path", "a model is one folder here"),
    *lost("model.model_kwargs.*", "controls are brought near to data_config.control_size here"),
    # ---- samples
    Rule("sample.neg", "samples.negative_prompt",
         only_with_prompts(lambda value, look: Lost("none, as here", False) if is_off(value) else to.text(value))),
    Rule("sample.sample_every", "samples.every", only_with_prompts(_steps), default=100),
    Rule("sample.width", "samples.width", only_with_prompts(to.whole), default=512),
    Rule("sample.height", "samples.height", only_with_prompts(to.whole), default=512),
    Rule("sample.seed", "samples.seeds", only_with_prompts(lambda value, look: [to.whole(value)])),
    Rule("sample.guidance_scale", "samples.guidance_scale", only_with_prompts(guidance), default=7),
    Rule("sample.sample_steps", "samples.num_steps", only_with_prompts(to.whole), default=20),
    Rule("sample.network_multiplier", "samples.strengths", only_with_prompts( lambda value, look: [to.real(value)])),
    Rule("sample.prompts", "samples.prompts samples.controls samples.prompts_file", prompts_with_options,
         remark="options behind a prompt, such as --ctrl_img, are read"),
    Rule("sample.samples", "samples.prompts samples.controls samples.prompts_file", prompts_with_options),
    *harmless("sample.walk_seed", "all prompts are sampled with the same seeds, so that rounds can be compared"),
    *harmless("sample.sampler sample.format sample.ext sample.guidance_rescale sample.num_frames sample.fps "
              "sample.sample_start_step sample.adapter_conditioning_scale sample.refiner_start_at",
              "samples take Euler steps"),
    # ---- the rest
    Rule("logging.use_wandb", "report_to",
         lambda value, look: "wandb" if to.truth(value) else Lost("no tracker, as here", False)),
    Rule("logging.project_name", "tracker_project_name", to.text),
    *harmless("logging.* performance_log_every log_dir sqlite_db_path device job meta.* is_v2 slider.*",
              "not about the training"),
)  # fmt: skip

FOLDERS: tuple[Rule, ...] = (
    Rule("folder_path", "img_dir", to.text),
    Rule("dataset_path", "img_dir", to.text, remark="a folder; a JSON file of captions has no counterpart"),
    Rule("control_path", "control_dir", to.one_or_several),
    Rule("mask_path", "mask_dir", to.text),
    Rule("alpha_mask", "mask", lambda value, look: "alpha" if to.truth(value) else Lost("no masks, as here", False)),
    Rule("mask_min_value", "weight_outside_mask", _masks_weight, default=0.0),
    Rule("caption_ext", "caption_type", to.extension),
    Rule("caption_type", "caption_type", to.extension),
    Rule("default_caption", "",
         to.unless_off("pictures without a caption file are a problem here: write files, or caption_text for all")),
    Rule("trigger_word", "caption_prefix", lambda value, look: to.text(value) or Lost("none, as here", False)),
    Rule("caption_dropout_rate", "caption_dropout_rate", to.real),
    Rule("token_dropout_rate", "tag_dropout_rate", to.real),
    Rule("shuffle_tokens", "shuffle_tags", to.truth_or("tags stay in order, as here")),
    Rule("keep_tokens", "keep_tags", to.whole),
    Rule("resolution", "img_size", to.sides, default=512,
         remark="several sizes are all used there; here each turn draws one"),
    Rule("num_repeats", "repeats", to.real),
    Rule("loss_multiplier", "loss_weight", to.real),
    Rule("flip_x", "flip", to.truth_or("no mirror images, as here")),
    Rule("num_workers", "data_config.num_workers", to.whole),
    *lost("flip_y random_scale random_crop augmentations augments invert_mask inpaint_path unconditional_path "
          "clip_image_path random_triggers replacements poi controls square_crop use_short_captions extra_values",
          "pictures are only cropped to their buckets here, and mirrored"),
    Rule("network_weight", "",
         lambda value, look: Lost("the LoRA's strength in training is 1", to.number(value) != 1)),
    Rule("scale", "",
         lambda value, look: Lost("pictures are not scaled before they are cropped", to.number(value) != 1)),
    Rule("num_frames", "", lambda value, look: Lost("pictures are trained on, no videos", to.number(value) > 1)),
    *harmless("is_reg", "see prior_preservation.folder"),
    *harmless("type buckets bucket_tolerance cache_latents cache_latents_to_disk cache_text_embeddings "
              "cache_clip_vision_to_disk prefetch_factor full_size_control_images replay_transforms fast_image_size "
              "standardize_images debug shrink_video_to_frames fps do_i2v control_transparent_color guidance_type "
              "clip_image_from_same_folder random_triggers_max shuffle_augmentations auto_frame_count do_audio",
              "pictures are bucketed and cached here always"),
)  # fmt: skip

AI_TOOLKIT = Peer(
    name="ai-toolkit",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=_length,
    examples_per_step=_examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    files="The YAML (or JSON) file of a job, as in its `config/` or from its page.",
    misses=(
        "Differential output preservation, sliders, and the optimizer Automagic.",
        "Default captions for pictures without one, and `[trigger]` inside captions.",
        "A queue of jobs and pictures managed in the page.",
    ),
    remarks=("`sigmoid`, its usual way of drawing noise levels, is `sigma_distribution: sigmoid` with `shift: none`.",),
)
