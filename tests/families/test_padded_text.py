"""Captions padded to a multiple of some number of tokens change neither the velocity nor a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from pixtune.engine.activations import recompute_blocks, recompute_projections
from pixtune.engine.compile import compile_blocks, compile_forward
from pixtune.engine.forwards import replace_computation
from pixtune.engine.load import random_transformer
from pixtune.engine.padded_attention import attend_padded
from pixtune.families import FAMILIES, family_of, qwen_attention, qwen_image
from pixtune.families.packing import pack_latents, unpack_latents
from pixtune.family import Conditioning, ModelFamily, Placement
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained.adapters import attach_lora, lora_weights
from tests.families.stock import give_values
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("own_graphs")

CPU = torch.device("cpu")
LAYERS = 2
MULTIPLE = 16
LENGTHS = {"one caption": [5], "one that fills its multiple": [16], "two of other lengths": [19, 7]}
CLEAN = "qwen-image-edit, controls modulated as if clean"
MODELS = {  # folder, what its config has besides
    "qwen-image": ("tiny-qwen-image", {}),
    "qwen-image-edit": ("tiny-qwen-image-edit", {}),
    CLEAN: ("tiny-qwen-image-edit", {"zero_cond_t": True}),
}
BOUND = 1e-5
"""Relative, in fp32."""


@dataclass(frozen=True)
class Case:
    """A model with a LoRA that changes something, and what goes into one step."""

    family: ModelFamily
    transformer: nn.Module
    rows: list[Conditioning]
    noisy_BCHW: Tensor
    sigma_B: Tensor
    controls: tuple[Tensor, ...]

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.get_submodule("transformer_blocks").children())

    def step(self, multiple: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Velocity, the LoRA's gradients in one, and each row's gradient of text features, padding included."""
        self.transformer.zero_grad(set_to_none=True)
        text = self.family.stack_conditioning(self.rows, multiple)
        text["prompt_embeds"] = text["prompt_embeds"].requires_grad_()
        velocity = self.family.predict_velocity(self.transformer, self.noisy_BCHW, self.sigma_B, text, self.controls)
        velocity.square().mean().backward()
        # A compiled block gives zeros where nobody asks for a result, an eager one nothing.
        trained = [p for p in self.transformer.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained]
        assert text["prompt_embeds"].grad is not None
        return velocity.detach(), torch.cat(gradients), list(text["prompt_embeds"].grad)


def build(model: str, lengths: list[int], num_layers: int = LAYERS) -> Case:
    name, changes = MODELS[model]
    folder = ModelFolder(ROOT / "assets" / name)
    family = family_of(folder)
    config = {**folder.component_config("transformer"), "num_layers": num_layers, **changes}
    torch.manual_seed(0)
    transformer = random_transformer(family, config, Placement(CPU, torch.float32)).module
    give_values(transformer)
    attach_lora(transformer, ["attention_mlp"], 4, 4.0, 0, family.lora_presets)
    give_values_to_lora(transformer)

    def latents(width: int, height: int) -> Tensor:
        return torch.randn(len(lengths), *family.latent_shape(folder, width, height))

    unit = family.pixel_multiple(folder)
    controls = (latents(4 * unit, 2 * unit), latents(unit, 2 * unit)) if family.max_controls else ()
    rows = [family.random_text(folder, length, seed) for seed, length in enumerate(lengths)]
    sigma_B = torch.tensor([0.3, 0.8])[: len(lengths)]
    return Case(family, transformer, rows, latents(6 * unit, 4 * unit), sigma_B, controls)


def give_values_to_lora(transformer: nn.Module) -> None:
    with torch.no_grad():
        for number, weight in enumerate(lora_weights(transformer).values()):
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert error < BOUND, f"{what}: {error:.2g}"


