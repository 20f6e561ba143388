"""Runs a forward and a backward pass of a full-size transformer with random weights in several number formats.

All ways of one model have the same weights, the same LoRA and the same inputs. Inputs and noise level are numbers that
bf16 can hold, so that the exact pass sees the same ones.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from architectures import ARCHITECTURES, write_model_folder
from torch import Tensor, nn
from torch.func import functional_call

from pixtune import randomness
from pixtune.config import load_config
from pixtune.engine import heads, lora, mlp
from pixtune.engine.activations import recompute_blocks
from pixtune.engine.apply import (
    apply_switches,
    apply_to_activations,
    apply_to_weights,
    blocks_of,
    layout_of,
    placement_of,
)
from pixtune.engine.forwards import Forward, wrap_forward
from pixtune.engine.load import random_transformer
from pixtune.engine.quantize import FP8, INT8, NF4, SMALLEST_PEAK, FrozenProduct, row_codes
from pixtune.families import family_of
from pixtune.family import Conditioning, ModelFamily
from pixtune.objective import add_noise, example_losses, velocity_target
from pixtune.plan.training import TrainingPlan
from pixtune.planning import plan_on_this_machine
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters

SEED = 0
RANK = 16
UP_DEVIATION = 0.002
"""Standard deviation of the LoRA's second matrices, which start at zero and then give the first ones no gradient. With
the first ones' usual 1 / rank the LoRA makes about 5% of its layer's output."""
SIGMA = 0.5
"""Noise level; 1000 times it is a number that bf16 holds, as the models want it."""
MODULATION_SIZE = 0.5
"""Root of the mean square of the shifts, scales and gates in the blocks: 0.3 to 1.1 in the trained small models. With
the weights as they are drawn it is 0.03, blocks change their streams by a hundredth, and depth would have no effect."""
NUM_FINGERPRINTED = 64
E5M2 = torch.float8_e5m2


@dataclass(frozen=True)
class Inputs:
    """Inputs of a pass: one example, on the device."""

    noisy_BCHW: Tensor
    sigma_B: Tensor
    conditioning: Conditioning
    target_BCHW: Tensor
    num_image_tokens: int
    num_text_tokens: int


@dataclass(frozen=True)
class Setting:
    """Everything that all ways of one model have in common."""

    family: ModelFamily
    transformer_config: Mapping[str, Any]
    plan: TrainingPlan
    """Plan by which pixtune runs it in fp8 on this machine, with all weights on the device."""
    inputs: Inputs
    device: torch.device


@dataclass(frozen=True)
class Pass:
    """Results of a pass."""

    velocity_BCHW: Tensor
    gradients: Mapping[str, Tensor]
    """Gradient of each LoRA matrix."""
    fingerprint: Mapping[str, Tensor]
    """First values of each frozen tensor that was drawn and is not quantized, by name."""


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Puts torch's own operators in place of the kernels that fuse several of them."""
    with ExitStack() as stack:
        for module in (heads, lora, mlp):
            stack.enter_context(patch.object(module, "has_triton", lambda tensor: False))
        yield


@contextmanager
def exact_sums() -> Iterator[None]:
    """Computes 8-bit products without fast accumulation: partial sums are added outside the tensor cores, in fp32."""
    multiply = torch._scaled_mm

    def exactly(*args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **(kwargs | {"use_fast_accum": False}))

    with patch.object(torch, "_scaled_mm", exactly):
        yield


@contextmanager
def unfused_mlps() -> Iterator[None]:
    """Computes each layer of an MLP by itself."""
    with patch.object(mlp, "has_triton", lambda states: False):
        yield


@contextmanager
def e5m2_gradients() -> Iterator[None]:
    """Computes gradients in e5m2: more powers of two, a bit less of each number.

    MLPs are not fused, since their kernels write e4m3.
    """
    with unfused_mlps(), patch.object(FrozenProduct, "backward", staticmethod(e5m2_backward)):
        yield


@dataclass(frozen=True)
class Way:
    """One way for the blocks to compute."""

    name: str
    linear_format: str
    as_planned: bool = False
    """Whether it is compiled where that works, and keeps for the backward pass what the plan says. Else it is launched
    operator by operator with every block recomputed, so that it fits in all formats."""
    selective: bool = False
    """Whether GELU's input is kept in 8 bits where the way is not as planned."""
    during: Callable[[], AbstractContextManager[None]] = nullcontext

    def plan(self, planned: TrainingPlan, num_blocks: int) -> TrainingPlan:
        transposes = planned.kept_transposes and self.linear_format == FP8
        plan = replace(planned, weights_format=self.linear_format, kept_transposes=transposes)
        if self.as_planned:
            return plan
        return replace(
            plan, compile=False, selective=self.selective, recomputed_blocks=num_blocks, reprojected_blocks=0
        )


