"""The sections of a config: keys that belong together, such as those of the data set, and how all sections behave.

As in `schema.py`, each attribute's docstring is what editors show and the schema's file holds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pixtune.config.contradictions import contradictions
from pixtune.config.section import Section
from pixtune.config.values import (
    Count,
    FewThousand,
    FilePath,
    FilePaths,
    LossWeight,
    LossWeights,
    Name,
    PathLists,
    Repeats,
    Seeds,
    Share,
    Shares,
    Side,
    Sides,
    Sizes,
    Strengths,
    Text,
    Words,
)

SIGMA_DISTRIBUTIONS = Literal["uniform", "logit_normal", "sigmoid", "mode"]
CAPTION_SOURCES = Literal["file", "lines", "file_name"]
AUTO_FROM, AUTO_SHARE, AUTO_LEAST, AUTO_MOST = 40, 0.05, 4, 16
"""Number of pictures from which some are held out by themselves, which share of them, and at least and most how many:
fewer than 4 measure too roughly, and below 40 their loss to training would weigh more than what they tell."""
WEIGHTING_SCHEMES = Literal["none", "sigma_sqrt", "cosmap"]


class FolderConfig(Section):
    """Keys of one of several folders of pictures. What a folder leaves out, `data_config` decides."""

    img_dir: FilePath | None = None
    """Folder of pictures, as `data_config.img_dir`. Absent: only where `dataset` names pictures."""
    dataset: Name | None = None
    """Hugging Face data set in place of `img_dir`: a folder that its `save_to_disk` wrote, a Parquet file, a WebDataset
    shard (.tar) or a folder of either, or a name on the hub, which is downloaded. Read by the package `datasets`;
    pictures are copied into the cache. Absent: `img_dir` has the pictures."""
    dataset_split: Name = "train"
    """Split of `dataset`."""
    image_column: Name = "image"
    """Column of `dataset` that holds the pictures."""
    caption_column: Name = "text"
    """Column of `dataset` that holds the captions: a text, or a list of which each turn draws one."""
    control_column: Name | None = None
    """Column of `dataset` that holds the control pictures: one, or a list. Absent: no controls."""
    name: Name | None = None
    """Name before those of its pictures in messages and checkpoints: "NAME/picture.png". Absent: the last part of
    `img_dir` or `dataset`, or as many parts as tell it from the others."""
    repeats: Repeats = 1.0
    """Number of times that an epoch uses each of its pictures. Fractions count over the epochs: 0.5 is every second
    epoch, 1.5 once and twice in turn. 0: none is used."""
    control_dir: FilePath | FilePaths | None = None
    """Folder or folders of its control pictures, as `data_config.control_dir`. Absent: no controls."""
    metadata_file: FilePath | None = None
    """Metadata file of its pictures, as `data_config.metadata_file`. Absent: caption files."""
    allow_missing_controls: bool | None = None
    """Whether a picture may lack a control. Absent: `data_config.allow_missing_controls`."""
    caption_type: Name | None = None
    """Extension of its caption files. Absent: `data_config.caption_type`."""
    caption_source: CAPTION_SOURCES | None = None
    """Source of its captions. Absent: `data_config.caption_source`."""
    caption_text: Text | None = None
    """One caption for all of its pictures. Absent: `data_config.caption_text`."""
    caption_prefix: Text | None = None
    """Text in front of its captions. Absent: `data_config.caption_prefix`."""
    shuffle_tags: bool | None = None
    """Whether tags are shuffled. Absent: `data_config.shuffle_tags`."""
    keep_tags: Annotated[int, Field(ge=0)] | None = None
    """Number of first tags that stay where they are. Absent: `data_config.keep_tags`."""
    tag_dropout_rate: Share | None = None
    """Share of tags that is left out. Absent: `data_config.tag_dropout_rate`."""
    caption_variants: Annotated[int, Field(ge=1, le=256)] | None = None
    """Number of forms of a caption. Absent: `data_config.caption_variants`."""
    caption_dropout_rate: Share | None = None
    """Share of turns in which a caption is dropped. Absent: `data_config.caption_dropout_rate`."""
    img_size: Side | Sides | None = None
    """Training size of its pictures in pixels, or several. Absent: `data_config.img_size`."""
    img_size_shares: Shares | None = None
    """Share of turns of each of its `img_size`. Absent: `data_config.img_size_shares` where it has no sizes of its own,
    else equal shares."""
    flip: bool | None = None
    """Whether half of its turns are mirrored. Absent: `data_config.flip`."""
    random_ratio: bool | None = None
    """Whether its pictures are cropped to ratios by chance. Absent: `data_config.random_ratio`."""
    upscale: bool | None = None
    """Whether its small pictures are enlarged. Absent: `data_config.upscale`."""
    mask_dir: FilePath | None = None
    """Folder of its masks, as `data_config.mask_dir`. Absent: no masks, unless `mask` says where they are."""
    mask: Literal["alpha"] | None = None
    """Place of the masks in its pictures themselves. Absent: `data_config.mask`, where there is no `mask_dir`."""
    weight_outside_mask: Share | None = None
    """Weight of what its masks do not show. Absent: `data_config.weight_outside_mask`."""
    allow_missing_masks: bool | None = None
    """Whether a picture without a mask counts as a whole. Absent: `data_config.allow_missing_masks`."""
    loss_weight: LossWeight = 1.0
    """Factor of its pictures' losses: below 1 they are learned less, and at 0 they are not used."""


