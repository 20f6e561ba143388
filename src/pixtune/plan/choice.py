"""Choice of the rung that a run takes: the fastest that fits, with reasons in words for the user. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from pixtune.config.schema import TrainConfig
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, missing_on_host
from pixtune.plan import all_weights, rungs
from pixtune.plan.all_weights import AllWeightsRung, ladder_of_all_weights, runs_backward_twice
from pixtune.plan.footprint import ELEMENT_BYTES, Footprint
from pixtune.plan.optimizers import EXACT, OPTIMIZERS, SMALL
from pixtune.plan.processes import reasons_together
from pixtune.plan.refusals import refuse_all_weights, refuse_lora
from pixtune.plan.rungs import QUANTIZED, Rung, fit_host, fitting_by_speed, ladder, with_rows
from pixtune.plan.seconds import basis, step_seconds
from pixtune.plan.situation import AnyRung, Situation


@dataclass(frozen=True)
class Choice:
    """The rung that a run takes, with the reasons and the memory that it needs.

    A run that trains all weights has rungs of its own; `rung` is then the part that both ladders share.
    """

    rung: Rung
    optimizer: str
    reasons: tuple[str, ...]
    peak_bytes: int = 0
    host_bytes: int = 0
    fused_step: bool = False
    states_on_host: bool = False
    micro_batch_seconds: float = 0.0
    """Estimate of a micro-batch's time; 0: there is none."""


def choose_rung(situation: Situation, config: TrainConfig) -> Choice:
    """Chooses the fastest rung that fits.

    Args:
        config: names the keys of the demands, where nothing fits.

    Raises:
        PlanError: nothing fits; names how much is missing and which demand to drop.
        ConfigError: a format is demanded that this GPU does not compute in.
    """
    if situation.facts.device != "cuda":
        return _choose_on_cpu(situation)
    if situation.footprint.trains_all:
        return _choose_for_all_weights(situation, config)
    return _choose_for_lora(situation, config)


def _choose_for_lora(situation: Situation, config: TrainConfig) -> Choice:
    rung = rungs.first_that_fits(situation)
    if rung is None:
        raise PlanError(refuse_lora(situation, config))
    reasons = (
        *_lora_reasons(situation, rung),
        *_passed_over(situation),
        *_not_compiled(situation),
        *_small_states(situation),
        *_optimizer(situation),
        *reasons_together(rung, situation),
    )
    return Choice(
        rung, situation.optimizer, reasons, situation.peak(rung), rung.host_bytes(situation),
        micro_batch_seconds=step_seconds(rung, situation),
    )  # fmt: skip


def _choose_for_all_weights(situation: Situation, config: TrainConfig) -> Choice:
    rung = all_weights.first_that_fits(situation)
    if rung is None:
        raise PlanError(refuse_all_weights(situation, config))
    blocks = rung.blocks(situation.demands.compute_format)
    return Choice(
        blocks,
        rung.optimizer,
        (
            *_all_weights_reasons(situation, rung),
            *_not_compiled(situation),
            *_optimizer(situation),
            *reasons_together(blocks, situation),
        ),
        situation.peak(rung),
        rung.host_bytes(situation),
        rung.fused_step,
        rung.states_on_host,
    )


def _choose_on_cpu(situation: Situation) -> Choice:
    demands, footprint = situation.demands, situation.footprint
    weights_format = demands.compute_format
    shards = demands.shards or 1
    num_streamed = footprint.num_blocks if shards > 1 and not footprint.trains_all else 0
    count = footprint.num_blocks if demands.recompute or num_streamed else 0
    reasons = [] if count else ["no block is recomputed: host memory is enough on a CPU"]
    if demands.compute_format == "bf16":
        reasons.append("bf16 on a CPU, as mixed_precision asks: slower there than mixed_precision=no")
    if demands.quantize and not footprint.trains_all:
        weights_format = "fp8" if demands.fp8 else "int8"
        reasons.append("8-bit weights on a CPU, as quantize asks: they save memory there and cost time")
        reasons += _kept_plain(footprint)
    reasons += _optimizer(situation)
    keeps = footprint.trains_all and shards > 1 and not count
    rung = Rung(
        weights_format, recomputed_blocks=count, streamed_blocks=num_streamed, shards=shards, keeps_gathered=keeps
    )
    return Choice(rung, situation.optimizer, (*reasons, *reasons_together(rung, situation)))


# ---- reasons of a LoRA run


