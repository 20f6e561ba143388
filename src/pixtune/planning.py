"""Way from a config and a model folder to a plan: gathers what `plan` decides on without loading a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixtune.config.schema import TrainConfig
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Shapes
from pixtune.hardware.facts import GIB, HardwareFacts, host_room_bytes
from pixtune.hardware.read import read_facts
from pixtune.launch.hosts import Machine, least_of, read_machine, with_whole_groups
from pixtune.plan.demands import demands_of, state_options_of
from pixtune.plan.encoders import TEXT_TOKENS, EncoderPlan, EncoderSizes, plan_encoders
from pixtune.plan.footprint import ELEMENT_BYTES, Footprint, of_all_weights, read_footprint, with_average
from pixtune.plan.kernel_choice import Findings, findings_of_all, kernels_to_try
from pixtune.plan.optimizers import KERNEL, SMALL
from pixtune.plan.passes import FIRST_PASS, PLAIN_PASSES, PassPlan, needs_negative
from pixtune.plan.phases import Surroundings, compiled_pass_bytes, sampling_bytes, sampling_passes, sampling_tile
from pixtune.plan.rungs import EIGHT_BIT, QUANTIZED
from pixtune.plan.situation import CONTEXT_BYTES, RESERVE_BYTES, in_its_pool, usable_bytes
from pixtune.plan.text_padding import Captions, least_multiple
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained.targets import adapter_of, ending_with, resolve_targets

if TYPE_CHECKING:
    import torch


Found = tuple[Machine, Findings | None, str | None]
"""Findings of a process before it plans: its machine, trials of attention kernels, and what bars FlashAttention 3."""


def plan_on_this_machine(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    count_tokens: Callable[[int], int],
    captions: Captions | None,
    device: torch.device,
    num_processes: int,
    share: Callable[[Found], list[Found]] = lambda own: [own],
    step_form: str | None = KERNEL,
) -> TrainingPlan:
    """Plans a run that starts now: what the machine can do is tried first. Several processes decide alike.

    Args:
        count_tokens: returns image and text tokens of one process's largest micro-batch, its captions padded to a
            multiple.
        captions: lengths of captions; None: the family cannot pad them.
        num_processes: processes of the run, on all hosts.
        share: returns what all of them were given.
        step_form: see `plan_training`.

    Raises:
        PlanError, ConfigError: see `plan_training`.
    """
    # `pixtune plan` imports this module without a device to try, and must not wait for torch.
    from pixtune.engine.attention import flash_attention_3_obstacle
    from pixtune.engine.attention_trial import Shape, try_attention
    from pixtune.engine.compile import compile_obstacle

    findings: Findings | None = None
    obstacle: str | None = None
    demands, multiple = demands_of(config), least_multiple(config, captions)
    fraction, flash_3_obstacle = demands.memory_fraction, flash_attention_3_obstacle()
    if device.type == "cuda":
        obstacle = compile_obstacle(device)
        transformer = folder.component_config("transformer")
        heads = (transformer["num_attention_heads"], transformer["attention_head_dim"])
        shape = Shape(count_tokens(multiple) // config.batch_size, *heads, demands.compute_format, config.deterministic)
        findings = try_attention(shape, kernels_to_try(read_facts(device, fraction), config, flash_3_obstacle))
    own = read_machine(read_facts(device, fraction), num_processes, obstacle is None)
    machines, trials, obstacles = zip(*share((own, findings, flash_3_obstacle)), strict=True)
    machine, findings = least_of(machines), findings_of_all(trials)
    flash_3_obstacle = next(filter(None, obstacles), None)
    config = with_whole_groups(config, num_processes, machine.num_processes)
    return plan_for_captions(
        lambda footprint: plan_training(
            machine.facts, footprint, config, findings, machine.can_compile, machine.num_processes, flash_3_obstacle,
            captions, max(num_processes // machine.num_processes, 1), machine.links, step_form,
        ),
        config, family, folder, count_tokens, captions,
    )  # fmt: skip


def plan_for_captions(
    plan_for: Callable[[Footprint], TrainingPlan],
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    count_tokens: Callable[[int], int],
    captions: Captions | None,
) -> TrainingPlan:
    """Plans with the footprint of captions as the plan pads them.

    Args:
        plan_for: plans a run of a footprint.
        count_tokens, captions: see `plan_on_this_machine`.
    """
    multiple = least_multiple(config, captions)
    while True:
        counted = count_tokens(multiple)
        plan = plan_for(footprint_of(config, family, folder, counted))
        if count_tokens(plan.text_multiple) <= counted:
            return plan
        multiple = plan.text_multiple  # longer captions than memory was counted for, which may leave fewer captures


SPARED_SHARES = (0.05, 0.1, 0.2, 0.4)
"""Shares of the memory of a plan that needed too much, which the plans after it leave unused: few are tried, each far
enough from the one before, since each loads the model again."""


@dataclass(frozen=True)
class Leaner:
    """Order to plan a run again whose plan turned out to need more memory than there is."""

    failed: TrainingPlan
    """The first plan, as it was carried out last."""
    num_plans: int = 1
    """Plans that failed."""

    @property
    def usable_bytes(self) -> int:
        """Memory that the next plan may use in torch's allocator."""
        return round(self.failed.usable_bytes * (1 - SPARED_SHARES[self.num_plans - 1]))