Folders = Annotated[tuple[FolderConfig, ...], Field(strict=False, max_length=1000)]


class DataConfig(Section):
    """Keys of the data set: pictures, captions, controls, and where their encodings are kept."""

    img_dir: FilePath | None = None
    """Folder of pictures, each with a caption file of the same stem beside it. Subfolders are read too. Absent: only
    where `folders` names some."""
    folders: Folders = ()
    """Several folders in place of `img_dir`, each with an `img_dir` of its own and whatever else is different for it,
    such as `repeats` or `caption_type`. Empty: `img_dir` is the only one."""
    control_dir: FilePath | FilePaths | None = None
    """Folder of control pictures with the targets' names (edit models), or a list of folders, one for each control of
    an example. Absent: no controls."""
    allow_missing_controls: bool = False
    """Whether a picture without a control of its name is trained on without one. False: it is a problem."""
    mask_dir: FilePath | None = None
    """Folder of masks with the targets' names. The loss counts where a mask is white, and where it is black by
    `weight_outside_mask`. Absent: no masks, unless `mask` says where they are."""
    mask: Literal["alpha"] | None = None
    """Place of the masks in the pictures themselves: "alpha" takes their alpha channels. Absent: there are none, or
    they are in `mask_dir`."""
    weight_outside_mask: Share = 0.02
    """Weight of what a mask does not show, 0 to 1, where it has 1 that the mask shows. At 0 nothing holds the
    surroundings, and they drift; a few hundredths do."""
    allow_missing_masks: bool = False
    """Whether a picture without a mask counts as a whole. False: it is a problem."""
    control_size: Side = 1024
    """Side, in pixels, of the square whose area control pictures are brought near to. The stock pipelines use 1024
    whatever the target's size; smaller is faster."""
    metadata_file: FilePath | None = None
    """A JSONL file in place of caption files and `control_dir`: one {"image": ..., "caption": ..., "control": [...]} a
    line, with paths relative to `img_dir`; several captions as a list, of which each turn draws one. Or a CSV file with
    such columns (`file_name` and `text` serve as well). Absent: caption files."""
    img_size: Side | Sides = 1024
    """Side, in pixels, of the square whose area pictures are brought near to, each in a bucket of its own aspect
    ratio. A list: each turn draws one of these sizes; held-out pictures have the first."""
    img_size_shares: Shares | None = None
    """Share of turns of each of several `img_size`, as numbers in any unit. Absent: equal shares."""
    flip: bool = False
    """Whether half of the turns show a picture mirrored left to right, with its controls; both ways are cached. Not for
    pictures with text, or captions that name left and right."""
    train_batch_size: FewThousand | None = None
    """Another place for the top level's `train_batch_size`, which decides where this is absent; unequal values are a
    problem."""
    num_workers: int = Field(default=2, ge=0, le=1024)
    """Number of threads that read the cache and draw noise ahead of the step. 0: batches are made between steps."""
    caption_type: Name = "txt"
    """Extension of the caption files."""
    caption_source: CAPTION_SOURCES = "file"
    """Source of captions: a file each (or `metadata_file`); "lines" of it, of which each is a caption and each turn
    draws one; or the picture's "file_name" without folder and extension, with spaces for underscores."""
    caption_text: Text | None = None
    """One caption for all pictures, in place of their own. Absent: `caption_source` decides."""
    caption_prefix: Text = ""
    """Text, such as a trigger word, that is put in front of each caption that does not hold it yet, with a comma after
    it. Dropped captions stay empty. Empty: none."""
    shuffle_tags: bool = False
    """Whether the parts of a caption between commas come in random order, all but the first `keep_tags`."""
    keep_tags: int = Field(default=0, ge=0)
    """Number of first parts of a caption that are neither shuffled nor left out."""
    tag_dropout_rate: Share = 0.0
    """Share of a caption's parts between commas that is left out, 0 to 1, all but the first `keep_tags`."""
    caption_variants: Annotated[int, Field(ge=1, le=256)] = 8
    """Number of forms that are drawn and encoded of each caption whose tags are shuffled or left out. Each turn draws
    one of them; without either, a caption has its one form."""
    max_text_tokens: FewThousand | None = None
    """Number of tokens that captions are cut to, and padded to where a model wants a fixed length (FLUX). Absent: the
    stock pipeline's (512 for Qwen-Image and FLUX; the edit models cut nothing)."""
    caption_dropout_rate: Share = 0.0
    """Share of turns, 0 to 1, in which the empty caption replaces the example's. Classifier-free guidance needs some
    (0.1 is common)."""
    random_ratio: bool = False
    """Whether each turn crops the picture to one of 16:9, 4:3, 1:1 or its own ratio. False: its own ratio always."""
    upscale: bool = False
    """Whether pictures smaller than `img_size` are enlarged. False: they are trained on in a smaller bucket."""
    exclude: Words = ()
    """Names of pictures that are left out, with or without their ending. Empty: none."""
    loss_weights: LossWeights = {}  # noqa: RUF012 (pydantic copies it)
    """Factors of the losses of single pictures by name, with or without the ending, above 0 to 1000, besides their
    folder's `loss_weight`: below 1 for those that may be wrong. Held-out losses are not weighted. Empty: none."""
    cache_dir: FilePath | None = None
    """Folder for encoded pictures and captions. Absent: `.pixtune_cache` inside `img_dir`, or inside that of the first
    of `folders`, which must have one."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> DataConfig:
        found = contradictions({f"data_config.{key}": value for key, value in self})
        if found:
            raise ValueError("; ".join(contradiction.sentence for contradiction in found))
        return self


class PriorConfig(Section):
    """Keys of prior preservation: regularization pictures, which the model knows already and is to keep."""

    folder: FilePath | None = None
    """Folder of regularization pictures with captions, to be trained on beside the others, without masks. Control
    pictures lie beside it, in folders of the same names as `data_config.control_dir`; what else holds for them is as in
    `data_config`. Absent: there are none, or the base model draws them from `prompts`."""
    prompts: Words = ()
    """Prompts from which the base model draws regularization pictures before the first step, such as "a cat" where a
    certain cat is learned. They are kept in `prior` in `output_dir`. Empty: it draws none."""
    num_pictures: FewThousand = 20
    """Number of pictures that it draws of each prompt, from fixed seeds."""
    num_steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Number of sampler steps of these."""
    guidance_scale: float = Field(default=4.0, ge=1)
    """Guidance of these, as `samples.guidance_scale`."""
    repeats: Repeats = 1.0
    """Number of times that an epoch uses each regularization picture; fractions count over the epochs."""
    loss_weight: LossWeight = 1.0
    """Factor of their losses."""


