"""Compiled blocks keep the right results for their backward pass, by the compiler's own graphs."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import CheckpointPolicy

from pixtune.engine import compile as compile_module
from pixtune.engine import heads as heads_module
from pixtune.engine import lora
from pixtune.engine.activations import recompute_projections
from pixtune.engine.compile import compile_blocks, compile_forward
from pixtune.engine.forwards import replace_computation
from pixtune.engine.gelu import compact_gelus
from pixtune.engine.load import random_transformer
from pixtune.engine.recompute_policy import RecomputePolicy
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.storage.model_folder import open_model_folder
from pixtune.trained.adapters import attach_lora, lora_weights
from tests.gradients import gradient_of
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("own_graphs")


class Int8Product(torch.autograd.Function):
    """A product that torch's partitioner does not know to be expensive; the backward pass reads its result."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NK)
        codes = (x_MK * 20).to(torch.int8)
        return torch._int_mm(codes, weight_NK.t()).to(x_MK.dtype) / 20

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, None]:
        return gradient_MN @ ctx.saved_tensors[0].to(gradient_MN.dtype), None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-8, 8, (32, 32), dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return Int8Product.apply(nn.functional.layer_norm(x * self.scale, (32,)), self.weight).sin()


def count_products(monkeypatch: pytest.MonkeyPatch, marked: bool) -> list[int]:
    """Products in the compiled graphs: forward, backward."""
    counts = []
    if not marked:
        monkeypatch.setattr(RecomputePolicy, "__call__", lambda self, graph: None)
    monkeypatch.setattr(RecomputePolicy, "uuid", lambda self: None)  # graphs must be made, not found

    def count(graph: torch.fx.Graph) -> None:
        counts.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default)))

    block = Block()
    compile_blocks([block], selective=True)
    x = torch.randn(64, 32, requires_grad=True)
    with inductor_config.patch(post_grad_custom_post_pass=count):
        block(x).sum().backward()
    plain = gradient_of(block.scale).clone()
    block.scale.grad = None
    type(block).forward(block, x).sum().backward()
    torch.testing.assert_close(block.scale.grad, plain, rtol=1e-3, atol=1e-3)
    return counts


def test_selective_recomputation_recomputes_no_expensive_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_products(monkeypatch, marked=True) == [1, 0]


def test_without_the_mark_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_products(monkeypatch, marked=False) == [1, 1]


@pytest.mark.parametrize(
    ("name", "sizes_vary", "text_multiple"),
    [
        ("tiny-qwen-image", True, 1), ("tiny-flux", True, 1), ("tiny-qwen-image", True, 8), ("tiny-flux", True, 8),
        ("tiny-qwen-image", False, 1),
    ],
)  # fmt: skip
def test_blocks_of_one_kind_share_one_graph_and_all_sizes_do_if_they_are_known_to_vary(
    name: str, sizes_vary: bool, text_multiple: int
) -> None:
    """The first block is included, whose input needs no gradient, and captions padded to a multiple. Else a second
    size makes one more."""
    folder = open_model_folder(str(ROOT / "assets" / name))
    family = family_of(folder)
    config = folder.component_config("transformer")
    config |= {key: 3 for key in ("num_layers", "num_single_layers") if key in config}
    transformer = random_transformer(family, config, Placement(torch.device("cpu"), torch.float32)).module
    attach_lora(transformer, family.lora_targets, 4, 4.0, 0, family.lora_presets)
    kinds = [list(transformer.get_submodule(path).children()) for path in family.block_paths]
    blocks = [block for kind in kinds for block in kind]
    assert {len(kind) for kind in kinds} == {3} and compact_gelus(blocks) >= len(blocks)
    compile_eagerly = functools.partial(compile_forward, trained=True, sizes_vary=sizes_vary, backend="eager")
    for block in blocks:
        replace_computation(block, compile_eagerly)
    before = dynamo_counters["stats"]["unique_graphs"]

    def graphs_after(width: int, height: int, num_text_tokens: int) -> int:
        latents_1CHW = torch.randn(1, *family.latent_shape(folder, width, height))
        conditioning = family.stack_conditioning([family.random_text(folder, num_text_tokens, 0)], text_multiple)
        family.predict_velocity(transformer, latents_1CHW, torch.tensor([0.5]), conditioning).sum().backward()
        return dynamo_counters["stats"]["unique_graphs"] - before

    assert graphs_after(64, 64, 7) == len(kinds)
    graphs = graphs_after(80, 64, 12)
    assert (graphs == len(kinds)) == sizes_vary and graphs <= 2 * len(kinds)
    for width, height, num_text_tokens in ((64, 80, 9), (96, 64, 30), (64, 128, 7), (128, 64, 25), (64, 64, 12)):
        assert graphs_after(width, height, num_text_tokens) == graphs


