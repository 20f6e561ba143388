"""Decides whether a run learns: whether gradients reach what is trained, whether it moves, whether its file works.

In a LoRA (Hu et al. 2021, arXiv 2106.09685) the up-matrices start at zero. So at the first step each of them has a
gradient, and each down-matrix has one that is exactly zero; after the first step with a learning rate above 0, however
small, no up-matrix is zero any more, since AdamW's step does not depend on the gradient's size. What is still as it was
`guard.must_learn_within` such steps later will never learn. All weights of a model may be held in bf16, where a small
step is rounded away by chance, so of them only large tensors must have moved, at rates near the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pixtune.storage.resume import shorten
from pixtune.trained.read_back import ReadBack

MOST_ROUNDING = {"no": 1e-4, "bf16": 2e-2}
"""Distance of two velocities that rounding explains, by `mixed_precision`."""
MOST_LOSS = 0.05
"""Part of a LoRA's effect that may be missing from its file."""
SMALLEST_RATE = 1e-37
"""Learning rate below which a step is rounded to zero in fp32."""
SMALLEST_RATES = {"no": 1e-6, "bf16": 1e-3}
"""Sum of learning rates below which weights may have moved too little to show in a rounded velocity, by its format."""


def judged_after(
    rate_at: Callable[[int], float], start: int, num_steps: int, within: int, least_share: float
) -> int | None:
    """Returns the step after which what is trained must have moved; None where the run has no rate that would do it.

    Args:
        rate_at: learning rate of a step, 0 for the first.
        start: number of steps that were taken before the weights were noted.
        within: number of steps with a rate that moves weights.
        least_share: part of the peak rate above which a rate moves weights.
    """
    least = least_share * max((rate_at(step) for step in range(0, num_steps, max(num_steps // 1000, 1))), default=0.0)
    count, last = 0, None
    for step in range(start, num_steps):
        if rate_at(step) > least or (least and rate_at(step) == least):
            count, last = count + 1, step + 1
        if count == within:
            return last
    return num_steps if count else None


def no_gradient(without: Collection[str], num_trained: int, last_block: Collection[str]) -> str | None:
    """Returns what is wrong where tensors have no gradient after the first step; None where nothing is.

    Args:
        without: names of those.
        last_block: names of the last block's tensors, some of which may have none: nothing reads what the block makes
            of the text.
    """
    if not (cut := [name for name in without if name not in last_block]):
        return None
    return (
        f"no gradient reaches {len(cut)} of {num_trained} trained tensors ({shorten(cut)}), so they would never learn. "
        "Their layers' outputs are not used, or something between them and the loss cuts gradients off"
    )


def not_moved(
    unmoved: Collection[str], num_judged: int, num_steps: int, has_gradient: Mapping[str, bool], rate: float
) -> str | None:
    """Returns what is wrong where tensors are as they were at the start; None where nothing is.

    Args:
        unmoved: names of those.
        num_judged: number of all that must have moved.
        num_steps: number of steps since the start whose rate moves weights.
        has_gradient: whether the optimizer has seen a gradient of them that is not zero.
        rate: the highest learning rate so far.
    """
    if not unmoved:
        return None
    if rate < SMALLEST_RATE:
        has_gradient = {}
    frozen = [name for name in unmoved if has_gradient.get(name, False)]
    why = (
        f"{'Their' if len(frozen) == len(unmoved) else 'Some'} gradients are not zero, so the weights are frozen: the "
        "optimizer does not reach them, or something sets them back"
        if frozen
        else "Such a learning_rate is too small for numbers of 32 bits"
        if rate < SMALLEST_RATE
        else "Their gradients are zero: something cuts them off from the loss, or every loss weighs 0"
    )
    what = "none of the weights that must move first has" if len(unmoved) == num_judged else (
        f"{len(unmoved)} of {num_judged} tensors that must move first have not"
    )  # fmt: skip
    return f"{what} moved in {num_steps} steps with learning rates up to {rate:.3g}: {shorten(sorted(unmoved))}. {why}"


def fault_of_file(read: ReadBack, path: Path, precision: str, sum_of_rates: float) -> str | None:
    """Returns what is wrong with a saved file by what it does on the base; None where nothing is.

    Args:
        precision: the config's `mixed_precision`.
        sum_of_rates: sum of the learning rates so far, or what an average has of it: how far a weight may have moved.
    """
    path = read.file or path
    if read.effect != read.effect or read.distance != read.distance:
        return None  # no numbers, which the guard of the losses judges
    if read.distance > max(MOST_ROUNDING[precision], MOST_LOSS * read.effect):
        layers = f" It holds other numbers for {shorten(read.unequal)}." if read.unequal else ""
        return (
            f"{path} does not do what the weights in memory do: put on the base, its velocity is off by "
            f"{read.distance:.1%}, where the training so far changes it by {read.effect:.1%}.{layers} The disk, or "
            "what writes the file, is at fault"
        )
    if read.unequal:
        return f"{path} holds other numbers than the weights in memory, for {shorten(read.unequal)}"
    if read.effect == 0 and sum_of_rates > SMALLEST_RATES[precision]:
        return (
            f"{path} does nothing: with it the base predicts what it predicts without. The layers that are trained "
            "(lora_targets) have no influence on the prediction, or their weights have not moved"
        )
    return None