class ObjectiveConfig(Section):
    """Keys of what a step learns: noise levels and the weight of their losses."""

    sigma_distribution: SIGMA_DISTRIBUTIONS = "logit_normal"
    """Distribution of the noise levels (sigmas, 0 to 1) that training draws, before the shift."""
    logit_mean: float = 0.0
    """Mean of the normal distribution inside "logit_normal"; larger means more noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution inside "logit_normal"."""
    mode_scale: float = 1.29
    """Scale of "mode"."""
    shift: Literal["model", "none"] | float = "model"
    """Resolution-dependent shift of sigmas towards noise: "model" takes it from the model's own scheduler config,
    "none" leaves sigmas as they are, a number is a fixed `mu` (the logarithm of the shift)."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance input of distilled models (FLUX.1-dev) during training and validation; other models have none."""
    weighting_scheme: WEIGHTING_SCHEMES = "none"
    """Weight of each example's loss by its sigma, under diffusers' names. "none": all weigh the same."""
    min_sigma: Share = 0.0
    """Lower end of the sigmas that training draws: draws, the shift included, are mapped evenly from [0, 1] to
    [`min_sigma`, `max_sigma`]. Large values train composition alone."""
    max_sigma: Share = 1.0
    """Upper end of the sigmas that training draws; see `min_sigma`. Small values train detail alone."""
    loss: Literal["mse", "huber"] = "mse"
    """Measure of the velocity's error in training: its square, or the pseudo-Huber loss, on which a few pictures unlike
    the others weigh less. Held-out losses are squares always."""
    huber_delta: Annotated[float, Field(ge=1e-4, le=1e4)] = 0.1
    """Error of the velocity, whose values are about 1, from which "huber" grows evenly with the error and no longer
    with its square."""

    @property
    def delta(self) -> float | None:
        """Delta of the pseudo-Huber loss; None where the loss is the squared error."""
        return self.huber_delta if self.loss == "huber" else None


