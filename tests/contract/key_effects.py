"""For each key of the config: two values, and what of a plan or a run differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pixtune.config.schema import NOT_YET
from tests.runs import TINY_MODEL


@dataclass(frozen=True)
class Effect:
    """What a key is for, so that it can be shown to do it."""

    part: str
    """What must differ: "plan" (`observe.plan_of`), "stepped" (`observe.stepped_weights`), or a part of what
    `observe.observe_run` returns."""
    values: tuple[object, object]
    given: Mapping[str, object] = field(default_factory=dict)
    """Other keys without which this one means nothing."""
    after_a_run: bool = False
    """`output_dir` holds a run of two steps already."""

    def unbuilt(self, key: str) -> list[str]:
        """Keys that this version refuses and that are needed to see the effect. A refusal may be the effect itself."""
        return [] if self.part == "error" else [name for name in (key, *self.given) if name in NOT_YET]


EDIT = {
    "pretrained_model_name_or_path": "SHALLOW/tiny-qwen-image-edit",
    "data_config.img_dir": "SCENE/edit/images",
    "data_config.control_dir": "SCENE/edit/control",
    "data_config.control_size": 64,
}
PRIOR = {
    "prior_preservation.prompts": ["red heart"],
    "prior_preservation.num_pictures": 1,
    "prior_preservation.num_steps": 1,
    "prior_preservation.guidance_scale": 1.0,
    "train_batch_size": 5,
}
MASKED = {"data_config.mask_dir": "SCENE/masks"}
SHORT_TEXT = {"data_config.max_text_tokens": 48}
"""FLUX pads each caption to the most tokens that it reads, which are 512 otherwise."""
FLUX = {"pretrained_model_name_or_path": "SHALLOW/tiny-flux", **SHORT_TEXT}
FRESH_CACHE = {"data_config.cache_dir": "RUN/cache"}
TRACKED = {"report_to": "tensorboard"}
TAGS = {"data_config.caption_text": "one, two, three, four, five"}
DRAWN = {"samples.prompts": ["red heart"], "samples.num_steps": 1, "samples.guidance_scale": 1.0}
MEASURED = {"validation.held_out": 0.25, "validation.num_draws": 1}
TRAINED = {"pretrained_model_name_or_path": str(TINY_MODEL), "learning_rate": 1.0}
"""A model that has more to lose than one block of it."""
FULL = {"method": "full"}
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0}
MUON = {"optimizer": "muon", **FULL}
LOKR = {"adapter.kind": "lokr"}
CONTROLLED = {**EDIT, **DRAWN, "samples.prompts": ["redraw it"]}
TWO_FOLDERS: dict[str, object] = {
    "data_config.folders": [{"img_dir": "SCENE/pictures"}, {"img_dir": "SCENE/other_pictures"}],
    "data_config.img_dir": None,
}
UNIFIED = {"unified_memory": True}

IN_ONE_FILE = {"pretrained_model_name_or_path": "SCENE/transformer.safetensors"}

EFFECTS: dict[str, Effect] = {
    "pretrained_model_name_or_path": Effect("steps", ("SHALLOW/tiny-qwen-image", "SHALLOW/tiny-flux"), SHORT_TEXT),
    "model_parts.others": Effect("error", ("SHALLOW/tiny-qwen-image", "/nowhere"), IN_ONE_FILE),
    "model_parts.pipeline": Effect("error", (None, "QwenImageEditPipeline"), IN_ONE_FILE),
    "model_parts.transformer": Effect("steps", (None, "SCENE/transformer.safetensors")),
    **{
        f"model_parts.{part}": Effect("error", (None, "/nowhere"))
        for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "processor", "scheduler")
    },
    "output_dir": Effect("files", ("RUN/out", "RUN/elsewhere")),
    "data_config.img_dir": Effect("steps", ("SCENE/pictures", "SCENE/other_pictures")),
    "data_config.folders": Effect(
        "steps",
        ([{"img_dir": "SCENE/pictures"}], [{"img_dir": "SCENE/pictures"}, {"img_dir": "SCENE/other_pictures"}]),
        {"data_config.img_dir": None},
    ),
    "data_config.control_dir": Effect("steps", ("SCENE/edit/control", "SCENE/edit/other_control"), EDIT),
    "data_config.allow_missing_controls": Effect(
        "error", (False, True), {**EDIT, "data_config.control_dir": "SCENE/edit/too_few_controls"}
    ),
    "data_config.mask_dir": Effect("steps", (None, "SCENE/masks")),
    "data_config.mask": Effect("steps", (None, "alpha"), {"data_config.img_dir": "SCENE/cutouts"}),
    "data_config.weight_outside_mask": Effect("steps", (0.0, 0.5), MASKED),
    "data_config.allow_missing_masks": Effect("error", (False, True), {"data_config.mask_dir": "SCENE/too_few_masks"}),
    "data_config.control_size": Effect("steps", (64, 128), EDIT),
    "data_config.metadata_file": Effect("steps", (None, "SCENE/metadata.jsonl")),
    "data_config.img_size": Effect("steps", (64, 96)),
    "data_config.img_size_shares": Effect("steps", ([1, 0], [0, 1]), {"data_config.img_size": [64, 96]}),
    "data_config.flip": Effect("steps", (False, True)),
    "data_config.train_batch_size": Effect("steps", (2, 1), {"train_batch_size": None}),
    "data_config.num_workers": Effect("reading threads", (0, 1)),
    "data_config.caption_type": Effect("steps", ("txt", "note")),
    "data_config.caption_source": Effect("steps", ("file", "file_name")),
    "data_config.caption_text": Effect("steps", (None, "a drawing")),
    "data_config.caption_prefix": Effect("steps", ("", "sks")),
    "data_config.shuffle_tags": Effect("steps", (False, True), TAGS),
    "data_config.keep_tags": Effect("steps", (0, 3), {**TAGS, "data_config.shuffle_tags": True}),
    "data_config.tag_dropout_rate": Effect("steps", (0.0, 0.5), TAGS),
    "data_config.caption_variants": Effect("steps", (1, 2), {**TAGS, "data_config.shuffle_tags": True}),
    "data_config.max_text_tokens": Effect("steps", (None, 1)),
    "data_config.caption_dropout_rate": Effect("steps", (0.0, 0.9)),
    "data_config.random_ratio": Effect("steps", (False, True)),
    "data_config.upscale": Effect("steps", (False, True), {"data_config.img_size": 160}),
    "data_config.exclude": Effect("steps", ([], ["alien"])),
    "data_config.loss_weights": Effect("steps", ({}, {"alien": 0.1})),
    "data_config.cache_dir": Effect("files", ("RUN/cache", "RUN/elsewhere")),
    "random_weights": Effect("steps", (False, True)),
    "logging_dir": Effect("files", ("logs", "elsewhere"), TRACKED),
    "report_to": Effect("files", (None, "tensorboard")),
    "tracker_project_name": Effect("files", ("one", "other"), TRACKED),
    "logging_steps": Effect("times tracked", (10, 1)),
    "seed": Effect("steps", (42, 43)),
    "deterministic": Effect("plan", (False, True)),
    "mixed_precision": Effect("plan", ("no", "bf16")),
    "train_batch_size": Effect("steps", (2, 1)),
    "gradient_accumulation_steps": Effect("steps", (1, 2)),
    "max_train_steps": Effect("steps", (2, 1)),
    "num_train_epochs": Effect("steps", (1, 2), {"max_train_steps": None, "train_batch_size": 4}),
    "learning_rate": Effect("rates", (1e-3, 2e-3)),
    "lr_scheduler": Effect("rates", ("constant", "linear")),
    "lr_warmup_steps": Effect("rates", (0, 2)),
    "lr_warmup_share": Effect("rates", (0.0, 0.5)),
    "lr_floor": Effect("rates", (0.0, 0.5), {"lr_scheduler": "linear"}),
    "lr_num_cycles": Effect("rates", (1, 2), {"lr_scheduler": "cosine_with_restarts", "max_train_steps": 3}),
    "lr_power": Effect("rates", (1.0, 2.0), {"lr_scheduler": "polynomial"}),
    "lr_step_rules": Effect("rates", ("1:1,0.1", "1:1,0.5"), {"lr_scheduler": "piecewise_constant"}),
    "optimizer": Effect("weights", ("adamw", "adafactor")),
    "adam8bit": Effect("plan", (False, True)),
    "adam_beta1": Effect("weights", (0.9, 0.5)),
    "adam_beta2": Effect("weights", (0.999, 0.9)),
    "adam_weight_decay": Effect("weights", (0.01, 0.5)),
    "adam_epsilon": Effect("weights", (1e-8, 1e-2)),
    "max_grad_norm": Effect("weights", (1.0, 1e-6)),
    "prodigy.d0": Effect("stepped", (1e-6, 1e-5), PRODIGY),
    "prodigy.d_coef": Effect("stepped", (1.0, 2.0), PRODIGY),
    "prodigy.growth_rate": Effect("stepped", (None, 1.01), PRODIGY),
    "prodigy.slice": Effect("stepped", (1, 11), PRODIGY),
    "prodigy.safeguard_warmup": Effect("stepped", (False, True), {**PRODIGY, "learning_rate": 0.5}),
    "prodigy.bias_correction": Effect("stepped", (True, False), PRODIGY),
    "schedule_free.r": Effect("stepped", (0.0, 1.0), {"optimizer": "adamw_schedule_free"}),
    "schedule_free.weight_lr_power": Effect(
        "stepped", (2.0, 0.0), {"optimizer": "adamw_schedule_free", "lr_warmup_share": 0.5}
    ),
    "adafactor.momentum": Effect("stepped", (None, 0.9), {"optimizer": "adafactor"}),
    "adafactor.decay_rate": Effect("stepped", (-0.8, -0.5), {"optimizer": "adafactor"}),
    "adafactor.clip_threshold": Effect("stepped", (1.0, 0.1), {"optimizer": "adafactor"}),
    "muon.momentum": Effect("stepped", (0.95, 0.5), MUON),
    "muon.nesterov": Effect("stepped", (True, False), MUON),
    "muon.ns_steps": Effect("stepped", (5, 2), MUON),
    "method": Effect("files", ("lora", "full")),
    "weight_update": Effect("plan", ("stochastic_rounding", "fp32_master"), {**FULL, "mixed_precision": "bf16"}),
    "rank": Effect("weights", (2, 4)),
    "lora_alpha": Effect("steps", (None, 16.0)),
    "lora_targets": Effect("weights", (None, ["to_q"])),
    "init_lora": Effect("steps", (None, "SCENE/adapter.safetensors")),
    "trigger_words": Effect("metadata", ([], ["sks"])),
    "lora_files.formats": Effect("files", (["diffusers", "comfyui"], ["diffusers", "kohya"])),
    "lora_files.title": Effect("metadata", (None, "A drawing style")),
    "lora_files.author": Effect("metadata", (None, "A painter")),
    "lora_files.description": Effect("metadata", (None, "Emojis")),
    "lora_files.license": Effect("metadata", (None, "CC-BY-4.0")),
    "lora_files.thumbnail": Effect("metadata", (True, False), {**DRAWN, "samples.every": 1}),
    "adapter.kind": Effect("weights", ("lora", "lokr")),
    "adapter.rank_pattern": Effect("weights", ({}, {"to_q": 1})),
    "adapter.rslora": Effect("steps", (False, True)),
    "adapter.lokr_factor": Effect("weights", (None, 4), LOKR),
    "adapter.lokr_low_rank": Effect("weights", ("none", "both"), LOKR),
    "ema.decay": Effect("weights", (None, 0.5)),
    "ema.warm_up": Effect("weights", (True, False), {"ema.decay": 0.9}),
    "ema.on_host": Effect("plan", (False, True), {"ema.decay": 0.9}),
    "training_adapter.path": Effect("steps", (None, "SCENE/adapter.safetensors")),
    "training_adapter.strength": Effect("steps", (1.0, 0.5), {"training_adapter.path": "SCENE/adapter.safetensors"}),
    "freeze_text_encoder": Effect("error", (True, False)),
    "objective.sigma_distribution": Effect("steps", ("logit_normal", "uniform")),
    "objective.logit_mean": Effect("steps", (0.0, 1.0)),
    "objective.logit_std": Effect("steps", (1.0, 0.5)),
    "objective.mode_scale": Effect("steps", (1.29, 0.5), {"objective.sigma_distribution": "mode"}),
    "objective.shift": Effect("steps", ("model", 3.0)),
    "objective.guidance": Effect("steps", (1.0, 4.0), FLUX),
    "objective.weighting_scheme": Effect("steps", ("none", "sigma_sqrt")),
    "objective.min_sigma": Effect("steps", (0.0, 0.5)),
    "objective.max_sigma": Effect("steps", (1.0, 0.5)),
    "objective.loss": Effect("steps", ("mse", "huber")),
    "objective.huber_delta": Effect("steps", (0.1, 1.0), {"objective.loss": "huber"}),
    "prior_preservation.folder": Effect("steps", (None, "SCENE/other_pictures"), {"train_batch_size": 4}),
    "prior_preservation.prompts": Effect("steps", (["a cat"], ["red heart"]), PRIOR),
    "prior_preservation.num_pictures": Effect("files", (1, 2), PRIOR),
    "prior_preservation.num_steps": Effect("steps", (1, 2), PRIOR),
    "prior_preservation.guidance_scale": Effect("steps", (1.0, 4.0), PRIOR),
    "prior_preservation.repeats": Effect("steps", (1.0, 3.0), PRIOR),
    "prior_preservation.loss_weight": Effect("steps", (1.0, 0.5), PRIOR),
    "validation.held_out": Effect("held-out losses", (0.0, 0.25)),
    "validation.held_out_dir": Effect("held-out losses", (None, "SCENE/other_pictures")),
    "validation.every": Effect("held-out losses", (100, 1), MEASURED),
    "validation.judge_captions": Effect("printed", (None, True), TWO_FOLDERS),
    "validation.patience": Effect(
        "held-out losses", (None, 1), {**MEASURED, **TRAINED, "validation.every": 1, "max_train_steps": 3}
    ),
    "validation.num_draws": Effect("held-out losses", (1, 2), MEASURED),
    "samples.prompts": Effect("pictures", (["red heart"], []), DRAWN),
    "samples.controls": Effect(
        "pictures", ([["SCENE/edit/control/alien.png"]], [["SCENE/edit/control/avocado.png"]]), CONTROLLED
    ),
    "samples.prompts_file": Effect("pictures", (None, "SCENE/prompts.jsonl"), {**DRAWN, "samples.prompts": []}),
    "samples.negative_prompt": Effect("pictures", (None, "red"), {**DRAWN, "samples.guidance_scale": 4.0}),
    "samples.seeds": Effect("pictures", ([0], [1]), DRAWN),
    "samples.every": Effect("pictures", (500, 1), DRAWN),
    "samples.num_steps": Effect("pictures", (1, 2), DRAWN),
    "samples.guidance_scale": Effect("pictures", (1.0, 4.0), DRAWN),
    "samples.width": Effect("pictures", (None, 96), DRAWN),
    "samples.height": Effect("pictures", (None, 96), DRAWN),
    "samples.sizes": Effect("pictures", ([], [[64, 64], [96, 64]]), DRAWN),
    "samples.strengths": Effect("pictures", ([1.0], [0.5, 1.0]), DRAWN),
    "guard.max_skipped_steps": Effect("error", (10, 1), {"learning_rate": 1e30}),
    "guard.exploded_loss": Effect("error", ("warn", "stop"), {**TRAINED, "max_train_steps": 8}),
    "guard.must_learn_within": Effect("error", (10, 0), {"learning_rate": 1e-50}),
    "checkpointing_steps": Effect("files", (500, 1)),
    "checkpoints_total_limit": Effect("files", (None, 1), {"checkpointing_steps": 1}),
    "resume_from_checkpoint": Effect("error", (None, "latest"), after_a_run=True),
    "resume_with_changes_in": Effect(
        "error", ([], ["seed"]), {"resume_from_checkpoint": "latest", "seed": 7}, after_a_run=True
    ),
    "precompute_text_embeddings": Effect("printed", (True, False)),
    "precompute_image_embeddings": Effect("printed", (True, False)),
    "save_cache_on_disk": Effect("files", (True, False), FRESH_CACHE),
    "disable_gradient_checkpointing": Effect("plan", (True, False)),
    "disable_cpu_offload": Effect("plan", (False, True)),
    "pin_memory": Effect("plan", (True, False)),
    "disable_quantization": Effect("plan", (False, True), {"quantize": True}),
    "quantize": Effect("plan", (False, True)),
    "keep_plain": Effect("plan", ([], ["to_q"]), {"quantize": True}),
    "cuda_graphs": Effect("plan", (True, False)),
    "unified_memory": Effect("plan", (False, True)),
    "gpu_memory_limit_gib": Effect("plan", (None, 23.3)),
    "host_memory_limit_gib": Effect("plan", (None, 5.0), {"gpu_memory_limit_gib": 15.3, "mixed_precision": "bf16"}),
    "memory_fraction": Effect("plan", (0.9, 0.5), UNIFIED),
    "expandable_segments": Effect("plan", (True, False), UNIFIED),
    "use_fastsafetensors": Effect("plan", (True, False)),
    "fastsafetensors_num_threads": Effect("plan", (8, 1)),
    "stream.window": Effect("steps", (None, 3)),
    "stream.shards_at_once": Effect("error", (8, 2)),
    "stream.cache_limit_gib": Effect("error", (64.0, 1e-6), {"stream.window": 3, **FRESH_CACHE}),
    "stream.skipped_share": Effect("error", (0.02, 0.5)),
    "stream.patience_seconds": Effect("error", (600.0, 1.0)),
    "distributed.shards": Effect("error", (1, 2)),
    "cuda_features.enable_flash_attention_3": Effect("plan", (False, True)),
    "cuda_features.enable_fp8_training": Effect("plan", (False, True), {"disable_quantization": False}),
    "cuda_features.enable_tf32_compute": Effect("plan", (True, False)),
    "cuda_features.enable_cudnn_sdp": Effect("plan", (True, False)),
}
