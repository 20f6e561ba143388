"""Estimate of a LoRA step's time, by which rungs that fit are compared. No torch.

What counts is which of two rungs is faster, so speeds are those of a chip's generation and figures of one block are
those of docs/profile.md. A step computes products, attention and passes over memory, and copies beside them: whichever
takes longer decides, forward and backward. Beside what grows with the tokens there is what does not, which decides for
small pictures: the last tiles of each product, the launch of each kernel, and what is done to weights before they are
multiplied.

Two constants were fitted to Qwen-Image's steps, `EXPANDED_PER_SM` and `REPROJECTED_PASSES`; the others were counted or
measured by themselves. `python benchmarks/step_times.py` compares all steps that were measured, FLUX.1-dev's among
them, to which nothing was fitted.

Not counted, as it is the same on every rung: the optimizer's step (0.7 ms of Qwen-Image's with rank 32), what a higher
rank adds, and layers outside of blocks; and as too little of it was measured: launches by Python where steps are not
captured, and the layers that make modulations (5 ms of Qwen-Image's in bf16, where no table stands in for them). To
count those would prefer tables in host memory to layers that fit the GPU, for 1%.
"""

from __future__ import annotations

from typing import Protocol

from pixtune.hardware.facts import HOPPER, HardwareFacts
from pixtune.plan.exchange_cost import Exchange, exchange_seconds
from pixtune.plan.footprint import BYTES_PER_WEIGHT, ELEMENT_BYTES, BlockKind, block_weight_bytes
from pixtune.plan.situation import Situation

TERAFLOPS_PER_SM = {(7, 0): 1.0, (8, 0): 2.2, (8, 6): 0.8, (8, 9): 1.25, (9, 0): 5.7, (10, 0): 11.0, (12, 0): 1.2}
"""TFLOP/s of bf16 products that a multiprocessor reaches, from this capability on. Hopper's was measured; the others
are its share of the peak applied to data sheets."""
ASSUMED_SMS, ASSUMED_BYTES_PER_SECOND = 64, 600e9
GAIN = {"fp8": 1.72, "int8": 1.0}
"""Speed of 8-bit products over bf16 ones. torch has none of int8 that are faster."""
ATTENTION_SHARE = 0.75
"""Speed of attention over that of bf16 products, forward and backward."""
TILE = 128
"""Side of the square of a product that a multiprocessor computes at a time."""
LAST_TILES = 0.5
"""Time that a product takes beyond its operations, in tiles: all multiprocessors wait for those that have one more, on
the average half of one."""
KERNEL_SECONDS = 0.7e-6
"""Time from one kernel of a captured step to the next, measured on an H200 (docs/experiments.md)."""
KERNELS, LAYER_KERNELS, CODES_KERNELS, SELECTIVE_KERNELS = 46, 4.6, 1.8, 1.2
"""Kernels of a block, forward and backward: so many, and for each linear layer; with 8-bit codes and with selective
recomputation more for each. They give the 101, 123 and 137 that were counted of Qwen-Image's blocks, of 12 layers, and
the 69 and 85 of FLUX.1-dev's single-stream ones, of 5 (docs/profile.md)."""
FORWARD_KERNELS = 1 / 3
"""Share of them in the forward pass; taken to be that of `PASSES`."""
MEMORY_SHARE = 0.65
"""Share of the memory's nominal bandwidth that passes over it reach, where multiprocessors do not hold them up."""
PASSED_PER_SM = 17.7e9
"""Bytes per second that passes of a multiprocessor read and write at most, whatever the memory can do. Norms, GELU,
codes and gates took 1.05 ms of a block of Qwen-Image's on an H200, and with 0.7 of its bandwidth 1.10 on an H100
(docs/experiments.md, docs/profile.md)."""
EXPANDED_PER_SM = 6.4e9
"""4-bit weights per second that a multiprocessor expands to 8 bits at most. Fitted; 3.6 a clock cycle, each of which
looks up a level and multiplies. An H200's memory would give twice as many."""
PASSES = {"forward": 27, "backward": 56}
"""Units that a block reads and writes beside products and attention."""
CODES_PASSES = {"forward": 3, "backward": 6}
"""Units more where activations are quantized: 1.1 instead of 0.96 ms of a block of Qwen-Image's at 4352 tokens on an
H100, with the kernels for it (docs/profile.md)."""
SELECTIVE_PASSES = 8
"""Units that selective recomputation reads and writes in addition."""
PROJECTIONS = 1 / 4
"""Share of a block's products that make queries, keys and values: 3 of 12 squares of the width in each stream."""
REPROJECTED_PASSES = 10
"""Units that are read and written where they are recomputed: their input and its codes, the products, and the norms and
rotary embedding of heads. Of one cell, with 57 blocks: 0.33 ms a block, of which products take 0.2."""
COPIES_COST = 0.04
"""Share of the time of copies that is lost although computation goes on beside them: they take memory's bandwidth."""
GATHERED_SHARE = 0.38
"""Share of the memory's nominal bandwidth that passes of gathered blocks reach, written here and read for others, as
time that is lost although computation goes on beside them. On two H200 Qwen-Image's 60 blocks lost 55 ms in bf16, which
NCCL gathered (78 where copy engines read), and some 33 ms in 8 bits, which copy engines read: 109 and 54 GB at 0.41
(0.29) and 0.34 of 4.8 TB/s."""
TABLE_COST = 0.002
"""Share of a step that filling and reading a modulation table costs."""


