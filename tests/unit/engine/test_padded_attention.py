"""Attention to padded sequences without a mask, against a masked product in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pixtune.engine import padded_attention
from pixtune.engine.padded_attention import ON_CPU, attend_padded, padding_kernel, padding_obstacle
from pixtune.plan.kernel_choice import CUDNN, FLASH

BATCH, TOKENS, HEADS, SIZE = 2, 90, 3, 32
REAL_BL = torch.ones(BATCH, TOKENS, dtype=torch.bool)
REAL_BL[0, 5:42] = False
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 0.01}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend_padded(query, key, value, REAL_BL, ON_CPU)


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    padding = ~REAL_BL[:, :, None, None]
    states = (query, key.masked_fill(padding, 0), value.masked_fill(padding, 0))
    query, key, value = (tensor.transpose(1, 2) for tensor in states)
    mask = REAL_BL[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def inputs(offset: float, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, with what nothing may come of in padded keys and values.

    Args:
        offset: taken off all scores of every row.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(BATCH, TOKENS, HEADS, SIZE, generator=generator) for _ in range(3))
    query[..., 0], key[..., 0] = SIZE**0.5, -offset
    key[~REAL_BL], value[~REAL_BL] = torch.nan, torch.inf
    return [tensor.to(dtype) for tensor in (query, key, value)]


def results(attend: Attend, states: list[Tensor]) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    leaves = [tensor.clone().requires_grad_() for tensor in states]
    gradient = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(1))
    attended = attend(*leaves)
    return [attended.detach(), *torch.autograd.grad(attended, leaves, gradient.to(attended.dtype))]


WAYS = {
    "eager": lambda: padded,
    "compiled": lambda: torch.compile(padded, fullgraph=True, dynamic=False),
    "compiled for any length": lambda: torch.compile(padded, fullgraph=True, dynamic=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("offset", [0, 60])
def test_it_is_attention_with_a_mask(offset: float, dtype: torch.dtype, way: str) -> None:
    """A padded key's exp(0) would leave nothing of real ones with scores of -60, if the mean were not subtracted."""
    states = inputs(offset, dtype)
    expected = results(masked, [tensor.double() for tensor in states])
    found = results(WAYS[way](), states)
    for what, tensor, wanted in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert tensor.dtype == dtype
        error = (tensor.double() - wanted).norm() / wanted.norm()
        assert error < BOUNDS[dtype], f"{what}: {error:.2g}"
    assert not found[2][~REAL_BL].any() and not found[3][~REAL_BL].any(), "padded keys and values have no gradient"


def test_where_nothing_is_padded_it_is_plain_attention() -> None:
    states = [tensor.nan_to_num(0, 0, 0) for tensor in inputs(0, torch.float32)]
    everything = torch.ones_like(REAL_BL)
    found = results(lambda query, key, value: attend_padded(query, key, value, everything, ON_CPU), states)

    def plain(*given: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in given)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    for tensor, wanted in zip(found, results(plain, states), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, False, True], ids=["eager", "static", "dynamic"])
@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
def test_operators_of_gpus_are_called_as_torch_defines_them(kernel: str, dynamic: bool | None) -> None:
    """On tensors that have shapes and strides alone; and nothing breaks the graph."""
    attend: Callable[..., Tensor] = attend_padded
    if dynamic is not None:
        attend = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (64, 80):
        query, key, value = (
            torch.empty(2, num_tokens, 3, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
        )
        real_BL = torch.empty(2, num_tokens, device="meta", dtype=torch.bool)
        attended = attend(query, key, value, real_BL, kernel)
        attended.sum().backward()
        for tensor in (attended, query.grad, key.grad, value.grad):
            assert tensor is not None and (tensor.shape, tensor.stride()) == (query.shape, query.stride())


@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
def test_on_a_gpu_the_kernel_that_the_run_uses_is_tried_with_its_heads(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[object, ...]] = []

    def attempt(*given: object) -> str:
        tried.append(given)
        return "its results are wrong"

    monkeypatch.setattr(padded_attention, "_try_padding", attempt)
    monkeypatch.setattr(padded_attention.PADDING_KERNEL, "on_gpus", kernel)
    assert padding_obstacle(torch.device("cpu"), 64) is None and not tried
    cuda = torch.device("cuda")
    assert padding_obstacle(cuda, 64) == "its results are wrong" and tried == [(cuda, 64, kernel)]


def test_which_kernel_is_taken() -> None:
    cuda = torch.device("cuda")
    assert (padding_kernel(torch.device("cpu")), padding_kernel(cuda)) == (ON_CPU, CUDNN)
    torch.use_deterministic_algorithms(True)
    try:
        assert padding_kernel(cuda) == FLASH
    finally:
        torch.use_deterministic_algorithms(False)
