"""Keys that musubi-tuner and sd-scripts share, both by kohya-ss: a TOML file of arguments, or a command with flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration import adapters, kohya_network
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.command_line import Command
from pixtune.migration.peer import NOT_HERE, Options, Part, mappings
from pixtune.migration.reading import Source, find_second, read_second
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost, only_if, used
from pixtune.migration.samples import file_of_prompts, only_with_prompts
from pixtune.migration.tables import shown

TRAINED = re.compile(r"\w*train(_network|_control_net|_textual_inversion)?\.py")
CACHING = re.compile(r"\w*cache_(latents|text_encoder_outputs)\.py")
NETWORK_KEYS = ("network_module", "network_dim", "network_weights")
"""Keys of which one at least stands where a LoRA is trained, and not all weights."""

for_lora = only_if(
    lambda look: any(key in look.written for key in NETWORK_KEYS), "without a network all weights are trained"
)
BY_ITSELF = Lost("pictures and captions are cached here by themselves", False)


def arguments_of(source: Source, commands: Sequence[Command]) -> dict[str, Any]:
    """Returns a training's arguments: those of a TOML file without its sections, under those of the command.

    Raises:
        MigrationError: there are several trainings, or the file that a command names is not there.
    """
    if source.form != "command":
        return _without_sections(source.tree)
    if len(commands) > 1:
        names = " and ".join(command.script for command in commands)
        raise MigrationError(f"{source.name} starts {len(commands)} trainings ({names}): keep one")
    command = commands[0]
    found: dict[str, Any] = {}
    file = command.arguments.get("config_file")
    if isinstance(file, str):
        path = find_second(file, source.folder) or find_second(f"{file}.toml", source.folder)
        if path is None:
            raise MigrationError(
                f"{source.name} starts {command.script} with {file}, which is not here: give that file"
            )
        tree = read_second(path, source.name)
        found = _without_sections(tree) if isinstance(tree, Mapping) else {}
    found |= {key: value for key, value in command.arguments.items() if key != "config_file"}
    if "mixed_precision" not in found and "mixed_precision" in command.launcher:
        found["mixed_precision"] = command.launcher["mixed_precision"]
    return found


def _without_sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= dict(value) if isinstance(value, Mapping) else {str(key): value}
    return found


def dataset_of(
    arguments: Mapping[str, Any], source: Source, options: Options
) -> tuple[Any, str, list[tuple[str, Lost]]]:
    """Returns the values of the file of the data set, its name, and what to say where it is not there.

    Raises:
        MigrationError: the file is no description of a data set.
    """
    named = arguments.get("dataset_config")
    path = options.dataset
    if path is None:
        if not isinstance(named, str) or not named:
            return None, "", []
        path = find_second(named, source.folder)
    if path is None:
        return None, "", [(f"dataset_config = {named}", NOT_HERE)]
    tree = read_second(path, source.name)
    if not isinstance(tree, Mapping) or not mappings(tree.get("datasets", [])):
        raise MigrationError(f"{path.name} describes no data set: it has no [[datasets]]")
    return tree, path.name, []


def subsets_of(tree: Any, inner: str = "subsets") -> list[dict[str, Any]]:
    """Returns the folders of a data set with everything that holds for each: general, then its set, then its own."""
    if not isinstance(tree, Mapping):
        return []
    general = dict(tree.get("general", {})) if isinstance(tree.get("general"), Mapping) else {}
    found = []
    for dataset in mappings(tree.get("datasets", [])):
        shared = {**general, **{key: value for key, value in dataset.items() if key != inner}}
        found += [{**shared, **subset} for subset in mappings(dataset[inner])] if inner in dataset else [shared]
    return found


def is_dataset(tree: Any) -> bool:
    """Returns whether a file describes a data set."""
    return isinstance(tree, Mapping) and isinstance(tree.get("datasets"), list) and set(tree) <= {"general", "datasets"}


def output_of(arguments: Mapping[str, Any], otherwise: str) -> tuple[str, str]:
    """Returns the folder of the output, and what says so: a folder there, and a name in it."""
    directory, name = arguments.get("output_dir", "output"), arguments.get("output_name", otherwise)
    said = f"output_dir = {shown('output_dir', directory)}, output_name = {shown('output_name', name)}"
    return f"{directory}/{name}", said


def folder_part(values: Mapping[str, Any], file: str) -> Part:
    return Part(values, f"{file}: " if file else "")


def length(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Returns a run's length: epochs win over steps."""
    if settings.get("max_train_epochs"):
        return None, float(to.number(settings["max_train_epochs"]))
    return to.whole(settings["max_train_steps"]), None


def examples_per_step(settings: Mapping[str, Any]) -> int:
    size = settings.get("folder.train_batch_size") or settings.get("train_batch_size") or 1
    return to.whole(size) * to.whole(settings.get("gradient_accumulation_steps", 1))


