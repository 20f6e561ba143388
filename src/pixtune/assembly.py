"""Assembles a run: device, data, plan, base, trained weights, and what the loop calls for each batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, BatchSource, Order
from pixtune.data.order import BatchOrder
from pixtune.data.prepare import prepare_data
from pixtune.data.prepared import DataFingerprint, PreparedData
from pixtune.data.prior import draw_prior
from pixtune.data.streamed.prepare import prepare_stream
from pixtune.data.streamed.state import stored_stream
from pixtune.engine.apply import apply_switches, apply_to_activations, blocks_of, load_planned
from pixtune.engine.capture import GraphCapturer, ReplayedPass
from pixtune.engine.exchange import Exchange, average_across_processes
from pixtune.engine.load import LoadedTransformer, Reading
from pixtune.engine.modulation_ahead import StepsAhead
from pixtune.engine.relief import (
    MemoryOfOthers,
    PassInParts,
    RecomputeMore,
    Reliefs,
    bytes_of_others,
    drop_frames,
    first_line,
    free_bytes,
    free_unused,
    in_turn,
    lacks_memory,
)
from pixtune.engine.sharded_blocks import ShardedBlocks, ShardGroup
from pixtune.engine.sharding import build_together
from pixtune.errors import MemoryShortage
from pixtune.families import family_of
from pixtune.families.opening import open_model
from pixtune.family import ModelFamily
from pixtune.hardware.facts import check_torch
from pixtune.launch.accelerator import agree_with_others, start_accelerator
from pixtune.launch.agreement import facts_of_start
from pixtune.launch.crew import gather_crew
from pixtune.launch.stop import StopRequest
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import EncoderPlan, without_former_fields
from pixtune.plan.optimizers import KERNEL, SEPARATE
from pixtune.plan.shards import can_share, check_shards, refuse_other_format
from pixtune.plan.training import TrainingPlan, check_parts, facts_of_plan, with_todays_names
from pixtune.planning import (
    Leaner,
    check_transformer,
    leaner_config,
    plan_on_this_machine,
    tensor_shapes,
    with_formats_of,
)
from pixtune.progress import announced, printer
from pixtune.run import Run
from pixtune.services import Services
from pixtune.storage.checkpoint import Checkpoint, read_decision
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.course import Course
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.resume import RunIdentity, batch_size_of
from pixtune.tracking.memory import RunMemory
from pixtune.trained.base import Base
from pixtune.trained.full_weights import FullWeights
from pixtune.trained.init_lora import fitting_init_lora
from pixtune.trained.methods import METHODS, TrainedWeights
from pixtune.trained.optimizers import check_optimizer
from pixtune.trained.resume_point import (
    check_run,
    decide_once,
    find_resume_point,
    identify,
    with_stored_choices,
)
from pixtune.trained.schedule import build_schedule
from pixtune.trained.sharded_files import check_folder_is_shared
from pixtune.trained.step_trial import step_obstacle
from pixtune.trained.training_adapter import check_training_adapter

log = logging.getLogger(__name__)
T = TypeVar("T")


Compute = Callable[[TrainConfig, ModelFamily, nn.Module, Callable[[Tensor], None], Batch], Tensor]
"""The type of `train.forward_backward`: what a run computes for each batch."""


def set_up(
    config: TrainConfig, compute: Compute, leaner: Leaner | None, lock: OutputLock, stop: StopRequest
) -> tuple[Run, Services]:
    """Assembles a run; where another program takes memory meanwhile, once more, by a plan for what is free then.

    Raises:
        MemoryShortage: memory ran out again.
    """
    for is_last in (False, True):
        try:
            return assemble(config, compute, leaner, lock, stop)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            obstacle = first_line(error)
            drop_frames(error)
        free_unused()  # outside the except clause, since the error holds what was loaded
        if PartialState().num_processes > 1:  # others would wait for it
            break
        if not is_last:
            log.warning("setting the run up ran out of memory (%s); it begins again", obstacle)
    raise MemoryShortage("setting the run up", obstacle)


def assemble(
    config: TrainConfig,
    compute: Compute,
    leaner: Leaner | None = None,
    lock: OutputLock | None = None,
    stop: StopRequest | None = None,
) -> tuple[Run, Services]:
    """Does everything up to the first step, in its one order.

    In turn: device, lock on the output folder, data, plan, base, trained weights and, where a run is resumed, theirs.

    Args:
        compute: what the run computes for each batch.
        leaner: the run is planned so, and not as its checkpoint says.
        lock: to be acquired on the output folder; None where no other run can know of it.
        stop: the request to end early; None: it never comes.
    """
    stop = stop or StopRequest()
    check_torch()
    if (optimizer := demands_of(config).optimizer) is not None:
        check_optimizer(optimizer)
    memory = RunMemory(config)
    stop.agree("the start", facts_of_start(config))
    accelerator = start_accelerator(config)
    agree_with_others(config, stop, accelerator)
    check_shards(config.distributed.shards, accelerator.num_processes)
    if config.method == "full":
        check_parts(demands_of(config))
    crew = gather_crew(accelerator)
    memory.start(accelerator.device)
    show = printer(quiet=not accelerator.is_main_process)
    if lock is not None:
        decide_once(accelerator, partial(lock.acquire, show))
    folder = open_model(config.pretrained_model_name_or_path, config.model_parts)
    family = family_of(folder)
    if not config.random_weights:
        check_transformer(family, folder)
    if config.training_adapter.path is not None:
        check_training_adapter(config, family, tensor_shapes(config, family, folder))
    checkpoint = find_resume_point(config, accelerator, show)
    config = with_stored_choices(config, checkpoint)
    if checkpoint is None and config.init_lora is not None:
        start = fitting_init_lora(config, family, tensor_shapes(config, family, folder))
        assert start is not None
        start.refuse_spoiled()
    start_step = checkpoint.step if checkpoint else 0
    with announced("recognizing the base model by its files", show):
        identity = identify(config, accelerator, folder, checkpoint)
    check_run(config, checkpoint, identity)

    stored = without_former_fields(checkpoint.record.get("encoders", {})) if checkpoint else None
    encoders = None if stored is None else read_decision(EncoderPlan, stored, "encoders")
    checked = partial(check_data, config, checkpoint, identity, stop)
    if config.stream.window is not None:
        data = prepare_stream(
            config, family, folder, accelerator, memory.stages, encoders, checked, crew,
            stored_stream(checkpoint) if checkpoint else None, stop,
        )  # fmt: skip
    else:
        prior = draw_prior(config, identity.base, accelerator, crew)
        data = prepare_data(
            config, family, folder, accelerator, memory.stages, encoders, checked, prior, crew
        )  # fmt: skip
    order = data.stream or BatchOrder(
        data.buckets, config.batch_size * accelerator.num_processes, config.seed, data.uses
    )  # fmt: skip
    num_steps = planned_steps(config, order)
    identity = replace(identity, **data.fingerprint.entries, num_steps=num_steps)
    changes = check_run(config, checkpoint, identity)
    with announced("planning, with trials of this GPU's kernels", show):
        plan = decide_plan(config, family, folder, data, accelerator, checkpoint, leaner)
    stop.agree("the plan", facts_of_plan(plan))
    check_optimizer(plan.optimizer)
    apply_switches(plan)
    with announced("loading the transformer", show):
        transformer = load_for(config, family, folder, plan, accelerator)
    base = Base(folder, family, transformer)
    trained = METHODS[config.method](config, plan, base, start_step)
    apply_to_activations(base.module, family, plan, data.sizes_vary)
    memory.stages.record("transformer")
    memory.outside_bytes = transformer.outside_bytes
    stop.agree("steps")

    source = build_source(config, plan, data, order, accelerator)
    passes, reliefs = build_pass(config, compute, plan, base, trained, stop)
    run = Run(
        config=config,
        family=family,
        plan=plan,
        accelerator=accelerator,
        memory=memory,
        transformer=transformer,
        trained=trained,
        forward_backward=passes,
        exchange=build_exchange(accelerator, trained, passes),
        reliefs=reliefs,
        learning_rate_at=build_schedule(config, num_steps),
        source=source,
        steps_ahead=build_steps_ahead(config, base, source, num_steps, accelerator.device),
        num_steps=num_steps,
        stop=stop,
    )
    if data.stream is not None:
        data.stream.keep_for(config, plan, partial(passes.make_room, data.encoding_bytes))
    services = Services(run, folder, data, start_step, Course(config.output_dir, identity, changes, checkpoint, lock))
    if checkpoint:
        services.checkpoints.restore(checkpoint)
    return run, services


def load_for(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, plan: TrainingPlan, accelerator: Accelerator
) -> LoadedTransformer:
    """Loads the transformer as the plan has it: whole, or the part that this process holds of it."""
    device, sharded, together = accelerator.device, None, None
    if config.method == "full":
        together = build_together(plan.shards, accelerator.num_processes, device)
        check_folder_is_shared(config.output_dir, together)
    elif plan.shards > 1 and plan.streamed_blocks > 0:
        sharded = ShardedBlocks(ShardGroup(plan.shards, device), device)
    reading = Reading(plan.loading_threads, plan.fast_loading)
    return load_planned(family, folder, plan, device, reading, config.random_weights, sharded, together)


def check_data(
    config: TrainConfig, checkpoint: Checkpoint | None, identity: RunIdentity, stop: StopRequest, found: DataFingerprint
) -> None:
    """Checks that the data are those of the run that is resumed, and the same for all its processes.

    Raises:
        CheckpointError: it is another run.
        ConfigError: this process sees other data, or another base model, than the first one.
    """
    names = {f"the data of {name}": digest for name, digest in (found.examples or {}).items()}
    stop.agree("the data", {"the base model": f"{identity.base}", "all data together": found.digest, **names})
    check_run(config, checkpoint, replace(identity, **found.entries))


def decide_plan(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    data: PreparedData,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    leaner: Leaner | None = None,
) -> TrainingPlan:
    """Plans a new run; a resumed run keeps its plan, since kernels and formats decide bits, unless it was too large.

    Where its processes are others, so that they cannot hold the weights together as it says or have other micro-batches
    than it was made for, it keeps the formats.
    """
    kept: str | None = None
    before = leaner.failed if leaner else None
    if leaner is not None:
        config = leaner_config(config, leaner)
    elif checkpoint:
        plan = read_decision(TrainingPlan, with_todays_names(checkpoint.record.get("plan", {})), "plan")
        steps_alone = plan.fused_step and accelerator.num_processes > 1  # before gradients could be averaged
        shares = can_share(plan.shards, config.distributed.shards, accelerator.num_processes)
        if shares and not steps_alone and batch_size_of(checkpoint.record["config"]) == config.batch_size:
            return plan
        config, kept, before = with_formats_of(config, plan), plan.weights_format, plan
    plan = plan_on_this_machine(
        config,
        family,
        folder,
        partial(data.micro_batch_tokens, config.batch_size),
        data.captions if family.pads_text else None,
        accelerator.device,
        accelerator.num_processes,
        lambda own: gather_object([own]),
        step_form_of(config, accelerator, before),
    )
    refuse_other_format(kept, plan.weights_format)
    return plan


def step_form_of(config: TrainConfig, accelerator: Accelerator, before: TrainingPlan | None) -> str | None:
    """Returns how all weights are stepped: by one kernel for each where all processes can; see `plan_training`.

    Args:
        before: plan that the run had so far; None: it is new. What rounding draws stays as it was.
    """
    if before is not None and before.step_form is None:
        return None
    if config.method != "full" or accelerator.device.type != "cuda":
        return SEPARATE
    obstacles: list[str | None] = gather_object([step_obstacle(accelerator.device)])
    if (obstacle := next(filter(None, obstacles), None)) is None:
        return KERNEL
    log.warning("weights are stepped by several kernels each, which takes longer: %s", obstacle)
    return SEPARATE


def go_on_from(config: TrainConfig, services: Services) -> TrainConfig:
    """Returns the config of a run that goes on from the newest checkpoint of a session that has ended."""
    if services.saved_step == services.start_step:  # none is newer than where the session began
        return config
    newest = checkpoint_path(config.output_dir, services.saved_step)
    return config.model_copy(update={"resume_from_checkpoint": str(newest)})


def build_source(
    config: TrainConfig, plan: TrainingPlan, data: PreparedData, order: Order, accelerator: Accelerator
) -> BatchSource:
    """Builds the source of this process's batches."""
    return BatchSource(
        order,
        data.reader,
        config.objective,
        config.data_config.caption_dropout_rate,
        accelerator.process_index,
        accelerator.num_processes,
        plan.text_multiple,
    )


