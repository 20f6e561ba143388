"""Several processes of a run: what each sends in a step, how long that takes beside computing, and why, in words.

No torch. Bytes and seconds are those of `exchange_cost.py`, for the rung that a run takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pixtune.hardware.facts import GIB
from pixtune.plan.exchange_cost import (
    Exchange,
    ScaledStep,
    exchanges_seconds,
    full_exchanges,
    gathering_exchanges,
    lora_exchanges,
    sent_bytes,
)
from pixtune.plan.footprint import ELEMENT_BYTES
from pixtune.plan.rungs import STREAM_SLOTS, Rung, ladder
from pixtune.plan.seconds import gather_seconds, gathered_blocks, step_seconds
from pixtune.plan.situation import Situation

LONG_EXCHANGE = 0.1
"""Share of a step from which the exchange of gradients is worth a warning."""


@dataclass(frozen=True)
class Together:
    """A step of all processes of a run, as each of them sees it."""

    num_hosts: int
    per_host: int
    """Processes, and GPUs, of each host."""
    shards: int
    """Processes that hold one copy of the weights together."""
    gathers: tuple[Exchange, ...]
    """Exchanges that bring weights, while a process computes."""
    sums: tuple[Exchange, ...]
    """Exchanges of gradients. Those of a LoRA are one, at the end of the step."""
    step: ScaledStep | None
    """Seconds of a step; None: its computing is not estimated, as where all weights are trained."""
    link_words: str
    """The links that are used, in words."""

    @property
    def num_processes(self) -> int:
        return self.num_hosts * self.per_host

    @property
    def copies(self) -> int:
        """Number of copies of the weights in all processes together."""
        return self.num_processes // self.shards


def together(rung: Rung, situation: Situation) -> Together:
    """Returns what the processes of a run do together in a step that holds memory as the rung says."""
    footprint, demands = situation.footprint, situation.demands
    num_micro_batches = max(footprint.examples_per_step // footprint.examples_at_once, 1)
    links = situation.known_links
    used = [links.words] if situation.num_processes > 1 else []
    used += [links.network_words] if situation.num_hosts > 1 else []
    words = " and ".join(used)
    if footprint.trains_all:
        gathers, sums = _of_all_weights(rung, situation, num_micro_batches)
        return Together(
            situation.num_hosts, situation.num_processes, rung.shards, gathers, sums, None, words
        )  # fmt: skip
    gathers = _of_shared_blocks(rung, situation, num_micro_batches)
    sums = tuple(lora_exchanges(footprint.trained_weights, situation.all_processes))
    step = None
    if situation.facts.device == "cuda" and demands.compute_format in ELEMENT_BYTES:
        step = ScaledStep(
            compute_seconds=num_micro_batches * step_seconds(rung, situation, gathers=False),
            hidden_seconds=num_micro_batches * step_seconds(rung, situation),
            exposed_seconds=exchanges_seconds(sums, situation.cluster),
            wait_seconds=0.0,
        )
    return Together(situation.num_hosts, situation.num_processes, rung.shards, gathers, sums, step, words)


def _of_shared_blocks(rung: Rung, situation: Situation, num_micro_batches: int) -> tuple[Exchange, ...]:
    """Returns the exchanges of a step that bring frozen blocks.

    The ring of whole blocks holds the last ones when the backward pass begins, and the first ones when it ends.
    """
    blocks = gathered_blocks(rung, situation)
    return tuple(gathering_exchanges(blocks, rung.shards, num_micro_batches, kept_blocks=STREAM_SLOTS))


def _of_all_weights(
    rung: Rung, situation: Situation, num_micro_batches: int
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """Returns the exchanges of a run that trains all weights: those of weights, and those of gradients."""
    footprint, element = situation.footprint, ELEMENT_BYTES[situation.demands.compute_format]
    # Gradients that are scattered travel in fp32 (`engine/sharding.py`).
    gradient = 4 if rung.shards > 1 or situation.demands.fp32_copies else element
    if rung.shards == 1:
        return (), (Exchange("all_reduce", gradient * footprint.trained_weights, situation.all_processes),)
    blocks = [
        kind.linear_weights + kind.modulation_weights + kind.other_weights
        for kind in footprint.kinds
        for _ in range(kind.count)
    ]
    every = full_exchanges(
        blocks, rung.shards, situation.all_processes, element, gradient, num_micro_batches, rung.keeps_gathered
    )
    gathers = tuple(each for each in every if each.kind == "all_gather")
    return gathers, tuple(each for each in every if each.kind != "all_gather")


# ---- in words


def reasons_together(rung: Rung, situation: Situation) -> Iterator[str]:
    """Yields how the processes of a run hold the weights, why so, what travels between them, and warnings."""
    if situation.all_processes == 1:
        return
    found, demanded = together(rung, situation), situation.demands.shards
    yield f"{_processes(found)}, {_placing(found)}: {_why(rung, situation, demanded)}"
    yield travel_words(found)
    if found.shards > found.per_host:
        yield f"parts of one copy lie on {found.shards // found.per_host} hosts, and come over the network in each pass"
    elif found.num_hosts > 1:
        yield "only gradients go from host to host: each host has whole copies"
    yield from warnings_of(found, rung, situation)


def travel_words(found: Together) -> str:
    """Returns the bytes that each process sends in a step, and how long that takes, in words."""
    parts = []
    if found.gathers:
        parts.append(f"{_size(sent_bytes(found.gathers))} of weights beside computing")
    if found.sums:
        when = " at its end" if len(found.sums) == 1 else ""
        parts.append(f"{_size(sent_bytes(found.sums))} of gradients{when}")
    sent = f"in a step each process sends {' and '.join(parts) or 'nothing'} over {found.link_words}"
    if found.step is None:
        return sent
    waited = found.step.seconds - found.step.compute_seconds
    return (
        f"{sent}: {_seconds(waited)} of {_seconds(found.step.seconds)} are waited for, "
        f"an efficiency of {found.step.efficiency:.1%}"
    )


def warnings_of(found: Together, rung: Rung, situation: Situation) -> Iterator[str]:
    """Yields where a link bounds the step, with what helps."""
    if found.step is None:
        return
    step = found.step
    num_micro_batches = max(situation.footprint.examples_per_step // situation.footprint.examples_at_once, 1)
    link_seconds = 2 * num_micro_batches * gather_seconds(rung, situation) if found.gathers else 0.0
    if link_seconds > 0.9 * step.compute_seconds:
        halved = rung.weights_format in ELEMENT_BYTES and situation.demands.quantize is not True
        helps = ["a larger train_batch_size computes more with what is gathered"]
        helps += ["quantize=true halves it"] if halved else []
        yield (
            f"the link bounds the step: weights come in {_seconds(link_seconds)}, and computing takes "
            f"{_seconds(step.compute_seconds)}; {', and '.join(helps)}"
        )
    if step.exposed_seconds > LONG_EXCHANGE * step.seconds:
        times = -(-step.exposed_seconds * (1 - LONG_EXCHANGE) // (LONG_EXCHANGE * max(step.hidden_seconds, 1e-9)))
        yield (
            f"the link bounds the step: gradients take {step.exposed_seconds / step.seconds:.0%} of it; "
            f"{max(times, 2):.0f} times the gradient_accumulation_steps bring that below {LONG_EXCHANGE:.0%}, "
            "a lower rank also shortens it"
        )


def _processes(found: Together) -> str:
    if found.num_hosts == 1:
        return f"{found.per_host} processes of one host"
    each = "one process" if found.per_host == 1 else f"{found.per_host} processes"
    return f"{each} on each of {found.num_hosts} hosts"


def _placing(found: Together) -> str:
    if found.shards == 1:
        return "each with a copy of the weights"
    copies = "one copy of the weights," if found.copies == 1 else f"{found.copies} copies of the weights, each"
    return f"{copies} in parts on {found.shards} GPUs"


def _why(rung: Rung, situation: Situation, demanded: int | None) -> str:
    """Returns why so many processes hold a copy together."""
    if demanded is not None:
        return "distributed.shards asks for it"
    if rung.shards == 1:
        return "it fits, and nothing but gradients is exchanged"
    if situation.footprint.trains_all:
        return "a whole copy does not fit a GPU"
    same = [each for each in ladder(situation) if each.shards == 1 and each.weights_format == rung.weights_format]
    fitting = [each for each in same if situation.fits_device(each)]
    if fitting:
        fastest = min(step_seconds(each, situation) for each in fitting)
        return (
            f"{_seconds(step_seconds(rung, situation))} a micro-batch, where a copy on each GPU would take "
            f"{_seconds(fastest)}"
        )
    least = min(situation.needed(each) for each in same if not each.streamed_blocks)
    usable = situation.usable_bytes / GIB
    return f"in {rung.weights_format} a whole copy needs {least / GIB:.1f} GiB of a GPU, and {usable:.1f} are usable"


def sizes_in_words(exchanges: Sequence[Exchange]) -> str:
    """Returns the bytes that each process sends in some exchanges, in words."""
    return _size(sent_bytes(exchanges))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
