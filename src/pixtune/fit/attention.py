"""Which of PyTorch's attention kernels a run uses: tried on this machine, in a process of its own.

cuDNN's is twice as fast as flash attention on recent GPUs, and not everywhere right: PyTorch 2.11 keeps its plan of a
backward pass by the shapes and strides of queries, keys and values alone, and computes with the strides of the first
gradient that came for them. Where one kind of block hands it a dense gradient and another one a slice of a wider
tensor, gradients come out wrong, or the process dies of an illegal memory access. So families see to it that every
gradient is dense (`with_dense_gradient`), and cuDNN's kernel is checked and timed before it is used. So is attention to
padded captions by the kernels that take no mask (`padded_attention.py`).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from pixtune.errors import ConfigError
from pixtune.files import user_cache_folder, write_atomically
from pixtune.fit.padded_attention import CUDNN, FLASH, attend_padded

TRIAL_SECONDS = 120
LARGEST_ERROR = 0.02
"""Relative, of outputs and gradients in bf16 against fp32: rounding makes 0.003 of it."""
ROUNDS = 5
PADDED = slice(5, 42)
"""Tokens that are padding where attention to padded captions is tried; the text comes first."""
FIGURES = {"error", "padded_error", "cudnn_ms", "flash_ms"}
"""Of a trial: what `judge` takes."""
FLASH_ATTENTION_3 = "flash_attn_interface"
"""The module that torch looks for."""


class _DenseGradient(torch.autograd.Function):
    """The same tensor forward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy in any case: the compiler of torch 2.11 loses a gradient that such a function returns as it came.
        return gradient.clone(memory_format=torch.contiguous_format)


def with_dense_gradient(attended_BLC: Tensor) -> Tensor:
    """The same tensor; the gradient that attention gets through it is contiguous. See the module."""
    return _DenseGradient.apply(attended_BLC) if attended_BLC.requires_grad else attended_BLC