def build_pass(
    config: TrainConfig, compute: Compute, plan: TrainingPlan, base: Base, trained: TrainedWeights, stop: StopRequest
) -> tuple[ReplayedPass[Batch], Reliefs]:
    """Builds the computation for a batch, captured and replayed where the plan says so, and what it can give up."""
    blocks = blocks_of(base.module, base.family)
    recompute_more = RecomputeMore(blocks, allowed=demands_of(config).recompute is not False)
    of_batch = partial(compute, config, base.family, base.module, trained.backward)
    parts = PassInParts(of_batch, plan.micro_batch_parts, most=1 if plan.fused_step else config.batch_size)
    replayed = ReplayedPass(
        parts,
        trained.parameters.values(),
        GraphCapturer(base.transformer.stream) if plan.captures else None,
        plan.captures,
        lambda: free_bytes(plan.usable_bytes - base.transformer.outside_bytes),
        in_turn(recompute_more, parts.divide),
    )
    others = MemoryOfOthers(lambda: bytes_of_others(plan.expected_peak_bytes), lambda: stop.requested(0))
    return replayed, Reliefs(plan, replayed.give_up_captures, recompute_more, parts, others, stop.most_needed)


def build_exchange(accelerator: Accelerator, trained: TrainedWeights, passes: ReplayedPass[Batch]) -> Exchange:
    """Builds what averages a step's totals and gradients: those of a LoRA as one piece, those of all weights in groups.

    The gradients of all weights come and go with each step, and are too many to stay.
    """
    if isinstance(trained, FullWeights):
        return Exchange(lambda totals_2: average_across_processes(accelerator, [totals_2, *trained.gradients()]))
    average = partial(passes.gradients.average, accelerator)
    return Exchange(average, passes.gradients.gather) if accelerator.num_processes > 1 else Exchange(average)


def build_steps_ahead(
    config: TrainConfig, base: Base, source: BatchSource, num_steps: int, device: torch.device
) -> StepsAhead:
    """Builds the announcer of coming steps to the modulation table. It does nothing where there is no table."""
    per_step, features = config.gradient_accumulation_steps, base.family.time_features
    return StepsAhead(
        transformer=base.transformer,
        family=base.family,
        times_of=lambda step: source.times_of_step(step, per_step, features),
        examples_per_step=config.batch_size * per_step,
        num_steps=num_steps,
        guidance=config.objective.guidance,
        device=device,
    )


def planned_steps(config: TrainConfig, order: Order) -> int:
    """Counts the optimizer steps of the whole run: `max_train_steps` or `num_train_epochs`, whichever ends first."""
    limits = [config.max_train_steps] if config.max_train_steps is not None else []
    if config.num_train_epochs is not None:
        assert isinstance(order, BatchOrder), "the config refuses epochs of a stream"
        micro_batches = order.epoch_end(config.num_train_epochs - 1)
        limits.append(-(-micro_batches // config.gradient_accumulation_steps))
    return min(limits)
