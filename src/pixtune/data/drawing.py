"""Draws pictures by a plan of their own, where no run is on its way: encoders first, then the transformer, alone.

It saves memory as training does: encoders are loaded first and leave, the transformer is loaded in the form that
`plan_sampling` chooses, and where not even a decoder fits beside it, it leaves before the pictures are decoded.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pixtune.config.model_parts import NO_PARTS, ModelParts
from pixtune.config.schema import TrainConfig
from pixtune.data.build_encoder import plan_encoders_for
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.encodings import Encodings, control_pictures, text_item
from pixtune.data.example_table import Example
from pixtune.data.prompts import control_rules, encode_prompt, nothing_to_edit, prompt_example, rounded_sizes
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.engine.apply import blocks_of, load_planned, placement_of
from pixtune.engine.compile import compile_blocks, compile_obstacle
from pixtune.engine.load import LoadedTransformer
from pixtune.families import family_of
from pixtune.families.opening import open_model
from pixtune.family import CONTROL_SIDE, ModelFamily, Placement
from pixtune.hardware.facts import HardwareFacts
from pixtune.hardware.monitor import StageLog
from pixtune.plan.encoders import EncoderPlan, count_caption_tokens
from pixtune.plan.footprint import Footprint, read_footprint
from pixtune.plan.passes import Abilities, needs_negative
from pixtune.plan.sampling import SampleSizes, SamplingPlan, plan_sampling
from pixtune.planning import can_pad, encoder_sizes, tensor_shapes
from pixtune.progress import announced, counted, say
from pixtune.sampler import EncodedPrompt, PromptPicture, PromptSampler, SamplerSettings
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained.adapters import adapter_names, at_strength
from pixtune.trained.saved_lora import SavedLora, attach_saved_lora, read_saved_lora

ENCODING, LOADING, SAMPLING, DECODING = "prompts encoded", "transformer", "pictures drawn", "pictures decoded"
"""Stages of sampling, as the memory log names them."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for pictures."""

    model: str
    prompts: tuple[AskedPrompt, ...]
    lora: Path | None
    weights_format: str
    settings: SamplerSettings
    max_text_tokens: int | None
    control_size: int
    """Side in pixels of the square whose area control pictures get."""
    quantize: bool | None = None
    """Whether base weights are quantized; None: it depends on the memory there is."""
    gpu_memory_limit_gib: float | None = None
    """Device memory that the process may take at most."""
    strengths: tuple[float, ...] = (1.0,)
    """Factors of the LoRA's scale, at each of which all pictures are drawn. 0 is the base alone."""
    model_parts: ModelParts = NO_PARTS
    """Parts of the model that lie elsewhere."""
    side: int = CONTROL_SIDE
    """Side in pixels of the square whose area pictures get where a prompt has no size."""

    @property
    def num_pictures(self) -> int:
        """Number of pictures at each strength."""
        return sum(len(asked.seeds or self.settings.seeds) for asked in self.prompts)


@dataclass(frozen=True)
class Plans:
    """Plans of a request on one machine."""

    encoders: EncoderPlan
    sampling: SamplingPlan


@dataclass(frozen=True)
class Task:
    """A request with the model and the LoRA that it names."""

    request: SampleRequest
    family: ModelFamily
    folder: ModelFolder
    lora: SavedLora | None
    examples: tuple[Example, ...]
    """Prompts of the request in the form of training examples."""
    notes: tuple[str, ...] = ()
    """Sentences on what is done otherwise than it was asked for."""

    @property
    def texts(self) -> tuple[TextItem, ...]:
        """Prompts, and those that guidance leads away from."""
        dropped = self.family.dropped_caption
        return tuple(
            dict.fromkeys(
                text_item(text, example, 0)
                for asked, example in zip(self.request.prompts, self.examples, strict=True)
                for text in (asked.text, dropped if asked.negative is None else asked.negative)
            )
        )

    @property
    def controls(self) -> tuple[FramedPicture, ...]:
        return tuple(dict.fromkeys(picture for example in self.examples for picture in control_pictures(example, 0)))


