"""Every key that a run can have: one schema, in the contract's own names, frozen once read.

Imports neither torch nor a model, so that checking a config takes milliseconds. `load.py` reads files into it.
Three-state keys (`bool | None`) are constraints on the planner: true demands, false forbids, absent lets it choose.
Each attribute's docstring is what editors show and `train_configs/schema.json` holds: meaning, unit, and what holds
where the key is absent. `tests/unit/config/test_schema.py` checks that none is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pixtune.config.adapter_section import AdapterConfig
from pixtune.config.contradictions import contradictions
from pixtune.config.lora_files import LoraFilesConfig
from pixtune.config.model_parts import ModelParts
from pixtune.config.optimizing import (
    FINDS_RATE,
    OPTIMIZER_NAMES,
    AdafactorConfig,
    MuonConfig,
    ProdigyConfig,
    ScheduleFreeConfig,
)
from pixtune.config.section import Section
from pixtune.config.sections import (
    CudaFeatures,
    DataConfig,
    DistributedConfig,
    EmaConfig,
    FolderConfig,
    GuardConfig,
    ObjectiveConfig,
    PriorConfig,
    SamplesConfig,
    TrainingAdapterConfig,
    ValidationConfig,
)
from pixtune.config.streaming import StreamConfig
from pixtune.config.values import (
    Count,
    FewThousand,
    FilePath,
    Name,
    Share,
    StepRules,
    Words,
)


def _changeable(names: tuple[str, ...]) -> tuple[str, ...]:
    known = [*leaf_keys(), *KNOWN_BY_CONTENT]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be names of config keys, or {', '.join(KNOWN_BY_CONTENT)}: {name!r} is none{hint}")
    return names


KNOWN_BY_CONTENT = ("data", "base_model", "num_processes")
"""Names of what a run is recognized by besides the keys of its config."""
ChangeableNames = Annotated[Words, AfterValidator(_changeable)]

LR_SCHEDULERS = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "rex",
    "piecewise_constant",
]


class TrainConfig(Section):
    """One training run."""

    # ---- what and where
    pretrained_model_name_or_path: Name
    """A folder in diffusers' layout or a hub name, for example Qwen/Qwen-Image; or a transformer in one file, beside
    which `model_parts` names the other parts."""
    model_parts: ModelParts = ModelParts()
    """Parts of the model that lie elsewhere than in its folder."""
    output_dir: FilePath
    """Folder for checkpoints, the LoRA, metrics and the report."""
    data_config: DataConfig
    """The data set."""
    random_weights: bool = False
    """TEST ONLY: whether the transformer has the model's architecture with random weights, and random latents and text
    features stand in for encoded data. Measures speed and memory where the real weights are absent."""

    # ---- logging
    logging_dir: FilePath = Path("logs")
    """Folder for the tracker's files, relative to `output_dir`."""
    report_to: Literal["tensorboard", "wandb"] | None = None
    """Tracker besides `metrics.jsonl`, which is always written. Absent: none."""
    tracker_project_name: Name = "pixtune"
    """Name of the project in the tracker."""
    logging_steps: Count = 10
    """Number of steps after which losses are read back from the device; each step's loss is recorded all the same.
    Several processes agree as often on whether to stop."""

    # ---- length and rate
    seed: int = Field(default=42, ge=0, le=2**63 - 1)
    """Seed of the run: every draw is a function of it, the step, the example and the purpose."""
    deterministic: bool = False
    """Whether steps are bit-exact on a GPU too, at a price in speed. On a CPU they always are."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Number format of activations and of weights that are not quantized: "bf16", or "no" for fp32. A LoRA and its
    gradients are fp32 in either; with `method: full` the trained weights have this format."""
    train_batch_size: FewThousand | None = None
    """Number of examples in a process's micro-batch. Absent here and in `data_config`: 1."""
    gradient_accumulation_steps: FewThousand = 1
    """Number of micro-batches per optimizer step."""
    max_train_steps: Count | None = None
    """Number of optimizer steps; with `num_train_epochs` as well, whichever ends first. Absent: `num_train_epochs`
    decides; one of the two is required."""
    num_train_epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Number of passes over the data set. Absent: `max_train_steps` decides."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate. Absent: 1e-4, and 1 for optimizers that estimate the step size themselves (Prodigy)."""
    lr_scheduler: LR_SCHEDULERS = "constant"
    """Schedule of the learning rate, by diffusers' `get_scheduler`; "rex" stays high for long and falls at the end."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Number of optimizer steps from rate 0 to the peak rate; counts for "constant" as well."""
    lr_warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run's steps, in place of `lr_warmup_steps`, from rate 0 to the peak rate: 0.05 of 1000 steps is 50.
    0: `lr_warmup_steps` decides."""
    lr_floor: Share = 0.0
    """Share of the peak rate to which schedules that fall end, as 0.1: "linear", "cosine", "cosine_with_restarts",
    "polynomial" and "rex". 0: they fall to zero."""
    lr_num_cycles: Count = 1
    """Number of cycles of "cosine_with_restarts"."""
    lr_power: float = Field(default=1.0, gt=0)
    """Exponent of "polynomial"."""
    lr_step_rules: StepRules | None = None
    """Rules of "piecewise_constant", for example "1:10,0.1:20,0.01:30,0.005": FACTOR:UNTIL_STEP, and a last factor.
    Required for that schedule; absent for all others."""
    optimizer: OPTIMIZER_NAMES = "adamw"
    """Method by which weights are stepped; docs/optimizers.md compares them. "adafactor" and "muon" (full only) take
    less memory than "adamw"; "prodigy" finds its step size itself; those that are schedule-free average the weights."""
    adam8bit: bool | None = None
    """Whether AdamW keeps its states in 8 bits (bitsandbytes): 2 bytes a trained weight in place of 8. Absent: for a
    LoRA on GPUs of up to 30 GiB; for `method: full` the planner decides. `use_8bit_adam` is an older name."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment of AdamW and Prodigy; schedule-free, the share of the average in what is trained."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment of AdamW and Prodigy."""
    adam_weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, of every optimizer and on all that is trained: a step takes this share, times the
    learning rate, off each weight."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Constant that AdamW and Prodigy add to the root of the second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global norm to which larger gradients are scaled down. 0: no clipping."""

    prodigy: ProdigyConfig = ProdigyConfig()
    """Estimate of the step size of "prodigy" and "prodigy_schedule_free"."""
    schedule_free: ScheduleFreeConfig = ScheduleFreeConfig()
    """Average of "adamw_schedule_free"."""
    adafactor: AdafactorConfig = AdafactorConfig()
    """Moments of "adafactor"."""
    muon: MuonConfig = MuonConfig()
    """Steps of "muon"."""

    # ---- what is trained
    method: Literal["lora", "full"] = "lora"
    """Choice of what is trained: a LoRA beside the frozen weights, or all weights of the transformer."""
    weight_update: Literal["stochastic_rounding", "fp32_master"] = "stochastic_rounding"
    """Way in which `method: full` adds a small update to a bf16 weight: rounded up or down by chance (weight and
    gradient take 4 bytes), or to an fp32 copy, beside gradients in fp32 (10 bytes)."""
    rank: FewThousand = 16
    """Rank of the LoRA."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Alpha of the LoRA, which is scaled by alpha / rank. Absent: the rank."""
    lora_targets: Words | None = None
    """Linear layers that get a LoRA: endings of module names, patterns with * over whole module paths, or the presets
    attention, attention_mlp and all_linear. Absent: attention (the contract's to_q, to_k, to_v, to_out.0)."""
    init_lora: FilePath | None = None
    """LoRA file (diffusers', ComfyUI's or kohya's names) that a new run starts from. Its layers must be among
    `lora_targets`, and other layers start from zero; another rank than `rank` is reached by SVD or with zeros. A
    resumed run has it in its checkpoint. Absent: the LoRA adds nothing before the first step."""
    trigger_words: Words = ()
    """Words written into the LoRA file's metadata for its users. Empty: none. Captions are not changed: write the words
    there too."""
    lora_files: LoraFilesConfig = LoraFilesConfig()
    """The LoRA files that are written, and what they say about themselves."""
    adapter: AdapterConfig = AdapterConfig()
    """Kind of adapter that is trained, a LoRA or one of its relatives, and ranks of some of its layers."""
    ema: EmaConfig = EmaConfig()
    """Average of the LoRA's weights over the steps."""
    training_adapter: TrainingAdapterConfig = TrainingAdapterConfig()
    """A frozen LoRA that is on in training alone."""
    freeze_text_encoder: bool = True
    """Whether the text encoder stays as it is. False, training it, is refused: this version cannot do it yet."""

    # ---- objective, validation, samples
    objective: ObjectiveConfig = ObjectiveConfig()
    """Noise levels and loss."""
    prior_preservation: PriorConfig = PriorConfig()
    """Pictures of what the model knows already and is to keep."""
    validation: ValidationConfig = ValidationConfig()
    """Loss on held-out pictures with fixed noise and sigmas."""
    samples: SamplesConfig = SamplesConfig()
    """Pictures that the model generates during training."""
    guard: GuardConfig = GuardConfig()
    """Losses that are no numbers, or explode."""

    # ---- checkpoints
    checkpointing_steps: Count = 500
    """Number of steps between two checkpoints; the last step and an interrupted run are always saved."""
    checkpoints_total_limit: Count | None = None
    """Number of checkpoints to keep, the newest; one more until the first loss with the newest one's weights is known,
    and the one with the lowest held-out loss beside them. Absent: all."""
    resume_from_checkpoint: Name | None = None
    """Checkpoint to resume from: its folder, or "latest" (the newest in `output_dir` that is whole, by the order of
    saving; a new run where there is none). Absent: a new run, refused where `output_dir` holds one."""
    resume_with_changes_in: ChangeableNames = ()
    """Names of what may differ from the run that is resumed, although its next steps are then another run's: keys of
    the config, `data`, `base_model`, `num_processes`. The checkpoints record the changes. Empty: nothing may."""

    # ---- encoding and cache
    precompute_text_embeddings: bool = True
    """Whether captions are encoded once, before training. False: at each turn, with the text encoder kept loaded."""
    precompute_image_embeddings: bool = True
    """Whether pictures are encoded once, before training. False: at each turn, with the autoencoder kept loaded."""
    save_cache_on_disk: bool = True
    """Whether encodings are kept on disk for later runs. False: in host memory, by each process for itself."""

    # ---- constraints on the planner
    disable_gradient_checkpointing: bool | None = None
    """Whether recomputation is ruled out. True: nothing is recomputed, and a LoRA run streams no weights either.
    False: every block is recomputed. Absent: the planner recomputes as little as memory allows."""
    disable_cpu_offload: bool | None = None
    """Whether text encoder and autoencoder stay on the GPU after encoding. False: they leave it. Absent: they stay
    where memory is unified and leave elsewhere."""
    pin_memory: bool | None = None
    """Whether batches wait in page-locked host memory, if there is a GPU. Absent: where memory is not unified."""
    disable_quantization: bool = False
    """Whether quantization is ruled out, of text encoders too. Wins over `quantize` and `enable_fp8_training`."""
    quantize: bool | None = None
    """Whether the frozen weights of the transformer's blocks are quantized to 8 bits and multiplied in 8 bits (FP8, or
    int8 below compute capability 8.9); true is an error below 8.0. Absent: the planner takes 16, 8 or 4 bits by the
    memory there is, on a CPU and below capability 8.0 16 or 32."""
    keep_plain: Words = ()
    """Linear layers that are not quantized where the others are, named as in `lora_targets`. Empty: none.
    `pixtune doctor --model` names those that lose too much in 8 bits."""
    cuda_graphs: bool = True
    """Whether a LoRA's steps on a GPU are captured as CUDA graphs, once a shape, and replayed in one launch. False:
    kernels are launched one by one."""
    unified_memory: bool | None = None
    """Whether CPU and GPU are treated as one pool of memory (DGX Spark): no offload, no pinned memory, encoders stay.
    Absent: as the GPU reports."""
    gpu_memory_limit_gib: float | None = Field(default=None, gt=0)
    """Upper limit of the process's GPU memory in GiB, CUDA context included: tries a smaller card on a larger one, or
    leaves room for others. Absent: all that is free."""
    host_memory_limit_gib: float | None = Field(default=None, gt=0)
    """Upper limit, in GiB, of the host memory that all processes of a run on one machine take together, beside GPUs
    with memory of their own. Page cache does not count. Absent: what is available, within limits of control groups."""
    memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the unified pool that a run uses, 0 to 1. Absent: 0.9. Without effect elsewhere."""
    expandable_segments: bool | None = None
    """Whether torch's allocator grows its segments, which loses less to fragmentation. Absent: on, where torch has it
    (Linux)."""
    use_fastsafetensors: bool = True
    """Whether the fastsafetensors package reads weights, where it is installed and there is a GPU. Otherwise threads of
    pixtune's own read them."""
    fastsafetensors_num_threads: Annotated[int, Field(ge=1, le=1024)] = 8
    """Number of threads that read weights, with or without that package; without effect on a CPU."""
    stream: StreamConfig = StreamConfig()
    """A data set that is neither copied nor encoded whole before the first step."""
    distributed: DistributedConfig = DistributedConfig()
    """Work that several processes share."""
    cuda_features: CudaFeatures = CudaFeatures()
    """Kernels and number formats to use or avoid."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_its_optimizer(cls, values: Any) -> Any:
        finds_rate = isinstance(values, dict) and values.get("optimizer") in FINDS_RATE
        return {"learning_rate": 1.0, **values} if finds_rate else values

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        found = contradictions({key: _value_at(self, key) for key in leaf_keys()})
        if found:
            raise ValueError("; ".join(contradiction.sentence for contradiction in found))
        return self

    @property
    def batch_size(self) -> int:
        """Number of examples in a process's micro-batch, from whichever place it was given."""
        return self.train_batch_size or self.data_config.train_batch_size or 1

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


