"""`pixtune doctor --model`: checks that a user's real weights compute here as they should, plain and in 8 bits.

It answers three questions. Is pixtune's velocity the stock pipeline's? Which layers lose too much in 8 bits
(`quantization_errors`)? Do loss and LoRA gradients of the whole quantized model agree with the plain model's?
Everything but the first is computed with blocks that are read when they run, so it needs no more memory than one block.

Inputs are random numbers of fixed seed in the model's shapes: noise in place of a noisy latent, which is nearly noise,
and noise in place of text features, which real ones do not resemble. The result holds no prompt, no path and no weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.commands.quantization_errors import BlockErrors, LayerErrors, Measurement, cosine, relative_error
from pixtune.engine.activations import recompute_blocks
from pixtune.engine.apply import blocks_of
from pixtune.engine.load import Layout
from pixtune.engine.on_demand import load_on_demand
from pixtune.engine.quantize import FP8, INT8, tensor_cores_multiply
from pixtune.families.stock_call import Inputs, load_stock_transformer, random_inputs, stock_velocity
from pixtune.family import ModelFamily, Placement
from pixtune.hardware.facts import GIB, HardwareFacts, package_versions
from pixtune.hardware.read import read_facts
from pixtune.storage.files import write_atomically
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters

SIDE_PIXELS, TEXT_TOKENS = 256, 64
RANK = 4
STOCK_BOUND = 0.05
"""Largest relative error of the velocity in bf16. The small models give exactly 0 on a CPU; other kernels on a GPU and
60 blocks need room for rounding, and a wrong convention changes far more."""
TIMES_THE_MEDIAN = 3
PRODUCT_BOUND, HOPELESS_PRODUCT = 0.1, 0.3
"""Bounds of a product's error. Sound layers of the small models stay below 0.07, fp8 included. Above the second bound
no median excuses a layer: all of its kind may be faulty."""
WEIGHT_CHANNEL_BOUND = 0.1
"""Bound of a weight channel's error; sound ones stay below 0.03."""
INPUT_CHANNEL_BOUND = 0.2
"""Bound of an input channel's error; sound ones stay below 0.16, where a GELU's output has many small channels."""
GRADIENT_BOUND = 0.95
"""Lower bound of the cosine of all LoRA gradients. Sound small models have at least 0.986 in fp8 and 0.996 in int8."""
SLACK_BYTES = 2 * GIB
"""Memory beside a whole transformer: activations, the autoencoder, the CUDA context's later growth."""


@dataclass(frozen=True)
class StockComparison:
    """Comparison of pixtune's velocity with the stock pipeline's."""

    device: str | None
    """Kind of device on which both were computed; None where they were not compared."""
    error: float | None
    note: str
    """Reason why it was not compared, or not on the GPU."""

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= STOCK_BOUND


@dataclass(frozen=True)
class FormatCheck:
    """Effect of an 8-bit format on one step: its loss and LoRA gradients beside the plain model's."""

    linear_format: str
    keep_plain: tuple[str, ...]
    """Layers that lose too much in it."""
    loss: float
    plain_loss: float
    cosine: float
    cosine_kept: float | None
    """Cosine with the named layers kept plain; None where none is named."""
    finite: bool

    @property
    def fault(self) -> str | None:
        """Sentence on the problem and what to do, if there is one."""
        cosine_ = self.cosine if self.cosine_kept is None else self.cosine_kept
        if not self.finite or cosine_ < GRADIENT_BOUND:
            return (
                f"LoRA gradients in {self.linear_format} differ from the plain model's in direction (cosine "
                f"{cosine_:.3f}, {GRADIENT_BOUND} is needed). Train with disable_quantization: true."
            )
        if self.keep_plain:
            return (
                f"{len(self.keep_plain)} layers lose too much in {self.linear_format}. Put into the config: "
                f"keep_plain: [{', '.join(self.keep_plain)}]"
            )
        return None


