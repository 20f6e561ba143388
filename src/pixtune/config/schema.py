"""Every key a run can have: one schema, in the contract's own names, frozen once read.

Imports neither torch nor a model, so that checking a config takes milliseconds. `load.py` reads files into it.
Three-state keys (`bool | None`) are constraints on the planner: true demands, false forbids, absent lets it choose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pixtune.config.contradictions import contradictions


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError(
            "must be a path, which empty text is not"
        )  # Path("") is the current folder, which nobody means
    return value


def _home_expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))


# YAML has no path type, so text is taken; `~` is the home folder, as in a shell.
FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_not_empty), AfterValidator(_home_expanded)]
Words = Annotated[tuple[str, ...], Field(strict=False)]
FilePaths = Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)]
PathLists = Annotated[tuple[FilePaths, ...], Field(strict=False)]
Integers = Annotated[tuple[int, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

LR_SCHEDULERS = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"
]


class Section(BaseModel):
    """Base of all sections: unknown keys are faults, values are not silently converted, nothing changes later."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    img_dir: FilePath
    """Folder of pictures, each with a caption file of the same stem beside it."""
    control_dir: FilePath | FilePaths | None = None
    """Folder of control pictures with the targets' names (edit models), or a list of folders: one a control."""
    allow_missing_controls: bool = False
    """True: a picture without a control of its name is trained on without it. False: it is a fault."""
    control_size: int = Field(default=1024, ge=16)
    """Control pictures are brought to an area near its square, in pixels. The stock pipelines use 1024 whatever the
    target's size; smaller is faster."""
    metadata_file: FilePath | None = None
    """A JSONL file instead of caption files and `control_dir`: one {"image": ..., "caption": ..., "control": [...]} a
    line, paths relative to `img_dir`."""
    img_size: int = Field(default=1024, ge=16)
    """Pictures are brought to an area near `img_size` squared pixels, in a bucket of their own aspect ratio."""
    train_batch_size: Count | None = None
    """May stand here or at top level; unequal values are a fault."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that read the cache and draw noise ahead of the step. 0: between the steps."""
    caption_type: str = "txt"
    """Extension of the caption files."""
    max_text_tokens: Count | None = None
    """Captions are cut to this many tokens, and padded to it where a model wants a fixed length (FLUX); absent: as the
    stock pipeline does."""
    caption_dropout_rate: Share = 0.0
    """Share of draws whose caption is replaced by the empty one, which classifier-free guidance needs."""
    random_ratio: bool = False
    """Each time a picture is drawn, crop it to one of 16:9, 4:3, 1:1 or its own ratio."""
    upscale: bool = False
    """Enlarge pictures smaller than `img_size`. False keeps them in a smaller bucket."""
    cache_dir: FilePath | None = None
    """Where encoded pictures and captions are kept. Default: `.pixtune_cache` inside `img_dir`."""


class ObjectiveConfig(Section):
    sigma_distribution: Literal["uniform", "logit_normal", "sigmoid", "mode"] = "logit_normal"
    """How noise levels are drawn, before the shift."""
    logit_mean: float = 0.0
    """Mean of "logit_normal"."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of "logit_normal"."""
    mode_scale: float = 1.29
    """Scale of "mode"."""
    shift: Literal["model", "none"] | float = "model"
    """Resolution-dependent shift towards noise: the model's own scheduler config, none, or a fixed `mu` (log-shift)."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance input of distilled models (FLUX.1-dev) while training; others have none."""
    weighting_scheme: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Loss weight by sigma, with diffusers' names."""


class ValidationConfig(Section):
    held_out: Share = 0.0
    """Share of the data set that is never trained on and serves to measure. 0 with no `held_out_dir`: no validation."""
    held_out_dir: FilePath | None = None
    """A folder of its own instead of a share. Its control pictures (edit models) lie beside it, in folders of the same
    names as those of the training pictures: data/images with data/control."""
    every: Count = 100
    """Validate every so many steps, besides before the first and after the last."""
    num_draws: Count = 2
    """Fixed noises per held-out picture in each quarter of the sigma range."""


