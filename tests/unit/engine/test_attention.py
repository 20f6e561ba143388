"""PyTorch takes the chosen attention kernel, in the chosen order, and gets dense gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from pixtune.engine import attention
from pixtune.engine.attention import use_attention, with_dense_gradient
from pixtune.engine.padded_attention import PADDING_KERNEL, padding_kernel
from pixtune.engine.recompute_policy import RecomputePolicy
from pixtune.errors import ConfigError

MATH, FLASH, EFFICIENT, CUDNN = (
    backend.value
    for backend in (
        SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
    )
)  # fmt: skip
OWN_ORDER = [FLASH, EFFICIENT, MATH, CUDNN, SDPBackend.OVERRIDEABLE.value]
"""PyTorch's order on capabilities 8.x and 12.x."""
HOPPERS_ORDER = [CUDNN, FLASH, EFFICIENT, MATH, SDPBackend.OVERRIDEABLE.value]


@pytest.fixture(autouse=True)
def _switches_as_they_were() -> Iterator[None]:
    order, allowed = torch._C._get_sdp_priority_order(), allowed_kernels()
    torch._C._set_sdp_priority_order(OWN_ORDER)
    yield
    torch._C._set_sdp_priority_order(order)
    for backend, name in NAMES.items():
        attention.switch(backend, on=name in allowed)
    PADDING_KERNEL.on_gpus = "cudnn"


NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
}


def allowed_kernels() -> set[str]:
    cuda = torch.backends.cuda
    enabled = (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    return {name for name, on in zip(NAMES.values(), enabled, strict=True) if on}


# ---- the order


@pytest.mark.parametrize(
    ("kernel", "off", "allowed", "order"),
    [
        (None, (), {"cudnn", "flash", "efficient"}, OWN_ORDER),
        (None, ("cudnn",), {"flash", "efficient"}, OWN_ORDER),
        ("cudnn", (), {"cudnn", "flash", "efficient"}, [CUDNN, FLASH, EFFICIENT, MATH]),
        ("cudnn", ("flash",), {"cudnn", "efficient"}, [CUDNN, FLASH, EFFICIENT, MATH]),
        ("flash", ("cudnn",), {"flash", "efficient"}, [FLASH, EFFICIENT, MATH, CUDNN]),
        ("efficient", ("cudnn", "flash"), {"efficient"}, [EFFICIENT, FLASH, MATH, CUDNN]),
        (None, ("cudnn", "flash", "efficient", "flash_3"), set(), OWN_ORDER),
    ],
)
def test_the_chosen_kernel_comes_first_and_others_stay_behind_it(
    kernel: str | None, off: tuple[str, ...], allowed: set[str], order: list[int]
) -> None:
    """The order before is that of capabilities 8.x and 12.x (DGX Spark: 12.1): cuDNN's is behind plain products."""
    use_attention(kernel, off)
    assert allowed_kernels() == allowed and torch.backends.cuda.math_sdp_enabled()
    assert torch._C._get_sdp_priority_order()[: len(order)] == order


def test_a_kernel_that_was_off_is_on_when_it_is_chosen() -> None:
    use_attention("flash", ("cudnn",))
    use_attention("cudnn", ())
    assert "cudnn" in allowed_kernels() and torch._C._get_sdp_priority_order()[0] == CUDNN


@pytest.mark.parametrize("chosen", ["cudnn", "flash"])
def test_the_order_is_set_after_hoppers_own(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets it when it chooses for the first time, whatever stood there before."""
    settled: list[str] = []

    def settle() -> None:
        settled.append("once")
        torch._C._set_sdp_priority_order(HOPPERS_ORDER)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "settle_own_order", settle)
    use_attention(chosen, ("cudnn",) if chosen == "flash" else ())
    assert settled and torch._C._get_sdp_priority_order()[0] == {"cudnn": CUDNN, "flash": FLASH}[chosen]


@pytest.mark.parametrize(
    ("kernel", "allowed"),
    [("cudnn", {"cudnn", "efficient"}), ("flash", {"flash", "efficient"}), ("efficient", {"efficient"})],
)
def test_where_the_order_cannot_be_set_what_comes_before_is_forbidden(
    kernel: str, allowed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delattr(torch._C, "_set_sdp_priority_order")
        use_attention(kernel, ())
    assert allowed_kernels() == allowed and torch.backends.cuda.math_sdp_enabled(), "for masks, fp32 and wide heads"


def test_compiled_graphs_are_kept_apart_by_what_comes_first() -> None:
    """torch's cache of them does not ask."""
    keys = []
    for kernel, off in ((None, ()), ("cudnn", ()), ("flash", ()), ("flash", ("efficient",)), ("flash", ("cudnn",))):
        for name in NAMES:
            attention.switch(name, on=True)
        torch._C._set_sdp_priority_order(OWN_ORDER)
        use_attention(kernel, off)
        keys.append(RecomputePolicy().uuid())
    assert keys[0] == keys[2] and len(set(keys)) == 4, "flash is PyTorch's own first"


def test_padded_captions_are_attended_to_by_the_runs_kernel() -> None:
    cuda = torch.device("cuda")
    for kernel, padding in (("flash", "flash"), ("cudnn", "cudnn"), ("flash", "flash"), (None, "cudnn")):
        use_attention(kernel, ())
        assert padding_kernel(cuda) == padding


def test_flash_attention_3_comes_where_flash_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[bool] = []
    monkeypatch.setattr(attention, "use_flash_attention_3", lambda: activated.append(True))
    use_attention("flash_3", ("cudnn", "flash"))
    assert activated and allowed_kernels() == {"flash", "efficient"}, "the one that is off has been replaced"
    assert torch._C._get_sdp_priority_order()[0] == FLASH


# ---- gradients


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slice_of_a_wider_gradient_arrives_dense(compiled: bool) -> None:
    """Compares blocks that put the MLP's features beside the attention's output."""
    strides = []

    def block(states: Tensor) -> Tensor:
        doubled = states * 2
        doubled.register_hook(lambda gradient: strides.append(gradient.stride()))
        return torch.cat([with_dense_gradient(doubled), states], dim=2).square()

    states = torch.randn(1, 4, 8, requires_grad=True)
    (torch.compile(block) if compiled else block)(states).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, 10 * states.detach())
    assert strides == [(32, 8, 1)] or compiled


def test_why_flash_attention_3_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False)
    monkeypatch.setattr(attention, "FLASH_ATTENTION_3", "a_module_that_nobody_has")
    with pytest.raises(ConfigError, match="a_module_that_nobody_has is not installed"):
        attention.use_flash_attention_3()
    monkeypatch.setattr(attention, "FLASH_ATTENTION_3", "json")  # one that is there
    assert attention.flash_attention_3_obstacle() is None
    attention.use_flash_attention_3()
    assert activated == ["FA3"]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    obstacle = attention.flash_attention_3_obstacle()
    assert obstacle is not None and torch.__version__ in obstacle