def flash_attention_3_obstacle() -> str | None:
    """Why this installation cannot use FlashAttention 3; None: it can."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} takes up no other flash attention than its own"
    if find_spec(FLASH_ATTENTION_3) is None:
        return f"its module {FLASH_ATTENTION_3} is not installed (the hopper folder of flash-attention builds it)"
    return None


def use_flash_attention_3() -> None:
    """From now on PyTorch's flash attention is FlashAttention 3, in compiled blocks, too.

    Raises:
        ConfigError: a resumed run's plan asks for it, and it is not there any more.
    """
    if (obstacle := flash_attention_3_obstacle()) is not None:
        raise ConfigError("the plan of this run uses FlashAttention 3", [f"{obstacle}. Install it, or start anew."])
    torch.nn.attention.activate_flash_attention_impl("FA3")


@dataclass(frozen=True)
class Trial:
    """How it went."""

    passed: bool
    finding: str
    """For people: what happened."""
    pads: bool = False
    """Attention to padded captions is right."""


def try_cudnn_attention(num_tokens: int, num_heads: int, head_size: int) -> Trial:
    """Runs this module on the process's first GPU; about 6 seconds, once for this GPU, these versions and this shape.

    Args:
        num_tokens: of a run's longest sequence.
    """
    folder = user_cache_folder()
    shape = f"{num_tokens}x{num_heads}x{head_size}"
    gpu = f"{torch.cuda.get_device_name()}-torch{torch.__version__}-cudnn{torch.backends.cudnn.version()}"
    kept = folder / "attention" / f"{re.sub('[^A-Za-z0-9.+-]', '_', gpu)}-{shape}.json" if folder else None
    if kept is not None and kept.exists():
        known = json.loads(kept.read_text())
        if known.keys() == FIGURES:  # another version may have kept others
            return judge(**known)
    trial = run_trial(num_tokens, num_heads, head_size)
    if isinstance(trial, Trial):
        return trial
    if kept is not None:
        write_atomically(kept, json.dumps(trial).encode())
    return judge(**trial)


def run_trial(num_tokens: int, num_heads: int, head_size: int) -> dict[str, float] | Trial:
    """In a process of its own: what `measure` returns, or the failed trial."""
    words = [str(num_tokens), str(num_heads), str(head_size)]
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", "pixtune.fit.attention", *words],
            capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Trial(False, f"did not end within {TRIAL_SECONDS} s")
    if outcome.returncode:
        lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line]  # the last one is the cause; what follows are hints
        return Trial(False, (errors or lines or [f"it ended with exit code {outcome.returncode}"])[-1][:200])
    measured: dict[str, float] = json.loads(outcome.stdout.splitlines()[-1])
    return measured


def judge(error: float, padded_error: float, cudnn_ms: float, flash_ms: float) -> Trial:
    """Takes cuDNN's attention where it is right and faster.

    Args:
        error: relative, the largest of output and gradients.
        padded_error: the same of attention to padded captions, by either kernel.
        cudnn_ms, flash_ms: of one forward and backward pass.
    """
    if not error < LARGEST_ERROR:
        return Trial(False, f"its results are {error:.2g} times their size away from what they should be")
    times = f"{cudnn_ms:.2f} ms a block, {flash_ms:.2f} with PyTorch's other kernels"
    return Trial(cudnn_ms < flash_ms, f"right within {error:.1%}, {times}", padded_error < LARGEST_ERROR)


def measure(num_tokens: int, num_heads: int, head_size: int) -> dict[str, float]:
    """Error and times, on the current GPU, of one sample in bf16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, num_tokens, num_heads, head_size)
    query, key, value, gradient = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16().transpose(1, 2) for _ in range(4)
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

    def run(inputs: list[Tensor], gradient: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        query, key, value = inputs
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended, *torch.autograd.grad(attended, inputs, gradient)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found = [tensor.detach() for tensor in run(inputs, gradient)]
        cudnn_ms = time_ms(lambda: run(inputs, gradient))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        flash_ms = time_ms(lambda: run(inputs, gradient))
    with sdpa_kernel(SDPBackend.MATH):  # heads are independent of one another, and one in fp32 is enough
        one_head = [tensor.detach()[:, :1].float().requires_grad_() for tensor in inputs]
        expected = run(one_head, gradient[:, :1].float())
        real_BL = torch.ones(1, num_tokens, dtype=torch.bool, device="cuda")
        real_BL[:, PADDED] = False
        expected_padded = run(one_head, gradient[:, :1].float(), real_BL[:, None, None])
    error = largest_error(found, expected)
    try:
        by_kernel = [run_padded(inputs, gradient, real_BL, kernel) for kernel in (CUDNN, FLASH)]
        padded_error = largest_error([*by_kernel[0], *by_kernel[1]], 2 * expected_padded)  # NaN of either, too
    except RuntimeError:  # this GPU lacks a kernel
        padded_error = math.inf
    return {"error": error, "padded_error": padded_error, "cudnn_ms": cudnn_ms, "flash_ms": flash_ms}


def run_padded(inputs: list[Tensor], gradient: Tensor, real_BL: Tensor, kernel: str) -> list[Tensor]:
    """Output and gradients of `attend_padded`, in the layout of `measure`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    attended = attend_padded(query, key, value, real_BL, kernel).transpose(1, 2)
    return [attended.detach(), *torch.autograd.grad(attended, inputs, gradient)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative, of all; of the first head alone, which is all that is expected. NaN where any is."""
    errors = [
        (tensor[:, :1].float() - wanted.detach()).norm() / wanted.detach().norm()
        for tensor, wanted in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def time_ms(work: Callable[[], object]) -> float:
    """The fastest of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return min(times)


def main() -> None:
    """Ends with an error, or by a crash, where cuDNN's attention cannot be used."""
    print(json.dumps(measure(*(int(word) for word in sys.argv[1:]))))


if __name__ == "__main__":
    main()
