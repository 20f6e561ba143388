"""Keys that people bring from other trainers, each with the key that is meant here.

A name that is near to ours by its letters need not stand here: `sources.nearest_keys` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_BY_OURS: Mapping[str, str] = {
    "pretrained_model_name_or_path": (
        "model base_model model_name model_path model_id name_or_path base_model_name pretrained_model checkpoint "
        "ckpt_path dit transformer_path"
    ),
    "model_parts.others": "extras_name_or_path diffusers_path base_model_path",
    "model_parts.vae": "vae_path ae ae_path vae_model_path pretrained_vae_model_name_or_path",
    "model_parts.text_encoder": "text_encoder_path clip_l clip_l_path clip_path text_encoder_1",
    "model_parts.text_encoder_2": "t5xxl t5xxl_path t5_path text_encoder_2_path",
    "model_parts.tokenizer": "tokenizer_path",
    "model_parts.transformer": "diffusion_model pretrained_transformer_model_name_or_path",
    "output_dir": (
        "output_folder output_path save_dir save_path save_folder output_model_destination training_folder "
        "workspace_dir"
    ),
    "data_config": "dataset datasets data dataset_config data_backend_config",
    "data_config.img_dir": (
        "train_data_dir instance_data_dir dataset_path dataset_dir folder_path image_dir image_directory images "
        "data_dir train_dir instance_data_root image_folder"
    ),
    "data_config.folders": "concepts subsets directories",
    "data_config.folders[].dataset": "dataset_name hub_dataset hf_dataset",
    "data_config.folders[].repeats": "num_repeats repeats dataset_repeats balancing",
    "data_config.control_dir": (
        "control_path control_directory conditioning_dir conditioning_data_dir conditioning_image_column "
        "control_folder control_paths conditioning_data"
    ),
    "data_config.mask_dir": "mask_path mask_directory masks masks_dir conditioning_mask mask_folder",
    "data_config.mask": "alpha_mask use_alpha_mask alpha_masks",
    "data_config.weight_outside_mask": (
        "unmasked_weight mask_min_value mask_min_weight masked_weight unmasked_probability masked_loss use_masks "
        "masked_training"
    ),
    "data_config.metadata_file": "image_jsonl_file jsonl dataset_metadata_path metadata in_json metadata_path",
    "data_config.img_size": "resolution image_size train_resolution size px target_size max_resolution resolutions",
    "data_config.flip": "flip_aug random_flip flip_x augment_flip hflip enable_random_flip",
    "data_config.shuffle_tags": "shuffle_caption shuffle_tokens enable_tag_shuffling",
    "data_config.keep_tags": "keep_tokens keep_tags_count",
    "data_config.tag_dropout_rate": "caption_tag_dropout_rate token_dropout token_dropout_rate tag_dropout_enable",
    "data_config.caption_source": "caption_strategy prompt_source",
    "data_config.caption_text": "instance_prompt",
    "data_config.caption_variants": "cache_shuffle_num",
    "data_config.control_size": "control_resolution qwen_image_edit_control_resolution",
    "data_config.folders[].control_column": "cond_image_column",
    "samples.seeds": "validation_seed num_validation_images",
    "samples.sizes": "validation_resolution",
    "data_config.caption_prefix": "prepend_caption",
    "data_config.num_workers": "max_data_loader_n_workers dataloader_num_workers dataset_num_workers",
    "data_config.caption_type": "caption_extension caption_ext caption_suffix caption_extention",
    "data_config.max_text_tokens": (
        "max_sequence_length max_token_length tokenizer_max_length t5xxl_max_token_length text_encoder_sequence_length "
        "text_encoder_2_sequence_length"
    ),
    "data_config.caption_dropout_rate": (
        "caption_dropout conditioning_dropout cfg_dropout proportion_empty_prompts caption_dropout_probability"
    ),
    "data_config.random_ratio": "random_crop enable_bucket",
    "data_config.cache_dir": "cache_directory cache_path latent_cache_dir",
    "logging_dir": "log_dir tensorboard_dir",
    "report_to": "log_with tracker use_wandb wandb enable_wandb",
    "tracker_project_name": (
        "log_tracker_name wandb_project wandb_run_name project_name run_name tracker_name wandb_tracker_name"
    ),
    "logging_steps": "log_every logging_interval performance_log_every",
    "seed": "random_seed rng_seed manual_seed noise_seed",
    "mixed_precision": "dtype precision train_dtype weight_dtype torch_dtype save_precision full_bf16 bf16 fp16",
    "train_batch_size": "batch_size per_device_train_batch_size bs micro_batch_size micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulate_grad_batches grad_accumulation",
    "max_train_steps": "steps max_steps num_steps train_steps iterations num_train_steps total_steps max_iterations",
    "num_train_epochs": "epochs max_train_epochs num_epochs max_epochs",
    "learning_rate": "lr unet_lr transformer_lr base_lr dit_lr learning_rate_unet prodigy_lr",
    "lr_scheduler": "scheduler lr_schedule learning_rate_scheduler lr_scheduler_type",
    "lr_warmup_steps": "warmup warmup_steps num_warmup_steps learning_rate_warmup_steps lr_warmup",
    "lr_warmup_share": "warmup_ratio lr_warmup_ratio warmup_percent lr_warmup_percent",
    "lr_floor": "lr_scheduler_min_lr_ratio min_lr_ratio min_lr_rate min_lr eta_min lr_end learning_rate_min_factor",
    "lr_num_cycles": "lr_scheduler_num_cycles num_cycles learning_rate_cycles",
    "lr_power": "power lr_scheduler_power",
    "optimizer": "optimizer_type optim optimizer_name optimizer_args optimizer_params",
    "adam8bit": "adamw8bit use_8bit_adam",
    "adam_weight_decay": "weight_decay optimizer_config",
    "prodigy.d_coef": "prodigy_d_coef d_coef prodigy_decouple",
    "prodigy.d0": "d0",
    "prodigy.slice": "slice_p prodigy_slice",
    "prodigy.growth_rate": "prodigy_growth_rate",
    "prodigy.safeguard_warmup": "prodigy_safeguard_warmup",
    "prodigy.bias_correction": "use_bias_correction prodigy_use_bias_correction",
    "adafactor.momentum": "adafactor_beta1 relative_step scale_parameter warmup_init",
    "adafactor.clip_threshold": "adafactor_clip_threshold",
    "muon.momentum": "muon_momentum",
    "muon.ns_steps": "ns_steps",
    "adam_beta1": "beta1 betas adam_betas optimizer_beta1",
    "adam_beta2": "beta2 optimizer_beta2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    "method": "network_module network_type model_type training_method train_type",
    "adapter.kind": "adapter_type lora_type algo lycoris lokr dora use_dora weight_decompose lora_decompose",
    "adapter.rank_pattern": "block_dims network_reg_dims",
    "adapter.rslora": "use_rslora",
    "adapter.lokr_factor": "factor decompose_factor",
    "adapter.lokr_low_rank": "lokr_full_rank decompose_both full_matrix",
    "rank": "network_dim network_rank lora_rank lora_dim dim linear lora_r r network_linear",
    "lora_alpha": "network_alpha linear_alpha alpha",
    "ema.decay": "use_ema ema_decay ema_config use_ema_model ema_model ema_beta",
    "training_adapter.path": "assistant_lora_path assistant_lora training_adapter_path base_lora base_weights",
    "training_adapter.strength": "base_weights_multiplier assistant_lora_strength",
    "init_lora": (
        "network_weights pretrained_lora_path lora_weights_path init_from_existing lora_model_name init_adapter"
    ),
    "lora_files.title": "metadata_title",
    "lora_files.author": "metadata_author",
    "lora_files.description": "metadata_description",
    "lora_files.license": "metadata_license",
    "lora_targets": "target_modules lora_layers lora_target_modules only_if_contains flux_lora_target layer_filter",
    "trigger_words": "trigger_word trigger token activation_text",
    "data_config.upscale": "bucket_no_upscale allow_upscale",
    "freeze_text_encoder": (
        "text_encoder_lr te_lr train_text_encoder network_train_unet_only network_train_text_encoder_only"
    ),
    "objective.sigma_distribution": (
        "timestep_sampling timestep_type timestep_distribution weighting_distribution timestep_sample_method"
    ),
    "objective.shift": "discrete_flow_shift flow_shift timestep_shift flow_schedule_shift",
    "objective.guidance": "flux_guidance_value distilled_guidance_scale",
    "objective.weighting_scheme": "loss_weighting loss_weight_fn min_snr_gamma snr_gamma",
    "objective.loss": "loss_type loss_fn loss_function huber_strength",
    "objective.huber_delta": "huber_c huber_param pseudo_huber_c",
    "objective.min_sigma": "min_timestep min_noising_strength min_denoising_steps timestep_min min_t",
    "objective.max_sigma": "max_timestep max_noising_strength max_denoising_steps timestep_max max_t",
    "prior_preservation.folder": "reg_data_dir class_data_dir reg_images reg_dir is_reg with_prior_preservation",
    "prior_preservation.prompts": "class_prompt class_prompts reg_prompt",
    "prior_preservation.num_pictures": "num_class_images",
    "prior_preservation.loss_weight": "prior_loss_weight reg_weight",
    "data_config.folders[].loss_weight": "loss_multiplier network_weight",
    "validation.held_out": "validation_split val_split eval_split",
    "validation.held_out_dir": "val_data_dir validation_dir validation_data_dir eval_dir",
    "validation.every": (
        "validation_epochs validation_steps eval_steps eval_every eval_every_n_steps eval_every_n_epochs"
    ),
    "validation.patience": "early_stopping_patience early_stop_patience",
    "samples.prompts": "validation_prompt validation_prompts sample_prompts sample_prompt sample_definition_file",
    "samples.prompts_file": "sample_prompts_file prompts_path validation_prompts_file",
    "samples.negative_prompt": "neg sample_negative validation_negative_prompt",
    "samples.strengths": "network_multiplier lora_strengths sample_lora_multiplier",
    "samples.every": (
        "sample_every sample_every_n_steps sample_after sample_every_n_epochs validation_step_interval "
        "validation_epoch_interval"
    ),
    "samples.num_steps": "sample_steps num_inference_steps validation_num_inference_steps",
    "samples.guidance_scale": "validation_guidance cfg_scale sample_guidance_scale validation_guidance_scale",
    "checkpointing_steps": (
        "save_every save_every_n_steps save_steps save_every_n_epochs checkpoint_every save_after backup_after "
        "checkpoint_step_interval checkpoint_epoch_interval"
    ),
    "checkpoints_total_limit": (
        "max_step_saves_to_keep save_total_limit save_last_n_steps save_last_n_epochs keep_last rolling_backup_count"
    ),
    "resume_from_checkpoint": "resume resume_from save_state",
    "precompute_text_embeddings": "cache_text_encoder_outputs cache_text_embeddings text_encoder_cache",
    "precompute_image_embeddings": "cache_latents latent_caching vae_cache precompute_latents",
    "save_cache_on_disk": "cache_latents_to_disk cache_text_encoder_outputs_to_disk cache_to_disk",
    "disable_gradient_checkpointing": "gradient_checkpointing grad_checkpointing",
    "disable_cpu_offload": "cpu_offload enable_model_cpu_offload layer_offloading offload low_vram lowram",
    "quantize": (
        "fp8_base fp8_scaled fp8_base_unet load_in_8bit load_in_4bit qtype base_model_precision quantization "
        "do_fp8_training transformer_dtype diffusion_model_dtype"
    ),
    "gpu_memory_limit_gib": "blocks_to_swap vram_limit max_vram",
    "cuda_features.enable_tf32_compute": "allow_tf32 tf32",
    "cuda_features.enable_cudnn_sdp": "sdpa xformers enable_xformers_memory_efficient_attention attention_mechanism",
    "cuda_features.enable_flash_attention_3": "flash_attn flash_attention use_flash_attn flash3",
}

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {name: ours for ours, names in _BY_OURS.items() for name in names.split()}
)
"""Last parts of other trainers' keys, in lower case, each with the dotted key here."""

