"""Every family agrees with its stock pipeline of diffusers: same text features, latents, model inputs and pictures.

A family joins by a row in `REFERENCES`. The shipped models' statistics of latents may be neutral (mean 0, deviation 1),
so the tests run on a copy whose configs are not: else a forgotten shift or scale would not show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune import objective
from pixtune.engine.load import LoadedTransformer, load_transformer, random_transformer
from pixtune.errors import WeightsError
from pixtune.families import FAMILIES, family_of
from pixtune.families.packing import pack_latents, unpack_latents
from pixtune.families.qwen_image import NUM_TEMPLATE_TOKENS
from pixtune.family import Conditioning, LatentDistribution, ModelFamily, Placement, Prompt, TextEncoder
from pixtune.sampler import sample_latents, starting_noise, to_image
from pixtune.storage.model_folder import ModelFolder

CPU = torch.device("cpu")
FP32, BF16 = Placement(CPU, torch.float32), Placement(CPU, torch.bfloat16)
SIZES = [(64, 64), (96, 48), (32, 80)]
"""(width, height) in pixels; width and height must not be mixed up."""
PROMPTS = ["a red fox", "a small blue house with a green door and two windows, flat emoji style", '{braces} "and" 狐']


# ---- the stock pipelines, each behind the same few calls


@dataclass(frozen=True)
class Reference:
    """What the contract needs to know of a family's stock pipeline."""

    model: str
    pipeline_class: str
    encode_prompts: Callable[[Any, list[str]], tuple[Tensor, Tensor | None]]
    encode_images: Callable[[Any, Tensor], Tensor]
    draw_latents: Callable[[Any, Tensor, torch.Generator], Tensor]
    """One draw of the pipeline's own noising path: pixels to normalized latents."""
    run: Callable[..., Any]
    """(pipeline, prompts, width, height, steps, seed, guidance, output_type) -> the pipeline's images."""
    unpack: Callable[[Any, Tensor, int, int], Tensor]


def qwen_encode_images(pipeline: Any, pixels_B3HW: Tensor) -> Tensor:
    from diffusers import QwenImageEditPipeline

    stand_in = SimpleNamespace(vae=pipeline.vae, latent_channels=pipeline.vae.config.z_dim)
    return QwenImageEditPipeline._encode_vae_image(stand_in, pixels_B3HW.unsqueeze(2), generator=None)[:, :, 0]