class ValidationConfig(Section):
    """Keys of the held-out loss: which pictures measure, and how often."""

    held_out: Share | Literal["auto"] = "auto"
    """Share of the data set, 0 to 1, that is never trained on and serves to measure; at least one picture. "auto": a
    twentieth, at least 4 and at most 16 pictures, of 40 pictures or more, and none of fewer; of a stream the first 16
    rows of the first shard, where that has 40. 0 without `held_out_dir`: no validation. A resumed run keeps its
    checkpoint's where this is "auto"."""
    held_out_dir: FilePath | None = None
    """A folder of held-out pictures in place of a share. Its control pictures (edit models) and masks lie beside it, in
    folders of the same names as those of the training pictures: data/images with data/control. Absent: `held_out`
    decides."""
    every: Count | None = None
    """Number of steps between two validations; there is also one before the first step and one after the last. Absent:
    100; where pictures are held out by `held_out: auto`, as many as keep measuring below a twentieth of the time."""
    judge_captions: bool | None = None
    """Whether the base model names captions that do not fit their pictures, before the first step of a new run. Absent:
    where that takes less than a twentieth of the run's time, which is from 40 turns of each picture on."""
    patience: Count | None = None
    """Number of validations in a row without a new lowest held-out loss after which the run ends early. Absent: it
    takes all of its steps."""
    num_draws: FewThousand = 2
    """Number of fixed noises for each held-out picture in each quarter of the sigma range."""

    def num_held_out(self, num_pictures: int) -> int:
        """Returns how many of some pictures are held out."""
        if self.held_out_dir is not None or self.held_out == 0:
            return 0
        if self.held_out == "auto":
            most = min(max(AUTO_LEAST, round(AUTO_SHARE * num_pictures)), AUTO_MOST)
            return most if num_pictures >= AUTO_FROM else 0
        return max(1, round(self.held_out * num_pictures))


