"""Kernels that a plan allows: what the config asks for, where this GPU has it, with the reason. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixtune.hardware.facts import HOPPER, HardwareFacts

if TYPE_CHECKING:  # importing it takes half a second of a trial's process
    from pixtune.config.schema import TrainConfig

CUDNN, FLASH, EFFICIENT, FLASH_3 = "cudnn", "flash", "efficient", "flash_3"
"""Attention kernels: cuDNN's, PyTorch's FlashAttention 2 and memory-efficient attention, FlashAttention 3."""
NAMES = {CUDNN: "cuDNN", FLASH: "flash", EFFICIENT: "efficient", FLASH_3: "FlashAttention 3"}
PADDING = (CUDNN, FLASH)
"""Attention kernels that return the log-sum-exp which padded captions need (`padded_attention.py`)."""
LARGEST_ERROR = 0.02
"""Largest relative error of outputs and gradients in bf16 against fp32; rounding accounts for 0.003 of it."""
NOT_DETERMINISTIC = "its backward pass sums in any order, and deterministic is true"


@dataclass(frozen=True)
class Finding:
    """Result of one attention kernel's trial on this machine: forward and backward pass of one example."""

    obstacle: str | None = None
    """Reason why the trial did not come to an end: the kernel raised, crashed or hung."""
    lacked_memory: bool = False
    """Whether the trial lacked memory, which says nothing of the kernel: it is not put first, but stays allowed."""
    error: float = math.inf
    """Largest relative error of output and gradients."""
    milliseconds: float = math.inf
    """Time of both passes."""
    padded_error: float = math.inf
    """`error` of attention to padded captions; infinite where the kernel cannot do that."""

    @property
    def fault(self) -> str | None:
        """Reason why the kernel cannot be used, in words for the user; None: it is right."""
        if self.obstacle is not None:
            return self.obstacle
        if self.error < LARGEST_ERROR:  # NaN is not
            return None
        return f"its results are wrong by {self.error:.2g} times their size"


Findings = Mapping[str, Finding]
"""Findings on the kernels that were tried, by name."""


def findings_of_all(every: Sequence[Findings | None]) -> Findings | None:
    """Returns what counts for a run of several processes, which compute alike: the worst finding on each kernel.

    A kernel that one of them has not tried is left out; None: none of them has tried any.
    """
    tried = [found for found in every if found is not None]
    if len(tried) < 2:
        return next(iter(tried), None)
    common = [kernel for kernel in tried[0] if all(kernel in found for found in tried)]
    return {kernel: _worst([found[kernel] for found in tried]) for kernel in common}


def _worst(findings: Sequence[Finding]) -> Finding:
    def most(values: Sequence[float]) -> float:
        return math.nan if any(map(math.isnan, values)) else max(values)

    return Finding(
        obstacle=next((each.obstacle for each in findings if each.obstacle is not None), None),
        # One that lacked memory says nothing of the kernel, unless another found a fault.
        lacked_memory=all(each.lacked_memory for each in findings if each.fault is not None)
        and any(each.lacked_memory for each in findings),
        error=most([each.error for each in findings]),
        milliseconds=most([each.milliseconds for each in findings]),
        padded_error=most([each.padded_error for each in findings]),
    )


@dataclass(frozen=True)
class AttentionChoice:
    """Decision on attention."""

    kernel: str | None
    """Kernel that is preferred to all others; None: PyTorch's own choice."""
    off: tuple[str, ...] = ()
    """Kernels that are not used even for what the chosen one does not accept (masks, fp32, other head sizes)."""
    pads: bool = False
    """The kernel is right for padded captions as well."""
    reasons: tuple[str, ...] = ()


def choose_tf32(facts: HardwareFacts, config: TrainConfig) -> tuple[bool, list[str]]:
    """Returns whether products of fp32 numbers may be computed in TF32, and why."""
    asked = config.cuda_features.enable_tf32_compute
    if asked is not None:
        return asked, []
    if facts.device != "cuda":
        return False, []
    major, minor = facts.capability
    on = facts.capability >= (8, 0)
    return on, [f"TF32 is {'on' if on else 'off'}: compute capability {major}.{minor}"]


def kernels_to_try(facts: HardwareFacts, config: TrainConfig, flash_3_obstacle: str | None) -> tuple[str, ...]:
    """Returns the kernels that are worth a trial: what cannot or may not be used is not run.

    FlashAttention 3 is tried where it is installed, so that the plan can report what it would gain. On ARM64 its builds
    are reported to crash, so there it is tried only if the config asks for it.
    """
    features = config.cuda_features
    wanted = features.enable_flash_attention_3
    may_try_flash_3 = wanted is True or (wanted is None and facts.machine != "aarch64")
    tried = {
        CUDNN: features.enable_cudnn_sdp is not False and not config.deterministic,
        FLASH: True,
        EFFICIENT: True,
        FLASH_3: may_try_flash_3 and _flash_3_obstacle(facts, flash_3_obstacle) is None,
    }
    return tuple(kernel for kernel, is_tried in tried.items() if is_tried)