def qwen_draw_latents(pipeline: Any, pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    from diffusers import QwenImageImg2ImgPipeline

    stand_in = SimpleNamespace(vae=pipeline.vae)
    return QwenImageImg2ImgPipeline._encode_vae_image(stand_in, pixels_B3HW.unsqueeze(2), generator)[:, :, 0]


def qwen_run(
    pipeline: Any, prompts: list[str], width: int, height: int, steps: int, seed: int, guidance: float, output_type: str
) -> Any:
    return pipeline(
        prompts,
        negative_prompt=[" "] * len(prompts) if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=width,
        height=height,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).images


REFERENCES = {
    "qwen_image": Reference(
        model="tiny-qwen-image",
        pipeline_class="QwenImagePipeline",
        encode_prompts=lambda pipeline, prompts: pipeline.encode_prompt(prompts, max_sequence_length=512),
        encode_images=qwen_encode_images,
        draw_latents=qwen_draw_latents,
        run=qwen_run,
        unpack=lambda pipeline, tokens, width, height: pipeline._unpack_latents(
            tokens, height, width, pipeline.vae_scale_factor
        )[:, :, 0],
    ),
}


def test_every_family_is_compared_with_its_stock_pipeline() -> None:
    """Here, or in the file of the families whose prompts and inputs have another form."""
    from tests.families import test_edit_parity, test_flux_parity

    assert {*REFERENCES, *test_edit_parity.COVERED, *test_flux_parity.COVERED} == FAMILIES.keys()


@dataclass(frozen=True)
class Case:
    """A family, its parts as we load them, and its stock pipeline over the same folder."""

    family: ModelFamily
    reference: Reference
    folder: ModelFolder
    pipeline: Any
    text_encoder: TextEncoder
    autoencoder: torch.nn.Module
    transformer: torch.nn.Module


def copy_with_telling_configs(source: Path, target: Path) -> None:
    """A model whose latent statistics differ by channel and whose sampler ends above 0, as the full-size one's."""
    shutil.copytree(source, target)
    config = json.loads((target / "vae" / "config.json").read_text())
    channels = config["z_dim"]
    config["latents_mean"] = [0.1 * channel - 0.7 for channel in range(channels)]
    config["latents_std"] = [0.5 + 0.15 * channel for channel in range(channels)]
    (target / "vae" / "config.json").write_text(json.dumps(config))
    change_scheduler(target, shift_terminal=0.02)


def change_scheduler(folder: Path, **values: object) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def stock_pipeline(reference: Reference, path: Path, dtype: torch.dtype) -> Any:
    import diffusers

    pipeline = getattr(diffusers, reference.pipeline_class).from_pretrained(path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=sorted(REFERENCES))
def case(request: pytest.FixtureRequest, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, reference = FAMILIES[request.param], REFERENCES[request.param]
    path = tmp_path_factory.mktemp(family.name) / "model"
    copy_with_telling_configs(repo_root / "assets" / reference.model, path)
    folder = ModelFolder(path)
    return Case(
        family,
        reference,
        folder,
        stock_pipeline(reference, path, torch.float32),
        family.load_text_encoder(folder, FP32),
        family.load_autoencoder(folder, FP32),
        load_transformer(family, folder, FP32).module,
    )


def encode(case: Case, texts: list[str]) -> list[dict[str, Tensor]]:
    return case.family.encode_text(case.text_encoder, [Prompt(text) for text in texts])


@contextmanager
def recorded_calls(transformer: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward call, and its first output under "output"."""
    calls: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        calls.append({**kwargs, "output": output[0]})

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def noise(case: Case, width: int, height: int, count: int = 1, seed: int = 0) -> Tensor:
    shape_CHW = case.family.latent_shape(case.folder, width, height)
    return torch.randn(count, *shape_CHW, generator=torch.Generator().manual_seed(seed))


def picture_pixels(width: int, height: int, count: int = 1) -> Tensor:
    """Smooth colour ramps in [-1, 1], another for each channel, axis and picture."""
    x, y = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    one = torch.stack([x.expand(height, width), y[:, None].expand(height, width), -x * y[:, None]])
    return torch.stack([one * (number + 1) / count for number in range(count)])


# ---- the folder


def test_family_is_found_by_the_folders_own_index(case: Case) -> None:
    assert family_of(case.folder) is case.family


def test_another_pipelines_folder_is_refused_by_its_kind(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(WeightsError, match=r"StableDiffusionPipeline.*qwen_image"):
        family_of(ModelFolder(tmp_path))


def test_sizes_are_those_of_the_stock_pipeline(case: Case) -> None:
    assert case.family.pixel_multiple(case.folder) == case.pipeline.vae_scale_factor * 2
    for width, height in SIZES:
        latents = case.family.encode_images(case.autoencoder, picture_pixels(width, height))
        shape_CHW = case.family.latent_shape(case.folder, width, height)
        assert latents.mean_BCHW.shape == latents.std_BCHW.shape == (1, *shape_CHW)
        with recorded_calls(case.pipeline.transformer) as calls:
            case.reference.run(case.pipeline, ["x"], width, height, 2, 0, 1.0, "latent")
        assert calls[0]["hidden_states"].shape[1] == case.family.num_image_tokens(*shape_CHW[1:])


def test_blocks_and_lora_targets_are_there(case: Case) -> None:
    num_blocks, width = case.family.block_shape(case.folder)
    lists = [list(case.transformer.get_submodule(path).children()) for path in case.family.block_paths]
    assert sum(map(len, lists)) == num_blocks
    block_names = [name for name, _ in case.transformer.named_modules()]
    for target in case.family.lora_targets:
        hits = [name for name in block_names if name.endswith(f".{target}")]
        assert len(hits) == num_blocks, target
        assert all(isinstance(case.transformer.get_submodule(name), torch.nn.Linear) for name in hits)
    assert case.transformer.get_submodule(hits[0]).out_features == width


def test_loaded_parts_are_frozen_and_in_the_asked_format(case: Case) -> None:
    transformer = load_transformer(case.family, case.folder, BF16).module
    encoder, autoencoder = case.text_encoder.models[0], case.autoencoder
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    for part in (transformer, encoder, autoencoder):
        assert not any(p.requires_grad for p in part.parameters())
    assert not encoder.training and not autoencoder.training


# ---- text


def test_template_is_the_pipelines_and_its_prefix_is_what_the_pipeline_cuts(case: Case) -> None:
    tokenizer, template = case.text_encoder.tokenizers[0], case.family.prompt_template
    assert template == case.pipeline.prompt_template_encode
    prefix, suffix = template.split("{}")
    num_tokens = len(tokenizer(prefix).input_ids)
    assert num_tokens == NUM_TEMPLATE_TOKENS == case.pipeline.prompt_template_encode_start_idx == 34
    for prompt in PROMPTS:  # the caption's first letters do not melt into the prefix
        kept = tokenizer(template.format(prompt)).input_ids[num_tokens:]
        assert tokenizer.decode(kept) == prompt + suffix


@pytest.mark.parametrize("prompt", [*PROMPTS, "", " ", "fox " * 700, "fox " * 1500], ids=lambda prompt: prompt[:12])
def test_text_features_of_one_prompt_are_the_pipelines(case: Case, prompt: str) -> None:
    expected, mask = case.reference.encode_prompts(case.pipeline, [prompt])
    (row,) = encode(case, [prompt])
    stacked = case.family.stack_conditioning([row])
    assert mask is None and "prompt_embeds_mask" not in stacked
    torch.testing.assert_close(stacked["prompt_embeds"], expected, rtol=0, atol=0)


def test_text_features_of_a_padded_batch_are_the_pipelines(case: Case) -> None:
    expected, mask = case.reference.encode_prompts(case.pipeline, PROMPTS)
    stacked = case.family.stack_conditioning(encode(case, PROMPTS))
    assert mask is not None and not mask.all()
    torch.testing.assert_close(stacked["prompt_embeds"], expected, rtol=0, atol=0)
    assert torch.equal(stacked["prompt_embeds_mask"], mask.bool())


def test_features_do_not_depend_on_the_prompts_encoded_beside(case: Case) -> None:
    together = encode(case, PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = encode(case, [prompt])
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_rows_of_equal_length_get_no_mask(case: Case) -> None:
    rows = encode(case, ["a fox", "a fox"])
    assert case.family.stack_conditioning(rows).keys() == rows[0].keys()


def test_dropped_caption_is_what_the_pipeline_gets_as_empty_negative_prompt(case: Case) -> None:
    """An empty text would give other features than the space that diffusers' own example passes."""
    expected, _ = case.reference.encode_prompts(case.pipeline, [" "])
    (row,) = encode(case, [case.family.dropped_caption])
    assert torch.equal(row["prompt_embeds"], expected[0])


# ---- pictures


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_encoded_mean_is_the_pipelines_normalised_latents(case: Case, width: int, height: int) -> None:
    pixels_B3HW = picture_pixels(width, height, count=2)
    with torch.no_grad():
        expected = case.reference.encode_images(case.pipeline, pixels_B3HW)
    ours = case.family.encode_images(case.autoencoder, pixels_B3HW)
    # Values are about 1; processors sum a convolution's products in different orders.
    torch.testing.assert_close(ours.mean_BCHW, expected, rtol=1e-5, atol=1e-5)


def test_a_draw_of_the_encoded_distribution_is_the_pipelines(case: Case) -> None:
    """So the deviation is normalized as the mean is."""
    pixels_B3HW = picture_pixels(64, 48)
    with torch.no_grad():
        expected = case.reference.draw_latents(case.pipeline, pixels_B3HW, torch.Generator().manual_seed(5))
    ours = case.family.encode_images(case.autoencoder, pixels_B3HW)
    same_noise = torch.randn(expected.unsqueeze(2).shape, generator=torch.Generator().manual_seed(5))[:, :, 0]
    assert ours.std_BCHW.min() > 0
    torch.testing.assert_close(ours.latents(same_noise), expected, rtol=1e-5, atol=1e-5)


def test_latents_of_a_distribution() -> None:
    drawn = LatentDistribution(torch.tensor([2.0]), torch.tensor([3.0])).latents(torch.tensor([0.5]))
    assert drawn.item() == 3.5


def test_decoding_inverts_the_normalisation(case: Case) -> None:
    """Decoded normalized latents are what the autoencoder makes of its own raw ones."""
    pixels_B3HW = picture_pixels(48, 64, count=2)
    with torch.no_grad():
        raw = case.pipeline.vae.encode(pixels_B3HW.unsqueeze(2)).latent_dist.mean
        expected = case.pipeline.vae.decode(raw).sample[:, :, 0]
    latents = case.family.encode_images(case.autoencoder, pixels_B3HW)
    decoded = case.family.decode_latents(case.autoencoder, latents.mean_BCHW)
    assert decoded.shape == pixels_B3HW.shape
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


# ---- velocity


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2]], ids=["one", "padded"])
def test_the_transformer_gets_what_the_pipeline_gives_it(
    case: Case, width: int, height: int, prompts: list[str]
) -> None:
    with recorded_calls(case.pipeline.transformer) as stock_calls:
        case.reference.run(case.pipeline, prompts, width, height, 2, 0, 1.0, "latent")
    stacked = case.family.stack_conditioning(encode(case, prompts))
    sigmas = case.pipeline.scheduler.sigmas
    assert len(stock_calls) == 2
    for sigma, stock in zip(sigmas, stock_calls, strict=False):
        noisy_BCHW = case.reference.unpack(case.pipeline, stock["hidden_states"], width, height)
        with recorded_calls(case.transformer) as calls, torch.no_grad():
            velocity_BCHW = case.family.predict_velocity(
                case.transformer, noisy_BCHW, sigma.expand(len(prompts)), stacked
            )
        (ours,) = calls
        assert torch.equal(ours["hidden_states"], stock["hidden_states"])
        torch.testing.assert_close(ours["timestep"], stock["timestep"], rtol=1e-6, atol=0)
        assert torch.equal(ours["encoder_hidden_states"], stock["encoder_hidden_states"])
        mask, stock_mask = (ours["attention_kwargs"] or {}).get("mask_BL"), stock["encoder_hidden_states_mask"]
        assert "encoder_hidden_states_mask" not in ours and (mask is None) == (stock_mask is None)
        assert mask is None or torch.equal(mask[:, : stock_mask.shape[1]], stock_mask.bool())
        assert mask is None or mask[:, stock_mask.shape[1] :].all(), "every image token is real"
        assert ours["img_shapes"] == stock["img_shapes"]
        assert ours.get("guidance") is stock["guidance"] is None
        expected = case.reference.unpack(case.pipeline, stock["output"], width, height)
        torch.testing.assert_close(velocity_BCHW, expected, rtol=1e-5, atol=1e-5)