class TimedRung(Protocol):
    """The part of a rung that decides a step's time; `rungs.Rung` describes it."""

    @property
    def weights_format(self) -> str: ...

    @property
    def modulation_rows(self) -> int: ...

    @property
    def selective(self) -> bool: ...

    @property
    def recomputed_blocks(self) -> int: ...

    @property
    def offload_inputs(self) -> bool: ...

    @property
    def streamed_blocks(self) -> int: ...

    @property
    def reprojected_blocks(self) -> int: ...

    @property
    def kept_transposes(self) -> bool: ...

    @property
    def shards(self) -> int: ...


def step_seconds(rung: TimedRung, situation: Situation, gathers: bool = True) -> float:
    """Estimates the seconds of one micro-batch, forward and backward.

    Args:
        gathers: blocks in parts on several GPUs have to come; False: as if they were there already.
    """
    forward = backward = 0.0
    number = 0
    for kind in situation.footprint.kinds:
        recomputed = min(max(rung.recomputed_blocks - number, 0), kind.count)
        again = min(max(rung.recomputed_blocks + rung.reprojected_blocks - number, 0), kind.count) - recomputed
        number += kind.count
        once = _forward_seconds(kind, rung, situation)
        forward += kind.count * once
        backward += kind.count * _backward_seconds(kind, rung, situation) + recomputed * once
        if again:
            backward += again * _reprojection_seconds(kind, rung, situation)
    forward, backward = (seconds * situation.footprint.step_times for seconds in (forward, backward))
    to_device, to_host = _copies(rung, situation)
    link = situation.facts.link_bandwidth_bytes_per_second
    if link and (to_device or to_host):
        # Weights come in both passes; inputs leave in the first and come back in the second.
        in_forward, in_backward = max(to_device, to_host) / link, (to_device + to_host) / link
        lost = COPIES_COST * (in_forward + in_backward)
        forward, backward = max(forward, in_forward), max(backward, in_backward) + lost
    if rung.shards > 1 and gathers:
        gathering = gather_seconds(rung, situation)
        traffic = 2 * rung.streamed_blocks * _block_bytes(rung, situation) / situation.footprint.num_blocks
        bandwidth = situation.facts.memory_bandwidth_bytes_per_second or ASSUMED_BYTES_PER_SECOND
        lost = 2 * traffic / (GATHERED_SHARE * bandwidth)
        forward, backward = max(forward, gathering), max(backward, gathering) + lost
    return (forward + backward) * (1 + TABLE_COST * (rung.modulation_rows > 0))


def gather_seconds(rung: TimedRung, situation: Situation) -> float:
    """Estimates the seconds in which a pass's blocks come from the GPUs that hold them together."""
    mean = Exchange("all_gather", round(_block_bytes(rung, situation) / situation.footprint.num_blocks), rung.shards)
    return rung.streamed_blocks * exchange_seconds(mean, situation.cluster)