def open_task(request: SampleRequest) -> Task:
    """Reads everything that a request names, except the model's weights.

    Raises:
        WeightsError, DataError: see `commands/sample.py: sample_pictures`.
    """
    folder = open_model(request.model, request.model_parts)
    family = family_of(folder)
    multiple = family.pixel_multiple(folder)
    rules = control_rules(family, folder, request.control_size)
    default = (request.side, request.side)
    asked_sizes = dict.fromkeys(each.size or default for each in request.prompts if each.size or not each.controls)
    notes = [sentence for size in asked_sizes for sentence in rounded_sizes(size, multiple)]
    notes += nothing_to_edit(family, request.prompts, "Name one: --control picture.png")
    examples = tuple(
        prompt_example(each.text, each.controls, each.size or default, each.size is None, multiple, rules)
        for each in request.prompts
    )
    lora = read_saved_lora(request.lora, family) if request.lora else None
    has_negative = any(each.negative is not None for each in request.prompts)
    if has_negative and not needs_negative(family, request.settings.guidance_scale):
        notes.append("the negative prompt has no effect: this model, or --guidance 1, takes no second pass for it.")
    return Task(request, family, folder, lora, examples, tuple(notes))


# ---- plans


def abilities_of(task: Task, device: torch.device) -> Abilities:
    """Tries what a plan can use on a GPU. A first compilation takes seconds."""
    compiles = device.type == "cuda" and compile_obstacle(device) is None
    return Abilities(compiles, can_pad(task.folder, device))


def make_plans(task: Task, config: TrainConfig, facts: HardwareFacts, abilities: Abilities | None = None) -> Plans:
    """Plans how a request fits a machine, from headers alone.

    Args:
        abilities: what was tried on this machine; None: everything is taken to work.

    Raises:
        WeightsError: the LoRA is for another model.
        PlanError, ConfigError: see `commands/sample.py: sample_pictures`.
    """
    encoders = plan_encoders_for(config, task.family, task.folder, facts, task.texts, task.controls)
    settings = task.request.settings
    passes_per_step = 2 if needs_negative(task.family, settings.guidance_scale) else 1
    sizes = SampleSizes(
        pixels=max(math.prod(example.framings[0].size) for example in task.examples),
        num_steps=settings.num_steps,
        autoencoder_bytes=encoder_sizes(config, task.family, task.folder, 0, 0).autoencoder_bytes,
        num_prompts=len(task.examples),
        num_pictures=task.request.num_pictures * len(task.request.strengths),
        passes_per_step=passes_per_step,
        pads_text=task.family.pads_text,
    )
    return Plans(encoders, plan_sampling(facts, footprint_of(task, config), config, sizes, abilities))


def footprint_of(task: Task, config: TrainConfig) -> Footprint:
    """Computes the footprint of one pass of the transformer with its LoRA.

    Raises:
        WeightsError: the LoRA is for another model.
    """
    family, folder, lora = task.family, task.folder, task.lora
    shapes = tensor_shapes(config, family, folder)
    modules = lora.modules if lora else ()
    if lora:
        lora.refuse_other_model(shapes)
    return read_footprint(
        family, shapes, family.block_shape(folder)[1], max(_num_tokens(task, example) for example in task.examples),
        modules, lora.size if lora else 0,
    )  # fmt: skip


def _num_tokens(task: Task, example: Example) -> int:
    """Estimates the tokens of a picture with its controls and prompt from above, since nothing is encoded yet."""
    family, seen = task.family, [picture for item in task.texts for picture in item.pictures]
    sizes = [family.latent_shape(task.folder, *size)[1:] for size in example.signature(0)]
    vision_pixels = sum(math.prod(picture.framing.size) for picture in set(seen))
    return sum(family.num_image_tokens(*size) for size in sizes) + count_caption_tokens(
        len(example.caption), vision_pixels
    )


# ---- carried out


