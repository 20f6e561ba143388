"""Prints what each size of card gets: the tables of docs/GPU_COMPATIBILITY.md, planned and not run.

For a card of each size and each family: the form in which the planner holds a LoRA run at 1024x1024 and batch 1, the
largest batch that fits at that size, the largest square picture at batch 1, and the smallest limit at which a run
of the family fits at all, found by halving. Last, how a card holds a run of all weights, and the host memory for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pixtune.commands.plan import make_report
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.plan.training import TrainingPlan

CARDS = (
    "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "RTX 6000 Ada", "H100", "RTX PRO 6000", "H200",
)  # fmt: skip
"""One card of each size."""
MODELS = {
    "Qwen-Image": "Qwen/Qwen-Image",
    "Qwen-Image-Edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
}
ALL_WEIGHTS_CARDS = ("RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "RTX 6000 Ada", "H100", "RTX PRO 6000", "H200")
HOST_GIB = 128
"""Memory of the machine around a card that trains all weights."""
MOST_EXAMPLES, LARGEST_SIDE, SIDE_STEP = 64, 4096, 64
LEAST_LIMIT_GIB, LIMIT_STEP_GIB = 2.0, 0.1


def config_of(model: str, size: int = 1024, batch_size: int = 1, limit_gib: float | None = None) -> TrainConfig:
    """Returns the config of a LoRA run of rank 16 that leaves everything about memory to the planner."""
    control_dir = Path("control") if "Edit" in model else None
    return TrainConfig(
        pretrained_model_name_or_path=model,
        output_dir=Path("out"),
        max_train_steps=1,
        rank=16,
        train_batch_size=batch_size,
        gpu_memory_limit_gib=limit_gib,
        data_config=DataConfig(img_dir=Path("pictures"), img_size=size, control_dir=control_dir),
    )


def plan_or_none(config: TrainConfig, card: str) -> TrainingPlan | None:
    """Plans a run; None: it does not fit."""
    try:
        return make_report(config, card).plan
    except PlanError:
        return None


def holds_batch(model: str, card: str, batch_size: int) -> bool:
    """Returns whether a card holds a run at 1024x1024 with this batch size."""
    return plan_or_none(config_of(model, batch_size=batch_size), card) is not None


def holds_side(model: str, card: str, num_steps: int) -> bool:
    """Returns whether a card holds a run at batch 1 with squares of so many times `SIDE_STEP` pixels a side."""
    return plan_or_none(config_of(model, size=SIDE_STEP * num_steps), card) is not None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Returns the largest number from 1 to `most` that fits, where each below it does, too; 0: not even 1."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe(plan: TrainingPlan) -> str:
    """Names a plan's ways of holding a run in a few words."""
    words = [plan.weights_format]
    if plan.streamed_blocks:
        words.append(f"{plan.streamed_blocks} blocks streamed")
    elif plan.offload_inputs:
        words.append("inputs offloaded")
    if plan.recomputed_blocks:
        words.append(f"{plan.recomputed_blocks} blocks recomputed")
    elif plan.reprojected_blocks:
        words.append(f"q, k, v of {plan.reprojected_blocks} blocks recomputed")
    elif plan.selective:
        words.append("norms and gates recomputed")
    else:
        words.append("nothing recomputed")
    return ", ".join(words)


def smallest_limit_gib(model: str) -> float:
    """Returns the smallest memory limit at which a run of 1024x1024 fits, on a card that computes in fp8."""
    steps = largest(
        lambda step: plan_or_none(config_of(model, limit_gib=24 - step * LIMIT_STEP_GIB), "H100") is not None,
        round((24 - LEAST_LIMIT_GIB) / LIMIT_STEP_GIB),
    )
    return round(24 - steps * LIMIT_STEP_GIB, 1)


def rows() -> list[str]:
    """Returns the table's lines."""
    lines = [
        "| card | model | held as, at 1024x1024 and batch 1 | largest batch | largest picture at batch 1 |",
        "|---|---|---|---|---|",
    ]
    for card in CARDS:
        for name, model in MODELS.items():
            plan = plan_or_none(config_of(model), card)
            if plan is None:
                lines.append(f"| {card} | {name} | does not fit | | |")
                continue
            batch = largest(partial(holds_batch, model, card), MOST_EXAMPLES)
            side = SIDE_STEP * largest(partial(holds_side, model, card), LARGEST_SIDE // SIDE_STEP)
            most = f"{batch} or more" if batch == MOST_EXAMPLES else str(batch)
            far = f"{side} or larger" if side == LARGEST_SIDE else str(side)
            lines.append(f"| {card} | {name} | {describe(plan)} | {most} | {far} |")
    return lines


def rows_of_all_weights() -> list[str]:
    """Returns the lines of the table of all weights."""
    lines = [
        "| card | model | each weight is stepped | 8-bit states | held as | GiB of the card | of the host |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in ALL_WEIGHTS_CARDS:
        for name in ("Qwen-Image", "FLUX.1-dev"):
            config = config_of(MODELS[name]).model_copy(update={"method": "full", "rank": None, "lora_targets": None})
            plan = make_report(config, card, HOST_GIB).plan
            step = "within the backward pass" if plan.fused_step else "after it"
            states = "in host memory" if plan.states_on_host else "on the card"
            sizes = [f"{num_bytes / GIB:.1f}" for num_bytes in (plan.expected_peak_bytes, plan.expected_host_bytes)]
            lines.append(f"| {card} | {name} | {step} | {states} | {describe(plan)} | {' | '.join(sizes)} |")
    return lines


def main() -> None:
    print("\n".join(rows()))
    print()
    for name, model in MODELS.items():
        print(f"* {name}: from {smallest_limit_gib(model)} GiB on")
    print()
    print("\n".join(rows_of_all_weights()))


if __name__ == "__main__":
    main()
