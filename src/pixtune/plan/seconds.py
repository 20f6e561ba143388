"""Estimate of a LoRA step's time, by which rungs that fit are compared. No torch.

What counts is which of two rungs is faster, so speeds are those of a chip's generation and figures of one block are
those of docs/profile.md (H100). A step computes products, attention and passes over memory, and copies beside them:
whichever takes longer decides, forward and backward.
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
MEMORY_SHARE = 0.65
"""Share of the memory's nominal bandwidth that passes over it reach."""
PASSES = {"forward": 30, "backward": 62}
"""Units that a block reads and writes beside products and attention: 1.1 ms of Qwen-Image's at 4352 tokens."""
SELECTIVE_PASSES = 8
"""Units that selective recomputation reads and writes in addition."""
PROJECTIONS = 1 / 6
"""Share of a block's products that make queries, keys and values."""
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
        backward += again * PROJECTIONS * _product_seconds(kind, rung, situation)
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
        return "H100 and H200 were measured: up to 20% longer, rarely shorter"
    return "by the data sheet, from what H100 and H200 took: not measured on this kind of card"


def teraflops(facts: HardwareFacts) -> float:
    """Returns about how many TFLOP/s of bf16 products a GPU reaches."""
    known = [capability for capability in TERAFLOPS_PER_SM if capability <= facts.capability]
    return TERAFLOPS_PER_SM[max(known, default=(7, 0))] * (facts.num_sms or ASSUMED_SMS)


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
    attention = _attention_seconds(kind, situation)
    return _product_seconds(kind, rung, situation) + attention + _pass_seconds(PASSES["forward"], situation)


def _backward_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    """Returns the seconds of a backward pass, which multiplies by the frozen weights as often as the forward pass."""
    num_passes = PASSES["backward"] + (SELECTIVE_PASSES if rung.selective else 0)
    transposes = 0.0
    if rung.weights_format in GAIN and not rung.kept_transposes:
        transposes = _memory_seconds(2 * kind.linear_weights, situation)
    products = _product_seconds(kind, rung, situation) + transposes
    return products + 2.5 * _attention_seconds(kind, situation) + _pass_seconds(num_passes, situation)


def _product_seconds(kind: BlockKind, rung: TimedRung, situation: Situation) -> float:
    """Returns the seconds of all products of a block with its frozen weights, in one direction."""
    footprint, facts = situation.footprint, situation.facts
    codes = "fp8" if facts.capability >= (8, 9) and situation.demands.fp8 is not False else "int8"
    multiplied = codes if rung.weights_format == "nf4" else rung.weights_format
    # A dual-stream block's weights are halves for image and text, which are most and few of the tokens.
    streams = 2 if kind.units.cut else 1
    flops = 2 * kind.linear_weights / streams * footprint.num_tokens
    slower = ELEMENT_BYTES[situation.demands.compute_format] / 2
    seconds = flops * slower / (teraflops(facts) * 1e12 * GAIN.get(multiplied, 1.0))
    if rung.weights_format == "nf4":  # read in 4 bits and written in 8 each time
        seconds += _memory_seconds(kind.linear_weights * (BYTES_PER_WEIGHT["nf4"] + 1), situation)
    return seconds


def _attention_seconds(kind: BlockKind, situation: Situation) -> float:
    footprint = situation.footprint
    tokens_of_one = footprint.num_tokens / footprint.examples_at_once
    flops = 4 * footprint.num_tokens * tokens_of_one * footprint.width
    return flops / (teraflops(situation.facts) * 1e12 * ATTENTION_SHARE)


def _pass_seconds(units: float, situation: Situation) -> float:
    """Returns the seconds of reading or writing so many units of activations."""
    element = ELEMENT_BYTES[situation.demands.compute_format]
    return _memory_seconds(units * situation.footprint.unit_bytes * element / 2, situation)


def _memory_seconds(num_bytes: float, situation: Situation) -> float:
    bandwidth = situation.facts.memory_bandwidth_bytes_per_second or ASSUMED_BYTES_PER_SECOND
    return num_bytes / (MEMORY_SHARE * bandwidth)
