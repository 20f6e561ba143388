"""READ FIRST. One training run: `train` assembles the parts, `run_steps` is the loop, `train_step` is one step.

What a model looks like is in `families/`, what a step learns in `objective.py`, how a batch is drawn in
`data/batches.py`, what memory allows in `plan/training.py`, what a crash leaves in `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, BatchOrder, BatchSource, read_ahead, timed
from pixtune.data.prepare import prepare_data
from pixtune.data.prepared import PreparedData
from pixtune.engine.activations import RecomputeMore
from pixtune.engine.apply import apply_switches, apply_to_activations, blocks_of, load_planned
from pixtune.engine.capture import GraphCapturer, ReplayedPass
from pixtune.engine.load import LoadedTransformer, Reading
from pixtune.engine.modulation_ahead import StepsAhead
from pixtune.errors import DataError
from pixtune.families import family_of
from pixtune.family import ModelFamily
from pixtune.hardware.facts import check_torch
from pixtune.launch import StopSignal, start_accelerator
from pixtune.objective import add_noise, example_losses, loss_weights, velocity_target
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import EncoderPlan
from pixtune.plan.training import TrainingPlan, with_todays_names
from pixtune.planning import plan_on_this_machine
from pixtune.run import AroundSteps, Run, TrainResult
from pixtune.services import Services
from pixtune.storage.checkpoint import Checkpoint, load_checkpoint, resolve_resume, stored
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from pixtune.tracking.memory import RunMemory
from pixtune.trained import optim
from pixtune.trained.methods import METHODS, TrainedWeights

EXCHANGED_NUMBERS = 1 << 28
"""Most numbers that processes exchange at once: 1 GiB in fp32."""


def train(config: TrainConfig) -> TrainResult:
    """Trains a LoRA, or all weights, as the config says, anew or from a checkpoint, and writes it with a report.

    Raises:
        PixtuneError: something a user can mend; nothing is lost, and the message says what to do.
    """
    return run_steps(*assemble(config))


def assemble(config: TrainConfig) -> tuple[Run, Services]:
    """Everything up to the first step, in its one order: data encoded, plan made, base loaded, what is trained
    attached."""
    check_torch()
    memory = RunMemory(config)
    accelerator = start_accelerator(config)
    memory.start(accelerator.device)
    folder = open_model_folder(config.pretrained_model_name_or_path)
    family = family_of(folder)
    resume_path = resolve_resume(config.output_dir, config.resume_from_checkpoint)
    checkpoint = load_checkpoint(resume_path) if resume_path else None

    encoders = stored(EncoderPlan, checkpoint.record, "encoders") if checkpoint else None
    data = prepare_data(config, family, folder, accelerator, memory.stages, encoders)
    plan = decide_plan(config, family, folder, data, accelerator, checkpoint)
    optim.check_optimizer(plan.optimizer)
    apply_switches(plan)
    transformer = load_transformer(config, family, folder, plan, accelerator.device)
    start_step = checkpoint.step if checkpoint else 0
    trained = METHODS[config.method](config, family, folder, plan, transformer.module, start_step)
    apply_to_activations(transformer.module, family, plan, data.sizes_vary)
    memory.stages.record("transformer")
    run = build_run(config, family, plan, accelerator, memory, transformer, trained, data)
    services = Services(run, folder, data, start_step)
    if checkpoint:
        services.restore(checkpoint)
    return run, services


def run_steps(run: Run, services: AroundSteps) -> TrainResult:
    """The loop: step, and what is due after it. Stops early, with a checkpoint, when the process is told to stop."""
    config, accumulation = run.config, run.config.gradient_accumulation_steps
    start, end = services.start_step, run.num_steps
    made = read_ahead(
        run.source, start * accumulation, end * accumulation, config.data_config.num_workers, run.plan.pin_memory
    )
    batches = timed(made, services.waited)
    with services, StopSignal(run.accelerator) as stop:
        services.before_first_step()
        for step in range(start, end):
            run.steps_ahead.reach(step)
            try:
                loss, grad_norm = train_step(run, islice(batches, accumulation), step, services.see_batch)
            except DataError:  # a picture that is encoded in the loop has changed or is gone
                services.interrupted(step)
                raise
            run.steps_ahead.look_ahead(step)
            services.after_step(step + 1, loss, grad_norm)
            if stop.requested(step + 1, config.logging_steps):
                return services.interrupted(step + 1)
            if scarcity := run.memory.scarcity():
                services.interrupted(step + 1)
                raise scarcity
        return services.finish()


def train_step(
    run: Run, micro_batches: Iterable[list[Batch]], step: int, see_batch: Callable[[Batch], None]
) -> tuple[Tensor, Tensor]:
    """One optimizer step over its micro-batches. Nothing here waits for the device.

    Returns:
        The loss, a mean over all examples of all processes, and the gradient's norm before clipping; on the device.
    """
    optim.set_learning_rate(run.trained.optimizer, run.learning_rate_at(step))
    total_loss = torch.zeros((), device=run.accelerator.device)
    for batch in chain.from_iterable(micro_batches):
        see_batch(batch)
        total_loss += run.forward_backward(batch.to(run.accelerator.device))
    average_across_processes(run.accelerator, [total_loss, *run.trained.gradients()])
    grad_norm = run.trained.step()
    run.forward_backward.zero_gradients()
    return total_loss, grad_norm


def forward_backward(
    config: TrainConfig, family: ModelFamily, transformer: nn.Module, backward: Callable[[Tensor], None], batch: Batch
) -> Tensor:
    """A micro-batch's share of a step's loss, after `backward` of it: its share of the gradients is there."""
    noisy_BCHW = add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B)
    velocity_BCHW = family.predict_velocity(
        transformer, noisy_BCHW, batch.sigma_B, batch.conditioning, batch.controls, config.objective.guidance
    )
    loss_B = example_losses(velocity_BCHW, velocity_target(batch.latents_BCHW, batch.noise_BCHW))
    weight_B = loss_weights(config.objective.weighting_scheme, batch.sigma_B)
    loss = (weight_B * loss_B).sum() / (config.batch_size * config.gradient_accumulation_steps)
    backward(loss)
    return loss.detach()


def average_across_processes(accelerator: Accelerator, tensors: list[Tensor]) -> None:
    """Means over all processes, in place. A LoRA's gradients are one exchange; all weights' would not fit twice."""
    if accelerator.num_processes == 1:
        return
    for bucket in buckets_of(tensors, EXCHANGED_NUMBERS):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        flat = accelerator.reduce(flat, reduction="mean")
        for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def buckets_of(tensors: Iterable[Tensor], most_numbers: int) -> list[list[Tensor]]:
    """Neighbours together, up to so many numbers, or one larger tensor alone."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room:
            buckets.append([])
            room = most_numbers
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def decide_plan(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    data: PreparedData,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> TrainingPlan:
    """The plan of a new run; a resumed run keeps its own, since kernels and formats decide bits."""
    if checkpoint:
        return stored(TrainingPlan, {"plan": with_todays_names(checkpoint.record.get("plan", {}))}, "plan")
    return plan_on_this_machine(
        config,
        family,
        folder,
        partial(data.micro_batch_tokens, config.batch_size),
        data.captions if family.pads_text else None,
        accelerator.device,
        accelerator.num_processes,
    )


def load_transformer(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, plan: TrainingPlan, device: torch.device
) -> LoadedTransformer:
    """Loads the base in its planned form and place; random values only behind the test switch."""
    reading = Reading(plan.loading_threads, plan.fast_loading)
    return load_planned(family, folder, plan, device, reading, config.random_weights)


def build_run(
    config: TrainConfig,
    family: ModelFamily,
    plan: TrainingPlan,
    accelerator: Accelerator,
    memory: RunMemory,
    transformer: LoadedTransformer,
    trained: TrainedWeights,
    data: PreparedData,
) -> Run:
    """Schedule and order of batches around a transformer and what of it is trained."""
    world_size = accelerator.num_processes
    order = BatchOrder(data.buckets, config.batch_size * world_size, config.seed)
    num_steps = planned_steps(config, order)
    source = BatchSource(
        order,
        data.reader,
        config.objective,
        config.data_config.caption_dropout_rate,
        accelerator.process_index,
        world_size,
        plan.text_multiple,
    )
    return Run(
        config=config,
        family=family,
        plan=plan,
        accelerator=accelerator,
        memory=memory,
        transformer=transformer,
        trained=trained,
        forward_backward=ReplayedPass(
            partial(forward_backward, config, family, transformer.module, trained.backward),
            trained.parameters.values(),
            GraphCapturer(transformer.stream) if plan.captures else None,
            plan.captures,
            lambda: plan.usable_bytes - torch.cuda.memory_reserved(),
            RecomputeMore(() if demands_of(config).recompute is False else blocks_of(transformer.module, family)),
        ),
        learning_rate_at=optim.build_schedule(config, num_steps),
        source=source,
        steps_ahead=StepsAhead(
            transformer=transformer,
            family=family,
            times_of=lambda step: source.times_of_step(step, config.gradient_accumulation_steps, family.time_features),
            examples_per_step=config.batch_size * config.gradient_accumulation_steps,
            num_steps=num_steps,
            guidance=config.objective.guidance,
            device=accelerator.device,
        ),
        num_steps=num_steps,
    )


def planned_steps(config: TrainConfig, order: BatchOrder) -> int:
    """Optimizer steps of the whole run: `max_train_steps` or `num_train_epochs`, whichever ends first."""
    limits = [config.max_train_steps] if config.max_train_steps is not None else []
    if config.num_train_epochs is not None:
        micro_batches = order.epoch_end(config.num_train_epochs - 1)
        limits.append(-(-micro_batches // config.gradient_accumulation_steps))
    return min(limits)