def gathered_blocks(rung: TimedRung, situation: Situation) -> list[int]:
    """Returns the bytes of each block that a pass gathers, evenly spread as `streaming.choose_streamed` takes them."""
    footprint, compute_format = situation.footprint, situation.demands.compute_format
    loaded = rung.modulation_rows == 0
    sizes = [
        block_weight_bytes(kind, rung.weights_format, compute_format, loaded)
        for kind in footprint.kinds
        for _ in range(kind.count)
    ]
    count = rung.streamed_blocks if rung.shards > 1 else 0
    return [sizes[(2 * i + 1) * len(sizes) // (2 * count)] for i in range(count)]


def basis(facts: HardwareFacts) -> str:
    """Returns what an estimate for this GPU rests on, in words."""
    if not facts.num_sms:
        return "a guess: this card is not in pixtune's table, so its speed is not known before a run"
    if facts.capability == HOPPER:
        return "H100 and H200 were measured: mostly within 6% of it"
    return "by the data sheet, from what H100 and H200 took: not measured on this kind of card"


def teraflops(facts: HardwareFacts) -> float:
    """Returns about how many TFLOP/s of bf16 products a GPU reaches."""
    known = [capability for capability in TERAFLOPS_PER_SM if capability <= facts.capability]
    return TERAFLOPS_PER_SM[max(known, default=(7, 0))] * _num_sms(facts)


def _copies(rung: TimedRung, situation: Situation) -> tuple[float, float]:
    """Returns the bytes that come to the device in each pass, and those of inputs that leave it."""
    footprint, compute_format = situation.footprint, situation.demands.compute_format
    inputs = footprint.unit_bytes * ELEMENT_BYTES[compute_format] / 2
    weights = rung.streamed_blocks * _block_bytes(rung, situation) / footprint.num_blocks if rung.shards == 1 else 0.0
    return weights, rung.recomputed_blocks * inputs if rung.offload_inputs else 0.0


def _block_bytes(rung: TimedRung, situation: Situation) -> int:
    """Counts the bytes of all blocks' weights."""
    footprint, compute_format = situation.footprint, situation.demands.compute_format
    loaded = rung.modulation_rows == 0
    return sum(
        kind.count * block_weight_bytes(kind, rung.weights_format, compute_format, loaded) for kind in footprint.kinds
    )


def _forward_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    seconds = _product_seconds(kind, rung, situation) + _attention_seconds(kind, situation)
    seconds += FORWARD_KERNELS * _kernels(kind, rung) * KERNEL_SECONDS
    return seconds + _pass_seconds(_passes("forward", rung), situation)


def _backward_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    """Returns the seconds of a backward pass, which multiplies by the frozen weights as often as the forward pass."""
    num_passes = _passes("backward", rung) + (SELECTIVE_PASSES if rung.selective else 0)
    seconds = _product_seconds(kind, rung, situation) + 2.5 * _attention_seconds(kind, situation)
    seconds += (1 - FORWARD_KERNELS) * _kernels(kind, rung) * KERNEL_SECONDS
    if rung.weights_format in GAIN and not rung.kept_transposes:
        seconds += _memory_seconds(2 * kind.linear_weights, situation) + kind.num_linears * KERNEL_SECONDS
    return seconds + _pass_seconds(num_passes, situation)


def _reprojection_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    """Returns the seconds in which a block's queries, keys and values are computed again."""
    kernels = FORWARD_KERNELS * _kernels(kind, rung) * KERNEL_SECONDS
    of_weights = PROJECTIONS * (_product_seconds(kind, rung, situation) + kernels)
    return of_weights + _pass_seconds(REPROJECTED_PASSES, situation)


def _kernels(kind: BlockKind, rung: TimedRung) -> float:
    """Counts the kernels of a block, without those that change the form of weights."""
    of_layer = LAYER_KERNELS + CODES_KERNELS * _has_codes(rung) + SELECTIVE_KERNELS * rung.selective
    return KERNELS + kind.num_linears * of_layer


def _passes(direction: str, rung: TimedRung) -> int:
    return PASSES[direction] + CODES_PASSES[direction] * _has_codes(rung)


def _has_codes(rung: TimedRung) -> bool:
    """Returns whether activations are quantized for the products."""
    return rung.weights_format not in ELEMENT_BYTES


def _product_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    """Returns the seconds of all products of a block with its frozen weights, in one direction."""
    footprint, facts = situation.footprint, situation.facts
    codes = "fp8" if facts.capability >= (8, 9) and situation.demands.fp8 is not False else "int8"
    multiplied = codes if rung.weights_format == "nf4" else rung.weights_format
    # A dual-stream block's weights are halves for image and text, which are most and few of the tokens.
    streams = 2 if kind.units.cut else 1
    flops = 2 * kind.linear_weights / streams * footprint.num_tokens
    # A product's last tiles are as deep as the layer has features on the other side: about `rows` over all layers.
    flops += LAST_TILES * 2 * TILE**2 * kind.rows * _num_sms(facts)
    slower = ELEMENT_BYTES[situation.demands.compute_format] / 2
    seconds = flops * slower / (teraflops(facts) * 1e12 * GAIN.get(multiplied, 1.0))
    if rung.weights_format == "nf4":  # read in 4 bits and written in 8 each time
        by_memory = _memory_seconds(kind.linear_weights * (BYTES_PER_WEIGHT["nf4"] + 1), situation)
        by_multiprocessors = kind.linear_weights / (EXPANDED_PER_SM * _num_sms(facts))
        seconds += max(by_memory, by_multiprocessors) + kind.num_linears * KERNEL_SECONDS
    return seconds


def _attention_seconds(kind: BlockKind, situation: Situation) -> float:
    footprint = situation.footprint
    tokens_of_one = footprint.num_tokens / footprint.examples_at_once
    flops = 4 * footprint.num_tokens * tokens_of_one * footprint.width
    return flops / (teraflops(situation.facts) * 1e12 * ATTENTION_SHARE)


def _pass_seconds(units: float, situation: Situation) -> float:
    """Returns the seconds of reading or writing so many units of activations."""
    element = ELEMENT_BYTES[situation.demands.compute_format]
    num_bytes = units * situation.footprint.unit_bytes * element / 2
    return max(_memory_seconds(num_bytes, situation), num_bytes / (PASSED_PER_SM * _num_sms(situation.facts)))


def _memory_seconds(num_bytes: float, situation: Situation) -> float:
    bandwidth = situation.facts.memory_bandwidth_bytes_per_second or ASSUMED_BYTES_PER_SECOND
    return num_bytes / (MEMORY_SHARE * bandwidth)


def _num_sms(facts: HardwareFacts) -> int:
    return facts.num_sms or ASSUMED_SMS
