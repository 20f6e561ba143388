"""LoRA gradients of the small trained models in 8 bits beside those in fp32, on what training really sees.

Real pictures and captions, and a LoRA that the plain model has learnt for some steps, so that both of its matrices have
a gradient that means something. That is harder than inputs of noise: where a model predicts well, little is left of the
loss's gradient, and an error of the prediction weighs more in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune import assembly
from pixtune import train as training
from pixtune.commands.quantization_errors import cosine
from pixtune.data.batches import read_ahead
from pixtune.trained import adapters
from tests.unit.engine.test_quantized_training import read_config

MODELS = ("tiny-qwen-image", "tiny-flux")
NUM_LEARNT, MEASURED_STEPS = 10, range(12, 18)
"""Steps of the plain model, and those whose gradients are summed up: all 48 pictures once, each at a noise level of its
own. Of a single batch of 8 the numbers scatter, fp8's most."""
LEAST_COSINE = {"int8": (0.99, 0.98), "fp8": (0.93, 0.86)}
"""Cosine of all gradients of a block, and of a single LoRA matrix."""


@dataclass(frozen=True)
class Gradients:
    """One batch's."""

    by_block: Mapping[str, Tensor]
    by_matrix: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=MODELS)
def gradients(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_cache: Path
) -> Iterator[dict[str, Gradients]]:
    """Gradients in each format."""
    folder, threads = tmp_path_factory.mktemp("gradients"), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to gain from more
    learnt: dict[str, Tensor] = {}
    found = {name: measure(request.param, folder, warm_cache, name, learnt) for name in ("plain", *LEAST_COSINE)}
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("linear_format", LEAST_COSINE)
def test_every_blocks_gradient_points_where_the_plain_models_does(
    gradients: dict[str, Gradients], linear_format: str
) -> None:
    of_block, of_matrix = LEAST_COSINE[linear_format]
    ours, exact = gradients[linear_format], gradients["plain"]
    blocks = {name: cosine(ours.by_block[name], exact.by_block[name]) for name in exact.by_block}
    matrices = {name: cosine(ours.by_matrix[name], exact.by_matrix[name]) for name in exact.by_matrix}
    assert len(blocks) in (5, 7) and min(blocks.values()) >= of_block, blocks
    assert max(blocks.values()) < 0.9999, "was it quantized at all?"
    worst = min(matrices, key=lambda name: matrices[name])
    assert matrices[worst] >= of_matrix, f"{worst}: {matrices[worst]}"


def measure(model: str, folder: Path, cache: Path, linear_format: str, learnt: dict[str, Tensor]) -> Gradients:
    """
    Args:
        learnt: the LoRA; is filled by the first, plain run and taken over by the others.
    """
    config = read_config(model, folder, cache, linear_format, batch_size=8)
    run, _ = assembly.assemble(config, training.forward_backward)
    if not learnt:
        batches = read_ahead(run.source, 0, NUM_LEARNT, 0, pin_memory=False)
        for step in range(NUM_LEARNT):
            training.train_step(run, islice(batches, 1), step)
        learnt |= {name: weight.clone() for name, weight in adapters.lora_weights(run.transformer.module).items()}
    adapters.load_lora_weights(run.transformer.module, learnt)
    run.forward_backward.zero_gradients()
    for parts in read_ahead(run.source, MEASURED_STEPS.start, MEASURED_STEPS.stop, 0, pin_memory=False):
        for batch in parts:
            run.forward_backward(batch)
    by_matrix = {name: p.grad.detach().flatten() for name, p in run.trained.parameters.items() if p.grad is not None}
    assert len(by_matrix) == len(run.trained.parameters)
    by_block: dict[str, list[Tensor]] = {}
    for name, gradient in by_matrix.items():
        by_block.setdefault(".".join(name.split(".")[:2]), []).append(gradient)
    return Gradients({name: torch.cat(gradients) for name, gradients in by_block.items()}, by_matrix)
