"""The chosen attention kernel really runs, by the profiler's names, and the trial finds on this GPU what is there.

Never run on capabilities 8.x and 12.x by us: there PyTorch's own order has cuDNN's kernel behind plain products.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune.engine import attention
from pixtune.engine.apply import apply_switches
from pixtune.engine.attention import flash_attention_3_obstacle, in_force
from pixtune.engine.attention_trial import Shape, try_attention
from pixtune.engine.recompute_policy import RecomputePolicy
from pixtune.plan.kernel_choice import LARGEST_ERROR
from tests.gpu.test_switches import kernels_of
from tests.runs import ROOT
from tests.unit.engine.test_apply import PLAIN

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SIGNS = {
    "cudnn": ("cudnn", "cudnn"),
    "flash": ("flash_fwd", "flash_bwd"),
    "efficient": ("fmha_cutlassf", "fmha_cutlassb"),
}
"""Parts of the names of forward and backward kernels. cuDNN's contain "flash" as well."""
SHAPE = Shape(1024, 24, 128)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _switches_as_they_were() -> Iterator[None]:
    attention.settle_own_order()
    order = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(order)
    for backend in attention.BACKENDS.values():
        attention.switch(backend, on=True)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Kernels that this GPU has, and that are right on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        found = try_attention(SHAPE, list(SIGNS))
    return {kernel for kernel, finding in found.items() if finding.fault is None}


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def draw(head_size: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Dense as (B, L, H, D), as blocks have them."""
    return [
        torch.randn(1, 1024, 24, head_size, device=CUDA, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    ]


def use(kernel: str) -> None:
    """Chooses a kernel as a plan does; none is off, so that the order alone decides."""
    apply_switches(replace(PLAIN, attention=kernel))


def assert_runs(kernel: str, forward: str, backward: str) -> None:
    assert SIGNS[kernel][0] in forward and SIGNS[kernel][1] in backward, (kernel, forward, backward)
    for other in SIGNS.keys() - {kernel}:
        assert SIGNS[other][0] not in forward and SIGNS[other][1] not in backward, (other, forward, backward)


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.parametrize("way", ["eager", "compiled", "compiled for any length"])
@pytest.mark.parametrize("kernel", SIGNS)
def test_the_chosen_kernel_runs_forward_and_backward(
    kernel: str, way: str, right: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel not in right:
        pytest.skip(f"{kernel} is not right here")
    monkeypatch.setattr("torch._inductor.config.joint_custom_pre_pass", RecomputePolicy())
    use(kernel)
    attend: Attend = plain
    if way != "eager":
        attend = torch.compile(plain, dynamic=way != "compiled")
    inputs = draw()
    gradient = torch.randn_like(inputs[0])
    forward = kernels_of(lambda: attend(*inputs))
    both = kernels_of(lambda: torch.autograd.grad(attend(*inputs), inputs, gradient))  # compiled ones run back once
    assert_runs(kernel, forward, both)


@pytest.mark.parametrize("kernel", SIGNS)
def test_the_chosen_kernel_runs_in_captured_steps(kernel: str, right: set[str]) -> None:
    if kernel not in right:
        pytest.skip(f"{kernel} is not right here")
    use(kernel)
    inputs = draw()
    gradient = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(plain(*inputs), inputs, gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    names = kernels_of(graph.replay)
    assert_runs(kernel, names, names)


@pytest.mark.parametrize("kernel", SIGNS)
def test_what_the_chosen_kernel_does_not_take_goes_to_another_one(kernel: str, right: set[str]) -> None:
    """Masks work too where all kernels that are faulty or not chosen are off."""
    if kernel not in right:
        pytest.skip(f"{kernel} is not right here")
    apply_switches(replace(PLAIN, attention=kernel, attention_off=tuple(SIGNS.keys() - {kernel})))
    mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool, device=CUDA).tril()
    query, key, value = draw()
    masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    masked.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()
    for inputs in (draw(dtype=torch.float32), draw(head_size=36), draw(head_size=512)):
        plain(*inputs).sum().backward()
        assert inputs[0].grad is not None and inputs[0].grad.isfinite().all()


def test_the_order_outlives_the_first_choice_of_a_process() -> None:
    """On Hopper and B200 PyTorch sets its own one then."""
    code = """
import torch
from dataclasses import replace
from pixtune.engine.apply import apply_switches
from tests.unit.engine.test_apply import PLAIN
apply_switches(replace(PLAIN, attention="efficient"))
states = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
torch.nn.functional.scaled_dot_product_attention(states, states, states)
efficient = torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value
assert torch._C._get_sdp_priority_order()[0] == efficient, torch._C._get_sdp_priority_order()
assert torch.ops.aten._fused_sdp_choice(states, states, states) == efficient
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_flash_attention_3_runs_where_it_is_installed() -> None:
    obstacle = flash_attention_3_obstacle()
    if obstacle is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(obstacle or "it runs on Hopper alone")
    try:
        use("flash_3")
        inputs = draw()
        names = kernels_of(lambda: plain(*inputs).sum().backward())
        assert not any(sign in names for signs in SIGNS.values() for sign in signs), names
        assert "FA3" in in_force()
    finally:
        torch.nn.attention.restore_flash_attention_impl()


# ---- the trial


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_trial_finds_kernels_right_and_times_each(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels = ("flash", "efficient") if deterministic else tuple(SIGNS)
    found = try_attention(replace(SHAPE, deterministic=deterministic), kernels)
    assert found.keys() == set(kernels)
    for kernel in ("flash", "efficient"):
        assert found[kernel].fault is None and 0 < found[kernel].milliseconds < 1000, found
    assert found["flash"].padded_error < LARGEST_ERROR
    assert found == try_attention(replace(SHAPE, deterministic=deterministic), kernels), "remembered"


def test_kernels_that_do_not_take_the_format_are_refused_and_no_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = try_attention(replace(SHAPE, compute_format="fp32"), list(SIGNS))
    assert found["efficient"].fault is None
    for kernel in ("cudnn", "flash"):
        assert found[kernel].fault == "PyTorch has no such kernel for this GPU, shape and format", found