def assert_padding_changes_nothing(case: Case, change: Callable[[Case], object]) -> None:
    """
    Args:
        change: made to the model for the padded step alone.
    """
    velocity, gradients, by_row = case.step(1)
    change(case)
    padded_velocity, padded_gradients, padded_by_row = case.step(MULTIPLE)
    assert_close(padded_velocity, velocity, "velocity")
    assert_close(padded_gradients, gradients, "gradients")
    for row, plain, padded in zip(case.rows, by_row, padded_by_row, strict=True):
        length = len(row["prompt_embeds"])
        assert len(padded) % MULTIPLE == 0
        assert_close(padded[:length], plain[:length], "gradient of text")
        assert not padded[length:].any(), "something came of padded tokens"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_padding_changes_nothing(model: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attend(*given: Any) -> Tensor:
        calls.append(given[3])
        return attend_padded(*given)

    monkeypatch.setattr(qwen_attention, "attend_padded", attend)
    assert_padding_changes_nothing(build(model, lengths), lambda case: None)
    assert len(calls) == LAYERS, "each block attends so, and none in the step that is not padded"
    assert [int(num_padded) for num_padded in (~calls[0]).sum(dim=1)] == [
        -(-max(lengths) // MULTIPLE) * MULTIPLE - length for length in lengths
    ]


def recompute_some(case: Case) -> None:
    recompute_blocks(case.blocks[:1], offload=False)
    recompute_projections(case.blocks[1:])


def compile_selectively(case: Case) -> None:
    recompute_projections(case.blocks)
    compile_blocks(case.blocks, selective=True)


def compile_for_all_lengths(case: Case) -> None:
    """As runs do whose captions vary in length, but that its code is not made, which takes most of the time."""
    for block in case.blocks:
        in_one = partial(compile_forward, trained=True, sizes_vary=True, backend="aot_eager_decomp_partition")
        replace_computation(block, in_one)


@pytest.mark.parametrize("model", MODELS)
def test_nor_where_blocks_are_recomputed(model: str) -> None:
    assert_padding_changes_nothing(build(model, LENGTHS["two of other lengths"]), recompute_some)


# The next two compile the one model whose blocks do all that the others' do: controls, and rows modulated as clean.


def test_nor_where_one_graph_serves_all_lengths() -> None:
    case = build(CLEAN, LENGTHS["two of other lengths"], 1)
    counters.clear()
    assert_padding_changes_nothing(case, compile_for_all_lengths)
    shorter = replace(case, rows=[{name: values[:9] for name, values in row.items()} for row in case.rows])
    shorter.step(MULTIPLE)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_nor_where_blocks_are_compiled() -> None:
    case = build(CLEAN, LENGTHS["two of other lengths"], num_layers=1)
    counters.clear()
    assert_padding_changes_nothing(case, compile_selectively)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], "a block is one graph"


def test_a_padded_step_is_the_stock_models_with_its_mask() -> None:
    """The same padded text and a mask, given to diffusers' own class with its own attention."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    folder = ModelFolder(ROOT / "assets" / "tiny-qwen-image")
    family = family_of(folder)
    stock = QwenImageTransformer2DModel.from_config({**folder.component_config("transformer"), "num_layers": LAYERS})
    give_values(stock)
    ours = random_transformer(family, dict(stock.config), Placement(CPU, torch.float32)).module
    ours.load_state_dict(stock.state_dict())
    rows = [family.random_text(folder, length, seed) for seed, length in enumerate((19, 7))]
    text = family.stack_conditioning(rows, MULTIPLE)
    noisy_BCHW, sigma_B = torch.randn(2, *family.latent_shape(folder, 96, 64)), torch.tensor([0.3, 0.8])
    _, _, height, width = noisy_BCHW.shape
    with torch.no_grad():
        expected = stock(
            hidden_states=pack_latents(noisy_BCHW),
            timestep=sigma_B,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_hidden_states_mask=text[qwen_image.REAL],
            img_shapes=[[(1, height // 2, width // 2)]] * 2,
            return_dict=False,
        )[0]
        velocity = family.predict_velocity(ours, noisy_BCHW, sigma_B, text)
    assert_close(velocity, unpack_latents(expected, height, width), "velocity")


class NothingFromTheHost(TorchFunctionMode):
    """On a GPU a tensor of Python's numbers is copied there and waited for, which a recording cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor), f"{func.__name__} of {args}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS)
def test_a_padded_or_masked_step_copies_no_number_from_the_host(model: str) -> None:
    case = build(model, LENGTHS["two of other lengths"])
    text = case.family.stack_conditioning(case.rows, MULTIPLE)
    masked = case.family.stack_conditioning(case.rows)
    given = (case.transformer, case.noisy_BCHW, case.sigma_B)
    case.family.predict_velocity(*given, text, case.controls)  # what is made once, in a step that is not recorded
    with NothingFromTheHost():
        for conditioning in (text, masked):
            case.family.predict_velocity(*given, conditioning, case.controls).sum().backward()
        with pytest.raises(AssertionError, match="tensor of"):
            torch.tensor(3)


def test_controls_modulated_as_clean_are_the_stock_models() -> None:
    """Velocity and gradients of all weights, of diffusers' own class and of ours."""
    from diffusers import QwenImageTransformer2DModel

    case = build(CLEAN, [7, 7])
    assert not case.transformer.zero_cond_t and case.transformer.config["zero_cond_t"]  # type: ignore[index]
    torch.manual_seed(0)
    stock = QwenImageTransformer2DModel.from_config(dict(case.transformer.config))  # type: ignore[arg-type]
    give_values(stock)
    ours = random_transformer(case.family, dict(stock.config), Placement(CPU, torch.float32)).module
    ours.load_state_dict(stock.state_dict())
    ours.requires_grad_(True)
    assert stock.zero_cond_t
    images = [case.noisy_BCHW, *case.controls]
    text = case.family.stack_conditioning(case.rows)
    expected = stock(
        hidden_states=torch.cat([pack_latents(image) for image in images], dim=1),
        timestep=case.sigma_B,
        encoder_hidden_states=text["prompt_embeds"],
        img_shapes=[[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * 2,
        return_dict=False,
    )[0]
    velocity = case.family.predict_velocity(ours, case.noisy_BCHW, case.sigma_B, text, case.controls)
    _, _, height, width = case.noisy_BCHW.shape
    expected = unpack_latents(expected[:, : height * width // 4], height, width)
    assert_close(velocity.detach(), expected.detach(), "velocity")
    velocity.square().mean().backward()
    expected.square().mean().backward()
    for (name, weight), wanted in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (weight.grad is None) == (wanted.grad is None), name
        if weight.grad is not None and wanted.grad is not None:
            torch.testing.assert_close(weight.grad, wanted.grad, rtol=1e-3, atol=1e-6, msg=name)


# ---- these tests can fail


@pytest.mark.parametrize("wrong", ["mask lost", "mask of the other side"])
def test_a_wrong_mask_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(query: Tensor, key: Tensor, value: Tensor, real_BL: Tensor, kernel: str) -> Tensor:
        real_BL = torch.ones_like(real_BL) if wrong == "mask lost" else real_BL.flip(1)
        return attend_padded(query, key, value, real_BL, kernel)

    monkeypatch.setattr(qwen_attention, "attend_padded", changed)
    with pytest.raises(AssertionError, match="velocity"):
        assert_padding_changes_nothing(build("qwen-image", [19, 7]), lambda case: None)


# ---- what is stacked


@pytest.mark.parametrize("name", FAMILIES)
def test_the_form_of_a_padded_batch_does_not_depend_on_its_lengths(name: str) -> None:
    """So that one recording serves all that are padded alike, and a batch of equal captions, too."""
    family = FAMILIES[name]
    width = 8

    def forms(lengths: list[int], multiple: int) -> dict[str, tuple[int, ...]]:
        rows = [{"prompt_embeds": torch.ones(length, width)} for length in lengths]
        return {key: tuple(tensor.shape) for key, tensor in family.stack_conditioning(rows, multiple).items()}

    if not family.pads_text:
        assert forms([16, 16], 64) == forms([16, 16], 1) == {"prompt_embeds": (2, 16, width)}
        return
    expected = {"prompt_embeds": (2, 64, width), qwen_image.REAL: (2, 64)}
    assert forms([64, 64], 64) == forms([1, 2], 64) == forms([1, 64], 64) == expected
    assert forms([65, 2], 64)["prompt_embeds"] == (2, 128, width)
    assert forms([5, 5], 1) == {"prompt_embeds": (2, 5, width)}
    assert forms([5, 7], 1) == {"prompt_embeds": (2, 7, width), qwen_image.MASK: (2, 7)}