BF16 = Way("bf16", "bf16", during=plain_kernels)
WAYS = (
    BF16,
    Way("fp8", FP8, as_planned=True),
    Way("nf4", NF4, as_planned=True),
    Way("fp8-eager", FP8),
    Way("fp8-exact-sums", FP8, during=exact_sums),
    Way("fp8-unfused-mlp", FP8, during=unfused_mlps),
    Way("fp8-e5m2-gradients", FP8, during=e5m2_gradients),
    Way("fp8-lean", FP8, selective=True),
    Way("int8", INT8),
)
"""Ways that are compared. The first is a reference, and has an error of its own beside the exact pass. Compare each
variant with "fp8-eager", but e5m2 with "fp8-unfused-mlp"."""


# ---- what all ways share


def prepare(model: str, size_pixels: int, device: torch.device) -> Setting:
    """Makes the plan, and sets the switches of the process as that plan says."""
    architecture = ARCHITECTURES[model]
    with tempfile.TemporaryDirectory() as name:
        write_model_folder(Path(name), architecture)
        folder = ModelFolder(Path(name))
        family = family_of(folder)
        inputs = draw_inputs(family, folder, size_pixels, architecture.num_text_tokens, device)
        words = [
            f"pretrained_model_name_or_path={name}", f"output_dir={name}", f"data_config.img_dir={name}",
            "random_weights=true", "max_train_steps=1", f"rank={RANK}", "mixed_precision=bf16", "quantize=true",
            "cuda_features.enable_fp8_training=true",
        ]  # fmt: skip
        config = load_config(None, words, folders_must_exist=False)
        num_tokens = inputs.num_image_tokens + inputs.num_text_tokens
        planned = plan_on_this_machine(config, family, folder, lambda multiple: num_tokens, None, device, 1)
        transformer_config = folder.component_config("transformer")
    plan = replace(planned, modulation_rows=0, streamed_blocks=0, captures=0)
    apply_switches(plan)
    return Setting(family, transformer_config, plan, inputs, device)


def draw_inputs(
    family: ModelFamily, folder: ModelFolder, size_pixels: int, num_text_tokens: int, device: torch.device
) -> Inputs:
    """Draws one training example without meaning."""

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(device).bfloat16().float()

    shape_CHW = family.latent_shape(folder, size_pixels, size_pixels)
    latents_BCHW, noise_BCHW = (
        rounded(randomness.normal((1, *shape_CHW), SEED, "random weights", what)) for what in ("latents", "noise")
    )
    sigma_B = torch.full((1,), SIGMA, device=device)
    text = family.stack_conditioning([family.random_text(folder, num_text_tokens, SEED)])
    return Inputs(
        noisy_BCHW=rounded(add_noise(latents_BCHW, noise_BCHW, sigma_B)),
        sigma_B=sigma_B,
        conditioning={name: rounded(tensor) for name, tensor in text.items()},
        target_BCHW=velocity_target(latents_BCHW, noise_BCHW),
        num_image_tokens=family.num_image_tokens(*shape_CHW[1:]),
        num_text_tokens=num_text_tokens,
    )


def block_names(transformer: nn.Module, family: ModelFamily) -> list[str]:
    """Returns the blocks' paths in the order in which they run."""
    return [f"{path}.{n}" for path in family.block_paths for n, _ in transformer.get_submodule(path).named_children()]


# ---- a pass


class Passes:
    """Runs passes of one model, and keeps the latest transformer for a next way that needs the same."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.blocks = block_names(setting.family.build_transformer(setting.transformer_config), setting.family)
        self._kept: tuple[TrainingPlan, nn.Module, dict[str, Tensor]] | None = None

    def run(self, way: Way) -> Pass:
        plan = way.plan(self.setting.plan, len(self.blocks))
        if self._kept is None or self._kept[0] != plan:
            self.forget()
            transformer, fingerprint = build(self.setting, plan)
            apply_to_activations(transformer, self.setting.family, plan)
            self._kept = plan, transformer, fingerprint
        _, transformer, fingerprint = self._kept
        with way.during():
            return forward_backward(self.setting, transformer, fingerprint)

    def run_exactly(self) -> Pass:
        """Runs a pass in fp32, TF32 off, by torch's own operators."""
        self.forget()
        plan = BF16.plan(self.setting.plan, len(self.blocks))
        transformer, fingerprint = build(self.setting, plan)
        compute_in_fp32(transformer, self.setting.family)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with plain_kernels():
                return forward_backward(self.setting, transformer, fingerprint)
        finally:
            torch.set_float32_matmul_precision(before)

    def forget(self) -> None:
        """Frees memory; compiled code holds on to weights."""
        self._kept = None
        torch.compiler.reset()
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