def test_bf16_timesteps_are_rounded_as_the_pipeline_rounds_them(case: Case) -> None:
    """The 0-1000 timestep is rounded before the division by 1000 and after it: other roundings give other pictures."""
    pipeline = stock_pipeline(case.reference, case.folder.path, torch.bfloat16)
    with recorded_calls(pipeline.transformer) as stock_calls:
        case.reference.run(pipeline, PROMPTS[:1], 32, 32, 20, 0, 1.0, "latent")
    (row,) = encode(case, PROMPTS[:1])
    stacked = case.family.stack_conditioning([row])
    given, expected = [], []
    for sigma, stock in zip(pipeline.scheduler.sigmas, stock_calls, strict=False):
        with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
            case.family.predict_velocity(pipeline.transformer, noise(case, 32, 32), sigma.expand(1), stacked)
        given.append(calls[0]["timestep"])
        expected.append(stock["timestep"])
    assert calls[0]["hidden_states"].dtype == calls[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert torch.equal(torch.cat(given), torch.cat(expected))
    sigmas = pipeline.scheduler.sigmas[:-1]
    assert not torch.equal(torch.cat(given), sigmas.to(torch.bfloat16)), "these steps cannot tell the roundings apart"


def test_a_batch_is_its_examples_one_by_one(case: Case) -> None:
    rows = encode(case, PROMPTS)
    noisy_BCHW = noise(case, 96, 48, count=len(rows))
    sigma_B = torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        together = case.family.predict_velocity(
            case.transformer, noisy_BCHW, sigma_B, case.family.stack_conditioning(rows)
        )
        for index, row in enumerate(rows):
            alone = case.family.predict_velocity(
                case.transformer,
                noisy_BCHW[index : index + 1],
                sigma_B[index : index + 1],
                case.family.stack_conditioning([row]),
            )
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2, "examples that are all alike would prove nothing"


def test_the_mask_and_the_prompt_reach_the_velocity(case: Case) -> None:
    """Guards the test above: without its mask, padding would change a short prompt's velocity."""
    stacked = case.family.stack_conditioning(encode(case, PROMPTS[:2]))
    unmasked = {"prompt_embeds": stacked["prompt_embeds"]}
    noisy_BCHW, sigma_B = noise(case, 64, 64).expand(2, -1, -1, -1), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        masked_velocity = case.family.predict_velocity(case.transformer, noisy_BCHW, sigma_B, stacked)
        velocity = case.family.predict_velocity(case.transformer, noisy_BCHW, sigma_B, unmasked)
    assert (masked_velocity - velocity)[0].abs().max() > 1e-4
    assert (masked_velocity[0] - masked_velocity[1]).abs().max() > 1e-4


def test_packing_is_the_pipelines_and_unpacking_its_inverse(case: Case) -> None:
    latents_BCHW = torch.randn(2, 16, 6, 10)
    tokens_BLC = pack_latents(latents_BCHW)
    assert torch.equal(tokens_BLC, case.pipeline._pack_latents(latents_BCHW, 2, 16, 6, 10))
    assert torch.equal(unpack_latents(tokens_BLC, 6, 10), latents_BCHW)


def test_random_transformer_is_the_same_architecture(case: Case) -> None:
    """Given the real weights, it computes what the loaded one does: nothing that is no parameter was left out."""
    config = case.folder.component_config("transformer")
    random = random_transformer(case.family, config, FP32).module
    noisy_BCHW, sigma_B = noise(case, 96, 48), torch.tensor([0.5])
    text = case.family.stack_conditioning([case.family.random_text(case.folder, 9, seed=1)])
    with torch.no_grad():
        untrained = case.family.predict_velocity(random, noisy_BCHW, sigma_B, text)
        assert untrained.isfinite().all() and untrained.std() > 1e-3
        random.load_state_dict(case.transformer.state_dict())
        ours = case.family.predict_velocity(random, noisy_BCHW, sigma_B, text)
        expected = case.family.predict_velocity(case.transformer, noisy_BCHW, sigma_B, text)
    assert torch.equal(ours, expected)
    assert not any(p.requires_grad for p in random.parameters())


# ---- the sampler

SCHEDULES = {
    "as the copy has it": {},
    "no terminal": {"shift_terminal": None},
    "constant shift": {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
    "unshifted": {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None},
    "full-size model's": {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9},
}


@pytest.mark.parametrize("changes", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("width", "height"), SIZES[:2])
def test_sigmas_are_the_pipelines(case: Case, tmp_path: Path, changes: dict[str, Any], width: int, height: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    shutil.copytree(case.folder.path / "scheduler", tmp_path / "scheduler")
    change_scheduler(tmp_path, **changes)
    shutil.copytree(case.folder.path / "vae", tmp_path / "vae")
    folder = ModelFolder(tmp_path)
    before = case.pipeline.scheduler
    case.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    try:
        case.reference.run(case.pipeline, ["x"], width, height, 5, 0, 1.0, "latent")
        expected = case.pipeline.scheduler.sigmas
    finally:
        case.pipeline.scheduler = before
    num_tokens = case.family.num_image_tokens(*case.family.latent_shape(folder, width, height)[1:])
    sigmas = case.family.sigma_schedule(folder, 5, num_tokens)
    assert sigmas == expected.tolist()
    assert len(sigmas) == 6 and sigmas[-1] == 0
    if changes.get("shift_terminal", 0.02) is None:  # training shifts its sigmas by the same curve
        shifted = objective.shift_sigmas(torch.linspace(1, 0.2, 5), case.family.time_shift(folder, num_tokens))
        torch.testing.assert_close(shifted, expected[:-1], rtol=1e-6, atol=1e-6)


def encoded(case: Case, prompts: list[str], guidance: float) -> tuple[Conditioning, Conditioning | None]:
    positive = case.family.stack_conditioning(encode(case, prompts))
    if guidance == 1:
        return positive, None
    dropped = [case.family.dropped_caption] * len(prompts)
    return positive, case.family.stack_conditioning(encode(case, dropped))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sampled_latents_are_the_pipelines(case: Case, width: int, height: int, guidance: float) -> None:
    packed = case.reference.run(case.pipeline, PROMPTS[1:2], width, height, 4, 11, guidance, "latent")
    expected = case.reference.unpack(case.pipeline, packed, width, height)
    noise_BCHW = starting_noise(case.family.latent_shape(case.folder, width, height), 11)
    positive, negative = encoded(case, PROMPTS[1:2], guidance)
    steps: list[None] = []
    latents_BCHW = sample_latents(
        case.family, case.folder, LoadedTransformer(case.transformer), noise_BCHW, positive, negative, 4, guidance,
        on_step=lambda: steps.append(None),
    )  # fmt: skip
    torch.testing.assert_close(latents_BCHW, expected, rtol=1e-4, atol=1e-4)
    assert len(steps) == 4


def test_guidance_changes_the_latents(case: Case) -> None:
    """Guards the test above: a scale that did nothing would pass it if the pipeline's did nothing either."""
    noise_BCHW = starting_noise(case.family.latent_shape(case.folder, 64, 64), 11)
    results = []
    for guidance in (1.0, 4.0):
        positive, negative = encoded(case, PROMPTS[1:2], guidance)
        results.append(
            sample_latents(
                case.family, case.folder, LoadedTransformer(case.transformer), noise_BCHW, positive, negative, 4,
                guidance,
            )
        )  # fmt: skip
    assert (results[0] - results[1]).abs().max() > 1e-2


def test_the_picture_is_the_pipelines(case: Case) -> None:
    width, height = 96, 48
    (expected,) = case.reference.run(case.pipeline, PROMPTS[:1], width, height, 3, 2, 4.0, "pil")
    noise_BCHW = starting_noise(case.family.latent_shape(case.folder, width, height), 2)
    positive, negative = encoded(case, PROMPTS[:1], 4.0)
    latents_BCHW = sample_latents(
        case.family, case.folder, LoadedTransformer(case.transformer), noise_BCHW, positive, negative, 3, 4.0
    )  # fmt: skip
    image = to_image(case.family.decode_latents(case.autoencoder, latents_BCHW)[0])
    assert image.size == expected.size == (width, height) and image.mode == "RGB"
    ours, stock = (torch.tensor(list(picture.tobytes())).int() for picture in (image, expected))
    assert (ours - stock).abs().max() <= 1


def test_to_image_maps_ends_and_middle_and_clips() -> None:
    pixels_3HW = torch.tensor([[[-1.0, 1.0]], [[0.0, -7.0]], [[7.0, 0.5]]])
    assert to_image(pixels_3HW).tobytes() == bytes([0, 128, 255, 255, 0, 191])