def sample_as_planned(
    task: Task,
    plans: Plans,
    device: torch.device,
    stages: StageLog | None = None,
    console: Console | None = None,
    is_wanted: Callable[[str, int], bool] = lambda text, seed: True,
) -> Iterator[PromptPicture]:
    """Yields one picture for each strength, prompt and seed.

    Args:
        is_wanted: returns whether a prompt's text is sampled with a seed.
        console: shows what takes over a second; None: nothing does.
        stages: gets the memory of `ENCODING`, `LOADING`, `SAMPLING` and, where pictures are decoded last, `DECODING`.
    """
    stages, console = stages or StageLog(), console or Console(quiet=True)
    placement = placement_of(plans.sampling, device)
    prompts = encode_prompts(task, build_encoder(task, plans.encoders, placement, console))
    stages.record(ENCODING)
    sampler = PromptSampler(
        task.family, task.folder, prompts, task.request.settings, placement, keep_autoencoder=False,
        tile_pixels=plans.sampling.tile_pixels, passes=plans.sampling.passes, is_wanted=is_wanted,
    )  # fmt: skip
    if not plans.sampling.decode_last:
        transformer = load_base(task, plans.sampling, device, sampler.sizes_vary, console)
        stages.record(LOADING)
        with counted("drawing", count_steps(task, sampler), console) as count:
            for strength in task.request.strengths:
                with at_strength(transformer.module, adapter_names(transformer.module), strength):
                    for picture in sampler.sample(transformer, count):
                        yield replace(picture, strength=strength)
        stages.record(SAMPLING)
        return
    for strength, prompt, seed, latents_BCHW in all_latents(task, plans.sampling, device, sampler, stages, console):
        yield PromptPicture(prompt, seed, sampler.decode(latents_BCHW), strength)
    stages.record(DECODING)


def count_steps(task: Task, sampler: PromptSampler) -> int:
    """Counts the sampler steps of all pictures."""
    return sampler.num_pictures * task.request.settings.num_steps * len(task.request.strengths)


def build_encoder(task: Task, plan: EncoderPlan, placement: Placement, console: Console | None = None) -> Encoder:
    """Builds the encoder of prompts and controls, with nothing loaded and nothing kept on disk."""
    return Encoder(
        family=task.family,
        folder=task.folder,
        placement=placement,
        plan=plan,
        max_text_tokens=task.request.max_text_tokens,
        store=MemoryStore(),
        ledger=Ledger(None),
        console=console or Console(quiet=True),
        memo_dir=None,
        names_weights=False,
    )


def encode_prompts(task: Task, encoder: Encoder) -> list[EncodedPrompt]:
    """Encodes prompts and controls as training does. Encoders leave the device before the transformer is loaded."""
    encodings = Encodings(encoder)
    encodings.fill_texts(task.texts)
    encodings.fill_pictures(task.controls)
    scale = task.request.settings.guidance_scale
    return [
        encode_prompt(task.family, encodings, asked, example, scale)
        for asked, example in zip(task.request.prompts, task.examples, strict=True)
    ]


def all_latents(
    task: Task,
    plan: SamplingPlan,
    device: torch.device,
    sampler: PromptSampler,
    stages: StageLog,
    console: Console,
) -> Sequence[tuple[float, EncodedPrompt, int, Tensor]]:
    """Samples the latents of all pictures with the LoRA's strength for each, on the CPU.

    The transformer has left the device on return.
    """
    transformer = load_base(task, plan, device, sampler.sizes_vary, console)
    stages.record(LOADING)
    sampled = []
    with counted("drawing", count_steps(task, sampler), console) as count:
        for strength in task.request.strengths:
            with at_strength(transformer.module, adapter_names(transformer.module), strength):
                for prompt, seed, latents_BCHW in sampler.latents(transformer, count):
                    sampled.append((strength, prompt, seed, latents_BCHW.cpu()))
    stages.record(SAMPLING)
    del transformer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sampled


def load_base(
    task: Task, plan: SamplingPlan, device: torch.device, sizes_vary: bool = False, console: Console | None = None
) -> LoadedTransformer:
    """Loads the transformer in its planned form, attaches the LoRA to it and compiles its blocks.

    Args:
        sizes_vary: passes have several shapes.

    Raises:
        WeightsError: files or LoRA do not fit the model.
    """
    with announced("loading the transformer", partial(say, console or Console(quiet=True))):
        transformer = load_planned(task.family, task.folder, plan, device)
    if task.lora is not None:
        task.lora.refuse_spoiled()
        attach_saved_lora(transformer.module, task.lora, stream=transformer.stream)
    if plan.compile:
        compile_blocks(blocks_of(transformer.module, task.family), selective=False, sizes_vary=sizes_vary)
    return transformer