class SamplesConfig(Section):
    """Keys of the pictures that the model generates during training."""

    prompts: Words = ()
    """Prompts to sample during training, one picture for each prompt and seed. Empty: no samples."""
    controls: PathLists = ()
    """Control pictures of each prompt (edit models): one list of paths for each prompt. Empty: none."""
    prompts_file: FilePath | None = None
    """File of further prompts: text with one a line, or JSONL with {"prompt": ..., "negative": ..., "seed": ...,
    "width": ..., "height": ..., "control": ...} a line, all but the first optional. Absent: none."""
    negative_prompt: Text | None = None
    """Prompt that guidance leads away from; without effect where `guidance_scale` is 1 or an input of the model (FLUX).
    Absent: the empty one."""
    seeds: Seeds = (0,)
    """Seeds of the starting noise; each is used with each prompt."""
    every: Count = 500
    """Number of steps between two rounds of samples; there is also one before the first step and one after the last. A
    file `sample_now` in `output_dir` asks for one more, after the next step that `logging_steps` divides."""
    num_steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Number of sampler steps."""
    guidance_scale: float = Field(default=4.0, ge=1)
    """Scale of classifier-free guidance; 1 turns it off and halves the time. For distilled models (FLUX) the guidance
    input."""
    width: Side | None = None
    """Width of the samples in pixels. Absent: `img_size`; with controls and no `height` either, the last control's
    shape at the area of `img_size` squared."""
    height: Side | None = None
    """Height of the samples in pixels. Absent: as for `width`."""
    sizes: Sizes = ()
    """Sizes at which each prompt is sampled, in place of `width` and `height`: [[1024, 1024], [1328, 800]] is a square
    and a wide one, in pixels. Empty: one size."""
    strengths: Strengths = (1.0,)
    """Strengths of the LoRA, -10 to 10, at each of which all samples are drawn, as [0.5, 1.0]. 0 is the base alone."""


class EmaConfig(Section):
    """Keys of the average of the LoRA's weights over the steps."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the LoRA: the share that a step leaves of it, such as 0.99. Samples,
    held-out losses and the LoRA files are of the average then, and `raw_lora_weights.safetensors` has the weights of
    the last step. Absent: there is no average."""
    warm_up: bool = True
    """Whether the decay of step n (0 for the first) is at most (1 + n) / (10 + n), so that a young average soon forgets
    the beginning. False: `decay` from the first step on."""
    on_host: bool = False
    """Whether the average is kept in host memory, at the price of two transfers a step. False: beside the LoRA on the
    GPU, 4 bytes a trained weight."""


class TrainingAdapterConfig(Section):
    """Keys of a frozen LoRA that is on in training alone."""

    path: FilePath | None = None
    """LoRA file (diffusers', ComfyUI's or kohya's names) that is on, frozen, in steps and held-out losses, and off in
    samples and in the LoRA files: an adapter that undoes a base's distillation, beside which a LoRA for the distilled
    base is trained. Absent: none."""
    strength: float = Field(default=1.0, gt=0, le=10)
    """Factor of its scale."""


class GuardConfig(Section):
    """Keys of what a run does when its losses go wrong."""

    max_skipped_steps: Count = 10
    """Number of steps skipped in a row at which the run ends; 1: the first one ends it. A step is skipped, and its
    examples are named, where its loss or the norm of its gradients is no finite number."""
    exploded_loss: Literal["warn", "stop"] = "warn"
    """Whether a loss that has exploded is a warning, or ends the run: a held-out loss over twice its lowest, a median
    of 32 training losses over 3 times its lowest, or 8 training losses 1.5 times those of predicting nothing."""
    must_learn_within: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Number of steps with a learning rate above 0 after which a run ends whose weights have not moved; it also ends
    where no gradient reaches a layer, or where a saved file, read back, does not do what the weights do. 0: none of
    this is checked."""


class DistributedConfig(Section):
    """Keys of a run of several processes, each with a GPU of its own."""

    shards: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Number of processes that hold one copy of the weights together: each a part of as many blocks as do not fit
    whole, of everything where all weights are trained. 1 gives each process its own copy. It must divide the number of
    processes. Absent: the planner decides, 1 where that fits."""


class CudaFeatures(Section):
    """Keys of kernels and number formats that only some GPUs have."""

    enable_flash_attention_3: bool | None = None
    """Whether attention runs by FlashAttention 3 (Hopper with the flash_attn_interface module only). True: where it is
    usable and passes its trial; the plan says why where it is not. False or absent: never."""
    enable_fp8_training: bool | None = None
    """Whether frozen weights are quantized to FP8 and multiplied in it. True: demanded, an error below compute
    capability 8.9. False: the 8-bit format is int8. Absent: FP8 is the 8-bit format from 8.9 on, and the planner
    chooses whether to quantize. `quantize: false`, `disable_quantization` and `method: full` win over it."""
    enable_tf32_compute: bool | None = None
    """Whether matrix products of what stays in fp32 run in TF32. Absent: on from compute capability 8.0."""
    enable_cudnn_sdp: bool | None = None
    """Whether attention runs by cuDNN, which `deterministic` rules out. True: where it passes its trial. False: never.
    Absent: the fastest kernel that a trial on this machine finds right; untried, cuDNN's on a DGX Spark."""
