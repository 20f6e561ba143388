"""A trial of attention kernels that are made up: on the CPU, in the process that a run starts for it.

Which kernel does what stands in the variable FAKES as JSON: "right", "wrong", "nan", "raises", "lacks memory",
"dies", "dies when padded", "spoils the GPU".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixtune.engine import attention_trial as trial

FAKES: dict[str, str] = json.loads(os.environ["FAKES"])
MILLISECONDS = {"cudnn": 1.49, "flash": 2.95, "efficient": 6.1}
right = trial.attend


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_work() -> str | None:
    """The kernel that alone is allowed; None while what it should give is computed."""
    enabled = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    allowed: list[str | None] = [name for name, on in enabled.items() if on]
    (kernel,) = allowed or [None]
    return kernel


def attend(inputs: list[Tensor], gradient: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    kernel = at_work()
    fake = FAKES[kernel] if kernel else "right"
    if fake == "raises":
        raise RuntimeError("cuDNN Frontend error: no engine\nmore of it")
    if fake == "lacks memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if fake == "spoils the GPU":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if fake == "dies":
        die()
    with sdpa_kernel(SDPBackend.MATH):
        found = right(inputs, gradient, mask)
    if fake in ("wrong", "nan"):
        return (*found[:3], found[3] * (1.5 if fake == "wrong" else torch.nan))
    return found


def run_padded(inputs: Any, gradient: Any, real_BL: Any, kernel: str) -> Any:
    if FAKES[kernel] == "dies when padded":
        die()
    with sdpa_kernel(SDPBackend.MATH):
        return right(inputs, gradient, real_BL[:, None, None])


def time_ms(work: Callable[[], object]) -> float:
    return MILLISECONDS[at_work() or ""]


if __name__ == "__main__":
    trial.attend, trial.run_padded, trial.time_ms, trial.DEVICE = attend, run_padded, time_ms, "cpu"
    trial.main(sys.argv[1:])