def _steps(value: Any, look: Look) -> Any:
    if look.peek("max_train_epochs"):
        return Lost("max_train_epochs wins over it there", False)
    return to.whole(value)


def _keep(every: str) -> Any:
    def convert(value: Any, look: Look) -> Any:
        """Returns the number of checkpoints to keep from a number of steps that they are kept for."""
        if every == "epochs":
            return to.at_least_one(value)
        steps = look.get("save_every_n_steps")
        return max(1, to.whole(value) // max(1, to.whole(steps))) if steps else Lost("nothing is saved by steps", False)

    return convert


def _fp8(value: Any, look: Look) -> Any:
    return True if to.truth(value) else Lost("see quantize", False)


def _alpha(value: Any, look: Look) -> Any:
    return to.real(value) if to.number(value) else Lost("0 stands for the rank, as leaving it out does here", False)


def _merged(value: Any, look: Look) -> Any:
    files = to.texts(value) if value is not True else []
    if len(files) == 1:
        why = "there it is merged into the base and stays on in samples; here it is off in samples and in the file"
        return Outcome({"training_adapter.path": files[0]}, (Lost(why),))
    return Lost("one training adapter is possible: merge them into one file") if files else Lost("none, as here", False)


def _strength(value: Any, look: Look) -> Any:
    numbers = value if isinstance(value, list) else [value]
    return to.real(numbers[0]) if look.peek("base_weights") else Lost("see base_weights", False)


def settings(rate: float, workers: int, layers: kohya_network.Layers) -> tuple[Rule, ...]:
    """Returns the rules of shared keys.

    Args:
        layers: what the trainer's `network_args` say of layers.
        rate: learning rate there by default.
        workers: number of workers of the data loader there by default.
    """
    return (
        Rule("output_dir", "output_dir", lambda value, look: Outcome(), remark="with output_name as a folder in it"),
        *used("output_name", "a folder in output_dir here"),
        Rule("network_module", adapters.KEYS, kohya_network.module),
        Rule("network_dim", "rank", for_lora(adapters.rank), default=4),
        Rule("network_alpha", "lora_alpha", for_lora(_alpha), default=1.0,
             remark="1 where it is left out; here the rank"),
        Rule("network_args", kohya_network.KEYS, for_lora(kohya_network.arguments(layers))),
        *lost("network_dropout scale_weight_norms", "a LoRA has no dropout and no limit of its norm here"),
        Rule("network_weights", "init_lora", to.lora_file),
        *harmless("dim_from_weights", "rank says which; a file of another rank is brought to it"),
        Rule("base_weights", "training_adapter.path", _merged),
        Rule("base_weights_multiplier", "training_adapter.strength", _strength),
        Rule("max_train_steps", "max_train_steps", _steps, default=1600),
        Rule("max_train_epochs", "num_train_epochs", to.at_least_one, remark="wins over max_train_steps"),
        Rule("gradient_accumulation_steps", "gradient_accumulation_steps", to.whole),
        Rule("seed", "seed", to.whole),
        Rule("mixed_precision", "mixed_precision", to.precision),
        *lost("full_bf16 full_fp16", "a LoRA and its gradients are fp32 here"),
        Rule("optimizer_type", "optimizer adam8bit", lambda value, look: optim.optimizer(value or "adamw", look),
             default="adamw"),
        Rule("use_8bit_adam", "adam8bit", to.truth_or("AdamW in 32 bits")),
        Rule("learning_rate", "learning_rate", optim.rate("optimizer_type"), default=rate),
        Rule("optimizer_args", "adam_weight_decay adam_beta1 adam_beta2 adam_epsilon",
             lambda value, look: Outcome() if value in (True, "") else optim.optimizer_arguments(value, look)),
        *optim.defaults_of_others("optimizer_type"),
        Rule("max_grad_norm", "max_grad_norm", to.real),
        Rule("lr_scheduler", "lr_scheduler", optim.schedule),
        Rule("lr_warmup_steps", "lr_warmup_steps lr_warmup_share", to.warm_up("lr_scheduler", ("constant", "")),
             remark="without effect there on the schedule constant"),
        Rule("lr_scheduler_num_cycles", "lr_num_cycles", to.whole),
        Rule("lr_scheduler_power", "lr_power", to.real),
        Rule("lr_scheduler_min_lr_ratio", "lr_floor", lambda value, look: to.share(value)),
        *lost("lr_scheduler_type lr_scheduler_args lr_decay_steps",
              "the schedules here are those of lr_scheduler"),
        *harmless("lr_scheduler_timescale", "belongs to a schedule that is not here"),
        Rule("max_data_loader_n_workers", "data_config.num_workers", to.whole),
        # ---- saving
        Rule("save_every_n_steps", "checkpointing_steps", to.at_least_one),
        Rule("save_every_n_epochs", "checkpointing_steps", to.every_epochs("checkpointing_steps"),
             remark="turned into steps"),
        Rule("save_last_n_epochs", "checkpoints_total_limit", _keep("epochs")),
        Rule("save_last_n_steps", "checkpoints_total_limit", _keep("steps"), remark="divided by save_every_n_steps"),
        *harmless("save_state save_state_on_train_end save_last_n_epochs_state save_last_n_steps_state",
                  "each checkpoint here holds all that a run needs to go on"),
        *harmless("save_model_as save_precision no_metadata training_comment metadata_* mem_eff_save",
                  "LoRA files are safetensors in fp32, for diffusers and ComfyUI, without paths and captions"),
        *harmless("resume resume_from_huggingface",
                  "a run here goes on from its own checkpoints: resume_from_checkpoint=latest"),
        *harmless("huggingface_* save_state_to_huggingface async_upload", "nothing is uploaded here"),
        # ---- samples
        Rule("sample_prompts", "samples.prompts samples.prompts_file", file_of_prompts),
        Rule("sample_every_n_steps", "samples.every", only_with_prompts(to.at_least_one)),
        Rule("sample_every_n_epochs", "samples.every", only_with_prompts(to.every_epochs("samples.every"))),
        *harmless("sample_at_first sample_sampler", "there is a round of samples before the first step"),
        # ---- logs
        Rule("log_with", "report_to", to.tracker),
        Rule("log_tracker_name", "tracker_project_name", to.text),
        *harmless("logging_dir log_prefix log_tracker_config log_config wandb_run_name wandb_api_key",
                  "not about the training"),
        # ---- memory and speed
        Rule("fp8_base", "quantize", _fp8),
        Rule("fp8_base_unet", "quantize", _fp8),
        *harmless("fp8_scaled fp8_vl fp8_t5 fp8_llm fp8", "see quantize; text encoders are fitted by the planner"),
        *harmless("blocks_to_swap single_blocks_to_swap double_blocks_to_swap gradient_checkpointing "
                  "gradient_checkpointing_cpu_offload cpu_offload_checkpointing use_pinned_memory_for_block_swap "
                  "img_in_txt_in_offloading lowram highvram vae_batch_size vae_tiling vae_spatial_tile_sample_min_size "
                  "vae_chunk_size vae_dtype text_encoder_batch_size split_mode split_attn disable_numpy_memmap "
                  "disable_mmap_load_safetensors block_swap_* fused_backward_pass",
                  "the planner recomputes and streams as little as memory allows; the result is the same"),
        *harmless("sdpa xformers flash_attn flash3 sage_attn mem_eff_attn attn_mode",
                  "the fastest attention that passes its trial is taken"),
        *harmless("compile compile_* torch_compile dynamo_* cuda_allow_tf32 cuda_cudnn_benchmark ddp_* deepspeed "
                  "persistent_data_loader_workers num_cpu_threads_per_process console_* debug_* skip_* show_timesteps",
                  "not about the training"),
        *harmless("cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk "
                  "skip_cache_check", "pictures and captions are cached here always"),
        *used("dataset_config", "that file is read: see data_config"),
    )  # fmt: skip


def timesteps(value: Any, look: Look) -> Any:
    """Returns how noise levels are drawn, from `timestep_sampling` and what belongs to it."""
    kind = to.text(value).casefold()
    std = to.real(look.get("sigmoid_scale", 1.0))
    shift = to.shift_of(look.get("discrete_flow_shift", 1.0))
    if kind == "sigma":
        return to.levels(**to.sd3_density(look), shift=shift)
    if kind == "uniform":
        return to.levels("uniform", "none")
    if kind == "sigmoid":
        return to.levels("logit_normal", "none", logit_std=std)
    if kind == "shift":
        return to.levels("logit_normal", shift, logit_std=std)
    if kind in ("flux_shift", "qwen_shift"):
        return to.levels("logit_normal", "model", logit_std=std)
    near = to.levels("logit_normal", "model", logit_std=std)
    return Outcome(
        near.values, (Lost("there is no such way of drawing noise levels; the model's own takes its place"),)
    )


LEVELS: tuple[Rule, ...] = (
    *harmless("sigmoid_scale discrete_flow_shift logit_mean logit_std mode_scale", "see timestep_sampling"),
    Rule("weighting_scheme", "objective.weighting_scheme", to.sd3_weighting),
    Rule("min_timestep", "objective.min_sigma", to.sigma_of_timestep, remark="divided by 1000"),
    Rule("max_timestep", "objective.max_sigma", to.sigma_of_timestep, remark="divided by 1000"),
    *lost("preserve_distribution_shape", "the distribution is squeezed into the range here"),
    *lost("num_timestep_buckets", "noise levels are drawn independently"),
)
