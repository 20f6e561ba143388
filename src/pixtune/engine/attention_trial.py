"""Checks and times each attention kernel on this machine before a run uses one, in a process of its own.

A kernel may be missing, be wrong, crash the process or hang, and do so on some GPUs only (known cases:
`attention.py`). The process reports the beginning and the end of each kernel's trial; where it dies or hangs, the
kernel at work is the cause, and another process tries those that are left.
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
"""Time limit of one process. All kernels together take about 7 s on an H100."""
ROUNDS = 5
PADDED = slice(5, 42)
"""Tokens that are padding in the trial of attention to padded captions; the text comes first."""
FORMAT = 2
"""Version of the file of findings. Files of version 1, which state none, know cuDNN's kernel and all others as one."""
MARK = "pixtune trial: "
"""Beginning of the trial's own lines; libraries print others."""
DEVICE = "cuda"
LACKS_MEMORY = "memory was lacking to try it"


@dataclass(frozen=True)
class Shape:
    """Shape of a run's longest sequence, and how it is attended to."""

    num_tokens: int
    num_heads: int
    head_size: int
    compute_format: str = "bf16"
    """Format of queries, keys and values: a plan's `compute_format`."""
    deterministic: bool = False

    @property
    def name(self) -> str:
        """The shape as part of a file's name."""
        size = f"{self.num_tokens}x{self.num_heads}x{self.head_size}-{self.compute_format}"
        return f"{size}-deterministic" if self.deterministic else size


# ---- from a run's side


def try_attention(shape: Shape, kernels: Sequence[str]) -> dict[str, Finding]:
    """Returns what each kernel does on the process's first GPU. Takes seconds once per GPU, versions and shape.

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
    """Returns the file of findings for this machine and shape; None where this user can store nothing."""
    folder = user_cache_folder()
    if folder is None:
        return None
    gpu = f"{torch.cuda.get_device_name()}-torch{torch.__version__}-cudnn{torch.backends.cudnn.version()}"
    return folder / "attention" / f"{re.sub('[^A-Za-z0-9.+-]', '_', gpu)}-{shape.name}.json"


def read_kept(file: Path) -> dict[str, Finding]:
    """Reads stored findings; none from a file that is damaged or has another `FORMAT`."""
    try:
        stored = json.loads(file.read_text())
        if stored["format"] != FORMAT:
            return {}
        return {kernel: Finding(**finding) for kernel, finding in stored["kernels"].items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def run_trials(shape: Shape, kernels: Sequence[str]) -> tuple[dict[str, Finding], set[str]]:
    """Returns findings, and for which kernels they will be the same next time. Starts a new process when one dies."""
    found: dict[str, Finding] = {}
    lasting: set[str] = set()
    left = list(kernels)
    while left:
        outcome = run_process(shape, left)
        done = {name: finding for name, finding in outcome.findings.items() if name in left}
        found |= done
        lasting |= {name for name, finding in done.items() if not finding.lacked_memory and name != outcome.culprit}
        if outcome.obstacle is None or outcome.culprit is None:
            # Without a culprit something other than a kernel failed, and would fail again.
            why = outcome.obstacle or "its trial reported nothing"
            found |= {name: Finding(why, lacked_memory=True) for name in left if name not in done}
            break
        # A culprit with a finding died in attention to padded captions: correct without padding, unknown with it.
        found.setdefault(outcome.culprit, Finding(outcome.obstacle))
        left = [name for name in left if name not in found]
    return found, lasting


@dataclass(frozen=True)
class Outcome:
    """Outcome of one process."""

    findings: dict[str, Finding]
    culprit: str | None = None
    """Kernel at work when the process died or was ended."""
    obstacle: str | None = None
    """Reason for that; None: the process ended well."""


def run_process(shape: Shape, kernels: Sequence[str]) -> Outcome:
    """Tries kernels in this order in a new process, as far as it gets."""
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
    """Reads an outcome from what a process printed, and from why it ended early."""
    findings: dict[str, Finding] = {}
    at_work: str | None = None
    for line in printed.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            report = json.loads(line.removeprefix(MARK))
        except ValueError:  # cut off in the middle
            break
        at_work = report["at_work"]
        if report["finding"] is not None:
            findings[report["kernel"]] = Finding(**report["finding"])
    return Outcome(findings, at_work if obstacle is not None else None, obstacle)


def last_words(stderr: str, exit_code: int) -> str:
    """Returns why a process ended, as far as it printed a reason."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]  # the last one is the cause; what follows are hints
    ended = f"its process ended with exit code {exit_code}"
    return f"{ended}: {errors[-1][:200]}" if errors else ended


# ---- in the trial's process