_BY_REASON: Mapping[str, str] = {
    "noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale noise_offset_random_strength "
    "ip_noise_gamma input_perturbation noise_multiplier offset_noise": (
        "Flow matching needs no offset noise, and there is none: leave it out."
    ),
    "ema_power ema_update_interval ema_update_after_step": (
        "The average (EMA) follows every step, with a decay that ema.warm_up ramps up: leave it out."
    ),
    "network_dropout lora_dropout rank_dropout module_dropout scale_weight_norms max_norm": (
        "A LoRA has no dropout here: leave it out. Captions have one: data_config.caption_dropout_rate."
    ),
    "conv_dim conv_alpha conv_rank network_conv conv": (
        "These models have no convolutions to adapt: leave it out. Which layers get a LoRA: lora_targets."
    ),
    "network_args network_kwargs": "Leave it out. Which layers get a LoRA: lora_targets; rank and lora_alpha its size.",
    "loha locon boft oft glora pissa": (
        "A LoRA, DoRA or LoKr is trained (adapter.kind), or all weights with method: full."
    ),
    "enable_wildcard secondary_separator caption_separator keep_tokens_separator": (
        "Tags are the parts of a caption between commas, and wildcards are not expanded: leave it out."
    ),
    "color_aug face_crop_aug_range augmentations": (
        "Colours are not changed at random: leave it out, or add changed copies. Crops: data_config.random_ratio; "
        "mirror images: data_config.flip."
    ),
    "train_unet train_transformer unet_trainable": "The transformer is what is trained: leave it out.",
    "clip_skip v2 v_parameterization zero_terminal_snr v_pred sdxl is_flux is_xl": (
        "It belongs to older models: leave it out. The family is recognized by the model's folder."
    ),
    "huber_schedule huber_scale": "The pseudo-Huber loss has one delta for all sigmas: objective.huber_delta.",
    "masked_prior_preservation_weight normalize_masked_area_loss": (
        "Losses are normalized by the area of their masks always, and the base is no target: leave it out."
    ),
    "down_lr_weight mid_lr_weight up_lr_weight block_lr loraplus_lr_ratio loraplus_unet_lr_ratio": (
        "All layers have one learning_rate: leave it out. Which layers get a LoRA: lora_targets; their ranks: "
        "adapter.rank_pattern."
    ),
    "sample_sampler sampler noise_scheduler": "Samples take Euler steps along the flow: leave it out.",
    "save_model_as save_dtype": "LoRA files are safetensors in fp32: leave it out.",
    "device device_name gpu gpu_ids cuda_device": "The GPU is found by itself: leave it out.",
    "push_to_hub hub_model_id hub_token huggingface_repo_id": "Nothing is uploaded: leave it out.",
    "vae_batch_size vae_tiling vae_slicing enable_vae_tiling text_encoder_batch_size": (
        "Encoders are fitted to the card by themselves: leave it out."
    ),
    "torch_compile dynamo_backend compile dynamo_mode": "What pays is compiled by itself: leave it out.",
    "min_bucket_reso max_bucket_reso bucket_reso_steps": (
        "Buckets are made from data_config.img_size by themselves: leave it out."
    ),
}

