"""FLUX.1-dev and FLUX.1-Kontext-dev agree with `FluxPipeline` and `FluxKontextPipeline`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pixtune.data.images import to_pixels
from pixtune.engine.load import LoadedTransformer, load_transformer
from pixtune.families import FAMILIES, family_of, flux
from pixtune.families.packing import pack_latents, unpack_latents
from pixtune.family import ModelFamily, Placement, Prompt, TextEncoder
from pixtune.sampler import sample_latents, starting_noise, to_image
from pixtune.storage.model_folder import ModelFolder
from tests.families.stock import CAPTIONS, assert_same, build_folder, recorded_calls

COVERED = ("flux", "flux_kontext")
PLACEMENT = Placement(torch.device("cpu"), torch.float32)
INPUTS = ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids")


@dataclass(frozen=True)
class Case:
    family: ModelFamily
    folder: ModelFolder
    pipeline: Any
    text_encoder: TextEncoder
    autoencoder: torch.nn.Module
    transformer: torch.nn.Module


@pytest.fixture(scope="module", params=COVERED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    import diffusers

    path = build_folder("tiny_flux", tmp_path_factory.mktemp(request.param) / "model")
    config = json.loads((path / "vae" / "config.json").read_text())
    (path / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.3, "scaling_factor": 0.7}))
    kind = FAMILIES[request.param].pipeline_classes[0]
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    folder = ModelFolder(path)
    family = family_of(folder)
    assert family.name == request.param
    pipeline = getattr(diffusers, kind).from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return Case(
        family, folder, pipeline, family.load_text_encoder(folder, PLACEMENT),
        family.load_autoencoder(folder, PLACEMENT), load_transformer(family, folder, PLACEMENT).module,
    )  # fmt: skip


def control_picture(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def run(case: Case, prompt: str, size: tuple[int, int], control: Image.Image | None = None, **options: Any) -> Any:
    settings = {"num_inference_steps": 2, "guidance_scale": 3.5, "output_type": "latent", "max_sequence_length": 24}
    if case.family.max_controls:
        settings |= {"image": control, "max_area": size[0] * size[1], "_auto_resize": False}
    return case.pipeline(
        prompt=prompt, width=size[0], height=size[1], generator=torch.Generator().manual_seed(4), **(settings | options)
    ).images


def encoded(case: Case, prompts: list[str], max_tokens: int | None = 24) -> dict[str, Tensor]:
    rows = case.family.encode_text(case.text_encoder, [Prompt(prompt) for prompt in prompts], max_tokens)
    return case.family.stack_conditioning(rows)


def encoded_control(case: Case, control: Image.Image) -> Tensor:
    """At its own size: the stock 4096 tokens would take minutes."""
    return case.family.encode_images(case.autoencoder, to_pixels(control)[None]).mean_BCHW


@pytest.mark.parametrize("max_tokens", [None, 24, 5])
def test_text_features_are_the_pipelines(case: Case, max_tokens: int | None) -> None:
    prompts = [*CAPTIONS[:2], "", "fox " * 700]
    with torch.no_grad():
        features, pooled, _ = case.pipeline.encode_prompt(prompts, max_sequence_length=max_tokens or 512)
    ours = encoded(case, prompts, max_tokens)
    assert torch.equal(ours["prompt_embeds"], features)
    assert torch.equal(ours["pooled_embeds"], pooled)
    assert (pooled[0] - pooled[1]).abs().max() > 0.01, "captions that are all alike would prove nothing"


def test_latents_are_normalised_and_decoded_as_the_pipeline_does(case: Case) -> None:
    pixels_B3HW = to_pixels(control_picture(64, 48))[None]
    latents = case.family.encode_images(case.autoencoder, pixels_B3HW)
    vae = case.pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(pixels_B3HW).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        drawn = (posterior.sample(torch.Generator().manual_seed(1)) - 0.3) * 0.7
        expected = vae.decode(posterior.mean).sample
    torch.testing.assert_close(latents.latents(noise), drawn, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.family.decode_latents(case.autoencoder, latents.mean_BCHW), expected)
    assert latents.mean_BCHW.shape[1:] == case.family.latent_shape(case.folder, 64, 48)


@pytest.mark.parametrize("shape", [(300, 300), (400, 300), (90, 160), (1000, 100), (31, 400)])
def test_control_pictures_get_the_pipelines_size(
    case: Case, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    if not case.family.max_controls:
        pytest.skip("takes no control")
    seen: list[tuple[int, int]] = []

    class Enough(Exception):
        pass

    def stop(image: Image.Image, height: int, width: int) -> None:
        seen.append((width, height))
        raise Enough

    monkeypatch.setattr(case.pipeline.image_processor, "resize", stop)
    with pytest.raises(Enough):
        run(case, "x", (64, 64), control_picture(*shape), _auto_resize=True)
    assert [case.family.control_size(case.folder, shape, 1024)] == seen


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("with_control", [False, True])
def test_the_transformer_gets_what_the_pipeline_gives_it(case: Case, size: tuple[int, int], with_control: bool) -> None:
    if with_control and not case.family.max_controls:
        pytest.skip("takes no control")
    control = control_picture(64, 32) if with_control else None
    with recorded_calls(case.pipeline.transformer) as stock_calls:
        run(case, CAPTIONS[1], size, control)
    controls = [encoded_control(case, control)] if control else []
    channels, height, width = case.family.latent_shape(case.folder, *size)
    num_tokens = case.family.num_image_tokens(height, width)
    for sigma, stock in zip(case.pipeline.scheduler.sigmas, stock_calls, strict=False):
        noisy_BCHW = unpack_latents(stock["hidden_states"][:, :num_tokens], height, width)
        with recorded_calls(case.transformer) as calls, torch.no_grad():
            velocity_BCHW = case.family.predict_velocity(
                case.transformer, noisy_BCHW, sigma[None], encoded(case, CAPTIONS[1:2]), controls, 3.5
            )
        for name in INPUTS:
            assert_same(calls[0][name], stock[name], name)
        expected = case.pipeline._unpack_latents(stock["output"][:, :num_tokens], *reversed(size), 8)
        torch.testing.assert_close(velocity_BCHW, expected, rtol=1e-4, atol=1e-4)
    assert channels == 16 and len(stock_calls) == 2


def test_bf16_timesteps_are_rounded_as_the_pipeline_rounds_them(case: Case) -> None:
    transformer = load_transformer(case.family, case.folder, Placement(torch.device("cpu"), torch.bfloat16)).module
    sigmas = torch.linspace(0.98, 0.02, 60)
    noisy = torch.zeros(60, 16, 2, 2)
    text = {name: tensor.expand(60, *tensor.shape[1:]) for name, tensor in encoded(case, CAPTIONS[:1]).items()}
    with recorded_calls(transformer) as calls, torch.no_grad():
        case.family.predict_velocity(transformer, noisy, sigmas, text)
    stock = (sigmas * 1000).to(torch.bfloat16) / 1000  # the pipeline's `t.expand(...).to(latents.dtype) / 1000`
    assert torch.equal(calls[0]["timestep"], stock)
    assert not torch.equal(stock, sigmas.to(torch.bfloat16)), "these cannot tell the roundings apart"


def test_a_batch_is_its_examples_one_by_one(case: Case) -> None:
    noisy_BCHW = torch.randn(3, 16, 6, 8, generator=torch.Generator().manual_seed(2))
    control_BCHW = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    controls = [control_BCHW] if case.family.max_controls else []
    sigma_B, text = torch.tensor([0.1, 0.5, 0.9]), encoded(case, CAPTIONS[:3])
    with torch.no_grad():
        together = case.family.predict_velocity(case.transformer, noisy_BCHW, sigma_B, text, controls, 2.0)
        for row in range(3):
            one = slice(row, row + 1)
            alone = case.family.predict_velocity(
                case.transformer, noisy_BCHW[one], sigma_B[one], {name: t[one] for name, t in text.items()},
                [control[one] for control in controls], 2.0,
            )  # fmt: skip
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)


def test_guidance_and_control_reach_the_velocity(case: Case) -> None:
    """Guards the tests above: an input that did nothing could not be seen to be wrong."""
    noisy_BCHW, sigma_B = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    text = encoded(case, CAPTIONS[:1])

    def velocity(*controls: Tensor, guidance: float = 1.0) -> Tensor:
        with torch.no_grad():
            return case.family.predict_velocity(case.transformer, noisy_BCHW, sigma_B, text, controls, guidance)

    assert (velocity() - velocity(guidance=4.0)).abs().max() > 1e-4
    if case.family.max_controls:
        assert (velocity(torch.zeros(1, 16, 4, 4)) - velocity(torch.ones(1, 16, 4, 4))).abs().max() > 1e-4


def test_the_picture_is_the_pipelines(case: Case) -> None:
    size = (64, 48)
    control = control_picture(48, 48) if case.family.max_controls else None
    (expected,) = run(case, CAPTIONS[0], size, control, num_inference_steps=3, output_type="pil")
    controls = [encoded_control(case, control)] if control else []
    latents_BCHW = sample_latents(
        case.family, case.folder, LoadedTransformer(case.transformer),
        starting_noise(case.family.latent_shape(case.folder, *size), 4),
        encoded(case, CAPTIONS[:1]), None, 3, 3.5, controls,
    )  # fmt: skip
    image = to_image(case.family.decode_latents(case.autoencoder, latents_BCHW)[0])
    ours, stock = (torch.tensor(list(picture.tobytes())).int() for picture in (image, expected))
    assert image.size == expected.size == size
    assert (ours - stock).abs().max() <= 1


@pytest.mark.parametrize("change", ["channel order", "guidance", "position ids", "timestep scale", "pooled text"])
def test_a_wrong_convention_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Each of these would train a LoRA that does not fit the stock pipeline."""
    if change == "channel order":
        monkeypatch.setattr(flux, "pack_latents", lambda latents: pack_latents(latents.flip(1)))
    elif change == "position ids":
        right_ids = flux.image_positions
        monkeypatch.setattr(flux, "image_positions", lambda rows, columns, *rest: right_ids(columns, rows, *rest))
    else:
        right_velocity = type(case.family).predict_velocity

        def wrong(self: Any, transformer: Any, noisy: Tensor, sigma: Tensor, text: Any, controls: Any, guidance: float):
            if change == "guidance":
                guidance *= 1000
            elif change == "timestep scale":
                sigma = sigma / 1000
            else:
                text = {**text, "pooled_embeds": torch.zeros_like(text["pooled_embeds"])}
            return right_velocity(self, transformer, noisy, sigma, text, controls, guidance)

        monkeypatch.setattr(type(case.family), "predict_velocity", wrong)
    with pytest.raises(AssertionError):
        test_the_transformer_gets_what_the_pipeline_gives_it(case, (96, 48), False)
