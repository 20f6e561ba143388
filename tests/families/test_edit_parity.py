"""Qwen-Image-Edit, -2509 and -2511 agree with `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`.

The stock pipelines get `mm_token_type_ids` as diffusers' pull request 14189 gives it to them: without it, transformers
5 numbers a picture's patches like words, which is not how these models were trained. Controls have the pipelines' own
size, about 1024x1024, so what the stock pipelines compute is computed once and compared with often.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from pixtune.data.images import to_pixels
from pixtune.engine.load import LoadedTransformer, load_transformer
from pixtune.families import FAMILIES, family_of, qwen_image
from pixtune.families.packing import pack_latents, unpack_latents
from pixtune.families.qwen_image_edit import EditReader
from pixtune.family import CONTROL_SIDE, ModelFamily, Placement, Prompt, TextEncoder
from pixtune.sampler import sample_latents, starting_noise, to_image
from pixtune.storage.model_folder import ModelFolder
from tests.families.stock import (
    CAPTIONS,
    assert_same,
    build_folder,
    edit_pipeline,
    real_processor,
    recorded_calls,
    remembered_encodings,
)
from tests.shallow import cut_blocks

COVERED = ("qwen_image_edit", "qwen_image_edit_plus")
PLACEMENT = Placement(torch.device("cpu"), torch.float32)
INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "img_shapes")
SHAPES = [(300, 300), (500, 320), (160, 250)]
"""Controls whose stock size the small autoencoder can take as it is: 1024x1024, 1280x832 and 832x1280."""
TARGET = (192, 128)


@dataclass(frozen=True)
class Case:
    family: ModelFamily
    folder: ModelFolder
    pipeline: Any
    text_encoder: TextEncoder
    autoencoder: nn.Module
    transformer: nn.Module
    known: dict[object, Any] = field(default_factory=dict)

    def once(self, what: object, compute: Callable[[], Any]) -> Any:
        """What is dear and the same in several tests."""
        if what not in self.known:
            self.known[what] = compute()
        return self.known[what]

    @property
    def most(self) -> int:
        return self.family.max_controls


@pytest.fixture(scope="module", autouse=True)
def encodings() -> Iterator[None]:
    """Of all cases: they differ in what they do with them."""
    with remembered_encodings():
        yield


@pytest.fixture(scope="module", params=["qwen_image_edit", "qwen_image_edit_plus", "qwen_image_edit_plus-2511"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, _, generation = request.param.partition("-")
    path = build_folder("tiny_qwen_image_edit", tmp_path_factory.mktemp(name) / "model")
    cut_blocks(path / "transformer", 2)
    kind = FAMILIES[name].pipeline_classes[0]
    change(path / "model_index.json", _class_name=kind)
    channels = json.loads((path / "vae" / "config.json").read_text())["z_dim"]
    # As large as the published models' text encoders see them, and not the small one's 16 tokens.
    change(path / "processor" / "preprocessor_config.json", size={"longest_edge": 12845056, "shortest_edge": 3136})
    change(
        path / "vae" / "config.json",
        latents_mean=[0.1 * channel - 0.7 for channel in range(channels)],
        latents_std=[0.5 + 0.05 * channel for channel in range(channels)],
    )
    if generation == "2511":
        change(path / "transformer" / "config.json", zero_cond_t=True)
    folder = ModelFolder(path)
    family = family_of(folder)
    assert family.name == name
    return Case(
        family, folder, edit_pipeline(family, folder), family.load_text_encoder(folder, PLACEMENT),
        family.load_autoencoder(folder, PLACEMENT), load_transformer(family, folder, PLACEMENT).module,
    )  # fmt: skip


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def control_pictures(count: int) -> list[Image.Image]:
    """Different in content and, from the second on, in shape."""
    colours = ("red", "green", "blue")
    return [
        ImageOps.colorize(Image.radial_gradient("L").resize(size), colour, "white")
        for size, colour in zip(SHAPES[:count], colours, strict=False)
    ]


def run(case: Case, prompt: str, size: tuple[int, int], controls: list[Image.Image], **options: Any) -> Any:
    settings: dict[str, Any] = {"num_inference_steps": 1, "true_cfg_scale": 1.0, "output_type": "latent"}
    image = controls if case.most > 1 else controls[0]
    return case.pipeline(
        image=image, prompt=prompt, width=size[0], height=size[1], generator=torch.Generator().manual_seed(4),
        **(settings | options),
    ).images  # fmt: skip


def prompt_of(case: Case, text: str, controls: list[Image.Image]) -> Prompt:
    sizes = [case.family.vision_size(control.size, CONTROL_SIDE) for control in controls]
    resized = [control.resize(size, Image.Resampling.LANCZOS) for control, size in zip(controls, sizes, strict=True)]
    return Prompt(text, tuple(resized))


def encoded(case: Case, text: str, controls: list[Image.Image]) -> dict[str, Tensor]:
    rows = case.family.encode_text(case.text_encoder, [prompt_of(case, text, controls)])
    return case.family.stack_conditioning(rows)


def encoded_controls(case: Case, count: int) -> list[Tensor]:
    """Latents of the first control pictures."""

    def encode(control: Image.Image) -> Tensor:
        size = case.family.control_size(case.folder, control.size, CONTROL_SIDE)
        pixels_3HW = to_pixels(control.resize(size, Image.Resampling.LANCZOS))
        return case.family.encode_images(case.autoencoder, pixels_3HW[None]).mean_BCHW

    controls = control_pictures(count)
    return [case.once(("control", number), partial(encode, c)) for number, c in enumerate(controls)]


def stock_step(case: Case, count: int) -> dict[str, Any]:
    """What the stock pipeline gives its transformer in one step, and what comes out."""

    def call() -> dict[str, Any]:
        with recorded_calls(case.pipeline.transformer) as calls:
            run(case, CAPTIONS[1], TARGET, control_pictures(count))
        (step,) = calls
        return step

    return case.once(("stock", count), call)


# ---- text


@pytest.mark.parametrize(("text", "num_controls"), [(CAPTIONS[1], 1), (" ", 1), (CAPTIONS[2], 2), (CAPTIONS[1], 3)])
def test_text_features_are_the_pipelines(case: Case, text: str, num_controls: int) -> None:
    if num_controls > case.most:
        pytest.skip("takes fewer controls")
    prompt = prompt_of(case, text, control_pictures(num_controls))
    image = list(prompt.pictures) if case.most > 1 else prompt.pictures[0]
    with torch.no_grad():
        expected, mask = case.pipeline.encode_prompt(text, image=image)
    (row,) = case.family.encode_text(case.text_encoder, [prompt])
    torch.testing.assert_close(row["prompt_embeds"][None], expected, rtol=1e-5, atol=1e-5)
    assert mask is None


def test_rows_encoded_together_are_those_encoded_alone(case: Case) -> None:
    controls = control_pictures(min(2, case.most))
    prompts = [prompt_of(case, CAPTIONS[1], controls), prompt_of(case, "x", controls[:1]), Prompt(CAPTIONS[0])]
    together = case.family.encode_text(case.text_encoder, prompts)
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = case.family.encode_text(case.text_encoder, [prompt])
        torch.testing.assert_close(row["prompt_embeds"], alone["prompt_embeds"], rtol=1e-4, atol=1e-4)


def test_the_tokenizer_does_what_the_real_processor_does(case: Case) -> None:
    (tokenizer,) = case.text_encoder.tokenizers
    controls = control_pictures(min(2, case.most))
    reader = EditReader(numbered=case.most > 1, vision_side=None)
    prompt = Prompt("redraw it", tuple(controls))
    text = reader.template.format(reader.user_part(prompt.text, len(controls)))
    stock = real_processor(tokenizer)(text=[text], images=controls, padding=True, return_tensors="pt")
    ours = tokenizer([text], [controls])
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(ours[name], torch.as_tensor(stock[name]).to(ours[name].dtype)), name
    assert int(ours["mm_token_type_ids"].sum()) > 100


def test_the_picture_and_its_place_reach_the_features(case: Case) -> None:
    (one,) = control_pictures(1)
    changed = ImageOps.invert(ImageOps.flip(one))
    rows = [encoded(case, "x", [picture])["prompt_embeds"] for picture in (one, one, changed)]
    assert torch.equal(rows[0], rows[1])
    assert (rows[2] - rows[0]).abs().max() > 1e-3


@pytest.mark.xfail(strict=True, reason="diffusers issue 14194: remove ForwardsTokenTypes once this passes")
@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_diffusers_forwards_token_types(kind: str) -> None:
    import diffusers

    assert "mm_token_type_ids" in inspect.getsource(getattr(diffusers, kind))


# ---- velocity and pictures


@pytest.mark.parametrize("num_controls", [1, 2, 3])
def test_the_transformer_gets_what_the_pipeline_gives_it(case: Case, num_controls: int) -> None:
    if num_controls > case.most:
        pytest.skip("takes fewer controls")
    stock, latents = stock_step(case, num_controls), encoded_controls(case, num_controls)
    text = encoded(case, CAPTIONS[1], control_pictures(num_controls))
    _, height, width = case.family.latent_shape(case.folder, *TARGET)
    num_tokens = case.family.num_image_tokens(height, width)
    noisy_BCHW = unpack_latents(stock["hidden_states"][:, :num_tokens], height, width)
    with recorded_calls(case.transformer) as calls, torch.no_grad():
        velocity_BCHW = case.family.predict_velocity(case.transformer, noisy_BCHW, torch.ones(1), text, latents)
    for name in INPUTS:
        assert_same(calls[0][name], stock[name], name)
    assert calls[0]["attention_kwargs"] is None and stock["encoder_hidden_states_mask"] is None, "nothing is padded"
    expected = unpack_latents(stock["output"][:, :num_tokens], height, width)
    torch.testing.assert_close(velocity_BCHW, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_examples_one_by_one(case: Case) -> None:
    generator = torch.Generator().manual_seed(2)
    channels = int(case.folder.component_config("vae")["z_dim"])
    noisy_BCHW = torch.randn(3, channels, 4, 6, generator=generator)
    controls = [torch.randn(3, channels, *size, generator=generator) for size in ((6, 4), (2, 4))]
    rows = case.family.encode_text(case.text_encoder, [Prompt(text) for text in CAPTIONS[:3]])
    sigma_B = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        together = case.family.predict_velocity(
            case.transformer, noisy_BCHW, sigma_B, case.family.stack_conditioning(rows), controls
        )
        for number, row in enumerate(rows):
            one = slice(number, number + 1)
            alone = case.family.predict_velocity(
                case.transformer, noisy_BCHW[one], sigma_B[one], case.family.stack_conditioning([row]),
                [control[one] for control in controls],
            )  # fmt: skip
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)


def test_the_picture_is_the_pipelines(case: Case) -> None:
    size, controls = (128, 192), control_pictures(min(2, case.most))
    (expected,) = run(
        case, CAPTIONS[0], size, controls, true_cfg_scale=3.0, negative_prompt=" ", output_type="pil",
        num_inference_steps=2,
    )  # fmt: skip
    latents_BCHW = sample_latents(
        case.family, case.folder, LoadedTransformer(case.transformer),
        starting_noise(case.family.latent_shape(case.folder, *size), 4),
        encoded(case, CAPTIONS[0], controls), encoded(case, case.family.dropped_caption, controls), 2, 3.0,
        encoded_controls(case, len(controls)),
    )  # fmt: skip
    image = to_image(case.family.decode_latents(case.autoencoder, latents_BCHW)[0])
    ours, stock = (torch.tensor(list(picture.tobytes())).int() for picture in (image, expected))
    assert image.size == expected.size == size
    assert (ours - stock).abs().max() <= 1


# ---- these tests can fail


@pytest.mark.parametrize("wrong", ["template word", "picture name", "channel order", "control order", "timestep scale"])
def test_a_wrong_convention_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Each of these would train a LoRA that does not fit the stock pipeline."""
    count = min(case.most, 2)
    if wrong in ("picture name", "control order") and count < 2:
        pytest.skip("one control only")
    if wrong == "channel order":
        monkeypatch.setattr(qwen_image, "pack_latents", lambda latents: pack_latents(latents.flip(1)))
    elif wrong == "template word":
        reader = case.family._reader  # type: ignore[attr-defined]
        other = EditReader(reader.numbered, reader.vision_side, template=reader.template.replace("texture", "texturf"))
        monkeypatch.setattr(case.family, "_reader", other)
    elif wrong == "picture name":
        monkeypatch.setattr(case.family, "_reader", EditReader(numbered=False, vision_side=384))
    else:
        right_velocity = type(case.family).predict_velocity

        def changed(self: Any, transformer: Any, noisy: Tensor, sigma: Tensor, text: Any, controls: Any) -> Tensor:
            if wrong == "control order":
                return right_velocity(self, transformer, noisy, sigma, text, controls[::-1])
            return right_velocity(self, transformer, noisy, sigma / 1000, text, controls)

        monkeypatch.setattr(type(case.family), "predict_velocity", changed)
    with pytest.raises(AssertionError):
        test_the_transformer_gets_what_the_pipeline_gives_it(case, count)
