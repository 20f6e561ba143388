"""The switches of `train_configs/train_cuda13_optimized.yaml` change which kernels run, not only the plan.

Attention's are in `test_attention_kernels.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pixtune.engine.apply import apply_switches
from pixtune.engine.quantize import FP8, QuantizedLinear, codes_for, tensor_cores_multiply
from tests.unit.engine.test_apply import PLAIN

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def kernels_of(work: Callable[[], object]) -> str:
    """Names of all kernels that some work launches."""
    work()  # chooses and loads them
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    names = [event.key for event in profiled.key_averages()]
    assert names, "nothing ran on the GPU"
    return " ".join(names).lower()


def test_tf32() -> None:
    one, other = torch.randn(2, 2048, 2048, device=CUDA)
    found = []
    for tf32 in (True, False):
        apply_switches(replace(PLAIN, tf32=tf32))
        found.append(kernels_of(lambda: one @ other))
    assert found[0] != found[1] and "tf32" in found[0] and "tf32" not in found[1]


def test_fp8_training() -> None:
    """Products run on 8-bit tensor cores, forward and backward, and no wide product is left."""
    codes = codes_for(FP8, CUDA)
    if not tensor_cores_multiply(codes, CUDA):
        pytest.skip("this GPU has no FP8 tensor cores")
    plain = torch.nn.Linear(1024, 1024, bias=False, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    quantized = QuantizedLinear(1024, 1024, FP8, codes, tensor_cores=True)
    quantized.set_weight(plain.weight)
    inputs = torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16, requires_grad=True)

    def product(layer: torch.nn.Module) -> None:
        layer(inputs).backward(torch.ones(512, 1024, device=CUDA, dtype=torch.bfloat16))

    wide, narrow = kernels_of(lambda: product(plain)), kernels_of(lambda: product(quantized))
    assert wide != narrow
    of_8_bits = r"e4m3|nvjet_\w*_qq"  # CUTLASS's names, and cuBLAS's, as in nvjet_sm90_qqtst_128x128_...
    assert re.search(of_8_bits, narrow), narrow
    assert not re.search(of_8_bits, wide), wide