def measure(
    shape: Shape, kernels: Sequence[str], device: torch.device
) -> Iterator[tuple[str, str | None, Finding | None]]:
    """Yields before and after each part of each kernel's trial.

    Yields:
        The kernel, the kernel at work from now on, and what was found.
    """
    inputs, gradient = draw_inputs(shape, device)
    real_BL = torch.ones(1, shape.num_tokens, dtype=torch.bool, device=device)
    real_BL[:, PADDED] = False
    with sdpa_kernel(SDPBackend.MATH):  # heads are independent of one another: one is enough, in fp32
        one_head = [tensor.detach()[:, :1].float().requires_grad_() for tensor in inputs]
        expected = attend(one_head, gradient[:, :1].float())
        expected_padded = attend(one_head, gradient[:, :1].float(), real_BL[:, None, None])
    float(expected_padded[0].detach().sum())  # waits for the device: a failure up to here is no kernel's fault
    torch.use_deterministic_algorithms(shape.deterministic)
    for kernel in sorted(kernels, key=lambda kernel: kernel == FLASH_3):  # the last one, as it replaces flash attention
        yield kernel, kernel, None
        finding = measure_kernel(kernel, inputs, gradient, expected)
        pads = kernel in PADDING and finding.fault is None
        yield kernel, kernel if pads else None, finding
        if pads:
            error = padded_error(kernel, inputs, gradient, real_BL, expected_padded)
            yield kernel, None, Finding(None, False, finding.error, finding.milliseconds, error)


def draw_inputs(shape: Shape, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Draws one example's queries, keys and values (B, H, L, D) and a gradient; dense as (B, L, H, D), as in blocks."""
    dtype = torch.bfloat16 if shape.compute_format == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    sizes = (1, shape.num_tokens, shape.num_heads, shape.head_size)
    *inputs, gradient = (
        torch.randn(sizes, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)
    )
    return [tensor.requires_grad_() for tensor in inputs], gradient


def measure_kernel(kernel: str, inputs: list[Tensor], gradient: Tensor, expected: Sequence[Tensor]) -> Finding:
    """Measures error and time of one kernel alone.

    Raises:
        torch.AcceleratorError: it has left the GPU in a state in which no other kernel can be tried.
    """
    try:
        if kernel == FLASH_3:
            use_flash_attention_3()
        with sdpa_kernel(BACKENDS[kernel]):
            found = [tensor.detach() for tensor in attend(inputs, gradient)]
            milliseconds = time_ms(lambda: attend(inputs, gradient))
        return Finding(error=largest_error(found, expected), milliseconds=milliseconds)
    except torch.OutOfMemoryError:
        return Finding(LACKS_MEMORY, lacked_memory=True)
    except torch.AcceleratorError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        return Finding(in_words(error))


def padded_error(
    kernel: str, inputs: list[Tensor], gradient: Tensor, real_BL: Tensor, expected: Sequence[Tensor]
) -> float:
    """Returns the error of attention to padded captions; infinite where this GPU lacks the kernel.

    Raises:
        torch.AcceleratorError: see `measure_kernel`.
    """
    try:
        return largest_error(run_padded(inputs, gradient, real_BL, kernel), expected)
    except torch.AcceleratorError:
        raise
    except RuntimeError:
        return math.inf


def in_words(error: Exception) -> str:
    """Returns the first line of an error's message."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "No available kernel" in message:
        return "PyTorch has no such kernel for this GPU, shape and format"
    return f"{type(error).__name__}: {message}"[:200]


def attend(inputs: list[Tensor], gradient: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns output, and gradients of queries, keys and values."""
    query, key, value = inputs
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended, *torch.autograd.grad(attended, inputs, gradient)


def run_padded(inputs: list[Tensor], gradient: Tensor, real_BL: Tensor, kernel: str) -> list[Tensor]:
    """Returns what `attend` does, by `attend_padded`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    attended = attend_padded(query, key, value, real_BL, kernel).transpose(1, 2)
    return [attended.detach(), *torch.autograd.grad(attended, inputs, gradient)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative error in the first head, the only one that is expected. NaN where any is."""
    errors = [
        (tensor[:, :1].float() - wanted.detach()).norm() / wanted.detach().norm()
        for tensor, wanted in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def time_ms(work: Callable[[], object]) -> float:
    """Returns the milliseconds of the fastest of `ROUNDS` rounds."""
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
    """Prints a report of each kernel at once. Dies where a kernel has spoiled the GPU for the others, or kills it."""
    num_tokens, num_heads, head_size, compute_format, deterministic, *kernels = words
    shape = Shape(int(num_tokens), int(num_heads), int(head_size), compute_format, bool(int(deterministic)))
    for kernel, at_work, finding in measure(shape, kernels, torch.device(DEVICE)):
        report = {"kernel": kernel, "at_work": at_work, "finding": None if finding is None else asdict(finding)}
        print(f"{MARK}{json.dumps(report)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
