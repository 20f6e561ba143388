"""READ FIRST. One training run: `train` assembles the parts, `run_steps` is the loop, `train_step` is one step.

What a model looks like is in `families/`, what a step learns in `objective.py`, how a batch is drawn in
`data/batches.py`, what memory allows in `fit/plan.py`, what a crash leaves in `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pixtune import optim
from pixtune.checkpoint import Checkpoint, load_checkpoint, resolve_resume
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, BatchPlan, BatchSource, read_ahead
from pixtune.data.prepare import PreparedData, prepare_data
from pixtune.families import family_of
from pixtune.families.base import ModelFamily, Placement
from pixtune.fit import load
from pixtune.fit.apply import FORMATS, apply_plan, apply_switches
from pixtune.fit.attention import try_cudnn_attention
from pixtune.fit.modulation import StepsAhead
from pixtune.fit.plan import MemoryPlan, RunSize, plan_memory
from pixtune.hardware.facts import check_torch, read_facts
from pixtune.launch import StopSignal, start_accelerator
from pixtune.objective import add_noise, loss_weights, sample_losses, velocity_target
from pixtune.services import Services, TrainResult
from pixtune.trained import METHODS, TrainedWeights
from pixtune.weights import ModelFolder, open_model_folder

EXCHANGED_NUMBERS = 1 << 28
"""Most numbers that processes exchange at once: 1 GiB in fp32."""


@dataclass(frozen=True)
class Run:
    """The parts that a step touches."""

    config: TrainConfig
    family: ModelFamily
    plan: MemoryPlan
    accelerator: Accelerator
    transformer: nn.Module
    trained: TrainedWeights
    learning_rate_at: Callable[[int], float]
    source: BatchSource
    steps_ahead: StepsAhead
    num_steps: int


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
    accelerator = start_accelerator(config)
    folder = open_model_folder(config.pretrained_model_name_or_path)
    family = family_of(folder)
    resume_path = resolve_resume(config.output_dir, config.resume_from_checkpoint)
    checkpoint = load_checkpoint(resume_path) if resume_path else None

    data = prepare_data(config, family, folder, accelerator)
    plan = decide_plan(config, family, folder, data, accelerator.device, checkpoint)
    apply_switches(plan)
    transformer = apply_plan(load_transformer(config, family, folder, plan, accelerator.device), plan)
    start_step = checkpoint.step if checkpoint else 0
    trained = METHODS[config.method](config, family, folder, plan, transformer, start_step)
    run = build_run(config, family, plan, accelerator, transformer, trained, data)
    services = Services(run, folder, data, start_step)
    if checkpoint:
        services.restore(checkpoint)
    return run, services


def run_steps(run: Run, services: Services) -> TrainResult:
    """The loop: step, and what is due after it. Stops early, with a checkpoint, when the process is told to stop."""
    config, accumulation = run.config, run.config.gradient_accumulation_steps
    start, end = services.start_step, run.num_steps
    batches = read_ahead(
        run.source, start * accumulation, end * accumulation, config.data_config.num_workers, run.plan.pin_memory
    )
    with services, StopSignal(run.accelerator) as stop:
        services.before_first_step()
        for step in range(start, end):
            run.steps_ahead.reach(step)
            loss, grad_norm = train_step(run, islice(batches, accumulation), step, services.see_batch)
            services.after_step(step + 1, loss, grad_norm)
            if stop.requested(step + 1, config.logging_steps):
                return services.interrupted(step + 1)
        return services.finish()


def train_step(
    run: Run, micro_batches: Iterable[list[Batch]], step: int, see_batch: Callable[[Batch], None]
) -> tuple[Tensor, Tensor]:
    """One optimizer step over its micro-batches. Nothing here waits for the device.

    Returns:
        The loss, a mean over all samples of all processes, and the gradient's norm before clipping; on the device.
    """
    config = run.config
    num_samples = config.batch_size * config.gradient_accumulation_steps
    optim.set_learning_rate(run.trained.optimizer, run.learning_rate_at(step))
    total_loss = torch.zeros((), device=run.accelerator.device)
    for batch in chain.from_iterable(micro_batches):
        see_batch(batch)
        batch = batch.to(run.accelerator.device)
        noisy_BCHW = add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B)
        velocity_BCHW = run.family.predict_velocity(
            run.transformer, noisy_BCHW, batch.sigma_B, batch.conditioning, batch.controls, config.objective.guidance
        )
        loss_B = sample_losses(velocity_BCHW, velocity_target(batch.latents_BCHW, batch.noise_BCHW))
        weight_B = loss_weights(config.objective.weighting_scheme, batch.sigma_B)
        loss = (weight_B * loss_B).sum() / num_samples
        loss.backward()
        total_loss += loss.detach()
    average_across_processes(run.accelerator, [total_loss, *gradients(run)])
    grad_norm = nn.utils.clip_grad_norm_(run.trained.parameters.values(), config.max_grad_norm)
    run.trained.optimizer.step()
    run.trained.optimizer.zero_grad(set_to_none=True)
    return total_loss, grad_norm


def gradients(run: Run) -> list[Tensor]:
    """Gradients in a stable order, the same set in all processes.

    Some parameters never get one: what the last block makes of the text, for example, is not used any more.
    """
    found = [parameter.grad for parameter in run.trained.parameters.values() if parameter.grad is not None]
    if not found:
        raise RuntimeError("no gradient reached any trained parameter: the loss does not depend on them")
    return found


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
    device: torch.device,
    checkpoint: Checkpoint | None,
) -> MemoryPlan:
    """The plan of a new run; a resumed run keeps its own, since kernels and formats decide bits."""
    if checkpoint:
        return MemoryPlan.from_dict(checkpoint.record["plan"])
    num_blocks, width = family.block_shape(folder)
    element_bytes = 2 if config.mixed_precision == "bf16" else 4
    num_parameters = count_parameters(config, family, folder)
    size = RunSize(
        weight_bytes=num_parameters * element_bytes,
        num_trained=num_parameters if config.method == "full" else 0,
        num_tokens=config.batch_size * (data.most_image_tokens + data.most_text_tokens),
        num_blocks=num_blocks,
        block_width=width,
    )
    trial = None
    if device.type == "cuda" and config.cuda_features.enable_cudnn_sdp is None:
        _, height, width = family.latent_shape(folder, *data.largest_target)
        tried = try_cudnn_attention(folder, height, width, data.most_text_tokens)
        trial = (tried.passed, tried.finding)
    return plan_memory(read_facts(device), size, config, trial)


def count_parameters(config: TrainConfig, family: ModelFamily, folder: ModelFolder) -> int:
    """Parameters of the transformer, without loading it."""
    if not config.random_weights:
        return folder.num_parameters("transformer")
    model = family.build_transformer(folder.component_config("transformer"))
    return sum(parameter.numel() for parameter in model.parameters())


def load_transformer(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, plan: MemoryPlan, device: torch.device
) -> nn.Module:
    """The base in the planned format; random values only behind the test switch."""
    placement = Placement(device, FORMATS[plan.weights_format])
    if config.random_weights:
        return load.random_transformer(family, folder.component_config("transformer"), placement)
    return load.load_transformer(family, folder, placement)


def build_run(
    config: TrainConfig,
    family: ModelFamily,
    plan: MemoryPlan,
    accelerator: Accelerator,
    transformer: nn.Module,
    trained: TrainedWeights,
    data: PreparedData,
) -> Run:
    """Schedule and order of batches around a transformer and what of it is trained."""
    world_size = accelerator.num_processes
    order = BatchPlan(data.buckets, config.batch_size * world_size, config.seed)
    num_steps = planned_steps(config, order)
    source = BatchSource(
        order,
        data.reader,
        config.objective,
        config.data_config.caption_dropout_rate,
        accelerator.process_index,
        world_size,
    )
    return Run(
        config=config,
        family=family,
        plan=plan,
        accelerator=accelerator,
        transformer=transformer,
        trained=trained,
        learning_rate_at=optim.build_schedule(config, num_steps),
        source=source,
        steps_ahead=StepsAhead(
            transformer=transformer,
            family=family,
            times_of=lambda step: source.times_of_step(step, config.gradient_accumulation_steps, family.time_features),
            samples_per_step=config.batch_size * config.gradient_accumulation_steps,
            num_steps=num_steps,
            guidance=config.objective.guidance,
            device=accelerator.device,
        ),
        num_steps=num_steps,
    )


def planned_steps(config: TrainConfig, order: BatchPlan) -> int:
    """Optimizer steps of the whole run: `max_train_steps` or `num_train_epochs`, whichever ends first."""
    limits = [config.max_train_steps] if config.max_train_steps is not None else []
    if config.num_train_epochs is not None:
        micro_batches = order.epoch_end(config.num_train_epochs - 1)
        limits.append(-(-micro_batches // config.gradient_accumulation_steps))
    return min(limits)