def test_as_many_shapes_are_compiled_as_a_data_set_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself torch gives up after 8 graphs of a function, and runs the block eagerly from then on."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compile_blocks([nn.Linear(2, 2)], False)
    assert torch._dynamo.config.recompile_limit >= 64


def test_blocks_before_the_first_trained_one_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    without_code = functools.partial(compile_forward, backend="eager")  # whose writing takes seconds
    monkeypatch.setattr(compile_module, "compile_forward", without_code)
    folder = open_model_folder(str(ROOT / "assets" / "tiny-qwen-image"))
    family = family_of(folder)
    config = folder.component_config("transformer") | {"num_layers": 3}
    transformer = random_transformer(family, config, Placement(torch.device("cpu"), torch.float32)).module
    attach_lora(transformer, ["transformer_blocks.1.attn.to_q"], 4, 4.0, 0, family.lora_presets)
    blocks = list(transformer.get_submodule("transformer_blocks").children())
    with_gradient = []
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: with_gradient.append(output[1].requires_grad))
    compile_blocks(blocks, selective=True)
    latents_1CHW = torch.randn(1, *family.latent_shape(folder, 64, 64))
    text = family.stack_conditioning([family.random_text(folder, 7, 0)])
    family.predict_velocity(transformer, latents_1CHW, torch.tensor([0.5]), text)
    assert with_gradient == [False, True, True]