def leaner_than(plan: TrainingPlan, before: Leaner | None) -> Leaner | None:
    """Returns what to plan by after a plan that failed; None: enough have been tried, or the plan counted no memory."""
    if before is None:
        return Leaner(plan) if plan.usable_bytes else None
    return replace(before, num_plans=before.num_plans + 1) if before.num_plans < len(SPARED_SHARES) else None


def leaner_config(config: TrainConfig, leaner: Leaner) -> TrainConfig:
    """Returns the config to plan by, which leaves number formats and optimizer as they are: they decide the numbers."""
    limit_gib = (leaner.usable_bytes + RESERVE_BYTES + CONTEXT_BYTES) / GIB
    return with_formats_of(config, leaner.failed).model_copy(update={"gpu_memory_limit_gib": limit_gib})


def with_formats_of(config: TrainConfig, plan: TrainingPlan) -> TrainConfig:
    """Returns the config with number formats and optimizer as a plan has them: they decide the numbers."""
    changes: dict[str, object] = {"adam8bit": plan.optimizer == SMALL}
    if plan.weights_format in EIGHT_BIT:
        features = config.cuda_features.model_copy(update={"enable_fp8_training": plan.weights_format == "fp8"})
        changes |= {"quantize": True, "cuda_features": features}
    elif plan.weights_format not in QUANTIZED:
        changes["quantize"] = False
    return config.model_copy(update=changes)


def encoder_sizes(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, caption_tokens: int, picture_pixels: int
) -> EncoderSizes:
    """Returns the sizes of encoders and of the largest items, from headers, or from an index alone."""
    element = ELEMENT_BYTES[demands_of(config).compute_format]
    text = count_text_weights(family, folder)
    autoencoder = folder.count_parameters("vae") or 0
    return EncoderSizes(
        element * text,
        element * autoencoder,
        caption_tokens,
        picture_pixels,
        element,
        family.encoding_bytes_per_pixel,
    )


def count_text_weights(family: ModelFamily, folder: ModelFolder) -> int:
    """Counts the text encoders' weights that reach a device; where only an index is there, all weights."""
    total = 0
    for part in family.text_components:
        if not folder.has_weights(part):
            total += folder.count_parameters(part) or 0
            continue
        for name, shape in folder.shapes(part).items():
            if not name.startswith(family.unread_text_weights):
                total += math.prod(shape)
    return total