@dataclass(frozen=True)
class ModelCheck:
    """Everything that a check found."""

    folder_name: str
    pipeline_class: str
    transformer_config: dict[str, Any]
    num_parameters: int
    compute_format: str
    facts: HardwareFacts
    versions: dict[str, str]
    stock: StockComparison
    not_finite: tuple[str, ...]
    """Blocks of the plain model whose output or gradient is not finite."""
    layers: tuple[LayerErrors, ...]
    blocks: tuple[BlockErrors, ...]
    formats: tuple[FormatCheck, ...]

    @property
    def faults(self) -> list[str]:
        """Problems, a sentence each; a model without any can be trained as it is."""
        faults = []
        if not self.stock.passed:
            faults.append(
                f"pixtune's velocity differs from {self.pipeline_class}'s by {self.stock.error:.1%} ({STOCK_BOUND:.0%} "
                "is allowed). A LoRA trained with it would not fit the pipeline: please report it."
            )
        if self.not_finite:
            faults.append(
                f"{len(self.not_finite)} blocks give infinite or undefined values in {self.compute_format}, "
                f"{self.not_finite[0]} first. Are the files damaged? Fetch the model again."
            )
        faults += [format.fault for format in self.formats if format.fault is not None]
        return faults

    @property
    def verdict(self) -> str:
        return " ".join(self.faults) or "Sound: velocity, 8-bit layers and LoRA gradients are within their bounds."

    def to_json(self) -> str:
        """Returns plain values; values that are not finite are null."""
        values = {**asdict(self), "ok": not self.faults, "verdict": self.verdict}
        return json.dumps(_without_infinities(values), indent=2, allow_nan=False)

    def write(self, path: Path) -> None:
        """Writes the JSON to a file.

        Raises:
            WriteError: it cannot be written.
        """
        write_atomically(path, self.to_json().encode())


def check_model(folder: ModelFolder, family: ModelFamily, device: torch.device) -> ModelCheck:
    """Checks a model folder on a device. Trains nothing, writes nothing.

    Raises:
        WeightsError: the files are not those of the architecture that the config describes.
    """
    facts = read_facts(device)
    placement = Placement(device, torch.bfloat16)
    inputs = random_inputs(family, folder, SIDE_PIXELS, TEXT_TOKENS, device)
    formats = formats_of(device)
    measured = Measurement(formats, family.modulation_layers)
    plain = load_on_demand(family, folder, placement, visit=measured.visit)
    velocity_of(family, plain, inputs, torch.full((1,), 0.7, device=device))
    exact = loss_and_gradients(family, folder, inputs, placement, Layout())
    checks = tuple(
        check_format(family, folder, inputs, placement, linear_format, measured.layers, exact)
        for linear_format in formats
    )
    return ModelCheck(
        folder_name=(folder.path if folder.file is None else folder.file.path).resolve().name,
        pipeline_class=folder.pipeline_class,
        transformer_config={k: v for k, v in folder.component_config("transformer").items() if k != "_name_or_path"},
        num_parameters=folder.num_parameters("transformer"),
        compute_format="bf16",
        facts=facts,
        versions=package_versions(),
        stock=compare_with_stock(folder, family, facts, inputs, device),
        not_finite=tuple(measured.not_finite),
        layers=tuple(measured.layers),
        blocks=tuple(measured.blocks),
        formats=checks,
    )


def formats_of(device: torch.device) -> tuple[str, ...]:
    """Returns the formats that a run on the device would quantize to; on a CPU both, since the run's GPU is unknown."""
    if device.type == "cpu":
        return (FP8, INT8)
    return (FP8,) if tensor_cores_multiply(torch.float8_e4m3fn, device) else (INT8,)


# ---- the stock pipeline


def compare_with_stock(
    folder: ModelFolder, family: ModelFamily, facts: HardwareFacts, inputs: Inputs, device: torch.device
) -> StockComparison:
    """Compares velocities on the device if the whole transformer fits there, else on the CPU, else not at all."""
    needed_bytes = 2 * folder.num_parameters("transformer") + SLACK_BYTES
    place, note = device, ""
    if device.type == "cuda" and needed_bytes > facts.free_bytes:
        place = torch.device("cpu")
        note = f"on the CPU: the whole transformer needs {needed_bytes / GIB:.0f} GiB, {device.type} has less free"
    if place.type == "cpu" and needed_bytes > facts.host_available_bytes:
        reason = f"the stock transformer needs {needed_bytes / GIB:.0f} GiB, and neither GPU nor host has them free"
        return StockComparison(None, None, reason)
    placement = Placement(place, torch.bfloat16)
    there = Inputs(
        inputs.noisy_BCHW.to(place),
        {name: tensor.to(place) for name, tensor in inputs.conditioning.items()},
        tuple(control.to(place) for control in inputs.controls),
        inputs.guidance,
    )
    stock_BCHW, sigma_B = stock_velocity(family, folder, load_stock_transformer(folder, placement), there, placement)
    # The stock transformer is gone by now: the two are never in memory together.
    ours_BCHW = velocity_of(family, load_on_demand(family, folder, placement), there, sigma_B)
    return StockComparison(place.type, relative_error(ours_BCHW, stock_BCHW), note)