ABSENT: Mapping[str, str] = MappingProxyType(
    {name: reason for names, reason in _BY_REASON.items() for name in names.split()}
)
"""Last parts of other trainers' keys that mean nothing here, in lower case, each with what to do instead."""

OTHER_VALUES: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "optimizer": (
            ("prodigy.*(plus|free)", '"prodigy_schedule_free"'),
            ("schedulefree", '"adamw_schedule_free"'),
            ("adam.*8", '"adamw" with adam8bit: true'),
        )
    }
)
"""Values of other trainers by ours: patterns of small letters and digits alone, of which the first one counts."""

REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "optimizer": (
            'It is "adamw" (with adam8bit: true in 8 bits), "adamw_schedule_free", "prodigy", "prodigy_schedule_free", '
            '"adafactor" or "muon"; the keys of each stand in its section.'
        ),
        "lr_floor": "It is a share of learning_rate, from 0 to 1.",
        "adafactor.momentum": "The learning rate is that of lr_scheduler always, and is not scaled by the weights.",
        "disable_gradient_checkpointing": "Mind the opposite meaning; without the key the plan decides.",
        "disable_cpu_offload": "Mind the opposite meaning; without the key the plan decides.",
        "gpu_memory_limit_gib": "The plan itself streams as many blocks as the memory needs.",
        "ema.decay": "It is a number such as 0.99; the decay alone switches the average on.",
        "quantize": "Without the key the plan chooses the number format by the memory there is.",
        "freeze_text_encoder": "Only the transformer is trained.",
        "trigger_words": "It stands in the LoRA file's metadata only: write the word into every caption, too.",
        "resume_from_checkpoint": "A run goes on from its own checkpoints, not from another program's LoRA.",
        "objective.min_sigma": "It is a noise level from 0 to 1, where others count timesteps to 1000.",
        "objective.max_sigma": "It is a noise level from 0 to 1, where others count timesteps to 1000.",
        "objective.loss": 'It is "mse" or "huber".',
        "data_config.mask": 'It is "alpha"; files of masks go into data_config.mask_dir.',
        "data_config.weight_outside_mask": "Masks are used wherever data_config.mask_dir or data_config.mask is given.",
        "objective.weighting_scheme": 'SNR weights belong to older models; "none" is usual here.',
        "data_config.upscale": "Mind the opposite meaning; false is the default.",
        "data_config.folders[].dataset": "dataset_name hub_dataset hf_dataset",
        "data_config.folders[].repeats": "It belongs to an item of data_config.folders.",
        "data_config.random_ratio": "Pictures are put into buckets of their own ratio always.",
        "method": 'It is "lora" or "full".',
        "adapter.kind": 'It is "lora", "lokr" or "dora".',
        "adapter.lokr_low_rank": 'Both of LoKr\'s matrices are whole with "none", the default.',
        "data_config": "It is a section: put img_dir and the other keys of the pictures below it.",
    }
)
"""Sentences on keys that do not do quite what their namesakes elsewhere do."""
