"""diffusion-pipe: a TOML file with the tables model, adapter and optimizer, and a TOML file of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import adapters
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.models import Model, find_model, is_hub_name_or_folder, model_of
from pixtune.migration.peer import NOT_HERE, WHICH_MODEL, Options, Part, Parts, Peer, flat, mappings
from pixtune.migration.reading import Source, find_second, read_second
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost, only_if, used


def _recognizes(source: Source) -> bool:
    tree = source.tree
    model = tree.get("model") if isinstance(tree, Mapping) else None
    return isinstance(model, Mapping) and "type" in model and ("optimizer" in tree or "dataset" in tree)


def _describes_data(tree: Any) -> str | None:
    is_data = isinstance(tree, Mapping) and isinstance(tree.get("directory"), list)
    return "the file with the tables [model], [adapter] and [optimizer]" if is_data else None


def _take_apart(source: Source, options: Options) -> Parts:
    tree = source.tree
    problems: list[tuple[str, Lost]] = []
    named = tree.get("dataset")
    path = options.dataset or (find_second(named, source.folder) if isinstance(named, str) else None)
    folders, file = [], ""
    if path is not None:
        folders, file = _directories(read_second(path, source.name), path.name), f"{path.name}: "
    elif named:
        problems.append((f"dataset = {named}", NOT_HERE))
    held_out = []
    for each in tree.get("eval_datasets", []) if isinstance(tree.get("eval_datasets"), list) else []:
        config = each.get("config") if isinstance(each, Mapping) else each
        found = find_second(config, source.folder) if isinstance(config, str) else None
        if found is None:
            problems.append(
                (f"eval_datasets: {config}", Lost("it is not here: write validation.held_out_dir", False, True))
            )
        else:
            held_out += [
                str(folder["path"])
                for folder in _directories(read_second(found, source.name), found.name)
                if folder.get("path")
            ]
    settings = flat({key: value for key, value in tree.items() if key not in ("dataset", "eval_datasets")})
    extra: dict[str, Any] = {} if "adapter" in tree else {"method": ("full", "no table [adapter]: all weights")}
    return Parts(
        Part(settings),
        tuple(Part(each, file) for each in folders),
        held_out=tuple(held_out),
        lost=tuple(problems),
        extra=extra,
    )


def _directories(tree: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(tree, Mapping):
        raise MigrationError(f"{name} is no data set of diffusion-pipe: it has no [[directory]]")
    shared = {key: value for key, value in tree.items() if key != "directory"}
    return [{**shared, **each} for each in mappings(tree.get("directory", []))]


def _model(parts: Parts) -> tuple[Model, str, str]:
    written = parts.settings.written
    kind, folder, file = (written.get(f"model.{key}") for key in ("type", "diffusers_path", "transformer_path"))
    model = model_of(("model.type", kind))
    for path in (file, folder):  # Kontext and the edit models have the same type
        found = find_model(path) if isinstance(path, str) else None
        if isinstance(found, Model) and found.layers == model.layers:
            model = found
            break
    takes_folder = file is None and is_hub_name_or_folder(folder)
    origin = f"model.diffusers_path = {folder}" if takes_folder else f"model.type = {kind}"
    return model, str(folder) if takes_folder else model.name, origin


def _length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    steps, epochs = settings.get("max_steps"), settings.get("epochs")
    return (to.whole(steps) if steps else None), (float(to.number(epochs)) if epochs else None)


def _micro_batch(settings: Mapping[str, Any]) -> int:
    size = settings.get("micro_batch_size_per_gpu", 1)
    while isinstance(size, list) and size:
        size = size[-1]
    return to.whole(size)


def _examples_per_step(settings: Mapping[str, Any]) -> int:
    return _micro_batch(settings) * to.whole(settings.get("gradient_accumulation_steps", 1))


def _batch(value: Any, look: Look) -> Any:
    if not isinstance(value, list):
        return to.whole(value)
    size = _micro_batch({"micro_batch_size_per_gpu": value})
    return Outcome({"train_batch_size": size}, (Lost("one batch size for all sizes of pictures here, the smallest"),))


_for_lora = only_if(
    lambda look: any(key.startswith("adapter.") for key in look.written), "without [adapter] all weights are trained"
)


def _adapter(value: Any, look: Look) -> Any:
    found = adapters.kind(to.text(value))
    if found.values.get("adapter.kind") != "lokr":
        return found
    both = look.get("adapter.decompose_both") is True
    values = {"adapter.lokr_low_rank": "both" if both else adapters.low_rank(look.peek("adapter.rank"))}
    if look.get("adapter.decompose_factor") is not None:
        values["adapter.lokr_factor"] = adapters.factor(look.get("adapter.decompose_factor"), look)
    return Outcome({**found.values, **values})


def _timesteps(value: Any, look: Look) -> Any:
    kind = to.text(value).casefold()
    shift: float | str = "none"
    if look.get("model.shift"):
        shift = to.shift_of(look.get("model.shift"))
    elif look.get("model.flux_shift"):
        shift = "model"
    if kind == "uniform":
        return to.levels("uniform", shift)
    std = to.real(look.get("model.sigmoid_scale", 1.0))
    found = to.levels("logit_normal", shift, logit_std=std)
    if kind != "logit_normal":
        return Outcome(found.values, (Lost("logit_normal takes its place"),))
    if shift == "model" and not look.model.guided:
        why = "the shift of FLUX there; here the model's own, which rises less with the size"
        return Outcome(found.values, (Lost(why),))
    return found


def _betas(value: Any, look: Look) -> Any:
    if value != "by type":
        return optim.optimizer_arguments({"betas": value}, look)
    if "optimi" in str(look.peek("optimizer.type", "")).casefold():
        return Outcome({"adam_beta2": 0.99})
    return Lost("as here", False)


def _repeats(value: Any, look: Look) -> Any:
    """Returns repeats of pictures: each stands in an epoch once for each size, and here once."""
    sizes = look.get("resolutions")
    return to.real(value) * max(1, len(sizes) if isinstance(sizes, list) else 1)


def _huber(value: Any, look: Look) -> Any:
    if not to.number(value):
        return Lost("off, as here", False)
    return Outcome({"objective.loss": "huber", "objective.huber_delta": to.real(value)})


def _forms(value: Any, look: Look) -> Any:
    if not to.number(value):
        return Lost("tags stay in order, as here", False)
    return Outcome({"shuffle_tags": True, "caption_variants": min(256, to.whole(value))})


def _tracker(value: Any, look: Look) -> Any:
    return "wandb" if to.truth(value) else Lost("no tracker, as here", False)


def _project(value: Any, look: Look) -> Any:
    return to.text(value) or Lost("none", False)


def _path(value: Any, look: Look) -> Any:
    if is_hub_name_or_folder(value) and not look.peek("model.transformer_path"):
        return Outcome()
    return Lost(f"encoders and autoencoder are those of {look.model.name} from the hub", False)


SETTINGS: tuple[Rule, ...] = (
    Rule("output_dir", "output_dir", to.text, default="output"),
    Rule("epochs", "num_train_epochs", to.at_least_one, default=1),
    Rule("max_steps", "max_train_steps", to.at_least_one),
    Rule("micro_batch_size_per_gpu", "train_batch_size", _batch, default=1),
    Rule("gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
    Rule("gradient_clipping", "max_grad_norm", to.real),
    Rule("warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up()),
    Rule("lr_scheduler", "lr_scheduler", optim.schedule),
    Rule("pseudo_huber_c", "objective.huber_delta", _huber),
    *lost("force_constant_lr", "write learning_rate, and resume_with_changes_in: [learning_rate]"),
    # ---- adapter
    Rule("adapter.type", adapters.KEYS, _for_lora(_adapter)),
    Rule("adapter.type", "lora_targets", _for_lora(lambda value, look: ["all_linear"]),
         remark="all linear layers of the blocks; here attention"),
    Rule("adapter.rank", "rank", _for_lora(adapters.rank)),
    *lost("adapter.dropout", "a LoRA has no dropout here"),
    Rule("adapter.init_from_existing", "init_lora", to.lora_file, remark="a folder there, and a file here"),
    *lost("adapter.fuse_adapters adapter.exclude_linear_modules adapter.alpha",
          "one frozen LoRA is possible: training_adapter.path"),
    *harmless("adapter.decompose_factor adapter.decompose_both", "belongs to type lokr"),
    *harmless("adapter.dtype save_dtype", "a LoRA is fp32 here, in training and in its file"),
    # ---- optimizer
    Rule("optimizer.type", "optimizer adam8bit", optim.optimizer),
    Rule("optimizer.lr", "learning_rate", optim.rate("optimizer.type")),
    Rule("optimizer.betas", "adam_beta1 adam_beta2", _betas, default="by type",
         remark="0.9 and 0.99 for adamw_optimi where they are left out"),
    Rule("optimizer.weight_decay", "adam_weight_decay", to.real),
    Rule("optimizer.eps", "adam_epsilon", to.real),
    *harmless("optimizer.gradient_release optimizer.stabilize", "about memory, or off"),
    *optim.defaults_of_others("optimizer.type"),
    Rule("optimizer.d_coef", "prodigy.d_coef", to.real),
    Rule("optimizer.d0", "prodigy.d0", to.real),
    *lost("optimizer.*", "the optimizer has no such argument here"),
    # ---- model
    *used("model.type", WHICH_MODEL),
    Rule("model.diffusers_path", "pretrained_model_name_or_path", _path),
    Rule("model.transformer_path", "model_parts.transformer pretrained_model_name_or_path", to.transformer),
    *harmless("model.vae_path model.text_encoder_path model.llm_path model.clip_path model.t5_path "
              "model.text_encoders model.vae model.merge_adapters",
              "encoders come with pretrained_model_name_or_path"),
    Rule("model.diffusion_model", "model_parts.transformer pretrained_model_name_or_path", to.transformer),
    Rule("model.dtype", "mixed_precision", to.precision),
    Rule("model.transformer_dtype", "quantize", to.quantization),
    Rule("model.diffusion_model_dtype", "quantize", to.quantization),
    Rule("model.timestep_sample_method", "objective.sigma_distribution objective.shift", _timesteps,
         default="logit_normal"),
    *harmless("model.shift model.flux_shift model.sigmoid_scale", "see timestep_sample_method"),
    Rule("model.guidance", "objective.guidance", to.real),
    Rule("model.min_t", "objective.min_sigma", to.real),
    Rule("model.max_t", "objective.max_sigma", to.real),
    Rule("model.max_sequence_length", "data_config.max_text_tokens", to.whole),
    *lost("model.bypass_guidance_embedding model.transformer_lr", "there is no such thing here"),
    # ---- saving
    Rule("save_every_n_steps", "checkpointing_steps", to.at_least_one),
    Rule("save_every_n_epochs", "checkpointing_steps", to.every_epochs("checkpointing_steps"),
         remark="turned into steps"),
    *harmless("save_every_n_examples checkpoint_every_n_epochs checkpoint_every_n_minutes checkpoint_every_n_steps",
              "a saved LoRA and a checkpoint are the same here: see checkpointing_steps"),
    *harmless("resume_from_checkpoint regenerate_cache", "a run here goes on by resume_from_checkpoint=latest"),
    # ---- judging
    Rule("eval_every_n_steps", "validation.every", to.at_least_one),
    Rule("eval_every_n_epochs", "validation.every", to.every_epochs("validation.every"), remark="turned into steps"),
    *harmless("eval_before_first_step eval_every_n_examples eval_micro_batch_size_per_gpu "
              "eval_gradient_accumulation_steps image_eval_micro_batch_size_per_gpu disable_block_swap_for_eval",
              "losses are measured before the first step always"),
    Rule("monitoring.enable_wandb", "report_to", _tracker),
    Rule("monitoring.wandb_tracker_name", "tracker_project_name", _project),
    *harmless("monitoring.* logging_steps steps_per_print x_axis_examples tensorboard", "not about the training"),
    *harmless("activation_checkpointing reentrant_activation_checkpointing blocks_to_swap compile pipeline_stages "
              "partition_method partition_split caching_batch_size map_num_proc",
              "the planner recomputes and streams as little as memory allows"),
    *harmless("video_clip_mode image_micro_batch_size_per_gpu upload_hf_from_epoch huggingface_repo",
              "about videos, or uploads"),
)  # fmt: skip

FOLDERS: tuple[Rule, ...] = (
    Rule("path", "img_dir", to.text),
    Rule("control_path", "control_dir", to.one_or_several),
    Rule("control_paths", "control_dir", to.one_or_several),
    Rule("mask_path", "mask_dir", to.text),
    Rule("mask_path", "weight_outside_mask allow_missing_masks",
         lambda value, look: Outcome( {"weight_outside_mask": 0.0, "allow_missing_masks": True}),
         remark="0 outside masks there; here 0.02"),
    Rule("resolutions", "img_size", to.sides, default=[512],
         remark="all of them are used in an epoch there; here each turn draws one"),
    Rule("num_repeats", "repeats", _repeats, default=1, remark="times the number of resolutions"),
    Rule("caption_prefix", "caption_prefix", lambda value, look: to.text(value).rstrip(", ") or Lost("none", False)),
    Rule("cache_shuffle_num", "caption_variants", _forms),
    Rule("shuffle_tags", "shuffle_tags", to.truth_or("tags stay in order, as here")),
    *harmless("cache_shuffle_delimiter", "tags are the parts of a caption between commas"),
    Rule("enable_ar_bucket", "", to.in_buckets("one shape")),
    Rule("(small pictures are enlarged)", "upscale", default=True),
    *lost("ar_buckets size_buckets", "buckets are made from the pictures' own ratios here"),
    *harmless("min_ar max_ar num_ar_buckets frame_buckets", "buckets are made from the pictures' own ratios here"),
    *harmless("skip_empty_caption", "a picture without a caption file is a problem that pixtune validate lists"),
    *lost("default_text_file_caption uncond_fraction", "write captions; data_config.caption_dropout_rate drops some"),
)  # fmt: skip

DIFFUSION_PIPE = Peer(
    name="diffusion-pipe",
    recognizes=_recognizes,
    take_apart=_take_apart,
    model=_model,
    length=_length,
    examples_per_step=_examples_per_step,
    settings=SETTINGS,
    folders=FOLDERS,
    describes_data=_describes_data,
    files="The TOML file with the tables `[model]`, `[adapter]` and `[optimizer]`; that of `dataset` is found.",
    misses=("Pipeline parallelism over several GPUs, video models, optimizers of pytorch-optimizer.",),
    remarks=("A LoRA's alpha is its rank in both.",),
)
