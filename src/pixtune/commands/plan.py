"""`pixtune plan`: whether a run fits, how it would use the machine, and why. Loads no weight and starts no CUDA.

Sizes come from headers of weight files. Where the files are not there yet, the configs alone do: they are a few hundred
kilobytes of a download of tens of gigabytes. Of the models that pixtune names, it ships the architecture.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from pixtune.config.folders import folders_of, largest_size, prior_folder
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DistributedConfig
from pixtune.data.layouts import find_examples
from pixtune.data.sample_prompts import asked_prompts, default_size
from pixtune.errors import PlanError
from pixtune.hardware.cards import HOST_BYTES, facts_as, find_card
from pixtune.hardware.facts import GIB, PROCESS_HOST_BYTES, HardwareFacts
from pixtune.hardware.gpu_links import NETWORK_SHARE, GpuLinks, links_of_card, read_gpu_links
from pixtune.hardware.meminfo import read_host_memory
from pixtune.hardware.read import cpu_facts, read_facts_without_cuda
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import PIXELS_PER_VISION_TOKEN, PLAINLY, TEXT_TOKENS, EncoderPlan, EncoderSizes
from pixtune.plan.exchange_cost import sent_bytes
from pixtune.plan.footprint import Footprint
from pixtune.plan.passes import needs_negative
from pixtune.plan.phases import Phase, Surroundings, idle_bytes, phases_of
from pixtune.plan.processes import Together, reasons_together, together
from pixtune.plan.rungs import Rung
from pixtune.plan.shards import check_shards
from pixtune.plan.situation import CONTEXT_BYTES, in_its_pool, situation_of
from pixtune.plan.text_padding import Captions, least_multiple, padded_length
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.architecture import ShippedModel, require_configs
from pixtune.storage.model_folder import ModelFolder, download_command

if TYPE_CHECKING:
    from pixtune.family import ModelFamily


@dataclass(frozen=True)
class Length:
    """Length of a run as its config has it."""

    num_pictures: int | None
    """Pictures in all folders; None where they cannot be read yet."""
    num_held_out: int
    """Number of them that a run holds out, and does not train on."""
    num_steps: int | None
    """Optimizer steps; None where epochs decide and the pictures are not there yet."""
    turns_per_epoch: float
    """Uses of pictures in an epoch by their folders' repeats, regularization pictures included."""
    is_once: bool
    """All folders have one repeat."""
    is_by_epochs: bool
    """The number of epochs ends the run, so that steps follow from the pictures' number."""
    pictures_per_step: int
    """Pictures of all processes together."""
    micro_batches_per_step: int