def sections() -> dict[str, type[Section]]:
    """Returns the nested sections by name, for example "data_config". They do not nest further."""
    fields = TrainConfig.model_fields.items()
    return {
        name: field.annotation
        for name, field in fields
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def leaf_keys() -> Iterator[str]:
    """Yields every key that holds a value, dotted: "rank", "data_config.img_dir"."""
    inner = sections()
    for name in TrainConfig.model_fields:
        if name in inner:
            yield from (f"{name}.{key}" for key in inner[name].model_fields)
        else:
            yield name


LIST_SECTIONS: dict[str, type[Section]] = {"data_config.folders": FolderConfig}
"""Keys whose values are lists of sections, with the section of their items."""


def section_of(key: str) -> type[Section] | None:
    """Returns the section that a dotted name stands for: "samples", "data_config.folders[2]"; None: it is none."""
    listed = re.fullmatch(r"(.+)\[\d*\]", key)
    return LIST_SECTIONS.get(listed[1]) if listed else sections().get(key)


def item_keys() -> Iterator[str]:
    """Yields every key of the items of lists of sections: "data_config.folders[].repeats"."""
    for name, section in LIST_SECTIONS.items():
        yield from (f"{name}[].{key}" for key in section.model_fields)


def is_leaf(key: str) -> bool:
    """Returns whether a key holds a value: "rank", "data_config.folders", "data_config.folders[2].repeats"."""
    section, _, name = key.rpartition(".")
    holder = section_of(section) if section else TrainConfig
    return holder is not None and name in holder.model_fields and key not in sections()


def _value_at(config: TrainConfig, key: str) -> object:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


OLDER_NAMES = {"use_8bit_adam": "adam8bit", "cuda_13_features": "cuda_features"}
"""Names that the contract's older documents use, each with the name it has here."""

FORMER_KEYS = {
    "encode_batch_size": "captions and pictures are encoded one by one, so that each encoding depends on itself alone"
}
"""Keys that earlier versions had and that nothing reads any more, each with why. They are accepted with a warning."""

NOT_YET: dict[str, tuple[object, ...]] = {
    "freeze_text_encoder": (True,),
}
"""Documented keys that this version cannot do yet, with the values it can honour. Others raise NotYetError."""