def _lora_reasons(situation: Situation, rung: Rung) -> Iterator[str]:
    """Yields why this rung is chosen and not the first one, and what it means."""
    footprint, first = situation.footprint, next(ladder(situation))
    yield _peak(situation, rung)
    yield f"a micro-batch is estimated to take {step_seconds(rung, situation):.2f} s; {basis(situation.facts)}"
    yield from situation.demands.notices
    if rung != first:
        yield f"the fastest way would need {_gib(situation.peak(first))}, so memory is saved:"
    if rung.weights_format in QUANTIZED:
        bits = "4 bits (nf4)" if rung.weights_format == "nf4" else f"8 bits ({rung.weights_format})"
        yield f"frozen weights in {bits}, multiplied on 8-bit tensor cores forward and backward"
        yield from _kept_plain(footprint)
    if rung.kept_transposes:
        yield "8-bit weights are also kept transposed, as the backward pass reads them: there is room"
    if rung.modulation_rows:
        weights = sum(kind.count * kind.modulation_weights for kind in footprint.kinds)
        yield (
            f"modulations are computed {rung.modulation_rows} draws ahead: their {weights / 1e9:.1f} billion weights "
            "stay in their file"
        )
    if rung.selective:
        yield "norms, rotary embedding and gates are recomputed, and GELU's input is kept in 8 bits"
    yield _recomputation(rung, footprint) + (" as a whole" if rung.selective and not rung.recomputed_blocks else "")
    if rung.reprojected_blocks:
        yield f"queries, keys and values are recomputed in {rung.reprojected_blocks} blocks"
    if rung.offload_inputs:
        yield "the inputs of recomputed blocks wait in host memory"
    if rung.streamed_blocks and rung.shards > 1:
        yield f"{rung.streamed_blocks} blocks lie in {rung.shards} parts, one a GPU, and are gathered in each pass"
    elif rung.streamed_blocks:
        yield f"the weights of {rung.streamed_blocks} blocks come from host memory in each pass"


def _passed_over(situation: Situation) -> Iterator[str]:
    """Yields that faster rungs which fit the GPU keep too much in host memory, where they do."""
    passed_over = takewhile(lambda rung: fit_host(rung, situation) is None, fitting_by_speed(situation))
    on_host = max((situation.on_host(with_rows(rung, situation.footprint)) for rung in passed_over), default=0)
    if missing := missing_on_host(situation.facts, on_host):
        yield (
            f"faster ways would keep up to {_gib(on_host)} in host memory, {_gib(missing)} more than may be taken there"
        )


def _small_states(situation: Situation) -> Iterator[str]:
    if situation.optimizer == SMALL and situation.demands.optimizer is None:
        yield f"8-bit optimizer states: the run has at most {situation.size_bytes / GIB:.0f} GiB"


def _optimizer(situation: Situation) -> Iterator[str]:
    """Yields what an optimizer keeps that the planner would not have chosen."""
    name = situation.demands.optimizer
    if name in (None, EXACT, SMALL):
        return
    needs, num_bytes, weights = (
        OPTIMIZERS[name],
        situation.footprint.state_bytes(name),
        situation.footprint.trained_weights,
    )
    each = f" ({num_bytes / weights:.2f} bytes a trained weight)" if weights else ""
    yield f"{needs.title} keeps {_gib(num_bytes)} of states{each}" + (
        "; its steps are thousands of small ones, and wait for the device" if needs.waits else ""
    )


def _not_compiled(situation: Situation) -> Iterator[str]:
    if not situation.compiled:
        yield "blocks are not compiled: torch.compile does not work here (see pixtune doctor)"


def _peak(situation: Situation, rung: AnyRung) -> str:
    return f"a step needs about {_gib(situation.peak(rung))} at its peak, and {_gib(situation.usable_bytes)} are usable"


def _recomputation(rung: Rung | AllWeightsRung, footprint: Footprint) -> str:
    if rung.recomputed_blocks:
        return f"{rung.recomputed_blocks} of {footprint.num_blocks} blocks are recomputed in the backward pass"
    return "no block is recomputed"


def _kept_plain(footprint: Footprint) -> Iterator[str]:
    if count := len(footprint.plain_layers):
        yield f"{count} linear layers are not quantized, as keep_plain asks"


# ---- reasons of a run that trains all weights


def _all_weights_reasons(situation: Situation, rung: AllWeightsRung) -> Iterator[str]:
    footprint, demands = situation.footprint, situation.demands
    first = ladder_of_all_weights(situation)[0]
    yield f"{_peak(situation, rung)}: all {footprint.trained_weights / 1e9:.1f} billion weights are trained"
    if rung != first:
        yield f"the fastest way would need {_gib(situation.peak(first))}, so memory is saved:"
    yield _recomputation(rung, footprint)
    if rung.optimizer == SMALL and demands.optimizer is None:
        saved = footprint.state_bytes(EXACT) - footprint.state_bytes(SMALL)
        yield f"8-bit optimizer states: 32-bit ones would take {_gib(saved)} more"
    if rung.fused_step:
        yield "each weight is stepped within the backward pass, so that the gradients of all never exist at once"
    if runs_backward_twice(rung, situation):
        yield (
            "clipping needs the norm of all gradients before the first weight moves, so the backward pass runs twice; "
            "max_grad_norm=0 (no clipping) takes little more than half the time"
        )
    if rung.states_on_host:
        what = "optimizer states and fp32 copies" if demands.fp32_copies else "optimizer states"
        size = _gib(rung.host_bytes(situation))
        if rung.streamed_blocks:
            what += f", and the weights of {rung.streamed_blocks} of {footprint.num_blocks} blocks,"
        yield f"{what} wait in host memory ({size}), and go to the device and back in each step"
    if rung.shards > 1:
        element = ELEMENT_BYTES[demands.compute_format]
        of_each = element + (8 if demands.fp32_copies else element)  # the weight; gradient and copy, or gradient alone
        every = footprint.state_bytes(rung.optimizer) + of_each * footprint.trained_weights
        yield (
            f"{rung.shards} processes hold weights, gradients and states together, about {_gib(every / rung.shards)} "
            f"each, and gather each block {'once a step' if rung.keeps_gathered else 'before it runs, in both passes'}"
        )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