def plan_encoders_of(config: TrainConfig, facts: HardwareFacts, sizes: EncoderSizes, beside: int = 0) -> EncoderPlan:
    """Plans how a run on a GPU encodes, `beside` so many bytes that are in use meanwhile.

    Raises:
        PlanError: see `plan_encoders`.
    """
    demands = demands_of(config)
    usable = max(0, usable_bytes(facts, demands) - beside)
    return plan_encoders(
        usable,
        sizes,
        may_quantize=demands.may_quantize_encoders,
        text_stays=not config.precompute_text_embeddings or demands.keeps_encoders(demands.is_unified(facts)),
        must_stay=demands.encoders_stay is True,
        host_bytes=usable if facts.integrated else host_room_bytes(facts),
    )


@dataclass(frozen=True)
class BetweenSteps:
    """Work of a run's GPU between steps: sampling and held-out losses."""

    tile_pixels: int | None
    """Side of the tiles in which samples are decoded; None: whole."""
    device_bytes: int
    """Peak of sampling or a held-out loss, in addition to what the run holds between its steps; 0 on a CPU."""
    passes: PassPlan = PLAIN_PASSES
    """Way in which the passes of samples run."""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplesBetween:
    """Samples of a run, as far as its plan of them depends on them."""

    pixels: int = 0
    """Pixels of the largest one; 0: there are none."""
    num_prompts: int = 1
    guidance_scale: float = 1.0
    can_pad: bool = True
    """Attention to padded prompts is right on this machine; see the function `can_pad`."""


def can_pad(folder: ModelFolder, device: torch.device) -> bool:
    """Returns whether attention to padded prompts, which samples can use on a GPU, is right on this one."""
    from pixtune.engine.padded_attention import padding_obstacle

    if device.type != "cuda":
        return False
    return padding_obstacle(device, folder.component_config("transformer")["attention_head_dim"]) is None


