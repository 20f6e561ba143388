"""Checks and times each attention kernel on this machine before a run takes one, in a process of its own.

A kernel may be missing, wrong, crash the process or hang, and each on some GPUs alone (what is known:
`attention.py`). The process tells of each kernel when it begins and when it is done with it; where it dies or hangs,
the kernel at work is what did it, and another process goes on with those that are left.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixtune.engine.attention import BACKENDS, use_flash_attention_3
from pixtune.engine.padded_attention import attend_padded
from pixtune.plan.kernel_choice import FLASH_3, PADDING, Finding
from pixtune.storage.files import user_cache_folder, write_atomically

TRIAL_SECONDS = 120
"""Of one process. All kernels together take about 7 s on an H100."""
ROUNDS = 5
PADDED = slice(5, 42)
"""Tokens that are padding where attention to padded captions is tried; the text comes first."""
FORMAT = 2
"""Of the kept findings. 1, which has no number, knew cuDNN's kernel and all others together."""
MARK = "pixtune trial: "
"""Begins the lines that are the trial's; libraries print others."""
DEVICE = "cuda"
LACKS_MEMORY = "memory was lacking to try it"


@dataclass(frozen=True)
class Shape:
    """Of a run's longest sequence, and how it is attended to."""

    num_tokens: int
    num_heads: int
    head_size: int
    compute_format: str = "bf16"
    """Of queries, keys and values: a plan's `compute_format`."""
    deterministic: bool = False

    @property
    def name(self) -> str:
        """In a file's name."""
        size = f"{self.num_tokens}x{self.num_heads}x{self.head_size}-{self.compute_format}"
        return f"{size}-deterministic" if self.deterministic else size


# ---- from a run's side


def try_attention(shape: Shape, kernels: Sequence[str]) -> dict[str, Finding]:
    """What each kernel does on the process's first GPU: seconds, once for this GPU, these versions and this shape.

    Kernels that crashed or hung are tried anew by the next run: another driver, or a GPU that is not shared, may help.
    """
    kept = kept_file(shape)
    known = read_kept(kept) if kept is not None else {}
    missing = [kernel for kernel in kernels if kernel not in known]
    if missing:
        found, lasting = run_trials(shape, missing)
        known |= found
        if kept is not None and lasting:
            stored = {kernel: asdict(known[kernel]) for kernel in known if kernel not in missing or kernel in lasting}
            write_atomically(kept, json.dumps({"format": FORMAT, "kernels": stored}).encode())
    return {kernel: known[kernel] for kernel in kernels}


def kept_file(shape: Shape) -> Path | None:
    """Where the findings for this machine and shape are; None where this user can keep nothing."""
    folder = user_cache_folder()
    if folder is None:
        return None
    gpu = f"{torch.cuda.get_device_name()}-torch{torch.__version__}-cudnn{torch.backends.cudnn.version()}"
    return folder / "attention" / f"{re.sub('[^A-Za-z0-9.+-]', '_', gpu)}-{shape.name}.json"