def choose_attention(
    facts: HardwareFacts, config: TrainConfig, findings: Findings | None, flash_3_obstacle: str | None
) -> AttentionChoice:
    """Chooses the kernel that the config demands if it is right on this machine, else the fastest one that is.

    A demand that cannot be met is reported and passed over: the same config serves GPUs of several kinds.

    Args:
        findings: results of trials on this machine; None: nothing was tried.
        flash_3_obstacle: why FlashAttention 3 cannot be used on this machine; None: no reason is known.
    """
    features, found = config.cuda_features, findings or {}
    demanded = [
        asked
        for asked, flag in ((FLASH_3, features.enable_flash_attention_3), (CUDNN, features.enable_cudnn_sdp))
        if flag
    ]
    barred = _barred(facts, config, flash_3_obstacle)
    faults = {kernel: fault for kernel, finding in found.items() if (fault := finding.fault) is not None}
    reasons: list[str] = []
    for asked in demanded:
        against = barred.get(asked) or (f"tried on this machine, {faults[asked]}" if asked in faults else None)
        if against is not None:
            reasons.append(f"{_title(asked)} is off, though asked for: {against}")
    if facts.device != "cuda":
        return AttentionChoice(None, reasons=tuple(reasons))
    usable = [each for each in NAMES if each not in barred and each not in faults]
    met = [asked for asked in demanded if asked in usable]
    right = sorted((each for each in usable if each in found), key=lambda each: found[each].milliseconds)
    kernel: str | None
    if met:
        kernel, because = met[0], _as_asked(met, found)
    elif right:
        kernel, because = right[0], f"attention by {NAMES[right[0]]}: {_figures(right[0], found, barred)}"
    elif not found and facts.integrated and CUDNN in usable:
        kernel, because = CUDNN, "attention by cuDNN: the stable choice on a DGX Spark"
    else:
        tried = "passed its trial" if faults else "was tried"
        kernel, because = None, f"attention by PyTorch's own choice: no kernel {tried}"
    dropped = [
        f"{_title(other)} is not used: tried on this machine, {fault}"
        for other, fault in faults.items()
        if other not in demanded
    ]
    return AttentionChoice(
        kernel,
        _off(kernel, [other for other in faults if not found[other].lacked_memory], config),
        pads=kernel in PADDING and kernel in found and found[kernel].padded_error < LARGEST_ERROR,
        reasons=(*reasons, because, *dropped),
    )


def _barred(facts: HardwareFacts, config: TrainConfig, flash_3_obstacle: str | None) -> dict[str, str]:
    """Returns the kernels that the config or the GPU rules out before any trial, with the reason."""
    features, barred = config.cuda_features, {}
    if facts.device != "cuda" and features.enable_cudnn_sdp:
        barred[CUDNN] = f"it runs only on GPUs, and this is {facts.name}"
    elif features.enable_cudnn_sdp is False:
        barred[CUDNN] = "enable_cudnn_sdp is false"
    elif config.deterministic:
        barred[CUDNN] = NOT_DETERMINISTIC
    if (obstacle := _flash_3_obstacle(facts, flash_3_obstacle)) is not None:
        barred[FLASH_3] = obstacle
    elif not features.enable_flash_attention_3:
        barred[FLASH_3] = "used only where enable_flash_attention_3 asks for it"
    return barred


def _flash_3_obstacle(facts: HardwareFacts, obstacle: str | None) -> str | None:
    if facts.device != "cuda" or facts.capability != HOPPER:
        return f"it runs only on Hopper (compute capability 9.0), and this is {facts.name}"
    return obstacle


def _off(chosen: str | None, faulty: Sequence[str], config: TrainConfig) -> tuple[str, ...]:
    """Returns faulty kernels, and cuDNN's unless it is chosen: PyTorch prefers it to all others on some GPUs."""
    without_cudnn = config.cuda_features.enable_cudnn_sdp is False or chosen not in (None, CUDNN)
    off = {*faulty, *([CUDNN] if without_cudnn else [])}
    return tuple(kernel for kernel in NAMES if kernel in off)


# ---- words


def _title(kernel: str) -> str:
    return NAMES[kernel] if kernel == FLASH_3 else f"{NAMES[kernel]} attention"


def _as_asked(met: list[str], found: Findings) -> str:
    gives_way = "; cuDNN, also asked for, gives way" if len(met) > 1 else ""
    if met[0] not in found:
        return f"attention by {NAMES[met[0]]}, as asked{gives_way}"
    return f"attention by {NAMES[met[0]]}, as asked: {_figures(met[0], found, {})}{gives_way}"


def _figures(kernel: str, found: Findings, barred: Mapping[str, str]) -> str:
    """Returns words like "right within 0.3%, 1.49 ms a block; flash 2.95, efficient 6.10"; others only if right."""
    finding = found[kernel]
    words = f"right within {finding.error:.1%}, {finding.milliseconds:.2f} ms a block"
    others = [
        f"{NAMES[other]} {its.milliseconds:.2f}" + (f" ({barred[other]})" if other in barred else "")
        for other, its in found.items()
        if other != kernel and its.fault is None
    ]
    return f"{words}; {', '.join(others)}" if others else words