@dataclass(frozen=True)
class PlanReport:
    """Plan of a config, with what it rests on."""

    model: str
    facts: HardwareFacts
    is_estimate: bool
    """The plan is for a card of the table, not for this machine."""
    plan: TrainingPlan
    usable_bytes: int
    """Device memory that torch's allocator may use; 0 without a GPU."""
    phases: tuple[Phase, ...]
    encoders: EncoderPlan
    """Plan of encoding captions and pictures."""
    assumptions: tuple[str, ...]
    length: Length
    together: Together | None = None
    """The step of several processes; None: there is one."""
    why_together: tuple[str, ...] = ()
    """Reasons of the plan on what several processes do, which are part of its own."""
    seconds_alone: float | None = None
    """Seconds of the step of one process that plans for itself; None: it does not hold the run, or no such estimate."""

    @property
    def too_large(self) -> tuple[Phase, ...]:
        """Phases that need more than there is."""
        return tuple(phase for phase in self.phases if self.usable_bytes and phase.device_bytes > self.usable_bytes)

    def to_json(self) -> str:
        """Returns plain values as JSON, sizes in bytes."""
        values: dict[str, Any] = {
            "model": self.model,
            "machine": asdict(self.facts),
            "is_estimate": self.is_estimate,
            "usable_bytes": self.usable_bytes,
            "plan": self.plan.to_dict(),
            "encoders": self.encoders.to_dict(),
            "phases": [asdict(phase) for phase in self.phases],
            "assumptions": list(self.assumptions),
            "length": asdict(self.length),
        }
        if (found := self.together) is not None:
            step = found.step
            values["together"] = {
                "num_hosts": found.num_hosts,
                "gpus_per_host": found.per_host,
                "shards": found.shards,
                "copies": found.copies,
                "links": found.link_words,
                "sent_bytes_of_weights": sent_bytes(found.gathers),
                "sent_bytes_of_gradients": sent_bytes(found.sums),
                "num_exchanges": len(found.gathers) + len(found.sums),
                "seconds_per_step": step.seconds if step else None,
                "efficiency": step.efficiency if step else None,
            }
        return json.dumps(values, indent=2)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one example in a training step."""

    image: int
    text: int


@dataclass(frozen=True)
class Machines:
    """The GPUs that a run would use, whether they are there or not."""

    gpus: int = 1
    """GPUs of each host."""
    hosts: int = 1
    network_gbit: float | None = None
    """Network of each host, Gbit/s; None: as it is read, or usual for the card."""


def make_report(
    config: TrainConfig, card: str | None = None, host_gib: float | None = None, machines: Machines = Machines()
) -> PlanReport:
    """Plans a config, for this machine or for cards by name. Downloads nothing.

    Args:
        host_gib: memory of each machine around its cards, GiB; None: `HOST_BYTES` a card.

    Raises:
        PlanError: nothing fits.
        WeightsError: the model is neither in a folder nor in the hub's cache, or lacks some of its configs.
        PixtuneError: there is no card of that name.
    """
    from pixtune.families import family_of
    from pixtune.families.opening import find_model
    from pixtune.planning import footprint_of, plan_encoders_of

    num_processes = machines.gpus * machines.hosts
    check_shards(config.distributed.shards, num_processes)
    host_bytes = HOST_BYTES * machines.gpus if host_gib is None else round(host_gib * GIB)
    facts = before_cuda(facts_as(card, host_bytes)) if card else facts_of_this_machine()
    folder = find_model(config.pretrained_model_name_or_path, config.model_parts)
    family = family_of(folder)
    assumptions = []
    if isinstance(folder, ShippedModel):
        if not folder.has_weights("transformer"):
            config = config.model_copy(update={"random_weights": True})
        fetching = f"fetch the model for training: `{download_command(folder.name)}`"
        if folder.file is not None:
            fetching = f"a run fetches the parts of {folder.name} beside its transformer"
        assumptions.append(f"architecture: shipped with pixtune; {fetching}")
    else:
        require_configs(folder, config.pretrained_model_name_or_path)
        if not config.random_weights and not folder.has_weights("transformer"):
            config = config.model_copy(update={"random_weights": True})
            assumptions.append(
                "the weights are not there yet: the transformer's sizes are those of the architecture in its config, "
                "an encoder's those in its index, and encoders without an index are left out"
            )
    tokens, assumed = assumed_tokens(config, family, folder)
    length = length_of(config, num_processes)
    if config.stream.window is not None:
        assumptions.append(
            f"the data set is streamed: {config.stream.window:,} rows are read and encoded at once, between steps"
        )
    elif length.num_pictures is None:
        folders = folders_of(config.data_config)
        sets = [folder.dataset.name for folder in folders if folder.dataset]
        places = " or ".join(str(folder.img_dir) for folder in folders if not folder.dataset)
        assumptions.append(
            f"pictures of {', '.join(sets)} are not counted" if sets else f"there are no pictures in {places} yet"
        )
    if length.is_by_epochs:
        assumptions.append(
            "pictures of one size: those of rare sizes are used oftener to fill their batches, and an epoch has more "
            "steps then (pixtune validate with this config counts them)"
        )
    captions = Captions(differ=True) if family.pads_text else None
    text = padded_length(tokens.text, least_multiple(config, captions))
    footprint = footprint_of(config, family, folder, config.batch_size * (tokens.image + text))
    links = links_of(facts, machines, is_here=card is None) if num_processes > 1 else None
    plan = plan_training(
        facts, footprint, config, num_processes=machines.gpus, num_hosts=machines.hosts, links=links
    )  # fmt: skip
    situation = situation_of(
        facts, footprint, demands_of(config), plan.compile, machines.gpus, num_hosts=machines.hosts, links=links
    )
    rung = Rung(**{each.name: getattr(plan, each.name) for each in fields(Rung)})
    on_gpu = facts.device == "cuda"
    around = surroundings_of(config, family, folder, tokens, facts) if on_gpu else None
    if around and config.stream.window is not None:
        idle = idle_bytes(plan, in_its_pool(footprint, facts, demands_of(config)))
        beside = plan_encoders_of(config, facts, around.sizes, idle) if around.sizes.text_bytes else around.encoders
        around = replace(around, encoders=beside, between_steps=True)
    return PlanReport(
        model=f"{folder.pipeline_class}, {footprint.num_weights / 1e6:,.0f} million weights in its transformer",
        facts=facts,
        is_estimate=card is not None,
        plan=plan,
        usable_bytes=plan.usable_bytes,
        phases=phases_of(plan, in_its_pool(footprint, facts, demands_of(config)), around) if around else (),
        encoders=around.encoders if around else PLAINLY,
        assumptions=(*assumptions, *assumed),
        length=length,
        together=together(rung, situation) if num_processes > 1 else None,
        seconds_alone=_seconds_alone(facts, footprint, config) if num_processes > 1 else None,
        why_together=tuple(reasons_together(rung, situation)),
    )


def _seconds_alone(facts: HardwareFacts, footprint: Footprint, config: TrainConfig) -> float | None:
    """Returns the seconds of a step that one process takes with a plan of its own."""
    alone = config.model_copy(update={"distributed": DistributedConfig()})
    try:
        plan = plan_training(facts, footprint, alone)
    except PlanError:
        return None
    return config.gradient_accumulation_steps * plan.micro_batch_seconds or None


def links_of(facts: HardwareFacts, machines: Machines, is_here: bool) -> GpuLinks:
    """Returns the links of the GPUs: read where they are here, else those of the table of cards."""
    if is_here and facts.device == "cuda":
        links = read_gpu_links(facts, machines.gpus)
    else:
        card = find_card(facts.name, facts.total_bytes) if facts.device == "cuda" else None
        links = links_of_card(card, machines.gpus, facts.link_bandwidth_bytes_per_second)
    if machines.network_gbit is not None:
        network = NETWORK_SHARE * 1e9 / 8 * machines.network_gbit
        links = replace(links, network_bytes_per_second=network, network_is_assumed=False)
    return links


# ---- the machine


def facts_of_this_machine() -> HardwareFacts:
    """Reads the first GPU from nvidia-smi and the table of cards; the CPU where there is none. Starts no CUDA."""
    facts = read_facts_without_cuda()
    return before_cuda(facts) if facts else cpu_facts(read_host_memory(), "this machine's CPU")


def before_cuda(facts: HardwareFacts) -> HardwareFacts:
    """Returns the facts that a run will see: its process and its CUDA context exist by then."""
    host = facts.host_available_bytes - (0 if facts.integrated else PROCESS_HOST_BYTES)
    return replace(facts, free_bytes=max(0, facts.free_bytes - CONTEXT_BYTES), host_available_bytes=max(0, host))


# ---- the run


def length_of(config: TrainConfig, num_processes: int = 1) -> Length:
    """Counts the pictures and steps of a run; opens no picture, and no data set, which may be far away."""
    micro_batches = config.gradient_accumulation_steps
    folders = folders_of(config.data_config)
    counts = [len(find_examples(folder).pairs) for folder in folders if folder.dataset is None]
    num_pictures = sum(counts) or None if len(counts) == len(folders) else None
    if config.stream.window is not None:
        num_pictures = None
    num_held_out = 0 if num_pictures is None else config.validation.num_held_out(num_pictures)
    per_step = config.batch_size * micro_batches * num_processes
    turns, by_epochs = 0.0, None
    if num_pictures is not None:
        turns = sum(folder.repeats * count for folder, count in zip(folders, counts, strict=True))
        turns = turns * (1 - num_held_out / num_pictures) + _prior_turns(config)
        if config.num_train_epochs is not None:
            by_epochs = math.ceil(turns * config.num_train_epochs / per_step)
    num_steps = min((each for each in (config.max_train_steps, by_epochs) if each is not None), default=None)
    is_by_epochs = by_epochs is not None and num_steps == by_epochs
    prior = config.prior_preservation
    repeats = {*(folder.repeats for folder in folders), *([prior.repeats] if prior.folder or prior.prompts else [])}
    return Length(
        num_pictures, num_held_out, num_steps, turns, repeats == {1}, is_by_epochs, per_step, micro_batches
    )  # fmt: skip


def _prior_turns(config: TrainConfig) -> float:
    """Returns the uses of regularization pictures in an epoch."""
    prior = config.prior_preservation
    if prior.folder is None:
        return prior.repeats * len(prior.prompts) * prior.num_pictures
    return prior.repeats * len(find_examples(prior_folder(config.data_config, prior, prior.folder)).pairs)


def assumed_tokens(config: TrainConfig, family: ModelFamily, folder: ModelFolder) -> tuple[Tokens, tuple[str, ...]]:
    """Returns the tokens of an example before any picture is read, and what was assumed for them."""
    data = config.data_config
    multiple = family.pixel_multiple(folder)
    side = max(largest_size(data) // multiple, 1) * multiple
    longest = TEXT_TOKENS if data.max_text_tokens is None else data.max_text_tokens
    assumptions = [f"pictures of {side}x{side} pixels and captions of {longest} tokens; a run counts its own"]
    num_controls = _num_controls(config, family)
    control_side = max(data.control_size // multiple, 1) * multiple
    image = _image_tokens(family, folder, side) + num_controls * _image_tokens(family, folder, control_side)
    text = longest
    if num_controls:
        assumptions.append(f"{num_controls} control picture{'s' * (num_controls > 1)} of {control_side} pixels a side")
        if family.controls_in_text:
            width, height = family.vision_size((side, side), data.control_size)
            text += num_controls * (width * height // PIXELS_PER_VISION_TOKEN)
    return Tokens(image, text), tuple(assumptions)


def _image_tokens(family: ModelFamily, folder: ModelFolder, side: int) -> int:
    _, height, width = family.latent_shape(folder, side, side)
    return family.num_image_tokens(height, width)


def _num_controls(config: TrainConfig, family: ModelFamily) -> int:
    """Returns the control pictures of an example; an edit model gets one where the config names none."""
    given = max(len(folder.control_dirs) for folder in folders_of(config.data_config))
    return min(family.max_controls, max(given, 1))


def surroundings_of(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, tokens: Tokens, facts: HardwareFacts
) -> Surroundings:
    """Returns the run's parts besides the transformer; a run with random weights has no encoders."""
    from pixtune.planning import encoder_sizes, plan_encoders_of

    if config.random_weights and folder.has_weights("transformer"):
        return Surroundings(EncoderSizes(0, 0), PLAINLY)
    data, settings = config.data_config, config.samples
    side = largest_size(data)
    encoded_side = max(side, data.control_size) if _num_controls(config, family) else side
    caption_tokens = max(tokens.text, TEXT_TOKENS)
    sizes = encoder_sizes(config, family, folder, caption_tokens, encoded_side * encoded_side)
    asked = asked_prompts(config)
    passes_per_step = 2 if needs_negative(family, settings.guidance_scale) else 1
    return Surroundings(
        sizes=sizes,
        encoders=plan_encoders_of(config, facts, sizes),
        sample_pixels=max((math.prod(each.size or default_size(config)) for each in asked), default=0),
        sample_tokens=tokens.image + tokens.text if asked else 0,
        sample_shapes=len(asked) * passes_per_step,
        may_join_passes=passes_per_step > 1 and family.pads_text,
        text_in_loop=not config.precompute_text_embeddings,
        pictures_in_loop=not config.precompute_image_embeddings,
    )