def plan_between_steps(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    plan: TrainingPlan,
    encoders: EncoderPlan,
    samples: SamplesBetween,
    num_tokens: int,
    facts: HardwareFacts | None = None,
) -> BetweenSteps:
    """Plans what a run's GPU does between steps.

    Args:
        num_tokens: tokens of one process's largest micro-batch, on which held-out losses are computed.
        facts: the machine; None: its GPU has memory of its own.
    """
    if not plan.usable_bytes:
        return BetweenSteps(None, 0)
    footprint = footprint_of(config, family, folder, num_tokens)
    if facts is not None:
        footprint = in_its_pool(footprint, facts, demands_of(config))
    one_pass = compiled_pass_bytes(plan, footprint, num_tokens)
    if not samples.pixels:
        return BetweenSteps(None, one_pass)
    passes_per_step = 2 if needs_negative(family, samples.guidance_scale) else 1
    image_tokens = samples.pixels // family.pixel_multiple(folder) ** 2
    around = Surroundings(
        encoder_sizes(config, family, folder, 0, 0),
        encoders,
        samples.pixels,
        max(num_tokens // config.batch_size, image_tokens + TEXT_TOKENS),
        samples.num_prompts * passes_per_step,
        may_join_passes=passes_per_step > 1 and family.pads_text and samples.can_pad,
        text_in_loop=not config.precompute_text_embeddings,
    )
    tile = sampling_tile(plan, footprint, around)
    way = sampling_passes(plan, footprint, around, tile)
    sampling = sampling_bytes(plan, footprint, around, way, tile)
    words = [*way.in_words, *([FIRST_PASS] if plan.compile else [])]
    reasons = (f"samples: {'; '.join(words)}",) if words else ()
    return BetweenSteps(tile, max(one_pass, sampling), way, reasons)


def footprint_of(config: TrainConfig, family: ModelFamily, folder: ModelFolder, num_tokens: int) -> Footprint:
    """Returns the footprint of a run, from headers alone."""
    shapes = tensor_shapes(config, family, folder)
    _, width = family.block_shape(folder)
    layers = [] if config.method == "full" else targeted_linears(config, family, shapes)
    footprint = read_footprint(
        family,
        shapes,
        width,
        num_tokens,
        layers,
        adapter_of(config, layers, family.lora_presets),
        config.batch_size * config.gradient_accumulation_steps,
        plain_linears(config.keep_plain, family, shapes),
        config.batch_size,
        family.kept_beside(folder.component_config("transformer")),
        frozen_ranks(config, family, shapes),
    )
    footprint = replace(footprint, state_options=state_options_of(config))
    if config.method == "full":
        return of_all_weights(footprint, shapes)
    if config.init_lora is not None and config.init_lora.exists():  # a resumed run needs it no longer
        from pixtune.trained.init_lora import fitting_init_lora  # imports torch

        fitting_init_lora(config, family, shapes)
    return with_average(footprint, config)


def frozen_ranks(config: TrainConfig, family: ModelFamily, shapes: Shapes) -> Mapping[str, int]:
    """Returns the ranks of the training adapter's layers by their paths; empty where a run has none.

    Raises:
        WeightsError: it cannot be used on a transformer of these shapes.
    """
    if config.training_adapter.path is None:
        return {}
    from pixtune.trained.training_adapter import training_adapter_of  # imports torch

    adapter = training_adapter_of(config, family)
    assert adapter is not None
    adapter.refuse_other_model(shapes)
    return adapter.ranks


def tensor_shapes(config: TrainConfig, family: ModelFamily, folder: ModelFolder) -> Shapes:
    """Returns the shapes of the transformer's tensors: from its files' headers, or with random weights its config."""
    described = shapes_of_config(family, folder)
    return described if config.random_weights else check_transformer(family, folder)


def shapes_of_config(family: ModelFamily, folder: ModelFolder) -> Shapes:
    """Returns the shapes of the transformer's tensors by its config.

    Raises:
        WeightsError: the config describes none.
    """
    config = folder.component_config("transformer")
    try:
        shapes = family.transformer_shapes(config)
        right = all(type(side) is int and side > 0 for shape in shapes.values() for side in shape)
    except (TypeError, ValueError, ArithmeticError):
        right = False
    if not right:
        raise WeightsError(
            f"{folder.config_file('transformer')} describes no transformer: its layers have no sizes. "
            "Fetch the model again."
        )
    return shapes


def check_transformer(family: ModelFamily, folder: ModelFolder) -> Shapes:
    """Checks that the transformer's files hold the tensors that its config describes, and returns their shapes.

    Raises:
        WeightsError: they do not; names one.
    """
    described = shapes_of_config(family, folder)
    found = folder.shapes("transformer")
    wrong = [name for name in described if found.get(name) != tuple(described[name])]
    wrong += [name for name in found if name not in described]
    if wrong:
        name = wrong[0]
        there, wanted = (
            f"of shape {list(shapes[name])}" if name in shapes else "absent" for shapes in (found, described)
        )
        raise WeightsError(
            f"{folder.place('transformer')} does not hold the transformer that its config describes: {len(wrong)} "
            f"tensors differ, {name} among them, which is {there} and should be {wanted}. Was the download "
            "interrupted? Fetch the model again."
        )
    return found


def targeted_linears(config: TrainConfig, family: ModelFamily, shapes: Shapes) -> Sequence[str]:
    """Returns the paths of the linear layers that get a LoRA.

    Raises:
        ConfigError: a target matches nothing.
    """
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)]
    targets = resolve_targets(linears, config.lora_targets or family.lora_targets, family.lora_presets)
    return ending_with(linears, targets)


def plain_linears(patterns: Sequence[str], family: ModelFamily, shapes: Shapes) -> Sequence[str]:
    """Returns the paths of the blocks' linear layers that `keep_plain` means. No modulation layer is ever quantized.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    blocks = tuple(f"{path}." for path in family.block_paths)
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)]
    linears = [name for name in linears if name.startswith(blocks) and not name.endswith(family.modulation_layers)]
    return ending_with(linears, resolve_targets(linears, patterns, family.lora_presets, "keep_plain"))


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2