def kept_and_gradients(name: str, recomputes: bool) -> tuple[float, torch.Tensor]:
    """Bytes that compiled blocks keep, in streams of features a block, and the LoRA's gradients."""
    torch._dynamo.reset()
    folder = open_model_folder(str(ROOT / "assets" / name))
    family = family_of(folder)
    torch.manual_seed(0)
    config = folder.component_config("transformer")
    config |= {key: 2 for key in ("num_layers", "num_single_layers") if key in config}
    transformer = random_transformer(family, config, Placement(torch.device("cpu"), torch.float32)).module
    attach_lora(transformer, family.lora_targets, 4, 4.0, 0, family.lora_presets)
    with torch.no_grad():
        for path, weight in lora_weights(transformer).items():
            if "lora_B" in path:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    blocks = [block for path in family.block_paths for block in transformer.get_submodule(path).children()]
    if recomputes:
        recompute_projections(blocks)
    # One graph for all blocks of a kind, whose code is not made, which takes most of the time.
    in_one = functools.partial(compile_forward, trained=True, sizes_vary=False, backend="aot_eager_decomp_partition")
    for block in blocks:
        replace_computation(block, in_one)
    channels, height, width = family.latent_shape(folder, 128, 128)
    generator = torch.Generator().manual_seed(2)
    latents_1CHW = torch.randn(1, channels, height, width, generator=generator)
    text = family.stack_conditioning([family.random_text(folder, 32, 0)])
    own = {tensor.data_ptr() for tensor in [*transformer.parameters(), *transformer.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        velocity = family.predict_velocity(transformer, latents_1CHW, torch.tensor([0.5]), text)
    num_bytes = sum(kept.values())  # now: memory that the backward pass takes anew may have the same address
    velocity.square().mean().backward()
    gradients = [p.grad.flatten() for p in transformer.parameters() if p.grad is not None]
    unit = (family.num_image_tokens(height, width) + 32) * family.block_shape(folder)[1] * 4
    return num_bytes / unit / len(blocks), torch.cat(gradients)


@pytest.fixture
def operators_of_gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Blocks use the operators that they have on GPUs, here computed by torch's own. Returns those that were."""
    used: set[str] = set()

    def plain(*tensors: Tensor | None) -> Tensor:
        used.add("heads")
        parts = [tensors[:3], tensors[3:6]] if tensors[0] is not None else [tensors[3:6]]
        made = []
        for states_BLC, weight_D, rotary in parts:
            assert states_BLC is not None and weight_D is not None and rotary is not None
            heads = states_BLC.unflatten(-1, (-1, len(weight_D)))
            made.append(heads_module.rotate(nn.functional.rms_norm(heads, weight_D.shape, weight_D, 1e-6), rotary))
        return torch.cat(made, dim=1)

    def plain_backward(gradient_BSHD: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        used.add("heads backward")
        made, start = [], 0
        for states_BLC, weight_D, rotary in (tensors[:3], tensors[3:6]):
            if states_BLC is None or weight_D is None or rotary is None:
                made.append(gradient_BSHD.new_empty(0))
                continue
            back = rotary * torch.tensor([1.0, -1.0])
            weighted = heads_module.rotate(gradient_BSHD[:, start : start + len(rotary)], back) * weight_D
            heads = states_BLC.unflatten(-1, (-1, len(weight_D)))
            root = (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            unit = heads * root
            made.append((root * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))).flatten(2))
            start += len(rotary)
        return made[0], made[1]

    def added(*tensors: Any) -> Tensor:
        used.add("LoRA")
        return lora.plainly_added(*tensors)

    lora.add_low_rank.register_kernel("cpu")(added)
    heads_module.rotate_heads.register_kernel("cpu")(plain)
    heads_module.rotate_heads_backward.register_kernel("cpu")(plain_backward)
    monkeypatch.setattr(lora, "is_fused", lambda rows_MK: True)
    monkeypatch.setattr(heads_module, "has_triton", lambda states_BLC: True)
    return used


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the operators are the interpreter's")
@pytest.mark.parametrize("name", ["tiny-qwen-image", "tiny-flux"])
def test_with_the_operators_of_gpus_projections_that_are_recomputed_are_not_kept(
    name: str, operators_of_gpus: set[str]
) -> None:
    test_projections_that_are_recomputed_are_not_kept(name)
    assert operators_of_gpus == {"LoRA", "heads", "heads backward"}


def test_projections_that_are_recomputed_are_not_kept(name: str = "tiny-qwen-image") -> None:
    kept, expected = kept_and_gradients(name, recomputes=False)
    less, gradients = kept_and_gradients(name, recomputes=True)
    assert kept - less > 2.4
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_products_whose_mark_was_lost_are_recomputed_like_what_reads_them() -> None:
    """torch 2.11 leaves the mark out inside of some autograd functions; the one that adds a LoRA reads a product."""
    graph = torch.fx.Graph()
    base, low, up = (graph.placeholder(name) for name in ("base", "low", "up"))
    product = graph.call_function(torch.ops.aten.mm.default, (base, up))
    added = graph.call_function(torch.ops.pixtune.add_low_rank.default, (product, None, low, up))
    view = graph.call_function(torch.ops.aten.view.default, (added, [1]))
    graph.output(view)
    view.meta.update({"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 3})
    RecomputePolicy()(graph)
    assert product.meta == added.meta == view.meta


def test_a_product_whose_mark_was_lost_is_recomputed_like_what_reads_it() -> None:
    """torch 2.11 leaves the mark out inside of some autograd functions."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    marked, lost, kept = (graph.call_function(torch.ops.aten.mm.default, (x, weight)) for _ in range(3))
    reads_lost = graph.call_function(torch.ops.aten.neg.default, (lost,))
    graph.output((marked, reads_lost, graph.call_function(torch.ops.aten.neg.default, (kept,))))
    recomputed = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 3}
    marked.meta.update(recomputed)
    reads_lost.meta.update(recomputed)
    RecomputePolicy()(graph)
    assert lost.meta == marked.meta == recomputed
    assert kept.meta["recompute"] == CheckpointPolicy.MUST_SAVE