@torch.no_grad()
def velocity_of(family: ModelFamily, transformer: Any, inputs: Inputs, sigma_B: Tensor) -> Tensor:
    return family.predict_velocity(
        transformer, inputs.noisy_BCHW, sigma_B, inputs.conditioning, inputs.controls, inputs.guidance
    )


# ---- layers


def layers_to_keep(layers: Sequence[LayerErrors]) -> tuple[str, ...]:
    """Returns the paths of the layers of one format that lose too much in it."""
    by_kind: dict[str, list[LayerErrors]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    return tuple(layer.path for layer in layers if loses_too_much(layer, by_kind[layer.kind]))


def loses_too_much(layer: LayerErrors, kind: Sequence[LayerErrors]) -> bool:
    """Returns whether an error is beyond its bound and out of proportion to its kind's, or hopeless in any kind.

    Args:
        kind: all layers of its kind and format, itself among them.
    """
    bounds = {
        "product": PRODUCT_BOUND,
        "gradient": PRODUCT_BOUND,
        "weight_channel": WEIGHT_CHANNEL_BOUND,
        "input_channel": INPUT_CHANNEL_BOUND,
    }
    if not max(layer.product, layer.gradient) <= HOPELESS_PRODUCT:
        return True
    return any(
        getattr(layer, name) > max(bound, TIMES_THE_MEDIAN * median_low(getattr(other, name) for other in kind))
        for name, bound in bounds.items()
    )


# ---- loss and gradients


def check_format(
    family: ModelFamily,
    folder: ModelFolder,
    inputs: Inputs,
    placement: Placement,
    linear_format: str,
    layers: Iterable[LayerErrors],
    exact: tuple[float, Tensor],
) -> FormatCheck:
    """Compares a quantized step with the plain one; once more with the layers kept plain that lose too much, if any do.

    Args:
        layers: errors of layers in all formats.
        exact: the plain step's loss and gradients.
    """
    keep_plain = layers_to_keep([layer for layer in layers if layer.linear_format == linear_format])
    plain_loss, plain_gradient = exact
    loss, gradient = loss_and_gradients(family, folder, inputs, placement, Layout(linear_format))
    kept = None
    if keep_plain:
        layout = Layout(linear_format, plain_layers=keep_plain)
        kept = cosine(loss_and_gradients(family, folder, inputs, placement, layout)[1], plain_gradient)
    finite = all(math.isfinite(value) for value in (loss, plain_loss, float(gradient.norm())))
    return FormatCheck(linear_format, keep_plain, loss, plain_loss, cosine(gradient, plain_gradient), kept, finite)


def loss_and_gradients(
    family: ModelFamily, folder: ModelFolder, inputs: Inputs, placement: Placement, layout: Layout
) -> tuple[float, Tensor]:
    """Computes a step with a LoRA that changes the output already, so that both of its matrices have a gradient."""
    transformer = load_on_demand(family, folder, placement, layout)
    adapters.attach_lora(transformer, family.lora_targets, RANK, float(RANK), 0, family.lora_presets)
    parameters = adapters.trainable_parameters(transformer)
    for name, parameter in parameters.items():
        values = randomness.normal(parameter.shape, 0, "random weights", "lora", name)
        parameter.data = (values / (10 * math.sqrt(parameter.shape[1]))).to(placement.device)
    recompute_blocks(blocks_of(transformer, family), offload=False)
    sigma_B = torch.full((1,), 0.7, device=placement.device)
    velocity_BCHW = family.predict_velocity(
        transformer, inputs.noisy_BCHW, sigma_B, inputs.conditioning, inputs.controls, inputs.guidance
    )
    target_BCHW = randomness.normal(inputs.noisy_BCHW.shape, 0, "random weights", "target").to(placement.device)
    loss = (velocity_BCHW.float() - target_BCHW).square().mean()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