class SamplesConfig(Section):
    prompts: Words = ()
    """Pictures drawn during training, one a prompt and seed. None: no pictures."""
    controls: PathLists = ()
    """Control pictures of each prompt (edit models): a list of paths a prompt."""
    seeds: Integers = (0,)
    """Seeds of the starting noise, each used with each prompt."""
    every: Count = 500
    """Draw every so many steps, besides before the first and after the last."""
    num_steps: Count = 20
    """Sampler steps."""
    guidance_scale: float = Field(default=4.0, ge=1)
    """Classifier-free guidance; 1 turns it off and halves the time. For distilled models (FLUX) the guidance input."""
    width: Count | None = None
    """Pixels; default `img_size`."""
    height: Count | None = None
    """Pixels; default `img_size`."""


class CudaFeatures(Section):
    enable_flash_attention_3: bool | None = None
    """FlashAttention 3; Hopper only."""
    enable_fp8_training: bool | None = None
    """Native FP8 compute; capability 8.9 and newer."""
    enable_tf32_compute: bool | None = None
    """TF32 matrix products for what stays in fp32; absent: on from sm_80."""
    enable_cudnn_sdp: bool | None = None
    """cuDNN's attention kernels; absent: the fastest kernel that a trial on this machine finds right."""


class TrainConfig(Section):
    """One training run."""

    # ---- what and where
    pretrained_model_name_or_path: str
    """A folder in diffusers' layout or a hub name, for example Qwen/Qwen-Image."""
    output_dir: FilePath
    """Checkpoints, the LoRA, metrics and the report go here."""
    data_config: DataConfig
    """The data set."""
    random_weights: bool = False
    """TEST ONLY: a transformer of the model's architecture with random weights, and random latents and text features
    instead of encoded data. Measures speed and memory where the real weights are absent."""

    # ---- logging
    logging_dir: FilePath = Path("logs")
    """Trackers' files; relative to `output_dir`."""
    report_to: Literal["tensorboard", "wandb"] | None = None
    """Tracker besides `metrics.jsonl`, which is always written."""
    tracker_project_name: str = "pixtune"
    """Project name for the tracker."""
    logging_steps: Count = 10
    """Read losses back from the device every so many steps; each step's loss is recorded all the same."""

    # ---- length and rate
    seed: int = Field(default=42, ge=0)
    """Every random draw is a function of this, the step, the sample and the purpose."""
    deterministic: bool = False
    """Bit-exact steps on a GPU too, at a price in speed. On a CPU they always are."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Format of the frozen weights and activations; the LoRA and its optimizer state are always fp32."""
    train_batch_size: Count | None = None
    """Pictures per process and micro-batch; default 1. May stand in `data_config` instead."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    max_train_steps: Count | None = None
    """Optimizer steps. With `num_train_epochs` as well, whichever ends first."""
    num_train_epochs: Count | None = None
    """Passes over the data set."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler: LR_SCHEDULERS = "constant"
    """Schedule of diffusers' `get_scheduler`."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps from 0 to the peak rate; with "constant" as well."""
    lr_num_cycles: Count = 1
    """Restarts of "cosine_with_restarts"."""
    lr_power: float = Field(default=1.0, gt=0)
    """Exponent of "polynomial"."""
    lr_step_rules: str | None = Field(default=None, pattern=r"^([0-9.eE+-]+:[0-9]+,)*[0-9.eE+-]+$")
    """Rules of "piecewise_constant", for example "1:10,0.1:20,0.01:30,0.005"."""
    adam8bit: bool | None = None
    """8-bit AdamW states (bitsandbytes). `use_8bit_adam` is an older name of it."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0: they are not."""

    # ---- what is trained
    method: Literal["lora", "full"] = "lora"
    """A LoRA beside the frozen weights, or all weights of the transformer."""
    weight_update: Literal["stochastic_rounding", "fp32_master"] = "stochastic_rounding"
    """How `method: full` adds a small update to a bf16 weight: rounded up or down by chance (2 bytes a weight), or
    to an fp32 copy that also gathers the gradients (10 bytes with them, against 4)."""
    rank: Count = 16
    """Rank of the LoRA."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """The LoRA is scaled by alpha / rank; absent: alpha = rank."""
    lora_targets: Words | None = None
    """Endings of module names that get a LoRA, patterns with * over whole module paths, or presets: attention,
    attention_mlp, all_linear. Absent: attention, the contract's to_q, to_k, to_v, to_out.0."""
    trigger_words: Words = ()
    """Written into the LoRA file's metadata, for those who use it later."""
    freeze_text_encoder: bool = True
    """False would train the text encoder."""

    # ---- objective, validation, samples
    objective: ObjectiveConfig = ObjectiveConfig()
    """Noise levels and loss."""
    validation: ValidationConfig = ValidationConfig()
    """Loss on held-out pictures with fixed noise and sigmas."""
    samples: SamplesConfig = SamplesConfig()
    """Pictures drawn while training."""

    # ---- checkpoints
    checkpointing_steps: Count = 500
    """Save every so many steps; the last step and an interrupted run are always saved."""
    checkpoints_total_limit: Count | None = None
    """Keep so many of the newest; absent: all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, "latest" (start anew where there is none), or absent: start anew."""

    # ---- encoding and cache
    precompute_text_embeddings: bool = True
    """Encode captions once, before training."""
    precompute_image_embeddings: bool = True
    """Encode pictures once, before training."""
    save_cache_on_disk: bool = True
    """False keeps the cache in memory."""
    encode_batch_size: Count = 4
    """Captions, and pictures of one size, encoded together."""

    # ---- constraints on the planner
    disable_gradient_checkpointing: bool | None = None
    """True: recompute nothing. False: recompute every block. Absent: by the memory there is."""
    disable_cpu_offload: bool | None = None
    """True: encoders stay on the device after encoding. False or absent: they leave it."""
    pin_memory: bool | None = None
    """Page-locked host memory for batches; absent: on with a GPU."""
    disable_quantization: bool = False
    """Never quantize; wins over `quantize`."""
    quantize: bool | None = None
    """8-bit frozen weights, computed in 8 bits: true demands, false forbids, absent: by the memory there is."""
    keep_plain: Words = ()
    """Layers that are not quantized where the others are: endings of module names, patterns with * over whole paths, or
    presets, as in `lora_targets`. `pixtune doctor --model` names those that lose too much in 8 bits."""
    cuda_graphs: bool = True
    """On a GPU, forward and backward pass of a LoRA's steps are recorded once a shape and replayed in one launch.
    False: kernels are launched one by one."""
    unified_memory: bool | None = None
    """One memory pool for CPU and GPU (DGX Spark); absent: as the GPU says of itself."""
    gpu_memory_limit_gib: float | None = Field(default=None, gt=0)
    """Most device memory that the whole process may take, CUDA context included: tries a smaller card on a larger one,
    or leaves room for others."""
    memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the unified pool to use; absent: 0.9."""
    expandable_segments: bool | None = None
    """Whether torch's allocator grows its segments, which loses less to fragmentation; absent: on."""
    use_fastsafetensors: bool = True
    """Weights are read by the fastsafetensors package, where it is installed and there is a GPU; else, and where it is
    not, by threads of our own."""
    fastsafetensors_num_threads: Count = 8
    """Threads that read weights, either way."""
    cuda_features: CudaFeatures = CudaFeatures()
    """Kernels to use or avoid."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        found = contradictions({key: _value_at(self, key) for key in leaf_keys()})
        if found:
            raise ValueError("; ".join(contradiction.sentence for contradiction in found))
        return self

    @property
    def batch_size(self) -> int:
        """Pictures per process and micro-batch, from whichever place it was given."""
        return self.train_batch_size or self.data_config.train_batch_size or 1

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


def sections() -> dict[str, type[Section]]:
    """The nested sections by name, for example "data_config". They do not nest further."""
    fields = TrainConfig.model_fields.items()
    return {
        name: field.annotation
        for name, field in fields
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def leaf_keys() -> Iterator[str]:
    """Every key that holds a value, dotted: "rank", "data_config.img_dir"."""
    inner = sections()
    for name in TrainConfig.model_fields:
        if name in inner:
            yield from (f"{name}.{key}" for key in inner[name].model_fields)
        else:
            yield name


def _value_at(config: TrainConfig, key: str) -> object:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


OLDER_NAMES = {"use_8bit_adam": "adam8bit", "cuda_13_features": "cuda_features"}
"""Names that the contract's older documents use, and what they are called here."""

NOT_YET: dict[str, tuple[object, ...]] = {
    "freeze_text_encoder": (True,),
}
"""Documented keys that this version does not have yet, with the values it can honour. Others raise NotYetError."""