def read_kept(file: Path) -> dict[str, Finding]:
    """Nothing of a file that another version wrote, or that is damaged."""
    try:
        stored = json.loads(file.read_text())
        if stored["format"] != FORMAT:
            return {}
        return {kernel: Finding(**finding) for kernel, finding in stored["kernels"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_trials(shape: Shape, kernels: Sequence[str]) -> tuple[dict[str, Finding], set[str]]:
    """Findings, and of which kernels they will be the same next time. A process each time that one has died."""
    found: dict[str, Finding] = {}
    lasting: set[str] = set()
    left = list(kernels)
    while left:
        outcome = run_process(shape, left)
        done = {name: finding for name, finding in outcome.findings.items() if name in left}
        found |= done
        lasting |= {name for name, finding in done.items() if not finding.says_nothing and name != outcome.culprit}
        if outcome.obstacle is None or outcome.culprit is None:
            # Without a culprit it is not a kernel that failed, and it would again.
            why = outcome.obstacle or "its trial told nothing of it"
            found |= {name: Finding(why, says_nothing=True) for name in left if name not in done}
            break
        # Done, and dead in attention to padded captions: it is right without padding, and not known to be with it.
        found.setdefault(outcome.culprit, Finding(outcome.obstacle))
        left = [name for name in left if name not in found]
    return found, lasting


@dataclass(frozen=True)
class Outcome:
    """Of one process."""

    findings: dict[str, Finding]
    culprit: str | None = None
    """The kernel at work when it died or was ended."""
    obstacle: str | None = None
    """How that came; None: it ended well."""


def run_process(shape: Shape, kernels: Sequence[str]) -> Outcome:
    """Tries kernels, in this order, as far as it gets."""
    words = [str(shape.num_tokens), str(shape.num_heads), str(shape.head_size), shape.compute_format]
    words += [str(int(shape.deterministic)), *kernels]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pixtune.engine.attention_trial", *words],
            capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or ""  # bytes, though text was asked for
        return read_outcome(
            printed.decode(errors="replace") if isinstance(printed, bytes) else printed,
            f"did not end within {TRIAL_SECONDS} s",
        )
    return read_outcome(ended.stdout, last_words(ended.stderr, ended.returncode) if ended.returncode else None)


def read_outcome(printed: str, obstacle: str | None) -> Outcome:
    """From what a process printed, and how it came to an end."""
    findings: dict[str, Finding] = {}
    at_work: str | None = None
    for line in printed.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            told = json.loads(line.removeprefix(MARK))
        except ValueError:  # cut off in the middle
            break
        at_work = told["at_work"]
        if told["finding"] is not None:
            findings[told["kernel"]] = Finding(**told["finding"])
    return Outcome(findings, at_work if obstacle is not None else None, obstacle)


def last_words(stderr: str, exit_code: int) -> str:
    """Why a process ended, as far as it told."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]  # the last one is the cause; what follows are hints
    ended = f"its process ended with exit code {exit_code}"
    return f"{ended}: {errors[-1][:200]}" if errors else ended


# ---- in the trial's process


def measure(
    shape: Shape, kernels: Sequence[str], device: torch.device
) -> Iterator[tuple[str, str | None, Finding | None]]:
    """Each kernel's name before and after each part of its trial, again if it is at work next, and what was found."""
    inputs, gradient = draw_inputs(shape, device)
    real_BL = torch.ones(1, shape.num_tokens, dtype=torch.bool, device=device)
    real_BL[:, PADDED] = False
    with sdpa_kernel(SDPBackend.MATH):  # heads are independent of one another, and one in fp32 is enough
        one_head = [tensor.detach()[:, :1].float().requires_grad_() for tensor in inputs]
        expected = attend(one_head, gradient[:, :1].float())
        expected_padded = attend(one_head, gradient[:, :1].float(), real_BL[:, None, None])
    float(expected_padded[0].detach().sum())  # waits for the device: what fails up to here is no kernel's fault
    torch.use_deterministic_algorithms(shape.deterministic)
    for kernel in sorted(kernels, key=lambda kernel: kernel == FLASH_3):  # replaces flash attention for good
        yield kernel, kernel, None
        finding = measure_kernel(kernel, inputs, gradient, expected)
        pads = kernel in PADDING and finding.fault is None
        yield kernel, kernel if pads else None, finding
        if pads:
            error = padded_error(kernel, inputs, gradient, real_BL, expected_padded)
            yield kernel, None, Finding(None, False, finding.error, finding.milliseconds, error)


def draw_inputs(shape: Shape, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values (B, H, L, D) of one example, and a gradient; dense as (B, L, H, D), as in blocks."""
    dtype = torch.bfloat16 if shape.compute_format == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    sizes = (1, shape.num_tokens, shape.num_heads, shape.head_size)
    *inputs, gradient = (
        torch.randn(sizes, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)
    )
    return [tensor.requires_grad_() for tensor in inputs], gradient


def measure_kernel(kernel: str, inputs: list[Tensor], gradient: Tensor, expected: Sequence[Tensor]) -> Finding:
    """Error and time of one kernel alone.

    Raises:
        torch.AcceleratorError: it has left the GPU in a state in which no other one can be tried.
    """
    try:
        if kernel == FLASH_3:
            use_flash_attention_3()
        with sdpa_kernel(BACKENDS[kernel]):
            found = [tensor.detach() for tensor in attend(inputs, gradient)]
            milliseconds = time_ms(lambda: attend(inputs, gradient))
        return Finding(error=largest_error(found, expected), milliseconds=milliseconds)
    except torch.OutOfMemoryError:
        return Finding(LACKS_MEMORY, says_nothing=True)
    except torch.AcceleratorError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        return Finding(in_words(error))


def padded_error(
    kernel: str, inputs: list[Tensor], gradient: Tensor, real_BL: Tensor, expected: Sequence[Tensor]
) -> float:
    """Infinite where this GPU lacks the kernel.

    Raises:
        torch.AcceleratorError: as `measure_kernel`.
    """
    try:
        return largest_error(run_padded(inputs, gradient, real_BL, kernel), expected)
    except torch.AcceleratorError:
        raise
    except RuntimeError:
        return math.inf


def in_words(error: Exception) -> str:
    """The first line of an error."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "No available kernel" in message:
        return "PyTorch has no such kernel for this GPU, shape and format"
    return f"{type(error).__name__}: {message}"[:200]


def attend(inputs: list[Tensor], gradient: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output, and gradients of queries, keys and values."""
    query, key, value = inputs
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended, *torch.autograd.grad(attended, inputs, gradient)


def run_padded(inputs: list[Tensor], gradient: Tensor, real_BL: Tensor, kernel: str) -> list[Tensor]:
    """The same of `attend_padded`."""
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


def main(words: Sequence[str]) -> None:
    """Tells of each kernel as it goes. Dies where a kernel has spoiled the GPU for the others, or kills it."""
    num_tokens, num_heads, head_size, compute_format, deterministic, *kernels = words
    shape = Shape(int(num_tokens), int(num_heads), int(head_size), compute_format, bool(int(deterministic)))
    for kernel, at_work, finding in measure(shape, kernels, torch.device(DEVICE)):
        told = {"kernel": kernel, "at_work": at_work, "finding": None if finding is None else asdict(finding)}
        print(f"{MARK}{json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