def build(setting: Setting, plan: TrainingPlan) -> tuple[nn.Module, dict[str, Tensor]]:
    """Builds a transformer with a LoRA, and the fingerprint of its weights."""
    family, device = setting.family, setting.device
    torch.manual_seed(SEED)  # weights are drawn in the order of their names, each in bf16, whatever becomes of them
    num_blocks = len(block_names(family.build_transformer(setting.transformer_config), family))
    placement, layout = placement_of(plan, device), layout_of(plan, num_blocks)
    loaded = random_transformer(family, setting.transformer_config, placement, layout, draws_each=True)
    transformer = apply_to_weights(loaded, family, layout, device).module
    enlarge_modulations(transformer, setting)
    fingerprint = {
        name: tensor.flatten()[:NUM_FINGERPRINTED].float()
        for name, tensor in transformer.named_parameters()
        if tensor.ndim > 1
    }
    adapters.attach_lora(transformer, family.lora_targets, RANK, RANK, SEED, family.lora_presets)
    for name, parameter in adapters.trainable_parameters(transformer).items():
        deviation = 1 / RANK if ".lora_A." in name else UP_DEVIATION
        values = randomness.normal(parameter.shape, SEED, "random weights", "lora", name)
        parameter.data = (deviation * values).to(device)
    return transformer, fingerprint


@torch.no_grad()
def enlarge_modulations(transformer: nn.Module, setting: Setting) -> None:
    """Brings modulations to `MODULATION_SIZE`, within a factor of 1.4.

    The factor is a power of two, so that no weight is rounded and all ways have the same one.
    """
    family, inputs = setting.family, setting.inputs
    embedding = family.embed_time(transformer, inputs.sigma_B, inputs.conditioning)
    layers = [
        module
        for block in blocks_of(transformer, family)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(family.modulation_layers)
    ]
    size = layers[0](nn.functional.silu(embedding)).float().square().mean().sqrt()
    factor = 2.0 ** round(math.log2(MODULATION_SIZE / float(size)))
    for layer in layers:
        layer.weight.mul_(factor)


def forward_backward(setting: Setting, transformer: nn.Module, fingerprint: Mapping[str, Tensor]) -> Pass:
    """Runs a training step without its optimizer.

    Raises:
        ValueError: a gradient is not finite, or a whole matrix's is zero.
    """
    inputs, parameters = setting.inputs, adapters.trainable_parameters(transformer)
    transformer.zero_grad(set_to_none=True)
    velocity_BCHW = setting.family.predict_velocity(transformer, inputs.noisy_BCHW, inputs.sigma_B, inputs.conditioning)
    example_losses(velocity_BCHW, inputs.target_BCHW).mean().backward()
    gradients = {name: parameter.grad.detach() for name, parameter in parameters.items() if parameter.grad is not None}
    norms = {name: float(gradient.float().norm()) for name, gradient in gradients.items()}
    if bad := [name for name, norm in norms.items() if not 0 < norm < math.inf]:
        raise ValueError(f"{len(bad)} LoRA matrices have no gradient or an infinite one, {bad[0]} first")
    return Pass(velocity_BCHW.detach().float(), gradients, fingerprint)


def compute_in_fp32(transformer: nn.Module, family: ModelFamily) -> None:
    """Makes all arithmetic fp32 with the same weights; each block is recomputed and has fp32 weights only meanwhile."""
    in_blocks = tuple(f"{path}." for path in family.block_paths)
    for name, parameter in transformer.named_parameters():
        if not name.startswith(in_blocks):
            parameter.data = parameter.data.float()
    blocks = blocks_of(transformer, family)
    for block in blocks:
        wrap_forward(block, partial(run_in_fp32, block))
    recompute_blocks(blocks, offload=False)


class Call(nn.Module):
    """A block's forward as a module of its own, in which `functional_call` can replace the block's weights."""

    def __init__(self, block: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.block, self.call = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def run_in_fp32(block: nn.Module, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs one call of a block with its weights in fp32."""
    weights = {
        f"block.{name}": parameter.float()
        for name, parameter in block.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point()
    }
    return functional_call(Call(block, inner), weights, args, kwargs)


def e5m2_backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    """Replaces `FrozenProduct.backward`, with the gradient's codes in e5m2 and the weight's as they are."""
    stored, block_scale, scale_N1, transpose = ctx.saved_tensors
    if transpose is None:
        weight_KN, weight_scale_N1 = row_codes(stored, block_scale, scale_N1, ctx.codes, transposed=True)
    else:
        weight_KN, weight_scale_N1 = transpose.view(ctx.codes), scale_N1
    scaled_MN = gradient_MN.float() * weight_scale_N1.t()
    scale_M1 = scaled_MN.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_PEAK) / torch.finfo(E5M2).max
    codes_MN = (scaled_MN / scale_M1).to(E5M2)
    if ctx.tensor_cores:
        ones_1K = torch.ones(1, weight_KN.shape[0], device=weight_KN.device)
        x_gradient_MK = torch._scaled_mm(
            codes_MN, weight_KN.t(), scale_a=scale_M1, scale_b=ones_1K, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        x_gradient_MK = codes_MN.float() @ weight_KN.float().t() * scale_M1
    return x_gradient_MK.to(gradient_MN.dtype), None, None, None, None, None, None
